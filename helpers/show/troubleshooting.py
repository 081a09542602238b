"""Real messages, what they mean here, and what to do; shown where an error ends a cell or a command.

>>> remedy(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))[:19]
'Lower batch_size an'
>>> remedy(KeyError("anything else")) is None
True
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

HELPERS = Path(__file__).resolve().parent.parent
STOPPED = "stopped: run this cell again, and what was finished before is taken as it is"


class Trouble(NamedTuple):
    """A message as it is shown, as a regular expression to know it by, its cause, what to do, where it is discussed."""

    message: str
    pattern: str
    cause: str
    remedy: str
    source: str = ""


TROUBLES = (
    Trouble(
        "Your session crashed after using all available RAM",
        r"using all available RAM|Killed$",
        "Something held a whole 16-bit 7B: 14.5 GB in 12.7 GB.",
        "Use these notebooks' merge and GPTQ, which hold one tensor or layer at a time; close other notebooks of the "
        "session; then Runtime > Restart session and run this notebook from the top: finished stages are not repeated.",
        "unsloth#1860, peft#1939",
    ),
    Trouble(
        "No module named 'trl'",
        r"No module named '(?:trl|gptqmodel|pcre|tokenicer|device_smi|logbar|defuser)'",
        "Packages that ask for more than they use are not in requirements.txt.",
        "pip install --no-deps -r requirements/trl.txt -r requirements/gptq.txt, in the repository's folder.",
    ),
    Trouble(
        "CUDA out of memory",
        r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "The step needs more VRAM than is free; an interrupted cell may hold a model too.",
        "Lower batch_size and raise accumulation as much, or lower seq_len, or set checkpointing='all'; "
        "then Runtime > Restart session, since Python may hold the failed step's memory.",
    ),
    Trouble(
        "Cannot connect to GPU backend / You cannot currently connect to a GPU due to usage limits in Colab",
        r"connect to (?:a )?GPU|GPU backend",
        "The free GPU hours of these days are used up.",
        "Wait (up to a day), or open the notebook in Kaggle: checkpoints in Drive are continued from later.",
        "Colab FAQ",
    ),
    Trouble(
        "No CUDA GPUs are available",
        r"No CUDA GPUs are available|Found no NVIDIA driver|needs a GPU|has no GPU that PyTorch sees",
        "The runtime has no GPU.",
        "Runtime > Change runtime type > T4 GPU, then run from the top.",
    ),
    Trouble(
        "_amp_foreach_non_finite_check_and_unscale_cuda not implemented for 'BFloat16'",
        r"non_finite_check_and_unscale_cuda",
        "trl casts the adapters of a 4-bit model to bf16, which fp16's loss scaling cannot unscale.",
        "Build the trainer with helpers.finetune, which casts them to fp32.",
        "trl#4901",
    ),
    Trouble(
        "Found an incompatible version of torchao. Found version 0.10.0, but only versions above 0.16.0 are supported",
        r"incompatible version of torchao",
        "PEFT meets the image's torchao as soon as it wraps a layer that is not quantized.",
        "Open models with helpers.finetune and helpers.inference, which mind it; or pip uninstall -y torchao, restart.",
        "Soup#389",
    ),
    Trouble(
        "Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1",
        r"Virtual pool .* requests",
        "GPTQModel counts too few workers on two cores.",
        "Quantize with helpers.quantize, or set GPTQMODEL_CPU_WORKERS=2 before gptqmodel is imported.",
    ),
    Trouble(
        "numpy.dtype size changed, may indicate binary incompatibility / module was compiled using NumPy 1.x",
        r"numpy\.dtype size changed|compiled using NumPy|numpy\.core\.multiarray failed to import",
        "pip replaced the image's numpy in this session.",
        "Runtime > Disconnect and delete runtime, and run from the top: the set-up cell leaves numpy alone.",
        "colabtools#5578",
    ),
    Trouble(
        "No space left on device",
        r"No space left on device|os error 28",
        "The disk is full: base model 14.5 GB, merged model 14.5 GB, GPTQ 4 GB.",
        "Set free_base=True for the merge, delete ~/.cache/huggingface of other models, or runs you no longer need.",
    ),
    Trouble(
        "Input/output error / Transport endpoint is not connected (in /content/drive)",
        r"Input/output error|Transport endpoint is not connected|os error 5\b",
        "Drive's mount broke, which happens after many small writes.",
        "drive.flush_and_unmount(), then drive.mount('/content/drive', force_remount=True), and run the cell again; "
        "what was copied is not copied twice.",
        "colabtools#287",
    ),
    Trouble(
        "Storage quota has been exceeded (Drive)",
        r"[Ss]torage quota",
        "Drive is full; what was deleted uses the quota until the bin is emptied. Many writes at once show it too.",
        "Empty Drive's bin, wait a minute, run the cell again.",
        "colabtools#6051, transformers#14922",
    ),
    Trouble(
        "The file is not in Drive though it was written",
        r"(?!)",
        "Drive takes writes in later; a session that ends first loses them.",
        "drive.flush_and_unmount() before the session ends, and look at drive.google.com.",
        "colabtools#287",
    ),
    Trouble(
        "401 Client Error / 403 Client Error / Cannot access gated repo",
        r"40[13] Client Error|[Gg]ated[Rr]epo|gated repo|is gated",
        "The model's terms are not accepted, or there is no token.",
        "Accept them on the model's page, make a token with read access, and store it as the secret HF_TOKEN (the key "
        "in Colab's left margin, switch on notebook access); never in a cell.",
    ),
    Trouble(
        "TimeoutException: Requesting secret HF_TOKEN timed out",
        r"Requesting secret .* timed out|SecretNotFoundError|NotebookAccessError",
        "Colab's secrets answer only inside its page, and only after access was granted to this notebook.",
        "Open the key in the left margin, switch on notebook access, run the cell again in the browser.",
        "huggingface_hub#2686",
    ),
    Trouble(
        "429 Too Many Requests / Read timed out (huggingface.co)",
        r"\b429 Client Error|Too Many Requests|Read timed out|IncompleteRead",
        "The hub limits downloads without a token, or the connection broke.",
        "Set HF_TOKEN and run the cell again: a download goes on where it stopped.",
    ),
    Trouble(
        "Invalid Notebook (on GitHub)",
        r"Invalid Notebook|metadata\.widgets",
        "Saved widget state that GitHub cannot read.",
        "python notebooks/badges.py strips outputs and widget state.",
        "colabtools#5288",
    ),
    Trouble(
        "Sliders do not move, or only their text is shown",
        r"Error displaying widget|Failed to load model class",
        "ipywidgets 8 was installed over Colab's 7.7.",
        "Runtime > Disconnect and delete runtime; never pip install ipywidgets in Colab.",
        "colabtools#4525",
    ),
    Trouble(
        "loss is 0.0 or nan",
        r"loss became nan|loss.*\bnan\b",
        "Every label is masked, or the learning rate is too high for fp16.",
        "Look at the coloured tokens in notebook 02: some must be trained. Halve learning_rate.",
        "unsloth#1262, axolotl#2089",
    ),
    Trouble(
        "checkpoint-N is skipped: … / was made with other settings",
        r"checkpoint-\d+ is skipped|was made with other settings",
        "A write was cut off, or the run's settings changed since.",
        "Nothing for the first: the one before it is used. For the second set the values back, or resume='never'.",
    ),
    Trouble(
        "… has another checksum than when it was written",
        r"has another checksum|is not what was written",
        "A file of a finished stage changed: a copy that broke off, an edit, a failing disk.",
        "Run the notebook that the message names again.",
    ),
)


def remedy(error: BaseException | str | None) -> str | None:
    """What to do about an error or what caused it, or None when it is none of these."""
    from helpers.models import gpu  # not sooner: the set-up cell comes here before any package is installed

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        said = "" if isinstance(error, gpu.CameThrough) else str(error)  # that is lines of code, and messages told here
        for trouble in TROUBLES:
            if re.search(trouble.pattern, said):
                return trouble.remedy
        error = getattr(error, "__cause__", None) or getattr(error, "__context__", None)
    return None


def plain_errors() -> None:
    """In a notebook, show what a helper raises on purpose as its one sentence, and remedies of the above.

    That is a ValueError, a StorageError, and Stop, which is a KeyboardInterrupt wherever it is pressed. Other errors
    keep their traceback: they are bugs, and it is what a report of one needs. The cell fails in any case, so that "Run
    all" stops there. Outside IPython nothing happens.
    """
    running = sys.modules.get("IPython")
    shell = running.get_ipython() if running else None
    if shell is not None:
        shell.set_custom_exc((Exception, KeyboardInterrupt), sentence_or_traceback)


def sentence_or_traceback(shell, kind, error, trace, tb_offset=None):
    """IPython's hook: one sentence where a `raise` in helpers/ made the error or Stop was pressed, else the traceback.

    Below either what to do, where that is known.
    """
    from helpers.models import gpu
    from helpers.workspace import StorageError

    made, known = gpu.came_through(error)[-1], remedy(error)
    on_purpose = Path(made.filename).is_relative_to(HELPERS) and (made.line or "").startswith("raise ")
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, ValueError | StorageError) and on_purpose):
        lines = [f"\033[31m{kind.__name__}\033[0m: {str(error) or STOPPED}"]
    elif known or isinstance(error, ValueError):
        lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
    else:
        return shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
    lines += [f"What to do: {known}"] if known else []
    shell._showtraceback(kind, error, lines)
    return lines
