"""A notebook's page in headless Chromium, and what a person does with it: shared by the tests in a browser.

The page is JupyterLab's, which draws ipywidgets 8. Where 7.7 is installed, Colab's, it is the classic page (nbclassic),
which still draws those: `make test-colab-versions` runs the same tests there.

Needs Chromium and its driver (Debian: chromium, chromium-driver); `missing` says in a sentence what is not there.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

with suppress(ImportError):  # then every test that needs it is skipped, with the reason
    from selenium import webdriver
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).resolve().parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
FLAGS += ["--window-size=1180,1350"]
PATIENCE_S = 240
"""The longest that anything is waited for: what comes sooner goes on at once, and a machine may be busy."""


@dataclass(frozen=True)
class FrontEnd:
    """How a page is served, and where on it things are."""

    module: str
    options: tuple[str, ...]
    page: str
    cells: str
    editor: str
    menu: str
    run_all: str
    standing_by: str
    """JavaScript: whether the kernel waits for work."""


LAB = FrontEnd(
    "jupyterlab",
    ("--expose-app-in-browser",),
    "doc/tree/page.ipynb?reset&",
    ".jp-CodeCell",
    ".jp-InputArea-editor",
    "//*[contains(@class,'lm-MenuBar-itemLabel')][text()='Run']",
    "[data-command='runmenu:run-all']",
    "return jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
)
CLASSIC = FrontEnd(
    "nbclassic",
    (),
    "nbclassic/notebooks/page.ipynb?",
    ".code_cell",
    ".CodeMirror",
    "//*[@id='menus']//a[text()='Cell']",
    "#run_all_cells a",
    "const page = window.Jupyter?.notebook\n"
    "return Boolean(page?._fully_loaded && page.kernel?.is_connected() && !page.kernel_busy)",
)
FRONT = CLASSIC if version("ipywidgets").startswith("7.") else LAB
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no question over the page
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is there, seen or not
}


def missing() -> str:
    """What a browser's test lacks here, and where it comes from; "" where it can run."""
    for package in ("selenium", FRONT.module):
        if find_spec(package) is None:
            return f"{package} is not installed: `make setup` installs selenium and jupyterlab"
    return "" if BROWSER and DRIVER else "no Chromium with its driver here; `.ci/run` installs them"


@contextmanager
def serving(notebook: nbformat.NotebookNode, home: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a server's page that shows this notebook; the server ends with the block."""
    nbformat.write(notebook, home / "page.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    folders |= {name: str(home / name.lower()) for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", FRONT.module, "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={home}", "--IdentityProvider.token=page", *FRONT.options]
    for name, settings in SETTINGS.items():
        path = home / "jupyterlab_settings_dir" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    surroundings = os.environ | folders | {"PYTHONPATH": str(ROOT)} | (environment or {})
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=home, env=surroundings, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/api?token=page"), lambda: (home / "lab.log").read_text()[-2000:])
        yield f"{address}/{FRONT.page}token=page"
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def chromium(profile: Path) -> Iterator["webdriver.Chrome"]:
    """Headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, complaint=lambda: ""):
    """Poll until a condition holds; returns what it gave."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with suppress(StaleElementReferenceException, NoSuchElementException):
            if found := condition():
                return found
        time.sleep(0.05)
    return pytest.fail(f"waited {PATIENCE_S} s in vain. {complaint()}")


def stand_by(browser):
    """Wait until the page has its cells and its kernel waits for work."""
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, FRONT.cells), lambda: browser.title)
    wait_for(lambda: browser.execute_script(FRONT.standing_by), lambda: page_text(browser))


def run_all(browser, said):
    """The menu's "run all cells", once the kernel stands by; until something is said."""
    stand_by(browser)
    browser.find_element(By.XPATH, FRONT.menu).click()
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, FRONT.run_all)).click()
    wait_for(lambda: said in page_text(browser), lambda: page_text(browser))


def page_text(browser):
    return browser.find_element(By.TAG_NAME, "body").text


def run_cells(browser, first, count):
    """Shift+Enter so many times, from a cell on; the cells have a number each."""
    stand_by(browser)
    editor = browser.find_elements(By.CSS_SELECTOR, f"{FRONT.cells} {FRONT.editor}")[first]
    to_middle(browser, editor)
    editor.click()
    for _ in range(count):
        ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()


def to_middle(browser, element):
    """Scroll until an element is in the middle of the window."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)


def press(browser, word):
    """Press the widgets' button whose words begin so, as soon as it can be pressed."""
    where = f"//button[contains(@class,'jupyter-button')][starts-with(normalize-space(),'{word}')]"
    button = wait_for(lambda: browser.find_element(By.XPATH, where), lambda: page_text(browser))
    wait_for(button.is_enabled, lambda: f"{word} is grey")
    to_middle(browser, button)
    button.click()


def untitled(browser):
    """What is seen of widgets and has the word "null" as its tooltip, as ipywidgets 8 makes it of none."""
    nulls = browser.find_elements(By.CSS_SELECTOR, ".jupyter-widgets[title='null'], .jupyter-widgets [title='null']")
    return [element.get_attribute("outerHTML") for element in nulls if element.is_displayed()]


def control(browser, name):
    """The control with this label."""
    label = f"//*[contains(@class,'widget-label')][normalize-space()='{name}']"
    return browser.find_element(By.XPATH, f"{label}/ancestor::*[contains(@class,'widget-inline-hbox')][1]")


def shown(browser, name):
    """What a slider's readout says."""
    return control(browser, name).find_element(By.CSS_SELECTOR, ".widget-readout").text


def move(browser, name, steps):
    """Move a slider by its arrow keys, to the right or, of a negative number, to the left."""
    handle = control(browser, name).find_element(By.CSS_SELECTOR, ".noUi-handle, .ui-slider-handle")
    to_middle(browser, handle)
    handle.click()
    for _ in range(abs(steps)):
        handle.send_keys(Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT)
