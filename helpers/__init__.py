"""Thin helpers behind the notebooks: each file is one idea, and each stage reads the folder that the last one wrote."""

import logging
import os

__version__ = "0.1.0"

# Read when PyTorch first allocates on a GPU: segments that grow leave fewer gaps, and the budget counts on it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# Said on import and of no use here: torchao without its CUDA parts, something that torchao calls and PyTorch will drop,
# and a bitsandbytes kernel for CPUs that is not installed.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
