"""Which of two answers is better: asked of a person with two buttons, or of any OpenAI-compatible endpoint. Blind.

Neither knows which model said what, and left and right are drawn by lot.

>>> answers = [{"question": "2 + 2?", "models": {"base": {"text": "5"}, "gptq": {"text": "4"}}}]
>>> sorted((pair.left, pair.right) for pair in blind_pairs(answers, "base", "gptq")) in ([("5", "4")], [("4", "5")])
True
>>> tally(["base", "gptq", "gptq", None], "base", "gptq").wins
2
"""

import json
import random
import re
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.evaluate.metrics import SIGNIFICANCE

INSTRUCTION = (
    "You compare two answers to one question. Judge correctness first, then clarity; length is no merit. "
    "Reply with one word: LEFT, RIGHT or TIE."
)
TIMEOUT_S = 60


@dataclass(frozen=True)
class Pair:
    """Two answers whose authors are hidden behind left and right."""

    question: str
    left: str
    right: str
    left_is: str
    right_is: str


@dataclass(frozen=True)
class Tally:
    """How often the second of two models was preferred; ties count for neither."""

    wins: int
    losses: int
    ties: int
    share: float
    low: float
    high: float
    p_value: float
    verdict: str


def check(judged: str, models: Collection[str], judge: str | None) -> tuple[str, str]:
    """The two names in `ONE,OTHER`. Raises ValueError when they are not two of the models, or nobody judges.

    >>> check("base, gptq", ["base", "gptq"], "qwen3-32b")
    ('base', 'gptq')
    """
    names = [name.strip() for name in judged.split(",")]
    if len(names) != 2 or len({*names} & {*models}) != 2:
        raise ValueError(f"judged must be two of {', '.join(models)} with a comma between, not {judged!r}")
    if not judge:
        raise ValueError("a judge needs a name: judge_model is that of the model at its endpoint")
    return names[0], names[1]


def ask(folder: Path, judged: str, url: str, model: str, key: str = "") -> dict[str, Any]:
    """What an endpoint says of two models' answers in an evaluation's folder: the tally, with the models' names.

    Without a decided pair there is no share and no p. Raises ValueError with one sentence when it does not answer.
    """
    lines = (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    generations = [json.loads(line) for line in lines]
    one, other = check(judged, generations[0]["models"], model)
    preferred = ask_endpoint(blind_pairs(generations, one, other), url, model, key)
    about = {"judge": model, "model": other, "against": one}
    if not any(preferred):
        return about | {"wins": 0, "losses": 0, "ties": len(preferred), "verdict": "no difference shown"}
    return about | asdict(tally(preferred, one, other))


def blind_pairs(generations: Sequence[dict[str, Any]], one: str, other: str, seed: int = 0) -> list[Pair]:
    """Answers of two models to the same prompts, in random order and on random sides; equal answers are left out.

    generations: rows of generations.jsonl. Raises ValueError for a model that is not in them.
    """
    for name in (one, other):
        if any(name not in row["models"] for row in generations):
            raise ValueError(
                f"there are no answers of {name}: there are those of {', '.join(generations[0]['models'])}"
            )
    lots, pairs = random.Random(seed), []
    for row in generations:
        names = [one, other]
        lots.shuffle(names)
        left, right = (row["models"][name]["text"].strip() for name in names)
        if left != right:
            pairs.append(Pair(row["question"], left, right, *names))
    lots.shuffle(pairs)
    return pairs


def tally(preferred: Sequence[str | None], one: str, other: str) -> Tally:
    """Count preferences (a model's name; None: a tie) for `other` against `one`.

    share is that of `other` among decided pairs, with Wilson's 95% interval; p from the exact binomial test.
    Raises ValueError when nothing was decided or a name is neither.
    """
    from scipy.stats import binomtest

    wins, losses = (sum(name == wanted for name in preferred) for wanted in (other, one))
    ties = sum(name is None for name in preferred)
    if wins + losses + ties != len(preferred):
        raise ValueError(
            f"a preference is {one}, {other} or None: there are others among {sorted(set(map(str, preferred)))}"
        )
    if not wins + losses:
        raise ValueError("no pair was decided: judge at least one")
    test = binomtest(wins, wins + losses)
    interval = test.proportion_ci(0.95, method="wilson")
    verdict = "no difference shown"
    if test.pvalue < SIGNIFICANCE:
        verdict = "better" if wins > losses else "worse"
    return Tally(wins, losses, ties, wins / (wins + losses), interval.low, interval.high, test.pvalue, verdict)


def ask_endpoint(pairs: Sequence[Pair], url: str, model: str, key: str = "") -> list[str | None]:
    """The preferred model of each pair; None for a tie.

    Every pair is asked twice with sides swapped, since judges favour a side (https://arxiv.org/abs/2306.05685): what
    changes with the side is a tie. url: the endpoint's base, such as http://localhost:8000/v1. Raises ValueError with
    one sentence when it does not answer.
    """
    preferred = []
    for pair in pairs:
        sides = (pair, Pair(pair.question, pair.right, pair.left, pair.right_is, pair.left_is))
        first, second = (side_of(pair, reply(question(pair), url, model, key)) for pair in sides)
        preferred.append(first if first == second else None)
    return preferred


def question(pair: Pair) -> str:
    """What the judge reads."""
    return f"Question:\n{pair.question}\n\nLEFT answer:\n{pair.left}\n\nRIGHT answer:\n{pair.right}\n\nWhich is better?"


def side_of(pair: Pair, word: str) -> str | None:
    """The model behind the first LEFT, RIGHT or TIE of a reply; None when it has none.

    >>> side_of(Pair("?", "a", "b", "base", "gptq"), "**Right**, because ...")
    'gptq'
    """
    found = re.search(r"\b(left|right|tie)\b", word.lower())
    return {"left": pair.left_is, "right": pair.right_is}.get(found[1]) if found else None


def reply(text: str, url: str, model: str, key: str) -> str:
    """One chat completion of an OpenAI-compatible endpoint. Raises ValueError with one sentence."""
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 256}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    address = url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)["choices"][0]["message"]["content"] or ""
    except urllib.error.HTTPError as error:
        raise ValueError(f"the judge at {address} answered {error.code} {error.reason}: check model and key") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"the judge at {address} did not answer as an OpenAI-compatible endpoint does ({type(error).__name__}): "
            "check the address; it usually ends in /v1"
        ) from None


def buttons(pairs: Sequence[Pair], preferred: list[str | None]) -> Any:
    """A widget that shows one pair at a time with two buttons, and one for "no difference"; fills `preferred`."""
    import ipywidgets as widgets

    prompt, left, right, progress = widgets.HTML(), widgets.HTML(), widgets.HTML(), widgets.HTML()
    choices = {
        name: widgets.Button(description=name) for name in ("Left is better", "No difference", "Right is better")
    }
    wide = widgets.Layout(width="50%", padding="0 1em 0 0")
    left.layout = right.layout = wide

    def show() -> None:
        at = len(preferred)
        if at == len(pairs):
            prompt.value, left.value, right.value = "<b>Done, thank you.</b>", "", ""
            for button in choices.values():
                button.disabled = True
        else:
            pair = pairs[at]
            prompt.value = paragraph("<b>", pair.question, "</b>")
            left.value, right.value = paragraph("", pair.left, ""), paragraph("", pair.right, "")
        progress.value = f"{at} of {len(pairs)}"

    def choose(button: Any) -> None:
        if len(preferred) < len(pairs):  # a double click at the end
            pair = pairs[len(preferred)]
            sides = {"Left is better": pair.left_is, "Right is better": pair.right_is}
            preferred.append(sides.get(button.description))
        show()

    for button in choices.values():
        button.on_click(choose)
    show()
    return widgets.VBox([prompt, widgets.HBox([left, right]), widgets.HBox([*choices.values(), progress])])


def paragraph(start: str, text: str, end: str) -> str:
    """Text as HTML with its line breaks; a model's answer may hold anything.

    >>> paragraph("<b>", "a < b", "</b>")
    '<p style="white-space: pre-wrap"><b>a &lt; b</b></p>'
    """
    import html

    return f'<p style="white-space: pre-wrap">{start}{html.escape(text)}{end}</p>'
