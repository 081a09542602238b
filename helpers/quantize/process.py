"""The process that quantizes: started, followed and ended here; and what it does, on the other side of the pipe.

A library of quantization runs in a process of its own: its chatter goes to a log file, its memory is gone when it ends,
and its settings reach it before it is imported, whatever the notebook has imported already (PEFT and transformers
import GPTQModel wherever they find it).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType, ModuleType

from helpers import jobs
from helpers.models import ModelShape
from helpers.models.gpu import seeing
from helpers.models.methods import METHODS as RECORDS
from helpers.models.stored import for_all_readers
from helpers.models.templates import hand_on
from helpers.quantize import check
from helpers.show import bars
from helpers.workspace import write_text


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
    # It stands in the output folder, because GPTQModel writes a folder of logs where it stands
    process = jobs.start("helpers.quantize", job, log, {**environment, **seeing(1)}, cwd=job["output"])
    try:
        with process:
            yield from jobs.messages(process)
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
    """Do the job."""
    jobs.die_with_parent()
    job, report = jobs.received(when_alone=jobs.end)
    methods[job["config"]["quant_method"]].make(job, report)
    finish(Path(job["model"]), Path(job["output"]))
    if "check_rows" in job:
        check.measure(job, report)
    jobs.end(0)  # GPTQModel's pools need seconds to wind down, and nothing is left to do


def finish(model: Path, work: Path) -> None:
    """Tokenizer and template as the 16-bit model has them, and a config.json that every reader understands."""
    hand_on(model, work)
    if (model / "generation_config.json").is_file():
        shutil.copyfile(model / "generation_config.json", work / "generation_config.json")
    settings = json.loads((work / "config.json").read_text(encoding="utf-8"))
    write_text(work / "config.json", json.dumps(for_all_readers(settings), indent=2) + "\n")
