"""A chat with the models of a run: one question, every model's answer beside the others', as they are written.

    talk = chat.chat({"base": …, "finetuned": …, "gptq": …}, config, "Who owns the pet Pip?")
    talk

Each model remembers its own side of the conversation. One model is in memory at a time; the base answers through the
adapter's own 4-bit base with the adapter switched off, so that both need one opening. Uses only what ipywidgets 7.7
(Colab) and 8 share.
"""

import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets
from ipywidgets import Layout

from helpers import inference
from helpers.config import RunConfig
from helpers.models.gpu import free_memory
from helpers.show.shown import Shown, tipped

LONGEST = 512
"""Tokens of an answer, at most."""
REDRAW_S = 0.15
UNCHANGED_S = 0.6
WHEN_OFF = "base of the fine-tuned model: its adapter is switched off"
STYLE = """<style>
.chat{max-width:980px;font-size:14px;line-height:1.5;margin:2px}
.chat .asked{font-weight:600;margin:12px 0 4px;border-left:5px solid #0072B2;padding-left:10px;white-space:pre-wrap}
.chat .answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(230px,100%),1fr));gap:8px}
.chat .one{border:1px solid rgba(128,128,128,.35);border-radius:4px;padding:6px 10px;overflow-wrap:anywhere}
.chat .who{font-size:12px;opacity:.75;display:flex;justify-content:space-between;gap:8px}
.chat .said{white-space:pre-wrap;min-height:1.5em}
.chat details{font-size:12px;opacity:.85}
.chat pre{white-space:pre-wrap;margin:4px 0;font-size:12px}
.chat .wrong{color:#d9453f}
</style>"""


@dataclass
class Answer:
    """What one model says to one question, while it says it and afterwards."""

    text: str = ""
    prompt: str = ""
    """All that the model read, special tokens and all."""
    state: str = "waits"
    """waits, opens, writes, done, stopped, or failed."""
    note: str = ""


@dataclass
class Turn:
    """A question and its answers by model."""

    question: str
    answers: dict[str, Answer] = field(default_factory=dict)


class Chat(Shown):
    """A box to type in, a switch a model, send, stop and start over, a temperature, and what was said."""

    held: ClassVar[dict[str, Any]] = {}
    """The opened model by its path: one a process, whichever chat asked for it, or "Run all" would hold two."""

    def __init__(self, models: Mapping[str, str | Path], config: RunConfig, redraw_s: float = REDRAW_S) -> None:
        self.models, self.config, self.redraw_s = dict(models), config, redraw_s
        self.turns: list[Turn] = []
        self.stopping, self.worker = threading.Event(), None
        self.switches = {
            name: ipywidgets.ToggleButton(
                value=True, description=name, tooltip=f"Ask {name}", layout=Layout(width="auto")
            )
            for name in models
        }
        self.text = tipped(
            ipywidgets.Text(
                placeholder="Your question, then Enter", continuous_update=False, layout=Layout(width="430px")
            ),
            "Goes to every model that is switched on",
        )
        self.entered = False
        self.send, self.stop, self.clear = (
            ipywidgets.Button(description=word, tooltip=tip, icon=icon, layout=Layout(width="110px"))
            for word, tip, icon in (
                ("Send", "Ask every model that is switched on", "paper-plane"),
                ("Stop", "End the answer that is being written", "stop"),
                ("Start over", "Forget the conversation", "eraser"),
            )
        )
        self.temperature = tipped(
            ipywidgets.FloatSlider(
                value=0.0, min=0.0, max=1.5, step=0.1, description="temperature", style={"description_width": "84px"},
                layout=Layout(width="330px"),
            ),
            "0: always the likeliest token. Higher: more variety, less certainty",
        )  # fmt: skip
        self.transcript = ipywidgets.HTML()
        rows = [
            ipywidgets.HBox(list(self.switches.values()), layout=Layout(flex_flow="row wrap")),
            ipywidgets.HBox([self.text, self.send, self.stop, self.clear], layout=Layout(flex_flow="row wrap")),
            self.temperature,
            self.transcript,
        ]
        super().__init__(rows, layout=Layout(max_width="1000px"))
        self.send.on_click(lambda _: self.begin())
        self.stop.on_click(lambda _: self.stopping.set())
        self.clear.on_click(lambda _: self.start_over())
        with warnings.catch_warnings():  # its successor cannot tell Enter from a click elsewhere
            warnings.simplefilter("ignore")
            self.text.on_submit(lambda _: self.enter())
        self.text.observe(lambda _: self.begin() if self.entered else None, "value")
        self.busy(False)
        self.redraw()

    def enter(self) -> None:
        """Enter was pressed. Browsers say so before they send what was typed: asked is when that has come.

        Where nothing was typed since it was sent, nothing more will come, and what the box holds is asked.
        """
        self.entered = True
        threading.Timer(UNCHANGED_S, lambda: self.begin() if self.entered else None).start()

    def begin(self) -> None:
        """Ask what the box holds in a thread of its own, so that Stop is heard meanwhile."""
        question = self.text.value.strip()
        if not question or (self.worker is not None and self.worker.is_alive()):
            return
        self.entered, self.text.value = False, ""
        self.worker = threading.Thread(target=self.ask, args=(question,), daemon=True)
        self.worker.start()

    def ask(self, question: str) -> Turn:
        """Ask every model that is switched on, one after another; what goes wrong stands where its answer would."""
        self.stopping.clear()
        turn = Turn(question, {name: Answer() for name, switch in self.switches.items() if switch.value})
        self.turns.append(turn)
        self.busy(True)
        try:
            for name in sorted(turn.answers, key=self.opening):
                self.answer(name, turn.answers[name])
        finally:
            self.busy(False)
            self.redraw()
        return turn

    def answer(self, name: str, answer: Answer) -> None:
        """One model's answer, piece by piece."""
        if self.stopping.is_set():
            answer.state = "stopped"
            return
        answer.state = "opens"
        self.redraw()
        try:
            with self.voice(name) as (loaded, note):
                messages = self.conversation(name)
                answer.state, answer.note = "writes", note
                answer.prompt = loaded.tokenizer.decode(inference.prompt_ids(loaded.tokenizer, messages))
                settings = {"max_new_tokens": LONGEST, "temperature": self.temperature.value}
                drawn_s = 0.0
                with closing(inference.pieces(loaded, messages, **settings)) as pieces:
                    for piece in pieces:
                        answer.text = (answer.text + piece).lstrip()
                        if self.stopping.is_set():
                            break
                        if time.monotonic() - drawn_s >= self.redraw_s:
                            self.redraw()
                            drawn_s = time.monotonic()
            answer.state = "stopped" if self.stopping.is_set() else "done"
        except Exception as error:  # of a thread nobody would see it
            answer.state, answer.note = "failed", f"{error}" if isinstance(error, ValueError) else f"{error!r}"
        self.redraw()

    def conversation(self, name: str) -> list[dict[str, str]]:
        """What a model is asked: its own earlier answers between the questions."""
        messages: list[dict[str, str]] = []
        for turn in self.turns[:-1]:
            before = turn.answers.get(name)
            if before is not None and before.text:
                messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": before.text}]
        return [*messages, {"role": "user", "content": self.turns[-1].question}]

    def opening(self, name: str) -> str:
        """The folder that is opened for a model: for the base, the adapter that stands on it."""
        path = self.models[name]
        adapter = self.models.get("finetuned")
        return str(adapter if name == "base" and adapter is not None else path)

    @contextmanager
    def voice(self, name: str) -> Iterator[tuple[Any, str]]:
        """(the opened model, what to know of it), with the adapter switched off where the base is asked."""
        path = self.opening(name)
        if path not in self.held:
            self.held.clear()
            free_memory()
            self.held[path] = inference.load(path, self.config)
        loaded = self.held[path]
        off = path != str(self.models[name])
        with loaded.model.disable_adapter() if off else nullcontext():
            yield loaded, WHEN_OFF if off else loaded.how

    def start_over(self) -> None:
        """Forget what was said."""
        self.stopping.set()
        if self.worker is not None:
            self.worker.join()
        self.turns = []
        self.redraw()

    def busy(self, answering: bool) -> None:
        """Only what makes sense can be pressed."""
        self.send.disabled, self.stop.disabled = answering, not answering

    def redraw(self) -> None:
        """What was said, as a picture and in words."""
        self.transcript.value = f"{STYLE}<div class='chat' role='log'>{''.join(map(drawn, self.turns))}</div>"
        self.words = "\n".join(line for turn in self.turns for line in in_words(turn)) or "nothing was asked yet"


def chat(models: Mapping[str, str | Path], config: RunConfig, first: str = "") -> Chat:
    """The chat with these models by name, opened as the run's configuration says; asks `first` before it is shown."""
    box = Chat(models, config)
    if first:
        box.ask(first)
    return box


def drawn(turn: Turn) -> str:
    """One question and its answers beside each other, HTML; models may say anything, so everything is escaped."""
    answers = "".join(
        f"<div class='one'><div class='who'><b>{escape(name)}</b><span>{escape(told(answer))}</span></div>"
        f"<div class='said'>{escape(answer.text)}</div>{prompt(answer)}</div>"
        for name, answer in turn.answers.items()
    )
    return f"<div class='asked'>{escape(turn.question)}</div><div class='answers'>{answers}</div>"


def told(answer: Answer) -> str:
    """Where an answer stands, in words."""
    said = {"waits": "waits", "opens": "is being opened …", "writes": "writes …", "stopped": "stopped", "done": ""}
    return said.get(answer.state, answer.state)


def prompt(answer: Answer) -> str:
    """What the model read and how it was opened, folded; or what went wrong. HTML."""
    if answer.state == "failed":
        return f"<div class='wrong'>{escape(answer.note)}</div>"
    if not answer.prompt:
        return ""
    return (
        f"<details><summary>the prompt, as the model read it</summary><pre>{escape(answer.prompt)}</pre>"
        f"{escape(answer.note)}</details>"
    )


def in_words(turn: Turn) -> list[str]:
    """A turn as lines of text."""
    said = [f"{name}: {answer.text or answer.note or told(answer)}" for name, answer in turn.answers.items()]
    return [f"You: {turn.question}", *said]
