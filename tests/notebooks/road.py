"""The road: each notebook on a machine of its own, empty but for the recipes, and one folder, Drive, between them.

    road = Road(folder, base=model)            # folder/drive outlives every machine, folder/machine none
    for notebook in NOTEBOOKS:
        visit = road.visit(notebook, seed=3)   # Drive fails a quarter of first tries
        print(visit.status, visit.printed)

A machine is a copy of the recipes with its own home, temporary folder and runs/, as each Colab badge opens one. All
stand at the same path, as all of Colab's do, and none sees what another wrote anywhere but in Drive.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
import nbformat

from helpers.workspace.choices import PLAN

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = tuple(sorted(path.name for path in (ROOT / "notebooks").glob("0[1-6]_*.ipynb")))
"""Those of one run, each of which goes on where the one before it ended; 7 begins a run of its own."""
RECIPES = ("helpers", "notebooks", "data", "pyproject.toml", "requirements", "requirements.txt")
LEFT_OUT = shutil.ignore_patterns("measurements", "kernel-ipc*")  # and sockets of notebooks that run at this moment
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV")
SMALL_CARD = """

probe_without_card = probe


def probe(folder: Path | str = ".") -> Machine:
    gpu = replace(GPUS["t4"], vram_gib={vram_gib})
    return replace(probe_without_card(folder), gpu=gpu, free_vram_gib={vram_gib})
"""
"""A card with so little memory is decided for; computed is on the CPU, as PyTorch finds no card."""


@dataclass
class Visit:
    """One notebook on one machine: how its process ended, what it said, and its executed copy."""

    status: int
    said: str
    notebook: nbformat.NotebookNode | None

    @property
    def printed(self) -> str:
        """All text that the notebook shows."""
        outputs = [output for cell in self.notebook.cells for output in cell.get("outputs", [])]
        texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
        return "\n".join("".join(text) for text in texts)


def by_hand(form: Path, typed: dict[str, Any], moved: dict[str, Any]) -> None:
    """What somebody does in a notebook: type values into its form, move sliders of its panel before going on."""
    notebook = nbformat.read(form, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in typed.items():
        assert f"\n{name} = None" in parameters.source, f"{form.name} has no field {name}"
        parameters.source = parameters.source.replace(f"\n{name} = None", f"\n{name} = {value!r}")
    if moved:
        (shown,) = (place for place, cell in enumerate(notebook.cells) if "panel.panel(" in cell.source)
        moves = "\n".join(f"sliders.controls[{knob!r}].value = {value!r}" for knob, value in moved.items())
        notebook.cells.insert(shown + 1, nbformat.v4.new_code_cell(moves))
    nbformat.write(notebook, form)


@dataclass
class Road:
    """A Drive, and machines that come and go; what runs on them is the profile tiny, made smaller still.

    base: its model; rows: of each data file, so many; settings: what somebody has chosen before, as it lies in Drive.
    """

    folder: Path
    base: Path | None = None
    rows: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run.mkdir(parents=True)
        (self.run / PLAN).write_text(json.dumps({"profile": "tiny"} | self.settings), encoding="utf-8")

    @property
    def drive(self) -> Path:
        return self.folder / "drive"

    @property
    def run(self) -> Path:
        """The run's folder in Drive."""
        return self.drive / "mistral-t4-recipes" / "tiny"

    def fresh_machine(self, vram_gib: float | None) -> Path:
        """An empty machine with the recipes on it; the one before is gone. vram_gib: what its probe finds free."""
        machine = self.folder / "machine"
        shutil.rmtree(machine, ignore_errors=True)
        recipes = machine / "recipes"
        for name in ("home", "tmp", "recipes"):
            (machine / name).mkdir(parents=True)
        for name in RECIPES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, recipes / name, ignore=LEFT_OUT)
            else:
                shutil.copyfile(ROOT / name, recipes / name)
        if self.base is not None:
            shutil.rmtree(recipes / "data" / "tiny-mistral")
            shutil.copytree(self.base, recipes / "data" / "tiny-mistral")
        for name, count in self.rows.items():
            file = recipes / "data" / name
            file.write_text("".join(file.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8")
        if vram_gib is not None:
            with (recipes / "helpers" / "hardware.py").open("a", encoding="utf-8") as module:
                module.write(SMALL_CARD.format(vram_gib=vram_gib))
        return machine

    def visit(
        self,
        notebook: str,
        typed: dict[str, Any] | None = None,
        moved: dict[str, Any] | None = None,
        vram_gib: float | None = None,
        **injected,
    ) -> Visit:
        """Run one notebook on a fresh machine.

        typed: into its form, by parameter; moved: sliders, when its panel is shown. injected: faults in Drive, as
        `faults.settings` names them.
        """
        machine = self.fresh_machine(vram_gib)
        recipes = machine / "recipes"
        by_hand(recipes / "notebooks" / notebook, typed or {}, moved or {})
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= {"HOME": str(machine / "home"), "TMPDIR": str(machine / "tmp"), "HF_HUB_OFFLINE": "1"}
        environment |= {"RECIPES_LASTING": str(self.drive), "RECIPES_PATIENCE_S": "0"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if injected:
            environment |= faults.environment(self.drive, **injected)
        command = [sys.executable, "notebooks/run_all.py", "--only", notebook]
        done = subprocess.run(command, cwd=recipes, env=environment, capture_output=True, text=True)
        executed = recipes / "runs" / "tiny" / "notebooks" / notebook
        if executed.is_file():
            kept = self.folder / "executed" / f"{len(list(self.folder.glob('executed/*')))}_{notebook}"
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(executed, kept)
            return Visit(done.returncode, done.stdout + done.stderr, nbformat.read(kept, as_version=4))
        return Visit(done.returncode, done.stdout + done.stderr, None)
