"""Which of two models you like better, blind: pairs of answers, two buttons, and what your votes are worth so far."""

from pathlib import Path
from typing import Any

import ipywidgets

from helpers.evaluate import judge
from helpers.evaluate.report import read_generations
from helpers.show.shown import Shown


class Ballot(Shown):
    """Pairs of answers without names, and under them the count with its interval; names come out with the first vote.

    A class, because it is shown in words where nobody can press a button.
    """

    def __init__(self, pairs: list[judge.Pair], one: str, other: str) -> None:
        self.one, self.other, self.preferred = one, other, []
        self.count = ipywidgets.HTML()
        self.ballot = judge.buttons(pairs, self.preferred)
        super().__init__([self.ballot, self.count])
        for button in buttons_in(self.ballot):
            button.on_click(lambda _: self.redraw())
        self.pairs = len(pairs)
        self.redraw()

    def redraw(self) -> None:
        """Say what the votes show so far."""
        self.words = said(self.preferred, self.one, self.other, self.pairs)
        self.count.value = f"<b>{self.words}</b>"


def ballot(folder: Path, one: str = "base", other: str | None = None, seed: int = 0) -> Ballot:
    """The pairs of an evaluation's answers in which two models differ; `other` is the last one unless said.

    Raises ValueError for an evaluation without answers.
    """
    generations = read_generations(folder)
    if not generations:
        raise ValueError(f"{folder} holds no answers to compare: evaluate with questions or held-out conversations")
    names = list(generations[0]["models"])
    one, other = (one if one in names else names[0]), other or names[-1]
    return Ballot(judge.blind_pairs(generations, one, other, seed), one, other)


def said(preferred: list[str | None], one: str, other: str, pairs: int) -> str:
    """What votes show, in a sentence.

    >>> said(["gptq", "gptq", "base", None], "base", "gptq", 9)
    'gptq was better in 2 of 3 decided pairs, 67% (95% interval 21% to 94%): no difference shown against base'
    >>> said([], "base", "gptq", 9)
    '9 pairs in which base and gptq differ: press the better answer'
    """
    if not any(preferred):
        return f"{pairs} pairs in which {one} and {other} differ: press the better answer" if pairs else (
            f"{one} and {other} answered every question alike")  # fmt: skip
    found = judge.tally(preferred, one, other)
    return (
        f"{other} was better in {found.wins} of {found.wins + found.losses} decided pairs, {found.share:.0%} "
        f"(95% interval {found.low:.0%} to {found.high:.0%}): {found.verdict} against {one}"
    )


def buttons_in(widget: Any) -> list[ipywidgets.Button]:
    """Every button of a box, however deep."""
    if isinstance(widget, ipywidgets.Button):
        return [widget]
    return [button for child in getattr(widget, "children", ()) for button in buttons_in(child)]
