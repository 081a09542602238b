"""The panel in a real browser: Run All, sliders dragged, presets pressed, values typed, the proposal taken.

Leaves screenshots in runs/panel/. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import lab
import nbformat
import pytest

if lab.missing():
    pytest.skip(lab.missing(), allow_module_level=True)

from lab import ROOT, control, page_text, press, run_all, run_cells, shown, stand_by, to_middle, wait_for
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from helpers.show import panel

SCREENSHOTS = ROOT / "runs" / "panel"
SLIDERS = ("rank r", "alpha α", "learning rate", "context", "micro-batch", "accumulation", "checkpointed")
GENTLE = {"rank r": "8", "alpha α": "16", "learning rate": "1e-4"}
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
    """The address of a page with notebook 01."""
    home = tmp_path_factory.mktemp("lab")
    with lab.serving(notebook_01(home / "run"), home) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with lab.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def drag(browser, name, pixels):
    """Drag a slider's handle sideways, at most to the window's edge."""
    handle = control(browser, name).find_element(By.CSS_SELECTOR, ".noUi-handle, .ui-slider-handle")
    to_middle(browser, handle)
    left, right = 20 - handle.rect["x"], browser.execute_script("return innerWidth") - handle.rect["x"] - 40
    pixels = int(max(left, min(right, pixels)))
    ActionChains(browser).drag_and_drop_by_offset(handle, pixels, 0).perform()


def values(browser, *names):
    """What sliders show, by label."""
    return {name: shown(browser, name) for name in names}


def element_text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def bar(browser):
    return browser.find_element(By.CSS_SELECTOR, ".needs .bar").get_attribute("innerHTML")


def picture(browser, name):
    to_middle(browser, browser.find_element(By.CSS_SELECTOR, ".needs"))
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


@pytest.fixture(scope="module")
def page(address, browser):
    """Notebook 01 after Run All."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.get(address)
    run_all(browser, "read: 16 1,024 end")
    assert element_text(browser, ".needs .verdict").startswith("✓ It fits")
    picture(browser, "1-run-all")
    return browser


def test_controls_say_what_they_are_for_and_presets_and_typed_values_move_them(page):
    for name, tip in panel.TIPS.items():
        assert page.find_elements(By.CSS_SELECTOR, f'[title="{tip}"]'), name
    assert lab.untitled(page) == []
    press(page, "gentle")
    wait_for(lambda: values(page, "rank r", "alpha α", "learning rate") == GENTLE)
    press(page, "reset")
    wait_for(lambda: shown(page, "rank r") == "16")
    box = page.find_element(By.CSS_SELECTOR, "input[placeholder^='or type']")
    box.send_keys("rank=24, context=3000", Keys.ENTER)
    wait_for(lambda: values(page, "rank r", "context") == {"rank r": "24", "context": "3,000"})
    assert box.get_attribute("value") == ""
    box.send_keys("rnak=2", Keys.ENTER)
    wait_for(lambda: "rnak" in element_text(page, ".needs .verdict"))
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("rank=16, context=1024", Keys.ENTER)
    wait_for(lambda: element_text(page, ".needs .verdict").startswith("✓ It fits"))


def test_another_gpu_and_another_model_are_looked_at_and_never_trained(page):
    select = Select(control(page, "what if on").find_element(By.TAG_NAME, "select"))
    label = element_text(page, ".needs .line")
    select.select_by_visible_text("NVIDIA L4")
    wait_for(lambda: "Only looked at, never trained" in page_text(page))
    assert "NVIDIA L4" in element_text(page, ".needs .line")
    picture(page, "8-what-if")
    select.select_by_index(0)
    wait_for(lambda: element_text(page, ".needs .line") == label)


def test_drag_stop_at_what_does_not_fit_and_take_the_proposal(page):
    before, label = bar(page), element_text(page, ".needs .line")
    drag(page, "rank r", 400)
    wait_for(lambda: shown(page, "rank r") == "256")
    wait_for(lambda: bar(page) != before and element_text(page, ".needs .line") != label)
    assert "α/r = 0.125" in page_text(page)
    picture(page, "2-rank")

    drag(page, "context", 400)
    wait_for(lambda: shown(page, "context") == "32,768")
    wait_for(lambda: element_text(page, ".needs .verdict").startswith("✗ It does not fit"))
    assert page.find_elements(By.CSS_SELECTOR, ".needs .over"), "what is beyond the limit is hatched"
    picture(page, "3-does-not-fit")

    run_all(page, "Nothing is cut without your word")
    stand_by(page)
    assert values(page, "rank r", "context") == {"rank r": "256", "context": "32,768"}, "what was shown is shown"
    assert "read: 256" not in page_text(page), "no cell ran after the one that stopped"
    picture(page, "9-stopped")

    drag(page, "context", -120)
    drag(page, "checkpointed", -400)
    picture(page, "4-proposal")
    button = page.find_element(By.XPATH, "//button[contains(., 'Take the proposal')]")
    stood = values(page, *SLIDERS)
    wait_for(button.is_enabled)
    to_middle(page, button)
    button.click()
    wait_for(lambda: values(page, *SLIDERS) != stood)
    wait_for(lambda: not button.is_enabled())
    wait_for(lambda: element_text(page, ".needs .verdict").startswith("✓ It fits"))
    picture(page, "5-taken")

    taken = values(page, "rank r", "context")
    run_cells(page, -1, 1)
    wait_for(lambda: f"read: {taken['rank r']} {taken['context']} end" in page_text(page))

    run_all(page, "as chosen in notebook 1")
    wait_for(lambda: values(page, *taken) == taken)
    picture(page, "7-run-all-again")


@pytest.mark.skipif(lab.FRONT is not lab.LAB, reason="the classic page has no dark theme")
def test_it_is_there_in_the_dark(page):
    page.execute_script("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    wait_for(lambda: page.find_elements(By.CSS_SELECTOR, "body[data-jp-theme-light='false']"))
    wait_for(lambda: not page.find_elements(By.ID, "jupyterlab-splash"))
    picture(page, "6-dark")
