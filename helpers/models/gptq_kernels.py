"""Which of GPTQModel's kernels computes a 4-bit model on a GPU, and how the fastest is built once and kept.

At one token at a time a GPU waits for weights. ExLlamaV2's kernel reads 4 bits of each and unpacks them in registers:
4.56 ms a token for a 7B's shape on an H200, where NF4 takes 5.77 and 16 bits 6.09. Triton's and PyTorch's write the
whole matrix out in 16 bits first, for every token: 15.9 ms (summed time of the GPU's kernels;
data/measurements/h200_decode.csv). ExLlamaV2's has to be compiled by nvcc: 68 s on two cores, start and all.

Left alone, GPTQModel takes Machete on Hopper, which first downloads CUTLASS, or Marlin, which nvcc had not compiled on
two cores after 400 s.

A build lies where GPTQModel looks for it, in a folder named after the versions of PyTorch and CUDA, the GPU's
capability, the compiler's flags and the sources; a library that lies there is loaded without asking ninja. On a rented
machine a copy goes to the lasting folder, from where the next machine takes it.

    python -m helpers.models.gptq_kernels exllamav2      builds one of GPTQModel's extensions, and says why it cannot
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpers.models.opening import Opening, Say
from helpers.models.quiet import quiet
from helpers.profiles import ROOT
from helpers.workspace import checksum, lasting_store, write_text
from helpers.workspace.files import Torn, copy_verified
from helpers.workspace.versions import installed

EXLLAMA, TRITON, TORCH = "gptq_exllama_v2", "gptq_triton", "gptq_torch"
KERNELS = (EXLLAMA, TRITON, TORCH)
"""GPTQModel's kernels for a GPU that download nothing, the fastest first; the last knows every kind of model."""
NAMES = {EXLLAMA: "ExLlamaV2's kernel", TRITON: "Triton's kernel", TORCH: "PyTorch's operators"}
EXTENSION = "exllamav2"
"""GPTQModel's name for what has to be compiled."""
BUILD_LIMIT_S = 300.0


def opening(config: dict, best: Any, device: str, say: Say = print) -> Opening:
    """How transformers opens a GPTQ model here. config: its config.json; best: what other models compute in."""
    os.environ |= workers()
    if device != "cuda":
        return Opening(best)
    dtype = compute_dtype(config, best)
    options = gptq_kernel(config["quantization_config"], dtype, say=say)
    kernel = options["quantization_config"].backend
    return Opening(dtype, options, NAMES.get(kernel, kernel))


def workers() -> dict[str, str]:
    """What GPTQModel's environment must say before it is imported: two CPU workers, unless somebody said otherwise.

    With its default on two cores, which is one worker, its loader finds no thread for itself and nothing starts
    (seen with 7.5 to 7.7).
    """
    return {"GPTQMODEL_CPU_WORKERS": os.environ.get("GPTQMODEL_CPU_WORKERS", "2")}


def environment() -> dict[str, str]:
    """What a process of its own needs to compile and run GPTQModel's kernels: workers, pip's ninja, this project."""
    return workers() | {
        "PATH": tools_path(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def gptq_kernel(
    settings: dict, dtype: Any, device: str = "cuda", kernels: tuple[str, ...] = KERNELS, say: Say = print
) -> dict[str, Any]:
    """What from_pretrained needs to compute a GPTQ model on a GPU by the first of `kernels` that can be had.

    settings: quantization_config of the model's config.json. The last of `kernels` is taken unasked. Says in a
    sentence why it is not the fastest, and what that costs. The first call on a machine may compile for a minute
    (`make_ready`).
    """
    from transformers import GPTQConfig

    reasons = {}
    # Each is asked whether it knows these bits and groups, and whether it can be had here, which may mean a build.
    for kernel in kernels[:-1]:
        if not (reason := why_not(kernel, settings, dtype, device, say)):
            break
        reasons[kernel] = reason
    else:
        kernel = kernels[-1]
    if reasons:
        why = "; ".join(f"{NAMES.get(name, name)} cannot be had: {reason}" for name, reason in reasons.items())
        cost = "every matrix is unpacked for every token, some three times the time of ExLlamaV2's for one answer"
        say(f"The GPTQ model is computed by {NAMES.get(kernel, kernel)}: {cost} ({why}).")
    return {"quantization_config": GPTQConfig(bits=settings["bits"], backend=kernel)}


def compute_dtype(config: dict, best: Any) -> Any:
    """fp16 for a GPTQ model that is stored in fp16, also where the GPU computes in bf16 (best); else best.

    ExLlamaV2 multiplies in fp16: bf16 around it would be two conversions more a matrix and 8 significant bits instead
    of 11, and quantize's check of the model was in fp16. A model that is stored in bf16 may need bf16's range, and
    keeps it.
    config: the model's config.json.
    """
    import torch

    return torch.float16 if str(config.get("dtype") or config.get("torch_dtype")) == "float16" else best


def why_not(kernel: str, settings: dict, dtype: Any, device: str, say: Say = print) -> str:
    """Why a kernel of GPTQModel cannot compute this kind of model here, in a few words; "" when it can."""
    import torch

    asked = {
        "bits": settings["bits"],
        "group_size": settings.get("group_size", 128),  # these three as transformers reads them
        "desc_act": settings.get("desc_act", False),
        "sym": settings.get("sym", True),
    }
    try:
        # Imported here, as it takes seconds and prints a banner: only who opens a GPTQ model pays for it
        with quiet():
            from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
            from gptqmodel.utils.importer import hf_select_quant_linear_v2
        if kernel == EXLLAMA:
            knows, _ = ExllamaV2Linear._validate(
                **asked, pack_dtype=torch.int32, dtype=dtype, dynamic=settings.get("dynamic")
            )
            if not knows:
                return f"it does not know {asked['bits']} bits in groups of {asked['group_size']} in {dtype}"
            if trouble := make_ready(EXTENSION, device, say=say):
                return trouble
            # beside room to unpack one matrix the library takes 0.9 GiB for a 7B that no kernel is ever given
            ExllamaV2Linear.scratch_space_fixed = ExllamaV2Linear.temp_dq_size
        if kernel == TRITON and not (shutil.which("gcc") or shutil.which("clang")):
            return "there is no C compiler"
        with quiet():
            hf_select_quant_linear_v2(
                **asked,
                format=settings.get("checkpoint_format", "gptq"),
                quant_method="gptq",
                dtype=dtype,
                device_map={"": device},
                backend=kernel,
                pack=False,
            )
    except Exception as error:  # whatever goes wrong with a kernel, the next one is tried
        return first_line(error)
    return ""


def first_line(error: object) -> str:
    """A library's complaint, as far as a sentence has room for it.

    >>> first_line("<class 'gptqmodel.tritonv2.TritonV2Linear'> does not support device: cpu")
    'it does not support device: cpu'
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return re.sub(r"<class '[^']+'>", "it", line)[:160]


# ---- the build: found, fetched or made -------------------------------------------------------------------------------


def make_ready(
    name: str, device: str = "cuda", store: Path | None = None, limit_s: float = BUILD_LIMIT_S, say: Say = print
) -> str:
    """Load one of GPTQModel's compiled extensions into this process; returns why that cannot be, "" when it is done.

    Taken from this machine's cache, else from the lasting folder (store; default: Drive's where it is mounted), else
    compiled in a process of its own, which ends after limit_s seconds at the latest. What lies anywhere is loaded only
    when it has the checksum that it was built with: a library that was cut short ends the process that opens it. A
    build that failed is not tried again on this machine.
    """
    import torch

    with quiet():
        from gptqmodel.extension import _extension_for_name

        extension = _extension_for_name(name)
    if extension._ops_available():
        return ""
    if extension.requires_cuda and (device == "cpu" or not torch.cuda.is_available()):
        return "it needs a GPU"
    # Three places, the nearest first: this machine's cache, the lasting folder, a compiler.
    library = extension.build_root() / f"{extension.name}.so"
    kept = lasting_folder(name, library.parent.name, store)
    if is_whole(library) and not open_library(library):
        return ""
    if kept and fetch(kept / library.name, library, say) and not open_library(library):
        return ""
    failed = library.with_suffix(".failed")
    if failed.is_file():
        return f"{failed.read_text(encoding='utf-8').strip()}; delete {failed} to build it again"
    if missing := missing_tools(extension.requires_cuda):
        return missing
    say(
        f"Building the 4-bit kernel ({name}): about a minute, once; kept in {kept or library.parent}. "
        f"After {limit_s:.0f} s a slower one is taken."
    )
    started = time.monotonic()
    trouble = build(name, library, limit_s)
    if not trouble:
        trouble = open_library(library)
    if trouble:  # written down, so that the next model does not wait five minutes for the same answer
        library.parent.mkdir(parents=True, exist_ok=True)
        write_text(failed, trouble + "\n")
        return trouble
    write_note(library, round(time.monotonic() - started, 1))
    if kept:
        keep(library, kept / library.name, say)
    return ""


def lasting_folder(name: str, fingerprint: str, store: Path | None = None) -> Path | None:
    """Where a build is kept for the next machine: a folder named after all that it depends on; None without one.

    fingerprint is GPTQModel's, of PyTorch, CUDA, capability, flags and sources.
    """
    store = store or lasting_store()
    if store is None:
        return None
    python = "".join(platform.python_version_tuple()[:2])
    version = installed(("gptqmodel",)).get("gptqmodel", "")
    folder = f"{name}-gptqmodel{version}-python{python}-{platform.machine()}-{fingerprint}"
    return store / "mistral-t4-recipes" / "gptq-kernels" / folder


def open_library(library: Path) -> str:
    """Load a shared library's operators into PyTorch; returns why that fails, or ""."""
    import torch

    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return first_line(error)
    return ""


def note_of(library: Path) -> Path:
    """The file beside a library that holds its checksum."""
    return library.with_suffix(".json")


def write_note(library: Path, build_s: float) -> None:
    """Checksum, size, and what it was built with."""
    made_with = installed(("torch", "gptqmodel")) | {"python": platform.python_version(), "build_s": build_s}
    about = {"sha256": checksum(library), "size_bytes": library.stat().st_size, "made_with": made_with}
    write_text(note_of(library), json.dumps(about, indent=1))


def is_whole(library: Path) -> bool:
    """Whether a library has the checksum that its note says. Raises OSError when it cannot be read."""
    if not (library.is_file() and note_of(library).is_file()):
        return False
    try:
        return json.loads(note_of(library).read_text(encoding="utf-8"))["sha256"] == checksum(library)
    except (ValueError, KeyError, TypeError):
        return False


def fetch(source: Path, library: Path, say: Say) -> bool:
    """Copy a kept build here, under its name only when it is whole; says what hinders it. True when it is here."""
    arriving = library.with_name(library.name + ".arriving")
    try:
        if not is_whole(source):
            return False
        note = json.loads(note_of(source).read_text(encoding="utf-8"))
        copy_verified(source, arriving, note["sha256"])
    except (OSError, Torn) as error:
        arriving.unlink(missing_ok=True)
        say(f"The kernel kept in {source.parent} could not be fetched ({error}): it is built again.")
        return False
    arriving.replace(library)
    write_text(note_of(library), json.dumps(note, indent=1))
    return True


def keep(library: Path, target: Path, say: Say) -> None:
    """Copy a build to the lasting folder, its note last; a copy that fails is said, and ends nothing."""
    try:
        note_of(target).unlink(missing_ok=True)
        copy_verified(library, target, checksum(library))
        copy_verified(note_of(library), note_of(target), checksum(note_of(library)))
    except (OSError, Torn) as error:
        say(f"The kernel could not be kept in {target.parent} ({error}): the next machine builds it again.")


def missing_tools(for_cuda: bool) -> str:
    """Which of the tools that compile an extension is not here; "" when all are."""
    from gptqmodel.utils.cpp import _nvcc_path

    path = tools_path()
    if for_cuda and _nvcc_path() is None:
        return "there is no nvcc, CUDA's compiler, here"
    if not shutil.which("ninja", path=path):
        return "there is no ninja: pip install ninja"
    compiler = os.environ.get("CXX", "c++")
    return "" if shutil.which(compiler, path=path) else f"there is no C++ compiler {compiler}"


def tools_path() -> str:
    """PATH with the folder of this Python, where pip puts ninja also for an environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def build(name: str, library: Path, limit_s: float) -> str:
    """Compile an extension in a process of its own, at most limit_s seconds; returns why that failed, or "".

    The process loads what lies there already, or what it built. A library that was cut short by an earlier end ends it
    too, by a signal, and is then built anew.
    """
    # In another process: a library that was cut short ends whoever loads it by a signal, a notebook too.
    status, complaint = run_builder(name, limit_s)
    if status < 0 and library.is_file() and not complaint:
        library.unlink()
        status, complaint = run_builder(name, limit_s)
    if status < 0:
        return complaint or f"its build was ended by signal {-status}"
    return f"it cannot be compiled: {complaint}" if status else ""


def run_builder(name: str, limit_s: float) -> tuple[int, str]:
    """Exit status and complaint of a process that builds and loads an extension; its compilers end with it."""
    jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.models.gptq_kernels", name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment() | {"MAX_JOBS": jobs},
            start_new_session=True,  # so that ninja and nvcc can be ended with it
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL, f"its build was not done after {limit_s:.0f} s"
        finally:  # at the limit, and when the notebook's cell is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    if status <= 0:
        return status, ""
    return status, first_line(next((line for line in lines if "error:" in line.lower()), "".join(lines[-1:])))


def main(name: str) -> int:
    """Build and load one extension; the compiler's complaint goes to standard output."""
    from gptqmodel import extension

    try:
        extension.load(name)
    except RuntimeError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
