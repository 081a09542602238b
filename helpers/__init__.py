"""Thin helpers behind the notebooks. A stage reads folders that earlier stages wrote in the run's folder, and no more:

    prepare    reads conversations: a file, a folder, a zip, a hub dataset    writes prepare/: tokens with their mask
    finetune   reads prepare/ and the base                                    writes finetune/: adapter, log
    merge      reads finetune/ and the base                                   writes merge/: the model in 16 bits
    quantize   reads merge/, and prepare/ to calibrate                        writes quantize/: the model in 4 bits
    evaluate   reads the base, finetune/, merge/, quantize/, and prepare/     writes evaluate/: report, answers
    export     reads merge/, or what is to go as it is                        writes export/: GGUF or zip
    serve      reads any of these models                                      answers others, as OpenAI's API does

`budget` knows what each needs before it starts. `python -m helpers STAGE` is `cli`; notebooks begin in `setup`.
Imports go down only: cli, stages, then show, inference, budget, sources, then models, workspace, config and hardware.
"""

import logging
import os

__version__ = "0.1.0"

# Read when PyTorch first allocates on a GPU: segments that grow leave fewer gaps, and the budget counts on it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# Read when PyTorch starts its threads on a CPU. One that waits for the others spins for milliseconds by default and
# keeps the core from whoever it waits for: beside another program a small training takes ten times as long
# (tests/benchmarks/bench_threads.py). So it spins briefly, then sleeps, which costs nothing where it is alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Said on import and of no use here: torchao without its CUDA parts, something that torchao calls and PyTorch will drop,
# and a bitsandbytes kernel for CPUs that is not installed.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
