"""The process that quantizes: started, followed and ended here; and what it does, on the other side of the pipe.

A library of quantization runs in a process of its own: its chatter goes to a log file, its memory is gone when it ends,
and its settings reach it before it is imported, whatever the notebook has imported already (PEFT and transformers
import GPTQModel wherever they find it). A job goes in as one line of JSON, messages come back as lines of JSON.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import MappingProxyType, ModuleType

from helpers.models import ROOT, ModelShape
from helpers.models.gpu import seeing
from helpers.models.methods import METHODS as RECORDS
from helpers.models.stored import for_all_readers
from helpers.models.templates import hand_on
from helpers.quantize import check
from helpers.show import bars
from helpers.workspace import write_text

PR_SET_PDEATHSIG = 1
"""Linux's prctl(2): the signal that a process gets when its parent is gone."""


class QuantizationFailed(RuntimeError):
    """The process that quantizes ended early; the message holds its last words and where its log lies."""


def run(job: dict, method: ModuleType, sizes: ModelShape, log: Path) -> dict:
    """Do a job in a process of its own, with a bar; returns measurements, the error of each module among them.

    job: model, output, config and rows; with check_rows the result is then opened as its users do, asked a question,
    and held against the model. Raises QuantizationFailed.
    """
    modules: list[dict] = []
    figures: dict = {}
    title = RECORDS[job["config"]["quant_method"]].title
    with (
        closing(worker(job, log, method.environment())) as messages,
        bars.bar(f"{title}, modules", sizes.layers * len(sizes.linears)) as bar,
    ):
        for message in messages:
            if "said" in message:
                bar.write(message["said"])
            elif "module" in message:
                modules.append(message)
                bar.update()
                error = check.layer_error(modules, message["layer"])
                bar.set_postfix_str(f"layer {message['layer']}: error {error:.3g}")
            else:
                figures |= message
                bar.set_postfix_str("checking")
    layers = sorted({module["layer"] for module in modules})
    return figures | {
        "layer_errors": {str(layer): check.layer_error(modules, layer) for layer in layers},
        "standing_out": check.standing_out(modules),
        "modules": modules,
    }


def worker(job: dict, log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[dict]:
    """Messages of a process that does the job; what it prints goes to the log. Raises QuantizationFailed."""
    # It stands in the output folder: whichever the method, it must find this project from there
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.quantize"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            cwd=job["output"],  # GPTQModel writes a folder of logs where it stands
            env=os.environ | paths | environment | seeing(1),
            text=True,
        )
    try:
        with process:
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            except BrokenPipeError:  # dead already: its log says why
                with suppress(BrokenPipeError):
                    process.stdin.close()
            yield from map(json.loads, process.stdout)
    finally:
        process.kill()  # when the notebook's cell is interrupted
    if process.returncode:
        title = RECORDS[job["config"]["quant_method"]].title
        raise QuantizationFailed(last_words(title, process.returncode, log))


def last_words(title: str, status: int, log: Path) -> str:
    """Why a process ended, from its exit status and its log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "Error" in line), f"exit status {status}")
    if "OutOfMemory" in last or "out of memory" in last:
        remedy = "halve calibration_tokens, or restart the notebook's kernel"
        return f"{title} ran out of GPU memory: {remedy}; its log is {log}"
    if status == -9:
        return f"{title} was killed, most often because host memory ran out: close other notebooks; its log is {log}"
    return f"{title} stopped with {last!r}; its log is {log}"


# ---- in the process of its own ---------------------------------------------------------------------------------------


def main(methods: Mapping[str, ModuleType]) -> None:
    """Do the job, a line of JSON on standard input; messages, JSON too, go to standard output."""
    # Libraries print where they like: messages keep the pipe under another number, and 1 becomes the log
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    end_at_once_with_parent()
    job = json.loads(sys.stdin.readline())
    done = threading.Event()
    threading.Thread(target=end_with_parent, args=(done,), daemon=True).start()

    def report(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")

    methods[job["config"]["quant_method"]].make(job, report)
    finish(Path(job["model"]), Path(job["output"]))
    if "check_rows" in job:
        check.measure(job, report)
    done.set()
    channel.close()  # from here on the parent may go
    sys.stderr.flush()
    os._exit(0)  # GPTQModel's pools need seconds to wind down, and nothing is left to do


def end_at_once_with_parent() -> None:
    """On Linux have the kernel end this process when its parent ends, whatever it is busy with by then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent(done: threading.Event) -> None:
    """End when standard input does, elsewhere, and where the parent was gone before the kernel was asked.

    A library that holds Python's lock for minutes delays it until then.
    """
    os.read(0, 1)
    os._exit(0 if done.is_set() else 1)


def finish(model: Path, work: Path) -> None:
    """Tokenizer and template as the 16-bit model has them, and a config.json that every reader understands."""
    hand_on(model, work)
    if (model / "generation_config.json").is_file():
        shutil.copyfile(model / "generation_config.json", work / "generation_config.json")
    settings = json.loads((work / "config.json").read_text(encoding="utf-8"))
    write_text(work / "config.json", json.dumps(for_all_readers(settings), indent=2) + "\n")
