"""What several test files share: the eight notebooks, executed once."""

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch counts the cores, which the others use too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - before anything imports distutils, which it replaces and will not replace later
from filelock import FileLock

import helpers  # noqa: F401 - what it sets for PyTorch's threads must come before PyTorch

os.environ["RECIPES_PATIENCE_S"] = "0"  # what may pass is tried as often, without pauses; processes inherit it
ROOT = Path(__file__).resolve().parent.parent
LONG = (
    "evaluate/test_evaluate",  # with the eight notebooks, for which two other files would wait
    "notebooks/test_road",
    "quantize/test_quantize",
    "finetune/test_gpus",
    "models/test_families",
    "finetune/test_finetune",
    "test_merge",
    "workspace/test_checkpoints",
    "quantize/test_autogptq",
    "finetune/test_sharded",
    "models/test_gptq_kernels",
    "quantize/test_additive",
    "show/test_page_browser",
    "show/test_panel_browser",
    "evaluate/test_workers",
    "test_recipes",
)
"""Files of tests that take half a minute and more, the longest first."""
FAKE_TOKEN = "hf_" + "NotARealTokenButShapedLikeOne"[:34].ljust(34, "x")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first: none of them begins when the other processes have nothing left to do.

    pytest-xdist deals files out in this order with --no-loadscope-reorder; by itself it takes files of many tests
    first, and those that take longest have few.
    """
    places = {ROOT / "tests" / f"{name}.py": place for place, name in enumerate(LONG)}
    assert all(file.is_file() for file in places), "a file of LONG has another name now"
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


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
    """Run each notebook; a failure is its cell's own error. run_all.py as a command: tests/notebooks/test_road.py."""
    import run_all  # not sooner: papermill takes seconds

    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        home = workspace.with_name(f"home-{notebook.stem}")
        home.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patched:  # its kernel inherits the environment
            for name, value in {"HOME": str(home), "HF_TOKEN": FAKE_TOKEN, "HF_HUB_OFFLINE": "1"}.items():
                patched.setenv(name, value)
            run_all.run_all("tiny", workspace, [notebook.name])


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
