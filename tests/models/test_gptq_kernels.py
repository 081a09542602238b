"""The kernel of a 4-bit model: the fastest that can be had, its build kept for the next machine, else a sentence."""

import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import helpers.models.gptq_kernels
from helpers.evaluate.cost import kernel_ms
from helpers.evaluate.report import text_table
from helpers.models.gptq_kernels import EXLLAMA, KERNELS, TORCH, TRITON, compute_dtype, gptq_kernel, why_not

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """#include <torch/csrc/stable/library.h>
void pack(StableIValue* stack, uint64_t inputs, uint64_t outputs) {}
STABLE_TORCH_LIBRARY(gptqmodel, m) { m.def("pack_block_cpu(int x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(gptqmodel, CompositeExplicitAutograd, m) { m.impl("pack_block_cpu", &pack); }
"""
"""An extension of GPTQModel under its own name, with so few headers that it compiles in two seconds, not in sixty."""
DRIVER = """
import json, os, sys
from pathlib import Path
from helpers.models.gptq_kernels import make_ready
import torch
import gptqmodel.utils.cpp

for line in sys.stdin:  # each step in a process of its own: operators cannot be unloaded
    step = json.loads(line)
    came, went = os.pipe()
    if os.fork() == 0:
        os.environ |= step["environment"]
        said = []
        answer = make_ready("pack_block_cpu", store=Path(step["store"]), limit_s=step["limit_s"], say=said.append)
        loaded = hasattr(torch.ops.gptqmodel, "pack_block_cpu")
        os.write(went, json.dumps({"answer": answer, "said": said, "loaded": loaded}).encode())
        os._exit(0)
    os.wait()
    os.close(went)
    print("STEP", os.read(came, 65536).decode(), flush=True)
    os.close(came)
"""
NO_TOOLS = {"PATH": "/nowhere", "CXX": "/bin/false"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A function that opens the extension on a machine: its name, what its environment has, the lasting folder."""
    place = tmp_path_factory.mktemp("machines")
    import gptqmodel

    shutil.copytree(Path(gptqmodel.__file__).parent, place / "site" / "gptqmodel")
    (place / "site" / "pack_block_cpu.cpp").write_text(SOURCE)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(place / "site"), str(ROOT)])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def opened(machine: str, store: Path, limit_s: float = 3600.0, **environment: str) -> dict:
        cache = {"GPTQMODEL_TORCH_EXTENSIONS_DIR": str(place / machine)}
        step = {"environment": cache | environment, "store": str(store), "limit_s": limit_s}
        process.stdin.write(json.dumps(step) + "\n")
        process.stdin.flush()
        line = next(line for line in process.stdout if line.startswith("STEP"))
        libraries = [*(place / machine).rglob("*.so")]
        return json.loads(line.removeprefix("STEP")) | {"libraries": libraries, "cache": place / machine}

    yield opened
    process.stdin.close()
    process.wait()


def test_examples_in_docstrings():
    assert doctest.testmod(helpers.models.gptq_kernels).failed == 0


def test_a_build_is_kept_and_the_next_machine_opens_it_without_a_compiler(machines, tmp_path):
    first = machines("first", tmp_path)
    assert first["answer"] == ""
    assert first["loaded"]
    (building,) = first["said"]
    assert "about a minute, once; kept in " + str(tmp_path) in building
    again = machines("first", tmp_path / "gone", **NO_TOOLS)
    assert (again["answer"], again["said"], again["loaded"]) == ("", [], True)
    (library,) = first["libraries"]
    os.utime(library, (0, 0))  # a copy's times say nothing to ninja: it is not asked
    second = machines("second", tmp_path, **NO_TOOLS)
    assert (second["answer"], second["said"], second["loaded"]) == ("", [], True)
    (copy,) = second["libraries"]
    assert copy.read_bytes() == library.read_bytes()

    (kept,) = tmp_path.rglob("*.so")
    assert f"-python{sys.version_info[0]}{sys.version_info[1]}-" in kept.parent.name
    assert library.parent.name in kept.parent.name  # the versions, flags and sources that GPTQModel names its folder by
    kept.write_bytes(kept.read_bytes()[:9000])  # a copy that Drive cut short would end the process that opens it
    third = machines("third", tmp_path, **NO_TOOLS)
    assert not third["loaded"]
    assert "there is no ninja" in third["answer"] or "it cannot be compiled" in third["answer"]  # ninja may be here
    assert third["libraries"] == []

    # a kill in the middle of linking leaves such a library in the cache too, and now nothing can be kept either
    library.write_bytes(library.read_bytes()[:9000])
    store = tmp_path / "drive"
    store.write_text("a file where the folder should be: every call to the system fails")
    mended = machines("first", store)
    assert mended["loaded"]
    assert "could not be kept in" in mended["said"][-1]


def test_a_build_that_fails_or_takes_too_long_says_why_and_is_not_tried_again(machines, tmp_path):
    failing = machines("failing", tmp_path, CXX="false")
    assert not failing["loaded"]
    assert "cannot be compiled" in failing["answer"]
    again = machines("failing", tmp_path)
    assert again["said"] == []
    assert "to build it again" in again["answer"]
    slow = machines("slow", tmp_path, limit_s=0.2)
    assert slow["answer"] == "its build was not done after 0 s"
    assert "After 0 s a slower one is taken" in slow["said"][0]
    assert not [*tmp_path.rglob("*.so")]


def test_each_kernel_that_cannot_be_had_is_named_with_its_reason_and_what_the_other_costs(capsys):
    four, three = {"bits": 4, "group_size": 128}, {"bits": 3, "group_size": 128}
    assert KERNELS == (EXLLAMA, TRITON, TORCH)
    assert why_not(EXLLAMA, three, torch.float16, "cuda").startswith("it does not know 3 bits")
    assert why_not(EXLLAMA, {"bits": 4, "group_size": 16}, torch.float16, "cuda")
    assert why_not(EXLLAMA, four, torch.float32, "cuda")
    assert why_not(EXLLAMA, four, torch.float16, "cpu") == "it needs a GPU"
    chosen = gptq_kernel(four, torch.float16, device="cpu")["quantization_config"]
    assert (chosen.bits, chosen.backend) == (4, TORCH)
    said = capsys.readouterr().out
    assert "computed by PyTorch's operators" in said
    assert "ExLlamaV2's kernel cannot be had: it needs a GPU" in said
    assert "Triton's kernel cannot be had: it does not support device: cpu" in said
    assert "three times" in said
    gptq_kernel(four, torch.float16, device="cpu", kernels=(TORCH,))
    assert capsys.readouterr().out == ""


def test_what_is_stored_in_fp16_computes_in_fp16_on_cards_with_bf16_too():
    assert compute_dtype({"dtype": "float16"}, torch.bfloat16) == torch.float16
    assert compute_dtype({"torch_dtype": "float16"}, torch.bfloat16) == torch.float16
    assert compute_dtype({"dtype": "bfloat16"}, torch.bfloat16) == torch.bfloat16
    assert compute_dtype({"dtype": "bfloat16"}, torch.float16) == torch.float16  # a T4 has no other


def test_gptqmodel_still_has_what_is_taken_from_it():
    from gptqmodel.extension import _extension_for_name
    from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear

    extension = _extension_for_name("exllamav2")
    assert extension.name == "gptqmodel_exllamav2_ops"
    assert extension.build_root().name == extension._cache_fingerprint()
    assert ExllamaV2Linear.temp_dq_size and ExllamaV2Linear.scratch_space_fixed


def test_gpu_time_a_token_counts_kernels_and_not_copies_beside_them():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [("gemm", cuda, 400.0), ("Memcpy HtoD (Pinned -> Device)", cuda, 900.0), ("aten::mm", cpu, 50.0)]
    events += [("Memcpy DtoD (Device -> Device)", cuda, 100.0)]
    assert kernel_ms(SimpleNamespace(name=n, device_type=t, device_time=us) for n, t, us in events) == 0.5
    assert "GPU a token, ms" in text_table({"gptq": {"gpu_ms_per_token": 4.57}})
    assert "4.57" in text_table({"gptq": {"gpu_ms_per_token": 4.57}})
