"""Takes the README's picture: the panel as JupyterLab shows it for a T4, and a conversation as the model sees it.

usage: python tests/show/take_pictures.py        (writes data/pictures/panel_and_tokens.png)
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "show")]

import lab  # noqa: E402
import test_panel_browser as panel_page  # noqa: E402
from PIL import Image  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from helpers import prepare  # noqa: E402
from helpers.models import TINY, profile  # noqa: E402
from helpers.models.templates import load_tokenizer  # noqa: E402
from helpers.prepare import view  # noqa: E402

TARGET = ROOT / "data" / "pictures" / "panel_and_tokens.png"
WIDTH, EDGE = 820, 16


def tokens_page(folder: Path) -> str:
    """A conversation of the sample as HTML in a file; its address."""
    prepare.prepare(profile("tiny", max_conversations=20), folder / "prepare")
    row = max(prepare.load_prepared(folder / "prepare")["train"], key=lambda row: len(row["messages"]))
    page = f"<meta charset=utf-8><body style='font:14px system-ui;margin:8px;width:{WIDTH - 24}px'>"
    (folder / "tokens.html").write_text(page + view.token_view(row, load_tokenizer(TINY)), encoding="utf-8")
    return (folder / "tokens.html").as_uri()


def take(folder: Path) -> list[Path]:
    """The two pictures, taken in Chromium."""
    notebook = panel_page.notebook_01(folder / "run")
    (folder / "lab").mkdir()
    with lab.serving(notebook, folder / "lab") as address, lab.chromium(folder / "chromium") as browser:
        browser.get(address)
        lab.run_all(browser, "read: 16 1,024 end")
        box = browser.find_element(
            By.XPATH, "//*[contains(@class,'needs')]/ancestor::*[contains(@class,'widget-vbox')][1]"
        )
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        box.screenshot(str(folder / "panel.png"))
        browser.get(tokens_page(folder))
        browser.find_element(By.CSS_SELECTOR, ".tokens").screenshot(str(folder / "tokens.png"))
    return [folder / "panel.png", folder / "tokens.png"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pictures = [Image.open(path).convert("RGB") for path in take(Path(folder))]
        height = sum(picture.height for picture in pictures) + EDGE * (len(pictures) + 1)
        whole = Image.new("RGB", (WIDTH, height), "white")
        top = EDGE
        for picture in pictures:
            whole.paste(picture.crop((0, 0, min(picture.width, WIDTH - 2 * EDGE), picture.height)), (EDGE, top))
            top += picture.height + EDGE
        TARGET.parent.mkdir(exist_ok=True)
        whole.quantize(128).save(TARGET, optimize=True)
        print(f"{TARGET}: {TARGET.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
