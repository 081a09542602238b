"""The report as one sends it: what came out in a sentence, what differs first, the rest folded, read by everybody."""

import re
from contextlib import suppress
from dataclasses import asdict

import pytest
from matplotlib.colors import to_hex

from helpers import workspace
from helpers.evaluate import report
from helpers.models import profile
from helpers.show import plots


def compared(verdict, difference=0.5):
    return {"exact_match": {"verdict": verdict, "difference": difference, "low": 0.4, "high": 0.6, "p_value": 0.01}}


def entry(exact_match, size_bytes, **against):
    return {"exact_match": exact_match, "perplexity": 2.0, "size_bytes": size_bytes, "against": against}


FOUND = {
    "base": entry(0.1, 14_500_000_000),
    "finetuned": entry(0.7, 160_000_000, base=compared("better")) | {"size_with_base_bytes": 14_660_000_000},
    "merged": entry(0.7, 14_500_000_000, finetuned=compared(report.EQUAL, 0.0), base=compared("better")),
    "gptq": entry(0.69, 4_160_000_000, merged=compared(report.EQUAL, 0.0), finetuned=compared(report.EQUAL, -0.01)),
}
ROWS = [{"question": "a < b?", "answer": "yes", "models": {name: {"text": "yes", "ended": True} for name in FOUND}}]


@pytest.fixture
def page(tmp_path):
    made = report.made_with(asdict(profile("tiny", rank=8)), "Tesla T4")
    drawn = {"size": plots.size_against_quality(FOUND), "speed": plots.speed(FOUND)}
    return report.write_html(tmp_path / "report.html", FOUND, ROWS, drawn, "About.", made).read_text(encoding="utf-8")


def test_the_verdict_says_what_came_out_in_two_sentences():
    better, equal = report.verdict(FOUND)
    assert better.startswith("finetuned is better than base: exact match 70.0% against 10.0% (+50.0 points")
    assert equal.startswith("No difference is shown between gptq and finetuned: exact match 69.0% against 70.0%")
    worse = FOUND | {"gptq": entry(0.2, 4_160_000_000, finetuned=compared("worse", -0.5))}
    assert report.verdict(worse)[1].startswith("gptq is worse than finetuned")
    smaller = {name: FOUND[name] for name in ("base", "gptq")}
    smaller["gptq"] = entry(0.1, 4_160_000_000, base=compared(report.EQUAL, 0.0))
    assert "between gptq and base, in 29% of the disk space" in report.verdict(smaller)[0]
    assert report.verdict({"base": FOUND["base"]}) == ["base: nothing is there to compare with."]


def test_what_differs_stands_first_and_what_does_not_is_folded(page):
    open_part, _, folded = page.partition("<details>")
    assert open_part.count('<td class="better">better</td>') == 1
    assert folded.partition("</details>")[0].count(f">{report.EQUAL}<") == 2 and "2 comparisons show" in folded
    assert page.index('class="verdict"') < page.index("<h2>")


def test_a_notebook_shows_the_same_sentence_and_the_same_fold():
    shown, _, folded = report.verdicts(FOUND).partition("<details>")
    assert all(sentence in shown for sentence in report.verdict(FOUND))
    assert shown.count('<td class="better">better</td>') == 1 and folded.count(f">{report.EQUAL}<") == 2
    one = {name: FOUND[name] for name in ("base", "finetuned", "merged")}
    assert "1 comparison shows no" in report.verdicts(one)


def test_every_figure_of_which_more_or_less_is_better_has_its_arrow():
    pointed = {name: arrow for name, arrow in report.ARROWS.items() if arrow == "↑"}
    assert set(report.ARROWS) | set(report.SAYS_NEITHER) == set(report.COLUMNS) and "prompt_tokens_per_s" in pointed
    assert set(report.LESS_IS_BETTER) == set(report.ARROWS) - set(pointed)


def test_it_says_what_was_trained_on_what_where_and_when(page):
    said = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert said["model"] == "tiny-mistral" and said["data"] == "conversations.jsonl"
    assert said["adapter"] == "rank 8, alpha 32, all-linear" and "learning rate 0.0005" in said["training"]
    elsewhere = report.made_with(asdict(profile("tiny").with_values(model="/gone/since/my-model")), "Tesla T4")
    assert dict(elsewhere)["model"] == "my-model"
    assert re.fullmatch(r"Tesla T4, \d\d \w+ 20\d\d", said["measured on"])


def test_figures_are_said_in_words_and_a_model_has_one_colour_in_all(page):
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert alts[0].startswith("Size against quality") and "Decoding" in alts[1]
    quality, speed = plots.quality(FOUND), plots.speed(FOUND)
    for i, colour in enumerate(plots.COLOURS[: len(FOUND)]):
        bars = [quality.axes[0].patches[i], *speed.axes[0].patches[i :: len(FOUND)], speed.axes[1].patches[i]]
        assert {to_hex(bar.get_facecolor()) for bar in bars} == {colour.lower()}


def test_it_has_a_dark_side_a_narrow_one_and_a_printed_one_and_escapes_what_people_say(page):
    for rule in ("prefers-color-scheme: dark", "max-width: 640px", "@media print", "width=device-width"):
        assert rule in page
    assert "a &lt; b?" in page and "a < b?" not in page
    assert "The first 1 of 1" in page


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_card_that_is_cut_short_at_any_moment_damages_no_model(moment, tmp_path, monkeypatch):
    with workspace.building(tmp_path / "finetune", "finetune") as stage:
        (stage.folder / "adapter").mkdir()
        for name in ("README.md", "adapter_model.safetensors"):
            (stage.folder / "adapter" / name).write_text("PEFT's own")
    done = []

    def then_killed(act):
        def call(*arguments):
            found = act(*arguments)
            done.append(act)
            if len(done) == moment:
                raise KeyboardInterrupt
            return found

        return call

    for name in ("seal", "write_text"):
        monkeypatch.setattr(report, name, then_killed(getattr(report, name)))
    with suppress(KeyboardInterrupt):
        report.put_card("# Our card", tmp_path / "finetune" / "adapter")
    assert len(done) == min(moment, 3)
    workspace.require(tmp_path / "finetune", "finetune")
    card = (tmp_path / "finetune" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card == ("PEFT's own" if moment == 1 else "# Our card")
