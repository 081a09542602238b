"""On PYTHONPATH, every Python process sees a free T4 in place of the GPU that is there, its children too.

What compute capability 7.5 lacks is switched off (flash and cuDNN SDPA, bf16), names and sizes are a T4's. The
allocator's limit comes from PYTORCH_CUDA_ALLOC_CONF, host memory's from a cgroup: `whole_way.py` sets both.
"""

import torch

GIB = 2**30
TOTAL_GIB, ALLOCATOR_GIB = 14.56, 14.42
"""What PyTorch sees of a T4, and what CUDA's context leaves of it."""

if torch.cuda.is_available():
    real_memory = torch.cuda.mem_get_info

    def free_and_total(device: int | None = None) -> tuple[int, int]:
        """Bytes that are free and all of a T4's, less what the process before this one holds on the real GPU."""
        free, total = real_memory(device)
        return max(int(ALLOCATOR_GIB * GIB) - (total - free - OTHERS), 0), int(TOTAL_GIB * GIB)

    free, total = real_memory(0)
    OTHERS = total - free  # CUDA's own context, larger on newer GPUs, and other processes
    from triton.runtime import driver

    driver.active.get_current_target()  # Triton compiles for the GPU that is there: it keeps what it asks with now
    torch.cuda.mem_get_info = free_and_total
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    torch.cuda.get_device_name = lambda device=None: "Tesla T4"
    torch.cuda.get_per_process_memory_fraction = lambda device=None: 1.0  # the real one's is of the real GPU
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
