"""Models opened whatever their kind, and text out of them: batches, streams, chats.

A folder tells its kind by its files: adapter_config.json is a PEFT adapter, a GPTQ entry in config.json is a quantized
model, config.json alone is a plain one.

>>> from helpers.models import TINY
>>> kind(TINY)
'model'
"""

import contextlib
import gc
import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.config import RunConfig
from helpers.hub import snapshot
from helpers.models import hub_config, shape_from_config
from helpers.templates import Template, ends, load_tokenizer
from helpers.versions import forget_old_torchao

GIB = 2**30
ADAPTER, CONFIG = "adapter_config.json", "config.json"
KERNELS = ("gptq_triton", "gptq_torch")
"""GPTQModel's kernels for a GPU that need neither a download nor nvcc, the faster first; the last knows everything."""
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Loaded:
    """An open model with its tokenizer, and how it was opened."""

    model: Any
    tokenizer: Any
    kind: str
    """model, adapter or gptq."""
    how: str
    """Precision and reason, for the report."""
    path: str
    base: str
    """What an adapter stands on; else the same as path."""
    load_s: float

    @property
    def quantized(self) -> bool:
        """Whether its weights are below 16 bits."""
        return getattr(self.model.config, "quantization_config", None) is not None

    @property
    def context(self) -> int:
        """Tokens that the model's positions reach."""
        return self.model.config.max_position_embeddings


@dataclass(frozen=True)
class Generation:
    """One answer."""

    text: str
    tokens: int
    prompt_tokens: int
    ended: bool
    """True when the model said eos; False when max_new_tokens cut it off."""


def kind(name: str | Path) -> str:
    """model, adapter or gptq. A name that is no folder is taken for a hub id when it looks like one.

    Raises ValueError with one sentence when it is neither.
    """
    folder = Path(name)
    if (folder / ADAPTER).is_file():
        return "adapter"
    config = read_config(name)
    method = (config.get("quantization_config") or {}).get("quant_method")
    return "gptq" if method == "gptq" else "model"


def read_config(name: str | Path) -> dict:
    """config.json of a folder or a hub model. Raises ValueError with one sentence."""
    folder = Path(name)
    if (folder / CONFIG).is_file():
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            return config if isinstance(config, dict) else {}
        except ValueError:
            raise ValueError(f"{folder / CONFIG} is not JSON: make the model folder again") from None
    if folder.is_dir():
        raise ValueError(
            f"{folder} is not a model folder: it has neither {CONFIG} nor {ADAPTER}; "
            "name the folder that holds the model's safetensors"
        )
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "runs/", "data/")):
        return hub_config(str(name))
    raise ValueError(f"there is no model folder {name}: check the path, or give a hub id such as owner/name")


def base_of(adapter: Path, config: RunConfig) -> str:
    """The base that an adapter belongs to: what its configuration names, or the run's model when that moved.

    Of a hub model with a revision, which is the adapter's own or else the run's, the folder it was downloaded to.
    Raises ValueError when the adapter's configuration cannot be read.
    """
    try:
        settings = json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{Path(adapter) / ADAPTER} is not JSON: make the adapter again") from None
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if revision and named and not Path(named).exists() and not Path(named).is_absolute():
        return str(snapshot(named, revision))
    gone = not named or (Path(named).is_absolute() and not Path(named).is_dir())
    return pinned(config.model.model if gone else named, config)


def pinned(name: str | Path, config: RunConfig) -> str:
    """The run's own model, when it is on the hub and a revision is asked for, as the folder it was downloaded to.

    Any other name stays as it is. So everything that opens, measures or reads a model takes the same files.
    """
    asked = config.model.revision and str(name) == config.model.model and not Path(name).exists()
    return str(snapshot(str(name), config.model.revision) if asked else name)


def load(name: str | Path, config: RunConfig | None = None) -> Loaded:
    """Open a base or merged model, an adapter on its base, or a GPTQ model, on the GPU when there is one.

    On a CPU everything computes in float32. On a GPU below compute capability 8 in fp16, else in bf16; a 16-bit model
    whose weights do not fit the free VRAM beside a batch's keys and values is opened in NF4, and `how` says so.
    An adapter gets the base as its training saw it (config.model.weights, double_quant).
    Raises ValueError with one sentence for what is not a model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config or RunConfig()
    name = pinned(name, config)
    what = kind(name)
    source = base_of(Path(name), config) if what == "adapter" else str(name)
    read_config(source)
    dtype, placed = precision()
    quantization: dict[str, Any] = {}  # an explicit None would make from_pretrained forget that a GPTQ model is one
    how = f"{what} in {str(dtype).removeprefix('torch.')} on {placed}"
    if what == "adapter" and config.model.weights != "fp16":
        quantization = {"quantization_config": bitsandbytes_config(config, dtype)}
        how = f"base in {config.model.weights} as in training, adapter in {str(dtype).removeprefix('torch.')}"
    elif what == "model" and placed == "cuda" and (short := shortfall(source, config)):
        quantization = {"quantization_config": bitsandbytes_config(config.with_values(weights="nf4"), dtype)}
        how = f"nf4, because {short}"
    started = time.perf_counter()
    if what == "gptq":
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pools need two workers, also on two cores
        quantization = gptq_kernel(source, dtype) if placed == "cuda" else {}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": placed},
            attn_implementation=attention_kernel(config),
            **quantization,
        )
        if what == "adapter":
            from peft import PeftModel

            forget_old_torchao()
            model = PeftModel.from_pretrained(model, str(name))
        model.eval()
        tokenizer = open_tokenizer(name, config)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Loaded(model, tokenizer, what, how, str(name), source, time.perf_counter() - started)


def precision() -> tuple[Any, str]:
    """What to compute in, and where: float32 on a CPU, fp16 on a T4 (capability 7.5), bf16 from Ampere on."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32, "cpu"
    # torch.cuda.is_bf16_supported() counts emulation, and says True on a T4
    return (torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16), "cuda"


def attention_kernel(config: RunConfig) -> str:
    """The attention that training had: without grouped heads' materialised scores on a T4 unless the run chose so."""
    from helpers import attention

    return {"efficient": attention.register, "eager": lambda: "eager", "math": lambda: "sdpa"}[config.model.attention]()


def bitsandbytes_config(config: RunConfig, dtype: Any) -> Any:
    """The base's precision in training, for from_pretrained."""
    from transformers import BitsAndBytesConfig

    if config.model.weights == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.model.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def gptq_kernel(
    source: str | Path, dtype: Any, device: str = "cuda", kernels: tuple[str, ...] = KERNELS
) -> dict[str, Any]:
    """What from_pretrained needs to compute a GPTQ model on a GPU at once.

    Left alone, GPTQModel takes Machete on Hopper, which first downloads CUTLASS, and fails where nothing can be
    downloaded; Marlin is compiled by nvcc, for minutes on every new machine (data/measurements/README.md). So Triton's
    kernel is taken (needs a C compiler), or PyTorch's own operators where it does not know these bits or
    cannot be built, which a sentence says.
    """
    from transformers import GPTQConfig

    settings = read_config(source)["quantization_config"]
    for kernel in kernels:
        with quiet():
            known, trouble = try_kernel(kernel, settings, dtype, device)
        if known and not trouble:
            break
        if known:
            print(f"GPTQ's kernel {kernel} cannot be built here ({trouble}): a slower one is used.")
    return {"quantization_config": GPTQConfig(bits=settings["bits"], backend=kernel)}


def try_kernel(kernel: str, settings: dict, dtype: Any, device: str) -> tuple[bool, str]:
    """Whether a kernel of GPTQModel knows this kind of model, and why it cannot be built: "" when it can."""
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    try:
        hf_select_quant_linear_v2(
            bits=settings["bits"],
            group_size=settings.get("group_size", 128),  # these three as transformers reads them
            desc_act=settings.get("desc_act", False),
            sym=settings.get("sym", True),
            format=settings.get("checkpoint_format", "gptq"),
            quant_method="gptq",
            dtype=dtype,
            device_map={"": device},
            backend=kernel,
            pack=False,
        )
    except ValueError as error:  # holds the reason as an exception of its own
        missing = isinstance(error.args[0], ImportError)
        return missing, first_line(error) if missing else ""
    if kernel == "gptq_triton" and not (shutil.which("gcc") or shutil.which("clang")):
        return True, "there is no C compiler"
    return True, ""


def first_line(error: object) -> str:
    """A compiler's complaint, as far as a sentence has room for it."""
    return next((line.strip()[:120] for line in str(error).splitlines() if line.strip()), "no reason given")


def shortfall(source: str, config: RunConfig) -> str:
    """Why a model's 16-bit weights do not fit this GPU, or "" when they do.

    Beside the weights it needs keys and values of a batch, and half a GiB for activations and logits.
    """
    import torch

    shape = shape_from_config(read_config(source), source)
    asked = config.evaluate
    tokens = asked.eval_batch_size * (asked.eval_context + asked.max_new_tokens)
    needed_gib = (2 * shape.parameters + tokens * shape.kv_cache_bytes_per_token()) / GIB + 0.5
    free_gib = torch.cuda.mem_get_info()[0] / GIB
    return "" if needed_gib <= free_gib else f"16 bits need {needed_gib:.1f} GiB and {free_gib:.1f} are free"


def open_tokenizer(name: str | Path, config: RunConfig) -> Any:
    """A model's tokenizer with pad token and chat template; of an adapter that brings none, its base's."""
    brings = any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(base_of(Path(name), config) if kind(name) == "adapter" and not brings else name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep banners, progress bars and warnings of the model libraries out of a notebook."""
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:  # noqa: PTH123 (os.devnull is no path)
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(disabled)
            transformers.logging.set_verbosity(level)
            if bars:
                transformers.logging.enable_progress_bar()


def free_memory() -> None:
    """Give back what a model held; forget the model first."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prompt_ids(tokenizer: Any, prompt: str | Messages) -> list[int]:
    """Tokens of a prompt: messages through the chat template, just as in training; text as it is with its bos."""
    return tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else Template(tokenizer).prompt(prompt)


def batch_generate(
    loaded: Loaded,
    prompts: list[str | Messages],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Generation]:
    """Answers to prompts, in their order. Greedy at temperature 0, else sampled from the top_p nucleus.

    Padded on the left, so that every prompt ends where its answer begins; prompts of like length share a batch.
    Raises ValueError for no prompt, and for a prompt that with its answer is longer than the model's context.
    """
    import torch

    if not prompts:
        raise ValueError("there is no prompt to answer: give at least one")
    ids = [prompt_ids(loaded.tokenizer, prompt) for prompt in prompts]
    check_lengths([len(one) for one in ids], max_new_tokens, loaded.context)
    settings = generation_config(loaded, max_new_tokens, temperature, top_p)
    stops = set(settings.eos_token_id)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # longest first: too large a batch fails at once
    answers: dict[int, Generation] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad_left([ids[i] for i in rows], settings.pad_token_id, loaded.model.device)
            with torch.inference_mode():
                output = loaded.model.generate(**batch, generation_config=settings)
            new = output[:, batch["input_ids"].shape[1] :].tolist()  # (rows, new tokens)
            for i, tokens in zip(rows, new, strict=True):
                end = next((at for at, token in enumerate(tokens) if token in stops), None)
                text = loaded.tokenizer.decode(tokens[:end], skip_special_tokens=True)
                count = len(tokens) if end is None else end + 1
                answers[i] = Generation(text, count, len(ids[i]), ended=end is not None)
    return [answers[i] for i in range(len(ids))]


def check_lengths(lengths: list[int], max_new_tokens: int, context: int) -> None:
    """Raises ValueError naming the first prompt that with its answer does not fit the context."""
    for i, length in enumerate(lengths):
        if length + max_new_tokens > context:
            raise ValueError(
                f"prompt {i + 1} has {length} tokens and its answer may have {max_new_tokens}, but the model's context "
                f"is {context}: shorten the prompt, or set max_new_tokens to at most {max(context - length, 0)}"
            )


def generation_config(loaded: Loaded, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    """Everything that decides an answer, said here and not left to the model's folder."""
    from transformers import GenerationConfig

    own = getattr(loaded.model.generation_config, "eos_token_id", None)
    stops = set(ends(own, loaded.tokenizer))
    pad = loaded.tokenizer.pad_token_id
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops) if pad is None else pad,
        **sampling,
    )


def pad_left(rows: list[list[int]], pad: int, device: Any) -> dict[str, Any]:
    """input_ids and attention_mask (rows, longest) of prompts of different lengths."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def stream(loaded: Loaded, messages: str | Messages, **settings: Any) -> None:
    """Print the answer as it is written; settings as in `pieces`."""
    for place, piece in enumerate(pieces(loaded, messages, **settings)):
        print(piece if place else piece.lstrip(), end="", flush=True)  # templates leave a space before the answer
    print()


def pieces(
    loaded: Loaded,
    messages: str | Messages,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.9,
) -> Iterator[str]:
    """The answer, piece by piece as it is written; who stops listening stops the model.

    The answer is cut where the model's context ends. Raises ValueError for a prompt that fills the context, and what
    generation raises, in the caller's thread.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    ids = prompt_ids(loaded.tokenizer, messages)
    max_new_tokens = min(max_new_tokens, max(1, loaded.context - len(ids)))
    check_lengths([len(ids)], max_new_tokens, loaded.context)
    settings = generation_config(loaded, max_new_tokens, temperature, top_p)
    batch = pad_left([ids], settings.pad_token_id, loaded.model.device)
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned, failures = threading.Event(), []

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), abandoned.is_set(), device=input_ids.device)

    def write() -> None:
        try:
            with torch.inference_mode():
                loaded.model.generate(
                    **batch,
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Abandoned()]),
                )
        except Exception as error:
            failures.append(error)
            streamer.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        writer.join()
    if failures:
        raise failures[0]


def example_question(config: RunConfig) -> str:
    """A question to begin a chat with: the first of the run's questions, or one that any model can answer."""
    path = Path(config.evaluate.questions or "")
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            return json.loads(next(lines))["question"]
    return "Explain in two sentences why the sky is blue."
