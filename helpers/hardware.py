"""GPUs and hosts: a table of facts, and a probe of this machine.

>>> t4 = machine("t4")
>>> t4.vram_gib, round(t4.allocator_gib, 2), t4.gpu.bf16_tflops
(14.56, 14.42, 0.0)
"""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

GIB = 2**30
KAGGLE_WORKING = Path("/kaggle/working")
KAGGLE_KEEPS_GIB = 20e9 / GIB
"""What that folder may hold; the disk itself shows more (Kaggle's own first cell of a notebook says so)."""
SMALLEST_7B_GIB = 6.0
"""VRAM in which the 7B's profile trains as it is, a little room included. No second arithmetic: the budget, which lies
above this file, gives it, and a test holds the two together."""


@dataclass(frozen=True)
class GPU:
    """What a GPU offers. Rates are the makers' dense matrix rates with 32-bit accumulation, in TFLOP/s."""

    name: str
    vram_gib: float
    """What CUDA reports as total: less than the box says."""
    capability: tuple[int, int]
    fp16_tflops: float
    bf16_tflops: float
    """0 where there is no hardware for it (capability below 8)."""
    bandwidth_gb_s: float
    """10^9 bytes a second, as the makers give it."""
    context_gib: float = 0.40
    """CUDA context and loaded kernels of a training process, outside of PyTorch's allocator."""
    efficiency: float = 0.40
    """Share of the matrix rate that a 7B's products reach. Measured for T4 and H200 (budget/hours.py), else a guess."""
    bandwidth_share: float = 0.60
    """Share of the bandwidth that elementwise kernels and dequantization reach; measured where efficiency is."""
    link_gb_s: float = 10.0
    """10^9 bytes a second from one GPU of a machine to another. Through PCIe and host memory it is a guess; NVLink's is
    about two thirds of what the makers give for one direction, as NCCL reaches."""
    count: int = 1
    """GPUs of this kind in the machine; a run uses as many as `gpus` says."""
    has_kernels: bool = True
    """Whether PyTorch has kernels for it: the wheels that people get by default in the tables, the installed one's own
    list in a probe."""

    @property
    def has_flash(self) -> bool:
        """Whether SDPA has its flash kernel: compute capability 8 and above."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Host:
    """The machine around the GPU."""

    name: str
    ram_gib: float
    disk_gib: float
    """Free for a run, and for what is downloaded."""
    cpus: int
    session_h: float | None = None
    """After so many hours the machine and its disk are gone; None: it stays."""
    download_mb_s: float = 60.0
    """10^6 bytes a second from a model hub."""
    kept_gib: float | None = None
    """What may be written into the run's folder, where that is less: in /kaggle/working. Downloads lie elsewhere."""


@dataclass(frozen=True)
class Machine:
    """A host with a GPU, or without one."""

    gpu: GPU | None
    host: Host
    free_vram_gib: float | None = None
    """Less than the GPU's, when others use it too (a probe fills it in)."""

    @property
    def name(self) -> str:
        """How reasons speak of it: "Tesla T4", or the host where there is no GPU."""
        return self.gpu.name if self.gpu else self.host.name

    @property
    def vram_gib(self) -> float:
        """What one process may take, its CUDA context included; 0 without a GPU."""
        if self.gpu is None:
            return 0.0
        return self.gpu.vram_gib if self.free_vram_gib is None else min(self.free_vram_gib, self.gpu.vram_gib)

    @property
    def allocator_gib(self) -> float:
        """What is left for PyTorch's allocator."""
        return max(self.vram_gib - self.gpu.context_gib, 0.0) if self.gpu else 0.0

    @property
    def unusable(self) -> str:
        """Why PyTorch cannot compute on this GPU, and what mends it; "" where it can, or there is none."""
        if self.gpu is None or self.gpu.has_kernels:
            return ""
        major, minor = self.gpu.capability
        return (
            f"this PyTorch has no kernels for the {self.gpu.name}'s compute capability {major}.{minor}: take a GPU of "
            "7.5 or above (on Kaggle: T4 x2), or install a build of PyTorch for CUDA 12.6, the last with 5.0 to 7.0"
        )


# PyTorch's wheels for CUDA 12.8 and later have nothing for Pascal, and since torch 2.11 nothing for Volta; those for
# CUDA 12.6 still had both then (pytorch#172352). Colab's torch 2.11 is built for 12.8.
OLDEST_KERNELS = (7, 5)

# Rates and bandwidths: the makers' data sheets (NVIDIA T4, P100, L4, L40S, A6000, A100, H100, H200; GA102, AD102 and
# GB202 white papers,
# whose "FP16 with FP32 accumulate" is what cuBLAS uses). Total memory: torch.cuda.get_device_properties on each.
# T4 memory and context: measured, fitcheck's rows and GPTQModel#1486. H200's context: our rows.
GPUS = {
    "t4": GPU("Tesla T4", 14.56, (7, 5), 65.0, 0.0, 320, context_gib=0.14, efficiency=0.21, link_gb_s=5.5),
    "p100": GPU("Tesla P100", 15.89, (6, 0), 18.7, 0.0, 732, context_gib=0.25, efficiency=0.50, has_kernels=False),
    "v100": GPU("Tesla V100", 15.77, (7, 0), 112.0, 0.0, 900, context_gib=0.30, has_kernels=False),
    "v100-32": GPU("Tesla V100 32 GB", 31.74, (7, 0), 112.0, 0.0, 900, context_gib=0.30, has_kernels=False),
    "l4": GPU("NVIDIA L4", 22.03, (8, 9), 121.0, 121.0, 300, context_gib=0.25),
    "a10g": GPU("NVIDIA A10G", 22.06, (8, 6), 70.0, 70.0, 600, context_gib=0.25),
    "a6000": GPU("RTX A6000", 47.53, (8, 6), 154.8, 154.8, 768, context_gib=0.25),
    "l40s": GPU("NVIDIA L40S", 44.39, (8, 9), 362.1, 362.1, 864, context_gib=0.35),
    "a100-40": GPU("NVIDIA A100 40 GB", 39.39, (8, 0), 312.0, 312.0, 1555, link_gb_s=200.0),
    "a100-80": GPU("NVIDIA A100 80 GB", 79.15, (8, 0), 312.0, 312.0, 2039, link_gb_s=200.0),
    "rtx3060": GPU("GeForce RTX 3060", 11.75, (8, 6), 51.2, 51.2, 360, context_gib=0.25),
    "rtx3080": GPU("GeForce RTX 3080", 9.77, (8, 6), 59.5, 59.5, 760, context_gib=0.25),
    "rtx3090": GPU("GeForce RTX 3090", 23.68, (8, 6), 71.0, 71.0, 936, context_gib=0.25),
    "rtx4070": GPU("GeForce RTX 4070", 11.72, (8, 9), 58.3, 58.3, 504, context_gib=0.25),
    "rtx4090": GPU("GeForce RTX 4090", 23.64, (8, 9), 165.2, 165.2, 1008, context_gib=0.35),
    "rtx5090": GPU("GeForce RTX 5090", 31.36, (12, 0), 209.5, 209.5, 1792),
    "h100": GPU(
        "NVIDIA H100 80 GB",
        79.10,
        (9, 0),
        989.0,
        989.0,
        3350,
        context_gib=0.81,
        efficiency=0.60,
        bandwidth_share=0.33,
        link_gb_s=300.0,
    ),
    "h200": GPU(
        "NVIDIA H200",
        139.72,
        (9, 0),
        989.0,
        989.0,
        4800,
        context_gib=0.81,
        efficiency=0.60,
        bandwidth_share=0.33,
        link_gb_s=300.0,
    ),
}
SEVERAL = {"2xt4": (2, "t4"), "2xrtx3090": (2, "rtx3090"), "8xh100": (8, "h100")}
GPUS |= {name: replace(GPUS[one], count=count) for name, (count, one) in SEVERAL.items()}
ALIASES = {"a100": "a100-40", "kaggle": "2xt4", "colab": "t4", "3060": "rtx3060", "3080": "rtx3080"}
ALIASES |= {"a100-40gb": "a100-40", "a100-80gb": "a100-80"}
ALIASES |= {"3090": "rtx3090", "4070": "rtx4070", "4090": "rtx4090", "5090": "rtx5090", "rtxa6000": "a6000"}
ALIASES |= {"v100-16": "v100", "v100-32gb": "v100-32"}

# Colab: colabtools#4134 (2 cores, 12.7 GB) and Colab's FAQ (12 h); its disk differs, so the figure is on the safe side.
# Kaggle: its documentation (30 GB RAM, 12 h a session, about 57 GiB free in /kaggle/temp, where runs lie).
HOSTS = {
    "colab": Host("free Colab", 12.67, 60.0, 2, session_h=12.0, download_mb_s=100.0),
    "kaggle": Host("Kaggle", 30.0, 57.0, 4, session_h=12.0, download_mb_s=100.0),
    "colab-pro": Host("Colab Pro", 51.0, 150.0, 8, session_h=24.0, download_mb_s=100.0),
    "laptop": Host("laptop", 16.0, 100.0, 8, download_mb_s=12.0),
    "workstation": Host("workstation", 64.0, 500.0, 16, download_mb_s=60.0),
    "server": Host("server", 256.0, 1000.0, 32, download_mb_s=200.0),
}
USUAL_HOST = {"t4": "colab", "2xt4": "kaggle", "p100": "kaggle", "l4": "colab-pro", "a100-40": "colab-pro"}
USUAL_HOST |= {
    "v100": "server",
    "v100-32": "server",
    "l40s": "server",
    "a10g": "server",
    "a100-80": "server",
    "h100": "server",
    "h200": "server",
}
USUAL_HOST |= {"8xh100": "server"}


def machine(gpu: str, host: str | None = None) -> Machine:
    """A machine from the tables; without a host, the one where people meet this GPU. "cpu" and "none" have no GPU.

    With a number in front it has several: 2xt4, 4xa100-80.

    Raises ValueError naming what there is.

    >>> machine("4090").host.name, machine("cpu").vram_gib
    ('workstation', 0.0)
    """
    name = gpu.lower().replace(" ", "").replace("_", "-")
    count, times, one = name.replace("×", "x").partition("x")
    if times and count.isdigit() and int(count) > 0:
        one = ALIASES.get(one, one)
        name = f"{count}x{one}"
        if one in GPUS and name not in GPUS:
            return replace(machine(one, host), gpu=replace(GPUS[one], count=int(count)))
    name = ALIASES.get(name, name)
    if name not in GPUS and name not in ("cpu", "none"):
        raise ValueError(f"gpu must be auto, none, {', '.join(GPUS)}, not {gpu!r}")
    if host is not None and host not in HOSTS:
        raise ValueError(f"host must be one of {', '.join(HOSTS)}, not {host!r}")
    usual = "laptop" if name not in GPUS else USUAL_HOST.get(name, "workstation")
    return Machine(GPUS.get(name), HOSTS[host or usual])


def probe(folder: Path | str = ".") -> Machine:
    """This machine: its first GPU with the VRAM that is free now, the RAM that is free, the disk under folder.

    Works without a GPU and without torch; with torch, PyTorch's own numbers are used.
    """
    gpu, free = probe_gpu()
    in_colab = bool(os.environ.get("COLAB_RELEASE_TAG"))
    in_kaggle = bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE"))
    known = HOSTS["colab" if in_colab else "kaggle" if in_kaggle else "laptop"]
    kept = in_kaggle and Path(folder).absolute().is_relative_to(KAGGLE_WORKING)
    host = replace(
        known,
        kept_gib=max(KAGGLE_KEEPS_GIB - used_gib(KAGGLE_WORKING), 0.0) if kept else None,
        name=known.name if in_colab or in_kaggle else "this machine",
        ram_gib=free_ram_gib(),
        disk_gib=shutil.disk_usage(existing(Path(folder))).free / GIB,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        download_mb_s=known.download_mb_s if in_colab or in_kaggle else 30.0,
    )
    return Machine(gpu, host, free)


def used_gib(folder: Path) -> float:
    """What lies under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / GIB


def describe(machine: Machine) -> list[tuple[str, str]]:
    """(what, value) of a machine, for a table.

    >>> describe(machine("t4"))[0]
    ('GPU', 'Tesla T4')
    """
    gpu, host = machine.gpu, machine.host
    rows = [("GPU", "none: the profile tiny runs on the CPU")]
    if gpu:
        major, minor = gpu.capability
        bf16 = "bf16" if gpu.bf16_tflops else "fp16, which needs loss scaling: no bf16 hardware"
        rows = [
            (
                "GPU",
                gpu.name
                if gpu.count == 1
                else f"{gpu.count} × {gpu.name}, of which a run uses one unless gpus says more",
            ),
            *([("of no use here", machine.unusable)] if machine.unusable else []),
            ("VRAM", f"{machine.vram_gib:.2f} of {gpu.vram_gib:.2f} GiB free"),
            ("of which CUDA itself takes", f"{gpu.context_gib:.2f} GiB"),
            ("compute capability", f"{major}.{minor}"),
            ("16 bits", bf16),
            ("attention", "flash" if gpu.has_flash else "memory-efficient: no flash kernel below 8.0"),
        ]
    session = "no limit" if host.session_h is None else f"ends after {host.session_h:.0f} h at most, its disk with it"
    return [
        *rows,
        ("host", host.name),
        ("RAM free", f"{host.ram_gib:.1f} GiB"),
        ("disk free", f"{host.disk_gib:.1f} GiB"),
        *([("of which a run's folder may take", f"{host.kept_gib:.1f} GiB")] if host.kept_gib is not None else []),
        ("CPU cores", f"{host.cpus}"),
        ("session", session),
    ]


def suggested_profile(machine: Machine) -> str:
    """mistral-7b where the GPU can train it, tiny elsewhere.

    >>> suggested_profile(machine("t4")), suggested_profile(machine("p100")), suggested_profile(machine("none"))
    ('mistral-7b', 'tiny', 'tiny')
    """
    return "mistral-7b" if machine.vram_gib >= SMALLEST_7B_GIB and not machine.unusable else "tiny"


def existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def probe_gpu() -> tuple[GPU | None, float | None]:
    """The first GPU and its free GiB, from torch where it is installed, else from nvidia-smi; (None, None): no GPU.

    Free is also what this process's allocator has reserved and no tensor uses: the driver counts it as taken, but it
    is the next run's. Without it, a run that was stopped and is started again would be planned for a smaller GPU.
    """
    try:
        import torch

        if not torch.cuda.is_available():
            return None, None
        free, total = torch.cuda.mem_get_info(0)
        # The context of this very process is not free, but its run will not pay for it again.
        known = gpu_named(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0), total / GIB)
        allocated = torch.cuda.memory_allocated(0)
        free += torch.cuda.memory_reserved(0) - allocated
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(0)
        if share < 1:  # this process was given a part of the GPU
            free = min(free, share * total - allocated)
        free_gib = min(free / GIB + known.context_gib, total / GIB)
        found = has_kernels(known.capability, torch.cuda.get_arch_list())
        return replace(known, count=torch.cuda.device_count(), has_kernels=found), free_gib
    except ImportError:
        return probe_nvidia_smi()


def has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a PyTorch built for these (torch.cuda.get_arch_list) runs on a GPU.

    Machine code (sm_) runs on its generation from its minor version on, PTX (compute_) on all that came later.

    >>> has_kernels((8, 9), ["sm_80", "sm_90"]), has_kernels((7, 0), ["sm_75"]), has_kernels((12, 1), ["compute_90"])
    (True, False, True)
    """
    for kind, _, number in (name.partition("_") for name in built_for):
        digits = number.rstrip("af")  # sm_90a and the like
        built = (int(digits[:-1]), int(digits[-1])) if digits[:-1].isdigit() else (99, 0)
        if built <= capability and (kind == "compute" or (kind == "sm" and built[0] == capability[0])):
            return True
    return not built_for


def probe_nvidia_smi() -> tuple[GPU | None, float | None]:
    """The first GPU according to nvidia-smi; (None, None) when it is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    if not lines:
        return None, None
    name, total, free, capability = (part.strip() for part in lines[0].split(","))
    major, minor = capability.split(".")
    known = gpu_named(name, (int(major), int(minor)), int(total) / 1024)
    return replace(known, count=len(lines)), min(int(free) / 1024, known.vram_gib)


def gpu_named(name: str, capability: tuple[int, int], total_gib: float) -> GPU:
    """The table's GPU of that name and memory, or a careful guess at an unknown one from its generation.

    >>> gpu_named("NVIDIA A100-SXM4-80GB", (8, 0), 79.2).bandwidth_gb_s
    2039
    >>> gpu_named("Some GPU", (8, 6), 15.9).fp16_tflops
    50.0
    """
    words = name.lower().replace("-", " ").replace("rtx", "").split()
    alike = [known for key, known in GPUS.items() if key.split("-")[0].removeprefix("rtx") in words]
    if alike:
        nearest = min(alike, key=lambda known: abs(known.vram_gib - total_gib))
        return replace(nearest, vram_gib=min(total_gib, nearest.vram_gib) if nearest.name == "Tesla T4" else total_gib)
    rate = {6: 15.0, 7: 50.0, 8: 50.0, 9: 700.0}.get(capability[0], 100.0)
    bf16 = rate if capability >= (8, 0) else 0.0
    built, bandwidth = capability >= OLDEST_KERNELS, 300 if capability < (9, 0) else 3000
    return GPU(name, total_gib, capability, rate, bf16, bandwidth_gb_s=bandwidth, has_kernels=built)


def free_ram_gib() -> float:
    """RAM that a new process can take: what the kernel calls available, less where a container's limit is lower."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        available = min(available, max(int(limit.read_text()) - int(used.read_text()), 0))
    return available / GIB
