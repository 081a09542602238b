"""The chat page in a real browser: typed into, streamed, stopped, models switched, a key asked for; wide, narrow, dark.

Leaves screenshots in runs/page/. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import shutil
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: `make setup` installs it")
pytest.importorskip("starlette", reason="starlette is not installed: `make setup` installs requirements/pins.txt")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: `make setup` installs requirements/pins.txt")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402
from served import KEY, never_ending, saying, serving, wait_for  # noqa: E402

from helpers.models import TINY  # noqa: E402

SCREENSHOTS = Path(__file__).resolve().parents[2] / "runs" / "page"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-dev-shm-usage"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="no Chromium with its driver here; `.ci/run` installs them: chromium chromium-driver",
)


@pytest.fixture(scope="module")
def server():
    """Two tiny models behind a key, with the page."""
    with serving([f"first={TINY}", f"second={TINY}"], page=True) as here:
        yield here


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """Chromium on the page."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1000, 800)
    driver.get(server.address + "/")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    yield driver
    driver.quit()


def get(page, name):
    return page.find_element(By.ID, name)


def answers(page):
    return [turn.text for turn in page.find_elements(By.CSS_SELECTOR, ".assistant")]


def say(page, words, most=None):
    box = page.find_element(By.ID, "most")
    page.execute_script("arguments[0].value = arguments[1] || ''", box, most)
    get(page, "words").send_keys(words, Keys.ENTER)


def test_someone_enters_the_key_and_chats(page, server, monkeypatch):
    wait_for(lambda: "missing or wrong" in get(page, "trouble").text)
    assert page.switch_to.active_element == get(page, "key") and not get(page, "model").is_displayed()
    page.save_screenshot(str(SCREENSHOTS / "key.png"))
    get(page, "key").send_keys("wrong", Keys.ENTER)
    wait_for(lambda: "missing or wrong" in get(page, "trouble").text)
    get(page, "key").clear()
    get(page, "key").send_keys(KEY, Keys.ENTER)
    wait_for(lambda: [one.text for one in Select(get(page, "model")).options] == ["first", "second"])
    assert not get(page, "trouble").text and not get(page, "key").is_displayed()

    page.find_element(By.TAG_NAME, "summary").click()
    get(page, "system").send_keys("Answer <b>shortly</b>.")
    page.execute_script(
        "arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", get(page, "temperature")
    )
    assert get(page, "degrees").text == "0.00"
    page.save_screenshot(str(SCREENSHOTS / "settings.png"))
    page.find_element(By.TAG_NAME, "summary").click()
    say(page, "Which animal does Edith keep? <i>Tell</i> me.", 12)
    wait_for(lambda: answers(page) and "12 tokens" in answers(page)[0])
    assert "first" in answers(page)[0] and len(answers(page)[0].splitlines()[0]) > 10
    assert "<i>Tell</i>" in page.find_element(By.CSS_SELECTOR, ".user").text  # text, never markup
    Select(get(page, "model")).select_by_visible_text("second")
    say(page, "And Otto?", 12)
    wait_for(lambda: len(answers(page)) == 2 and "second" in answers(page)[1])

    # a long answer comes in pieces, and is stopped: on the page and on the server
    never_ending(server.models["second"].engine, monkeypatch)
    say(page, "Tell me everything.")
    wait_for(lambda: len(answers(page)) == 3 and len(answers(page)[2]) > 5)
    assert get(page, "stop").is_displayed() and server.places.taken == 1
    get(page, "stop").click()
    wait_for(lambda: "stopped" in answers(page)[2] and server.places.taken == 0)
    wait_for(lambda: get(page, "send").is_displayed())
    page.save_screenshot(str(SCREENSHOTS / "wide.png"))
    broken = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [said for said in broken if "401" not in said and "favicon" not in said]


MARKDOWN = """## Two ways

Take **bold**, *thin* or `f(*args)`: 2 * 3 * 4 <b>stays</b> as it is.
A second line, and [a link](https://example.org/x); [none](javascript:alert(1)).

1. first
2. second
   goes on
- a point

| name | pet |
|---|:-:|
| Edith | owl |

```python
def long(): return "a line of code that is longer than any telephone is wide, by far, and then some"
<script>alert(1)</script>
```
> said by someone

שלום עולם, זה טקסט מימין לשמאל
DonaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaftDonaudampfschifffahrt
```
not closed"""


def test_an_answer_in_markdown_is_shown_as_such_and_is_never_markup(page, server, monkeypatch):
    get(page, "fresh").click()
    Select(get(page, "model")).select_by_visible_text("first")
    saying(server.models["first"].engine, MARKDOWN, monkeypatch)
    say(page, "مرحبا، كيف حالك؟")
    wait_for(lambda: answers(page) and "tokens" in answers(page)[0])
    shown = page.find_element(By.CSS_SELECTOR, ".assistant .said")
    found = {
        name: [one.text for one in shown.find_elements(By.TAG_NAME, name)]
        for name in ("h3", "strong", "em", "a", "li", "th", "td", "pre", "blockquote", "b", "script")
    }
    assert found["h3"] == ["Two ways"] and found["strong"] == ["bold"] and found["em"] == ["thin"]
    assert found["a"] == ["a link"] and "[none](javascript:alert(1))" in shown.text
    assert "2 * 3 * 4 <b>stays</b> as it is." in shown.text and not found["b"] + found["script"]
    assert found["li"] == ["first", "second\ngoes on", "a point"] and found["blockquote"] == ["said by someone"]
    assert found["th"] == ["name", "pet"] and found["td"] == ["Edith", "owl"]
    assert found["pre"][0].endswith("<script>alert(1)</script>") and found["pre"][1] == "not closed"
    paragraphs = shown.find_elements(By.XPATH, "./p")
    assert paragraphs[-1].value_of_css_property("direction") == "rtl"
    asked = page.find_element(By.CSS_SELECTOR, ".user")
    assert asked.value_of_css_property("direction") == "rtl"
    assert asked.rect["x"] + asked.rect["width"] > 800, "what was asked stands on the right, whatever its direction"
    shown.find_element(By.TAG_NAME, "button").click()
    wait_for(lambda: shown.find_element(By.TAG_NAME, "button").text in ("Copied", "Selected"))
    page.save_screenshot(str(SCREENSHOTS / "markdown.png"))


def test_it_fits_a_phone_and_the_dark(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    page.find_element(By.TAG_NAME, "summary").click()
    page.save_screenshot(str(SCREENSHOTS / "phone_dark_settings.png"))
    page.find_element(By.TAG_NAME, "summary").click()
    page.save_screenshot(str(SCREENSHOTS / "phone_dark.png"))
    assert page.execute_script("return document.documentElement.scrollWidth") == 400
    for name in ("words", "send", "model", "fresh"):
        box = get(page, name).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and box["y"] + box["height"] <= 800, name
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"


def test_what_the_server_refuses_is_shown_and_the_question_comes_back(page):
    get(page, "fresh").click()
    assert not answers(page)
    page.execute_script("arguments[0].value = 'a very long story '.repeat(400)", get(page, "words"))
    get(page, "words").send_keys(Keys.ENTER)
    wait_for(lambda: answers(page) and "context is 512" in answers(page)[0])
    assert get(page, "words").get_attribute("value").startswith("a very long story")
    page.save_screenshot(str(SCREENSHOTS / "refused.png"))


def test_a_server_that_is_gone_is_said(page, server):
    server.server.should_exit = True
    asked = "fetch('/health').then(() => arguments[0](true), () => arguments[0](false))"
    wait_for(lambda: not page.execute_async_script(asked))
    page.execute_script("listModels()")
    wait_for(lambda: "does not answer" in get(page, "trouble").text)
    get(page, "fresh").click()
    get(page, "words").clear()
    say(page, "Is anyone there?")
    wait_for(lambda: answers(page) and "is it still running?" in answers(page)[0])
    assert get(page, "words").get_attribute("value") == "Is anyone there?"
    page.save_screenshot(str(SCREENSHOTS / "gone.png"))
