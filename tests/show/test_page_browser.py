"""What pages promise, in a real browser: Run All trains the uploaded file as sliders show; chat, vote, take home.

One notebook out of the notebooks' own cells, on the sample model. Leaves screenshots in runs/page/.
"""

import json
import re
import zipfile

import lab
import nbformat
import pytest

if lab.missing():
    pytest.skip(lab.missing(), allow_module_level=True)

from lab import ROOT, move, page_text, press, run_all, run_cells, shown, stand_by, wait_for
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SCREENSHOTS = ROOT / "runs" / "page"
ROWS = "question,answer\n" + "".join(f"Where is hat {n}?,Hat {n} is on shelf {n % 7}.\n" for n in range(120))
BEFORE_UPLOAD, BEFORE_PANEL = 3, 5
"""Cells up to and with the upload's button, and from there to the panel."""
IMPORTS = """from helpers import evaluate
from helpers.evaluate import report, vote
from helpers.export import buttons
from helpers.show import chat, gguf
from helpers.workspace import run_models
config = config.with_values(max_questions=4)
chosen = run_models(run, config)"""
ENDLESS = """import time
whole = inference.pieces
def pieces(loaded, messages, **settings):
    yield from whole(loaded, messages, **settings)
    while "everything" in messages[-1]["content"]:
        time.sleep(0.05)
        yield " and"
inference.pieces = pieces"""
"""An answer that is still being written when Stop is pressed, however fast the machine."""
DONE = "trained: the end"
FILE_INPUT = """const click = HTMLInputElement.prototype.click
HTMLInputElement.prototype.click = function () {
  if (this.type === 'file') { this.id = 'file-dialog'; document.body.appendChild(this) } else click.call(this)
}"""
"""A file dialog is the browser's own and cannot be driven: its field is put where it can."""
LIVE = """const figure = document.querySelector('.live')
if (figure) figure.scrollIntoView({block: 'center'})
return figure && [figure.innerText, figure.querySelectorAll('polyline').length]"""
"""In one go: the figure is another element after each redraw."""

ANSWERS = """return [...document.querySelectorAll('.chat .one')].map(one => [
  one.querySelector('.who b').innerText, one.querySelector('.who span').innerText, one.querySelector('.said').innerText
])"""


def cells_of(prefix, wanted):
    """Code cells of a notebook that hold one of the wanted pieces."""
    (path,) = (ROOT / "notebooks").glob(f"{prefix}*.ipynb")
    codes = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [next(source for source in codes if piece in source) for piece in wanted]


def page(workspace):
    """Notebook 02 from its parameters to what was counted, 03 from its panel to its training, and 05's buttons."""
    form = "# @title What to run"
    sources = cells_of("02", [form, "hardware.probe()", "filechooser.chooser(", "start.check("])
    sources += cells_of("02", ["columnview.chooser(", "counts ="])
    sources += cells_of("03", [form, "panel.panel(", "panel.config_of(", "start.watched(", "finetune.finetune("])
    sources += [IMPORTS, ENDLESS]
    sources += cells_of("05", ["evaluate.evaluate(", "chat.chat(", "vote.ballot(", "buttons.take_home("])
    sources += cells_of("06", ["gguf.choice("])
    for at, source in enumerate(sources):
        if source.startswith(form):
            sources[at] += f"\nprofile, workspace, types = 'tiny', {str(workspace)!r}, 'q4_k_m'"
        elif "finetune.finetune(" in source:
            sources[at] = f"config = config.with_values(epochs=1.0)\n{source}\nprint('trained:', 'the end')"
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
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
    nobody = {"OMP_NUM_THREADS": "1", "HOME": str(home), "HF_TOKEN": "", "HF_HUB_OFFLINE": "1"}
    with lab.serving(page(run), home, nobody) as address, lab.chromium(profile) as driver:
        driver.get(address)
        yield driver


def shot(browser, name):
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def says(browser, words):
    """Wait until a piece of HTML among the widgets says this."""
    written = By.CSS_SELECTOR, ".widget-html-content"
    wait_for(
        lambda: any(words in box.text for box in browser.find_elements(*written)),
        lambda: [box.text for box in browser.find_elements(*written)],
    )


def test_run_all_trains_the_uploaded_file_with_what_the_sliders_show_and_is_seen_while_it_does(browser, run, tmp_path):
    run_cells(browser, 0, BEFORE_UPLOAD)
    wait_for(lambda: "the SAMPLE conversations.jsonl" in page_text(browser), lambda: page_text(browser))
    file = tmp_path / "hats.csv"
    file.write_text(ROWS)
    browser.execute_script(FILE_INPUT)
    press(browser, "Your file")
    wait_for(lambda: browser.find_element(By.ID, "file-dialog")).send_keys(str(file))
    wait_for(lambda: "YOUR data hats.csv" in page_text(browser), lambda: page_text(browser))
    shot(browser, "1-upload")

    run_cells(browser, BEFORE_UPLOAD, BEFORE_PANEL)
    wait_for(lambda: shown(browser, "rank r") == "16", lambda: page_text(browser))
    move(browser, "rank r", -2)
    move(browser, "alpha α", 1)
    move(browser, "learning rate", -2)
    moved = {"rank r": "4", "alpha α": "64", "learning rate": "2e-4"}
    wait_for(lambda: {name: shown(browser, name) for name in moved} == moved)
    wait_for(lambda: "α/r = 16" in page_text(browser))

    run_all(browser, "YOUR data hats.csv")
    words, curves = wait_for(lambda: browser.execute_script(LIVE), lambda: page_text(browser))
    assert DONE not in page_text(browser), "a figure while it trains"
    assert re.search(r"step \d+ of \d+", words) and curves
    shot(browser, "2-training")
    wait_for(lambda: DONE in page_text(browser), lambda: page_text(browser))
    assert "YOUR data hats.csv" in page_text(browser) and "the SAMPLE" not in page_text(browser)
    assert {name: shown(browser, name) for name in moved} == moved, "what was shown is shown"
    adapter = json.loads((run / "finetune" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 64)
    trained = (run / "finetune" / "config.yaml").read_text()
    assert "upload/hats.csv" in trained and "learning_rate: 0.0002" in trained
    assert "hats.csv" in (run / "prepare" / "manifest.json").read_text()
    shot(browser, "3-trained")


def answers(browser):
    """The chat's answers as [who, in which state that is, what was said], in one go: each redraw makes them anew."""
    return browser.execute_script(ANSWERS)


def written(browser, number, more_than=0):
    """How long an answer is, as soon as it is longer than that."""
    found = wait_for(
        lambda: [len(said) for _, _, said in answers(browser)[number : number + 1] if len(said) > more_than],
        lambda: page_text(browser),
    )
    return found[0]


def test_a_question_is_answered_by_each_model_that_is_switched_on_and_stop_stops(browser):
    stand_by(browser)
    box = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "input[placeholder^='Your question']"))
    lab.to_middle(browser, box)
    assert [(who, state) for who, state, said in answers(browser) if said] == [("base", ""), ("finetuned", "")]
    box.send_keys("Tell me everything.", Keys.ENTER)
    written(browser, 2, written(browser, 2) + 8)
    states = [answer[:2] for answer in answers(browser)[2:]]
    assert states == [["base", "writes …"], ["finetuned", "waits"]], "it is seen growing"
    wait_for(lambda: box.get_attribute("value") == "", lambda: box.get_attribute("value"))
    press(browser, "Stop")
    wait_for(lambda: [state for _, state, _ in answers(browser)[2:]] == ["stopped"] * 2, lambda: answers(browser))
    press(browser, "base")
    box.send_keys("Where is hat 4?", Keys.ENTER)
    written(browser, 4)
    wait_for(lambda: [answer[:2] for answer in answers(browser)[4:]] == [["finetuned", ""]], lambda: answers(browser))
    assert not browser.find_elements(By.CSS_SELECTOR, ".chat .wrong")
    wait_for(browser.find_element(By.XPATH, "//button[contains(., 'Send')]").is_enabled)
    browser.find_elements(By.CSS_SELECTOR, ".chat summary")[-1].click()
    wait_for(lambda: "[INST]" in browser.find_elements(By.CSS_SELECTOR, ".chat pre")[-1].text)
    shot(browser, "4-chat")
    press(browser, "Start over")
    wait_for(lambda: not answers(browser))


def test_buttons_vote_tick_and_take_the_model_home(browser, run):
    press(browser, "Left is better")
    says(browser, "of 1 decided pairs")
    says(browser, "1 of ")

    box = browser.find_element(By.XPATH, "//label[.//*[normalize-space()='Q8_0']]//input | //input[@title='Q8_0']")
    lab.to_middle(browser, box)
    box.click()
    says(browser, "Q8_0, Q4_K_M ticked")

    for button, sentence in (
        ("To Drive", "no Drive is mounted here"),
        ("To the hub", "write OWNER/NAME into the box first"),
        ("Download", f"Done: {run / 'finetune.zip'}"),
    ):
        press(browser, button)
        says(browser, sentence)
    assert any(name.endswith("adapter_config.json") for name in zipfile.ZipFile(run / "finetune.zip").namelist())
    assert lab.untitled(browser) == []
    shot(browser, "5-take-home")
