"""The panel in a real browser: JupyterLab in headless Chromium, Run All, sliders dragged, the proposal taken.

Leaves screenshots in runs/panel/. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import lab
import nbformat
import pytest

if lab.missing():
    pytest.skip(lab.missing(), allow_module_level=True)

from lab import ROOT, page_text, run_all, wait_for
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SCREENSHOTS = ROOT / "runs" / "panel"
SLIDERS = ("rank r", "alpha α", "learning rate", "context", "micro-batch", "accumulation", "checkpointed")
READ = 'shown = panel.config_of(sliders)\nprint(f"read: {shown.adapter.rank} {shown.data.seq_len:,} end")'


def notebook_01(workspace):
    """Notebook 01 as it is, but for a T4 and a 7B wherever this runs, and with a cell that reads the panel."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_environment_setup.ipynb", as_version=4)
    for old, new in (
        ('profile = "auto"', 'profile = "mistral-7b"'),
        ('workspace = ""', f"workspace = {str(workspace)!r}"),
        ("hardware.probe()", 'hardware.machine("t4")'),
    ):
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    return nbformat.from_dict({**notebook, "cells": [*notebook.cells, nbformat.v4.new_code_cell(READ)]})


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """JupyterLab's address, serving notebook 01."""
    home = tmp_path_factory.mktemp("lab")
    with lab.serving(notebook_01(home / "run"), home) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with lab.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


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


def bar(browser):
    return browser.find_element(By.CSS_SELECTOR, ".needs .bar").get_attribute("innerHTML")


def picture(browser, name):
    panel = browser.find_element(By.CSS_SELECTOR, ".needs")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def test_run_all_drag_and_take_the_proposal(address, browser):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.get(address)
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
