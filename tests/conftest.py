"""What several test files share: the eight notebooks, executed once."""

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch counts the cores, which the others use too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - before anything imports distutils, which it replaces and will not replace later
from filelock import FileLock

import helpers  # noqa: F401 - what it sets for PyTorch's threads must come before PyTorch

os.environ["RECIPES_PATIENCE_S"] = "0"  # what may pass is tried as often, without pauses; processes inherit it
ROOT = Path(__file__).resolve().parent.parent
FAKE_TOKEN = "hf_" + "NotARealTokenButShapedLikeOne"[:34].ljust(34, "x")


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) -> a folder that only one of pytest's processes makes; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def executed_run(once) -> Path:
    """The workspace of the eight notebooks on the tiny profile, with a fake hub token in the environment.

    Each notebook has a process and an empty home of its own and shares nothing but the workspace, as on one's own
    machine. In Colab each badge opens another machine, where not even that is shared: tests/notebooks/test_road.py.
    """
    return once("tiny", execute)


def execute(workspace: Path) -> None:
    """Run each notebook; a failure is an assertion with what it printed."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        home = workspace.with_name(f"home-{notebook.stem}")
        home.mkdir(exist_ok=True)
        command = ["notebooks/run_all.py", "--workspace", str(workspace), "--only", notebook.name]
        environment = os.environ | {"HOME": str(home), "HF_TOKEN": FAKE_TOKEN, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def fake_token() -> str:
    """The token in the environment of `executed_run`."""
    return FAKE_TOKEN


@pytest.fixture(scope="session")
def report(executed_run) -> dict:
    """report.json of the executed notebooks."""
    return json.loads((executed_run / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def gptq_model(once) -> Path:
    """The tiny model as notebook 04 quantizes it: 4 bit, group 128; calibrated with general text."""
    from helpers.config import QuantizeConfig
    from helpers.models import TINY
    from helpers.quantize import quantize

    settings = QuantizeConfig(calibration="general", calibration_tokens=192)
    return once("gptq", lambda folder: quantize(TINY, folder / "quantize", settings)) / "quantize"
