"""Triton's kernels without a GPU: they compile for the GPUs that people have, and agree with PyTorch's operations.

Both are done by compile_kernels.py in processes that have Triton; `make test` puts Colab's into .venv/triton.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import ROOT

TRITON = Path(sys.prefix) / "triton"
CAPABILITIES = ("75", "80", "89", "90")
SHARED_BYTES = 48 * 1024  # a block of threads gets so much on every GPU without asking for more

pytestmark = pytest.mark.skipif(
    not (TRITON / "triton").is_dir() and importlib.util.find_spec("triton") is None,
    reason="there is no Triton for this system; `make test` installs it on Linux x86-64",
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, list[dict]]:
    """What both processes say; they run side by side."""
    cache = tmp_path_factory.mktemp("triton")
    paths = [str(TRITON), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": str(cache)}
    tasks = {"compile": (CAPABILITIES, {}), "run": ((), {"TRITON_INTERPRET": "1"})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen(
            [sys.executable, "tests/finetune/compile_kernels.py", name, *words],
            cwd=ROOT,
            env=environment | more,
            **pipes,
        )
        for name, (words, more) in tasks.items()
    }
    said = {name: process.communicate() for name, process in started.items()}
    for name, process in started.items():
        assert process.returncode == 0, said[name][1]
    return {name: [json.loads(line) for line in out.splitlines()] for name, (out, _) in said.items()}


@pytest.mark.parametrize("capability", map(int, CAPABILITIES))
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(capability, lines):
    files = ("finetune/engine/kernels.py", "models/aqlm.py")
    source = "".join((ROOT / "helpers" / file).read_text(encoding="utf-8") for file in files)
    rows = [row for row in lines["compile"] if row["capability"] == capability]
    assert {row["kernel"] for row in rows} == set(re.findall(r"@triton.jit\n    def (\w+)", source))
    assert {row["dtype"] for row in rows} == ({"fp16"} if capability < 80 else {"fp16", "bf16"})
    for row in rows:
        assert row["machine_code_bytes"] > 0 and row["shared_bytes"] <= SHARED_BYTES, row
        assert row["bf16"] == (row["dtype"] == "bf16" and capability >= 80), row


def test_kernels_agree_with_pytorchs_operations(lines):
    assert len(lines["run"]) == 22
    for row in lines["run"]:
        assert row["finite"] and row["worst"] <= row["allowed"], row
