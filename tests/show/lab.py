"""JupyterLab in headless Chromium, and what a person does with a notebook in it: shared by the tests in a browser.

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
PATIENCE_S = 40
KERNEL_STATUS = "return jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no question over the page
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is there, seen or not
}


def missing() -> str:
    """What a browser's test lacks here, and where it comes from; "" where it can run."""
    for package in ("selenium", "jupyterlab"):
        if find_spec(package) is None:
            return f"{package} is not installed: `make setup` installs it"
    return "" if BROWSER and DRIVER else "no Chromium with its driver here; `.ci/run` installs them"


@contextmanager
def serving(notebook: nbformat.NotebookNode, home: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a JupyterLab that shows this notebook; the server ends with the block."""
    nbformat.write(notebook, home / "page.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    folders |= {name: str(home / name.lower()) for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={home}", "--IdentityProvider.token=page", "--expose-app-in-browser"]
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
        yield f"{address}/doc/tree/page.ipynb?reset&token=page"
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


def run_all(browser, said):
    """Run > Run All Cells, once the kernel stands by; until something is said."""
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell"), lambda: browser.title)
    wait_for(lambda: browser.execute_script(KERNEL_STATUS) == "idle")
    browser.find_element(By.XPATH, "//*[contains(@class,'lm-MenuBar-itemLabel')][text()='Run']").click()
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "[data-command='runmenu:run-all']")).click()
    wait_for(lambda: said in page_text(browser), lambda: page_text(browser))


def page_text(browser):
    return browser.find_element(By.TAG_NAME, "body").text


def run_cells(browser, count):
    """Shift+Enter so many times, from the first cell on."""
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell"), lambda: browser.title)
    wait_for(lambda: browser.execute_script(KERNEL_STATUS) == "idle")
    browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell .jp-InputArea-editor")[0].click()
    for _ in range(count):
        ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
