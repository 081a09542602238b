"""The panel in a real browser: JupyterLab in headless Chromium, Run All, sliders dragged, the proposal taken.

Leaves screenshots in runs/panel/. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: `make setup` installs it")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: `make setup` installs it")
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "runs" / "panel"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
FLAGS += ["--window-size=1180,1350"]
PATIENCE_S = 40

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="no Chromium with its driver here; `.ci/run` installs them: chromium chromium-driver",
)

SLIDERS = ("rank r", "alpha α", "learning rate", "context", "micro-batch", "accumulation", "checkpointed")
KERNEL_STATUS = "return jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no question over the page
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is there, seen or not
}
READ = 'shown = panel.config_of(sliders)\nprint(f"read: {shown.adapter.rank} {shown.data.seq_len:,} end")'


def notebook_01(workspace):
    """Notebook 01 as it is, but for a T4 and a 7B wherever this runs, and with a cell that reads the panel."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_environment_setup.ipynb", as_version=4)
    for old, new in (
        ('profile = "auto"', 'profile = "mistral-7b"'),
        ("workspace = None", f"workspace = {str(workspace)!r}"),
        ("hardware.probe()", 'hardware.machine("t4")'),
    ):
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    return nbformat.from_dict({**notebook, "cells": [*notebook.cells, nbformat.v4.new_code_cell(READ)]})


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab's address, serving notebook 01."""
    home = tmp_path_factory.mktemp("lab")
    nbformat.write(notebook_01(home / "run"), home / "panel.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    folders |= {name: str(home / name.lower()) for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={home}", "--IdentityProvider.token=panel", "--expose-app-in-browser"]
    for name, settings in SETTINGS.items():
        path = home / "jupyterlab_settings_dir" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=home, env=os.environ | folders | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/api?token=panel"), lambda: (home / "lab.log").read_text()[-2000:])
        yield f"{address}/doc/tree/panel.ipynb?reset&token=panel"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
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


# What a person does with the notebook.


def run_all(browser, said):
    """Run > Run All Cells, once the kernel stands by; until something is said."""
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell"), lambda: browser.title)
    wait_for(lambda: browser.execute_script(KERNEL_STATUS) == "idle")
    browser.find_element(By.XPATH, "//*[contains(@class,'lm-MenuBar-itemLabel')][text()='Run']").click()
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "[data-command='runmenu:run-all']")).click()
    wait_for(lambda: said in page_text(browser), lambda: page_text(browser))


def control(browser, name):
    """The slider with this label."""
    return browser.find_element(
        By.XPATH, f"//label[text()='{name}']/ancestor::*[contains(@class,'widget-inline-hbox')][1]"
    )


def shown(browser, name):
    """What a slider's readout says."""
    return control(browser, name).find_element(By.CSS_SELECTOR, ".widget-readout").text


def drag(browser, name, pixels):
    """Drag a slider's handle sideways."""
    handle = control(browser, name).find_element(By.CSS_SELECTOR, ".noUi-handle, .ui-slider-handle")
    ActionChains(browser).drag_and_drop_by_offset(handle, pixels, 0).perform()


def element_text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def page_text(browser):
    return browser.find_element(By.TAG_NAME, "body").text


def bar(browser):
    return browser.find_element(By.CSS_SELECTOR, ".needs .bar").get_attribute("innerHTML")


def picture(browser, name):
    panel = browser.find_element(By.CSS_SELECTOR, ".needs")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def test_run_all_drag_and_take_the_proposal(lab, browser):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.get(lab)
    run_all(browser, "read: 16 1,024 end")
    assert element_text(browser, ".needs .verdict").startswith("✓ It fits")
    before, label = bar(browser), element_text(browser, ".needs .line")
    picture(browser, "1-run-all")

    drag(browser, "rank r", 400)
    wait_for(lambda: shown(browser, "rank r") == "256")
    wait_for(lambda: bar(browser) != before and element_text(browser, ".needs .line") != label)
    assert "α/r = 0.125" in page_text(browser)
    picture(browser, "2-rank")

    drag(browser, "context", 400)
    wait_for(lambda: shown(browser, "context") == "32,768")
    wait_for(lambda: element_text(browser, ".needs .verdict").startswith("✗ It does not fit"))
    assert browser.find_elements(By.CSS_SELECTOR, ".needs .over"), "what is beyond the limit is hatched"
    picture(browser, "3-does-not-fit")

    drag(browser, "context", -120)
    drag(browser, "checkpointed", -400)
    picture(browser, "4-proposal")
    button = browser.find_element(By.XPATH, "//button[contains(., 'Take the proposal')]")
    stood = {name: shown(browser, name) for name in SLIDERS}
    wait_for(button.is_enabled)
    button.click()
    wait_for(lambda: {name: shown(browser, name) for name in SLIDERS} != stood)
    wait_for(lambda: not button.is_enabled())
    wait_for(lambda: element_text(browser, ".needs .verdict").startswith("✓ It fits"))
    picture(browser, "5-taken")

    values = {name: shown(browser, name) for name in ("rank r", "context")}
    browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell .jp-InputArea-editor")[-1].click()
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    wait_for(lambda: f"read: {values['rank r']} {values['context']} end" in page_text(browser))

    run_all(browser, "as chosen in notebook 1")
    wait_for(lambda: {name: shown(browser, name) for name in values} == values)
    picture(browser, "7-run-all-again")

    browser.execute_script("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "body[data-jp-theme-light='false']"))
    wait_for(lambda: not browser.find_elements(By.ID, "jupyterlab-splash"))
    picture(browser, "6-dark")
