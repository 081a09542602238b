"""What several test files share: the eight notebooks, executed once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - before anything imports distutils, which it replaces and will not replace later

import helpers  # noqa: F401 - what it sets for PyTorch's threads must come before PyTorch

os.environ["RECIPES_PATIENCE_S"] = "0"  # what may pass is tried as often, without pauses; processes inherit it
ROOT = Path(__file__).resolve().parent.parent
FAKE_TOKEN = "hf_" + "NotARealTokenButShapedLikeOne"[:34].ljust(34, "x")


@pytest.fixture(scope="session")
def executed_run(tmp_path_factory) -> Path:
    """The workspace of the eight notebooks on the tiny profile, with a fake hub token in the environment.

    Each notebook has a process and an empty home of its own and shares nothing but the workspace, as on one's own
    machine. In Colab each badge opens another machine, where not even that is shared: tests/notebooks/test_road.py.
    """
    workspace = tmp_path_factory.mktemp("runs") / "tiny"
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        home = tmp_path_factory.mktemp("home")
        command = ["notebooks/run_all.py", "--workspace", str(workspace), "--only", notebook.name]
        environment = os.environ | {"HOME": str(home), "HF_TOKEN": FAKE_TOKEN, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return workspace


@pytest.fixture(scope="session")
def fake_token() -> str:
    """The token in the environment of `executed_run`."""
    return FAKE_TOKEN


@pytest.fixture(scope="session")
def report(executed_run) -> dict:
    """report.json of the executed notebooks."""
    return json.loads((executed_run / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def gptq_model(tmp_path_factory) -> Path:
    """The tiny model as notebook 04 quantizes it: 4 bit, group 128; calibrated with general text."""
    from helpers.config import QuantizeConfig
    from helpers.models import TINY
    from helpers.quantize import quantize

    output = tmp_path_factory.mktemp("gptq") / "quantize"
    quantize(TINY, output, QuantizeConfig(calibration="general", calibration_tokens=192))
    return output
