"""Models opened whatever their kind, and text out of them: batches, streams, chats.

A folder tells its kind by its files: adapter_config.json is a PEFT adapter; a config.json that names a method of
quantization (models/methods.py) is a model of that method; any other config.json is a model in 16 bits.

>>> from helpers.models import TINY
>>> kind(TINY)
'model'
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import hardware
from helpers.budget import placement
from helpers.budget.placement import Placement
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape, families, gguf_header, hub_config, loading, methods, offload, shape_from_config
from helpers.models.adapters import ADAPTER_CONFIG, adapter_settings
from helpers.models.gpu import gives_back
from helpers.models.hub import snapshot
from helpers.models.opening import Opening, Say
from helpers.models.quiet import quiet
from helpers.models.templates import Template, ends, load_tokenizer
from helpers.workspace.prepared import side
from helpers.workspace.versions import forget_old_torchao

GIB = 2**30
CONFIG = "config.json"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Loaded:
    """An open model with its tokenizer, and how it was opened."""

    model: Any
    tokenizer: Any
    kind: str
    """model, adapter, gguf, or a method of quantization."""
    how: str
    """Precision and reason, for the report."""
    path: str
    base: str
    """What an adapter stands on; else the same as path."""
    load_s: float
    placement: Placement | None = None
    """Where its weights lie, and in what batches it reads."""
    batch_tokens: int | None = None
    """Tokens, prompts and answers, that a batch may have beside the weights; None: any number."""

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
    """model, adapter, gguf, or the name of a method of quantization.

    A name that is no folder is taken for a hub id when it looks like one. Raises ValueError when it is neither.
    """
    folder = Path(name)
    if gguf_header.is_gguf(folder):
        return "gguf"
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    method = methods.of(read_config(name))
    return method.name if method else "model"


def kinds(models: dict[str, str | Path]) -> dict[str, str]:
    """Name -> kind of each."""
    return {name: kind(path) for name, path in models.items()}


def shape_of(name: str | Path, config: RunConfig) -> ModelShape:
    """The shape of a model, of an adapter its base's."""
    source = base_of(Path(name), config) if kind(name) == "adapter" else name
    return shape_from_config(read_config(source), str(source))


def read_config(name: str | Path) -> dict:
    """config.json of a folder or a hub model. Raises ValueError with one sentence."""
    folder = Path(name)
    if gguf_header.is_gguf(folder):
        return gguf_header.config(folder)
    if (folder / CONFIG).is_file():
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            return config if isinstance(config, dict) else {}
        except ValueError:
            raise ValueError(f"{folder / CONFIG} is not JSON: make the model folder again") from None
    if folder.is_dir():
        raise ValueError(
            f"{folder} is not a model folder: it has neither {CONFIG} nor {ADAPTER_CONFIG}; "
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
    settings = adapter_settings(Path(adapter))
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


@gives_back
def load(
    name: str | Path,
    config: RunConfig | None = None,
    machine: Machine | None = None,
    dtype: Any = None,
    say: Say = print,
) -> Loaded:
    """Open a base or merged model, an adapter on its base, or a GPTQ model, on the GPU when there is one.

    On a CPU everything computes in float32. On a GPU below compute capability 8 in fp16, else in bf16; a GPTQ model
    that is stored in fp16 computes in fp16 (models/gptq_kernels.py), and `how` names its kernel. A 16-bit model
    stays one: layers that do not fit the VRAM beside a batch's keys and values wait in host memory or on disk, and
    `how` says so. An adapter gets the base as its training saw it (config.model.weights, double_quant).
    machine: whose VRAM and RAM decide that; default this one, as free as it is now. dtype: to compute in, another than
    the GPU's own. say: what hears that a kernel is being built.
    Raises ValueError with one sentence for what is not a model, or does not fit in any way.
    """
    import torch

    config = config or RunConfig()
    if gguf_header.is_gguf(name):
        return load_gguf(Path(name), config, machine or hardware.probe())
    name = pinned(name, config)
    what = kind(name)
    source = base_of(Path(name), config) if what == "adapter" else str(name)
    settings = read_config(source)
    shape = shape_from_config(settings, source)
    machine = machine or hardware.probe()
    place = placement.place(what, config, shape, machine)
    if place.problem:
        raise ValueError(f"{name} cannot be opened: {place.problem}")
    dtype, placed = dtype or loading.precision().dtype, loading.device()
    how = Opening(dtype)  # an explicit quantization of None would make from_pretrained forget a quantized model's own
    if method := methods.of(settings):  # also of an adapter's base: its folder decides, not the run
        how = method.opening(settings, dtype, placed, say)
    elif what == "adapter" and config.model.weights != "fp16":
        how = Opening(dtype, {"quantization_config": loading.base_quantization(config, dtype)})
    started = time.perf_counter()  # a kernel's build, once a machine, is not the model's loading
    with quiet():
        where = offload.device_map(source, place.away, placed) if place.away else {"": placed}
        model = loading.causal_lm(
            source,
            dtype=how.dtype,
            device_map=where,
            attn_implementation=attention_kernel(config, settings),
            **how.options,
        )
        if place.away_in == "host memory":
            offload.wait_in_host_memory(model, place.away)
        if what == "adapter":
            from peft import PeftModel

            forget_old_torchao()
            model = PeftModel.from_pretrained(model, str(name))
        model.eval()
        tokenizer = open_tokenizer(name, config)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    asked = config.evaluate
    tokens = place.batch_size * (asked.eval_context + asked.max_new_tokens) if machine.gpu else None
    words = in_words(place, shape, how.dtype, config, how.kernel)
    return Loaded(model, tokenizer, what, words, str(name), source, load_s, place, tokens)


def load_gguf(file: Path, config: RunConfig, machine: Machine) -> Loaded:
    """A GGUF file as a model whose matrices stay packed. Raises ValueError for what does not fit."""
    from helpers.models import attention, gguf_model

    shape = shape_from_config(read_config(file), str(file))
    place = placement.place("gguf", config, shape, machine, gguf_header.weight_bytes(file))
    if place.problem:
        raise ValueError(f"{file} cannot be opened: {place.problem}")
    dtype, placed = loading.precision().dtype, loading.device()
    started = time.perf_counter()
    tokenizer = open_tokenizer(file, config)
    model = gguf_model.load(file, dtype, placed, attention.register())
    less = f", batches of {place.batch_size}" if place.batch_size < config.evaluate.eval_batch_size else ""
    bits = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
    how = f"{gguf_header.type_name(file)} in blocks, PyTorch in {bits}{less}"
    asked = config.evaluate
    tokens = place.batch_size * (asked.eval_context + asked.max_new_tokens) if machine.gpu else None
    load_s = time.perf_counter() - started
    return Loaded(model, tokenizer, "gguf", how, str(file), str(file), load_s, place, tokens)


def in_words(place: Placement, shape: ModelShape, dtype: Any, config: RunConfig, kernel: str = "") -> str:
    """How a model was opened, for the table: precision, where its layers lie, and smaller batches than asked for.

    kernel: what multiplies a quantized model's weights.
    """
    bits = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]
    words = {"model": bits, "adapter": f"base in {place.precision}, adapter in {bits}"}
    words = words.get(place.kind, f"{place.kind} in {bits}" + (f", {kernel}" if kernel else ""))
    less = f"batches of {place.batch_size}" if place.batch_size < config.evaluate.eval_batch_size else ""
    return ", ".join(filter(None, [words, placement.in_words(place, shape), less]))


def attention_kernel(config: RunConfig, model: dict) -> str | None:
    """The attention that training had, by transformers' name; None, its own choice, for a family unknown here.

    model: config.json. Without grouped heads' materialised scores on a T4, unless the run or the family needs another.
    """
    try:
        return loading.attention_implementation(families.of(model), config.model.attention)
    except ValueError:
        return None


def open_tokenizer(name: str | Path, config: RunConfig) -> Any:
    """A model's tokenizer with pad token and chat template; of an adapter that brings none, its base's."""
    if kind(name) == "gguf":  # its own says no merges: beside it lies the one that it was made of, or the run has it
        beside = Path(name).absolute().parent
        return load_tokenizer(beside if (beside / "tokenizer.json").is_file() else pinned(config.model.model, config))
    brings = any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(base_of(Path(name), config) if kind(name) == "adapter" and not brings else name)


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
    each: Callable[[int], Any] = lambda rows: None,
) -> list[Generation]:
    """Answers to prompts, in their order. Greedy at temperature 0, else sampled from the top_p nucleus.

    each: called after every batch with how many were answered in it.

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
        while order:
            most = batch_size
            if loaded.batch_tokens:  # prompts longer than the budget's go in smaller batches
                most = min(most, max(1, loaded.batch_tokens // (len(ids[order[0]]) + max_new_tokens)))
            rows, order = order[:most], order[most:]
            batch = pad_left([ids[i] for i in rows], settings.pad_token_id, loaded.model.device)
            with torch.inference_mode():
                output = loaded.model.generate(**batch, generation_config=settings)
            new = output[:, batch["input_ids"].shape[1] :].tolist()  # (rows, new tokens)
            for i, tokens in zip(rows, new, strict=True):
                end = next((at for at, token in enumerate(tokens) if token in stops), None)
                text = loaded.tokenizer.decode(tokens[:end], skip_special_tokens=True)
                count = len(tokens) if end is None else end + 1
                answers[i] = Generation(text, count, len(ids[i]), ended=end is not None)
            each(len(rows))
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


def example_question(config: RunConfig, prepared: Path | None = None) -> str:
    """A question to begin a chat with: the first of the run's questions, or of its held-out conversations.

    prepared: the folder of the run's data. Where neither has one, a question that any model can answer.
    """
    path = Path(config.evaluate.questions or "")
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            return json.loads(next(lines))["question"]
    rows = side(prepared, "heldout")["messages"] if prepared else []
    turns = (turn["content"] for row in rows for turn in row if turn["role"] == "user")
    return next(turns, "Explain in two sentences why the sky is blue.")
