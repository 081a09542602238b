"""A free Colab's T4 around other hardware: the allocator's share, what the GPU says of itself, host memory, two cores.

`limit` holds a process to what a T4 computes with; `python` starts one that sees a T4 and nothing else, its children
too (t4_envelope/sitecustomize.py calls `pretend`), in a cgroup with a hard limit where the system lets us.
"""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

GIB = 2**30
TOTAL_GIB, ALLOCATOR_GIB = 14.56, float(os.environ.get("CAP_GIB", "14.42"))
"""What PyTorch sees of a T4, and what CUDA's context leaves of it for the allocator."""
HOST_BYTES, CORES = 12_700_000_000, "0,1"
GROUPS = {
    "cgroup": (Path("/sys/fs/cgroup/free-colab"), "memory.max"),
    "cgroup-v1": (Path("/sys/fs/cgroup/memory/free-colab"), "memory.limit_in_bytes"),
}


def limit() -> None:
    """Cap this process's allocator and switch off what compute capability 7.5 lacks: flash and cuDNN SDPA."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(allocator_share())
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


def fine_tuning_in_fp16():
    """This process limited, and helpers.finetune, which then computes in fp16 whatever the GPU (fp32 without one)."""
    import torch

    from helpers import finetune
    from helpers.finetune import base
    from helpers.models.loading import Precision

    limit()
    chosen = Precision(torch.float16 if torch.cuda.is_available() else torch.float32, "as on a T4")
    base.precision = lambda *_: chosen
    return finetune


def allocator_share() -> float:
    """What share of this GPU a T4's allocator is."""
    import torch

    if not torch.cuda.is_available():
        return 1.0
    return min(1.0, ALLOCATOR_GIB * GIB / torch.cuda.get_device_properties(0).total_memory)


def about(*packages: str) -> dict:
    """What is the same for every row of a process: the day, the real GPU, its cap and versions of what is there."""
    import torch

    from helpers.workspace.versions import installed

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"date": str(date.today()), "gpu": gpu, "cap_gib": ALLOCATOR_GIB} | installed(packages)


def pretend() -> None:
    """Let PyTorch say of the GPU that is there what it would of a T4; the allocator's limit comes from `python`."""
    import torch

    if not torch.cuda.is_available():
        return
    real_memory = torch.cuda.mem_get_info
    free, total = real_memory(0)
    others = total - free  # CUDA's own context, larger on newer GPUs, and other processes

    def free_and_total(device: int | None = None) -> tuple[int, int]:
        """Bytes that are free and all of a T4's, less what the process before this one holds on the real GPU."""
        free, total = real_memory(device)
        return max(int(ALLOCATOR_GIB * GIB) - (total - free - others), 0), int(TOTAL_GIB * GIB)

    from triton.runtime import driver

    driver.active.get_current_target()  # Triton compiles for the GPU that is there: it keeps what it asks with now
    torch.cuda.mem_get_info = free_and_total
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    torch.cuda.get_device_name = lambda device=None: "Tesla T4"
    torch.cuda.get_per_process_memory_fraction = lambda device=None: 1.0  # the real one's is of the real GPU
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def python(arguments: list[str], kind: str, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """A Python that sees a T4, on two cores, in the group of `host_limit`; options: of Popen."""
    paths = [str(HERE / "t4_envelope"), os.environ.get("PYTHONPATH", "")]
    allocator = f"expandable_segments:True,per_process_memory_fraction:{allocator_share():.5f}"
    seen = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTORCH_CUDA_ALLOC_CONF": allocator,
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
    }
    enter = f"echo $$ > {GROUPS[kind][0]}/cgroup.procs && " if kind in GROUPS else ""
    command = ["bash", "-c", f'{enter}exec taskset -c {CORES} "$0" "$@"', sys.executable, *arguments]
    return subprocess.Popen(command, env=os.environ | seen | (environment or {}), cwd=ROOT, **options)


# ---- a hard limit on host memory -------------------------------------------------------------------------------------


def host_limit(size_bytes: int = HOST_BYTES) -> str:
    """What can hold processes to so much here: a cgroup, which counts everything, else RLIMIT_DATA of each."""
    for kind, (folder, file) in GROUPS.items():
        with suppress(OSError):
            if kind == "cgroup" and (folder.parent / "cgroup.subtree_control").exists():
                (folder.parent / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir(exist_ok=True)
            if (folder / file).exists() and (folder / "cgroup.procs").exists():
                (folder / file).write_text(str(size_bytes))
                return kind
            folder.rmdir()
    print("no cgroup can be made here: only RLIMIT_DATA limits host memory, where a process sets it", flush=True)
    return "rlimit-data"


def enter(kind: str, size_bytes: int) -> None:
    """Put this process under the limit."""
    if kind in GROUPS:
        (GROUPS[kind][0] / "cgroup.procs").write_text(str(os.getpid()))
    elif kind == "rlimit-data":
        resource.setrlimit(resource.RLIMIT_DATA, (size_bytes, size_bytes))


def events(kind: str) -> dict[str, int]:
    """How often the limit took file cache back so far, and how many processes it killed."""
    if kind not in GROUPS:
        return {}
    folder = GROUPS[kind][0]
    if kind == "cgroup":
        counts = dict(line.split() for line in (folder / "memory.events").read_text().splitlines())
        return {"limit_reached": int(counts["max"]), "oom_kill": int(counts["oom_kill"])}
    killed = dict(line.split() for line in (folder / "memory.oom_control").read_text().splitlines())
    return {"limit_reached": int((folder / "memory.failcnt").read_text()), "oom_kill": int(killed.get("oom_kill", 0))}
