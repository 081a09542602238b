"""What a page promises, in a real browser: an upload is what Run All trains on, a training is seen, a chat answers.

One notebook out of the notebooks' own cells, on the sample model. Leaves screenshots in runs/page/.
"""

import re

import lab
import nbformat
import pytest

if lab.missing():
    pytest.skip(lab.missing(), allow_module_level=True)

from lab import ROOT, page_text, run_all, wait_for
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SCREENSHOTS = ROOT / "runs" / "page"
ROWS = "question,answer\n" + "".join(f"Where is hat {n}?,Hat {n} is on shelf {n % 7}.\n" for n in range(120))
TRAIN = """from helpers import finetune
from helpers.workspace import require
config = start.watched(config.with_values(epochs=1.0), require(run.folder("prepare"), "prepare"))
measured = finetune.finetune(config, run.folder("prepare"), run.folder("finetune"), resume="never")
print(f"trained: {measured['steps']} steps end")"""
TALK = """from helpers.show import chat
models_by_name = {"base": config.model.model, "finetuned": run.folder("finetune") / "adapter"}
chat.chat(models_by_name, config)"""
DONE = re.compile(r"trained: \d+ steps end")
FILE_INPUT = """const click = HTMLInputElement.prototype.click
HTMLInputElement.prototype.click = function () {
  if (this.type === 'file') { this.id = 'file-dialog'; document.body.appendChild(this) } else click.call(this)
}"""
"""A file dialog is the browser's own and cannot be driven: its field is put where it can."""
LIVE = """const figure = document.querySelector('.live')
if (figure) figure.scrollIntoView({block: 'center'})
return figure && [figure.innerText, figure.querySelectorAll('polyline').length]"""
"""In one go: the figure is another element after each redraw."""


def cells_of(prefix, wanted):
    """Code cells of a notebook that hold one of the wanted pieces."""
    (path,) = (ROOT / "notebooks").glob(f"{prefix}*.ipynb")
    codes = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [next(source for source in codes if piece in source) for piece in wanted]


def page(workspace):
    """Notebook 02 from its parameters to what was counted, then a training and a chat."""
    pieces = ["# @title What to run", "hardware.probe()", "filechooser.chooser(", "start.check("]
    pieces += ["columnview.chooser(", "counts ="]
    sources = cells_of("02", pieces)
    sources[0] += f"\nprofile, workspace = 'tiny', {str(workspace)!r}"
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in [*sources, TRAIN, TALK]],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "tiny"


@pytest.fixture(scope="module")
def browser(tmp_path_factory, run):
    """The page, open in Chromium."""
    home, profile = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("chromium")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with lab.serving(page(run), home, {"OMP_NUM_THREADS": "1"}) as address, lab.chromium(profile) as driver:
        driver.get(address)
        yield driver


def shot(browser, name):
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def press(browser, word):
    """Press a widget's button."""
    button = browser.find_element(By.XPATH, f"//button[contains(., '{word}')]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


def test_run_all_after_an_upload_trains_on_it_and_is_seen_while_it_does(browser, run, tmp_path):
    lab.run_cells(browser, 3)
    wait_for(lambda: "the SAMPLE conversations.jsonl" in page_text(browser), lambda: page_text(browser))
    file = tmp_path / "hats.csv"
    file.write_text(ROWS)
    browser.execute_script(FILE_INPUT)
    press(browser, "Your file")
    wait_for(lambda: browser.find_element(By.ID, "file-dialog")).send_keys(str(file))
    wait_for(lambda: "YOUR data hats.csv" in page_text(browser), lambda: page_text(browser))
    shot(browser, "1-upload")
    run_all(browser, "YOUR data hats.csv")
    words, curves = wait_for(lambda: browser.execute_script(LIVE), lambda: page_text(browser))
    assert not DONE.search(page_text(browser)), "a figure while it trains"
    assert re.search(r"step \d+ of \d+", words) and curves
    shot(browser, "2-training")
    wait_for(lambda: DONE.search(page_text(browser)), lambda: page_text(browser))
    assert "YOUR data hats.csv" in page_text(browser) and "the SAMPLE" not in page_text(browser)
    assert "hats.csv" in (run / "prepare" / "manifest.json").read_text()
    assert "upload/hats.csv" in (run / "finetune" / "config.yaml").read_text()
    shot(browser, "3-trained")


def test_a_question_is_answered_by_each_model_that_is_switched_on_and_stop_stops(browser):
    box = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "input[placeholder^='Your question']"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.send_keys("Where is hat 3?", Keys.ENTER)
    wait_for(lambda: len(said(browser)) == 2 and all(said(browser)), lambda: page_text(browser))
    assert not browser.find_elements(By.CSS_SELECTOR, ".chat .wrong")
    assert browser.find_element(By.CSS_SELECTOR, ".chat .asked").text == "Where is hat 3?"
    press(browser, "Stop")
    wait_for(lambda: browser.find_element(By.XPATH, "//button[contains(., 'Send')]").is_enabled())
    wait_for(lambda: box.get_attribute("value") == "", lambda: box.get_attribute("value"))
    browser.find_element(By.CSS_SELECTOR, ".chat summary").click()
    wait_for(lambda: "[INST]" in browser.find_element(By.CSS_SELECTOR, ".chat pre").text)
    shot(browser, "4-chat")
    press(browser, "base")
    box.send_keys("And hat 4?", Keys.ENTER)
    wait_for(lambda: len(said(browser)) == 3 and said(browser)[-1], lambda: page_text(browser))
    whose = [name.text for name in browser.find_elements(By.CSS_SELECTOR, ".chat .who b")]
    assert whose == ["base", "finetuned", "finetuned"]


def said(browser):
    """The answers that stand in the chat."""
    return [answer.text for answer in browser.find_elements(By.CSS_SELECTOR, ".chat .said")]
