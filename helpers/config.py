"""RunConfig: every knob of a run, frozen, validated, saved as YAML beside every result.

Field names are unique across the parts, so that a notebook, a slider and a command-line flag can all say `rank`
without saying where it lives:

>>> config = RunConfig().with_values(rank=32, alpha=64)
>>> config.adapter.rank, config.adapter.scaling
(32, 2.0)
>>> RunConfig().with_values(rank=0)
Traceback (most recent call last):
ValueError: rank must be a whole number from 1 to 1024, not 0
"""

from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")

OWN_SOURCE, FIRST_RUN = "HuggingFaceH4/ultrachat_200k", 2000

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
CHOSEN = "chosen"
"""In a file of settings: who chose them and when, no setting itself."""
GONE = {
    f"{name}={value}": f"{name}={value} is no longer there: it needed the package liger-kernel and was no faster than "
    f"{name}={default}, which needs none; leave {name} out"
    for name, value, default in (("kernels", "liger", "own"), ("loss", "fused", "chunked"))
}
"""What a setting no longer takes -> why, and what to do."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The frozen base: which weights, in which precision, with which attention kernel."""

    model: str = "mistralai/Mistral-7B-v0.3"
    """The base: a hub id, or a folder with config.json and safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; none is its main branch."""
    weights: Literal["nf4", "int8", "fp16", "aqlm"] = "nf4"
    """The base's precision: nf4 is QLoRA (https://arxiv.org/abs/2305.14314); fp16 is bf16 where the GPU has it; aqlm,
    2 bits, for a model that is stored so (https://arxiv.org/abs/2401.06118)."""
    double_quant: bool = True
    """NF4's block scales are quantized to 8 bits too, which saves 0.37 bits a weight."""
    upcast: bool = False
    """Embeddings, head and norms in fp32, as PEFT does: needs more memory and does not improve quality."""
    attention: Literal["efficient", "eager", "math"] = "efficient"
    """Kernel of attention: efficient never holds the matrix of all scores; eager and math do."""


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """LoRA: W + (alpha / rank) BA (https://arxiv.org/abs/2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] = 16
    """LoRA's rank r: columns of B and rows of A; more can learn more, and need more memory."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    """LoRA's alpha; the update BA is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that are zeroed while it trains."""
    targets: str = "all-linear"
    """Which linear layers get an adapter: all-linear, attention, experts, or module names with commas between."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Learn magnitudes beside directions (https://arxiv.org/abs/2402.09353)."""
    start_adapter: str | None = None
    """A folder with an adapter of the same rank, alpha and targets to train on; none starts a fresh one."""

    @property
    def scaling(self) -> float:
        """What multiplies BA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The linear layers that get an adapter.

        >>> AdapterConfig(targets="q_proj,v_proj").target_modules
        ('q_proj', 'v_proj')
        """
        named = {
            "all-linear": ATTENTION_TARGETS + MLP_TARGETS,
            "attention": ATTENTION_TARGETS,
            "experts": MLP_TARGETS,  # of a model without a mixture, its one MLP
        }
        return named.get(self.targets) or tuple(name.strip() for name in self.targets.split(","))


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Conversations in: from where, how long, what is held out."""

    source: str = OWN_SOURCE
    """A file, a folder, a zip, or a hub dataset (owner/name, owner/name:configuration)."""
    source_split: str = "train_sft"
    """Read of a hub dataset, and of a folder with files named after splits; train where none has this name."""
    source_format: str = "auto"
    """How rows are read; auto: recognised by their fields."""  # names: sources/formats.py, where each is read
    columns: str = ""
    """Whose field is which: `user=Question,assistant=Answer,system=…`; also context, history, messages, text."""
    use: Literal["auto", "chosen", "pairs"] = "auto"
    """Of preference data: chosen keeps the better answers, pairs both; auto: pairs where method is dpo or orpo."""
    seq_len: Annotated[int, Field(ge=16, le=1_048_576, strict=True)] = 1024
    """The context: tokens of one training sequence, at most."""
    max_conversations: Literal["auto", "all"] | Count | None = "auto"
    """Used at most; auto: 2,000 of the profile's own hub dataset, for a first afternoon, all of any other."""
    heldout_fraction: Fraction = 0.02
    """Share of the conversations that is not trained on, chosen by their content."""
    heldout_source: str | None = None
    """A file of its own for the held-out conversations; then heldout_fraction is not used."""
    heldout_split: str | None = None
    """A split of the source to hold out, such as validation: of a hub dataset, a folder or a zip that has one."""
    on_finding: str = ""
    """What to do instead of the default about a finding of the checks: `near-duplicate=drop,leaked-template=keep`."""

    def cap(self, source: str | None = None) -> int | None:
        """How many conversations of a source are used, at most; None: all.

        >>> DataConfig().cap(), DataConfig().cap("mine.jsonl"), DataConfig(max_conversations=50).cap("mine.jsonl")
        (2000, None, 50)
        """
        if self.max_conversations == "auto":
            return FIRST_RUN if (source or self.source) == OWN_SOURCE else None
        return None if self.max_conversations == "all" else self.max_conversations


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """One pass of gradient descent over the adapters."""

    method: Literal["sft", "dpo", "orpo"] = "sft"
    """What is learned: sft, the answers; dpo, the better answers of pairs; orpo, that without a reference."""
    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Of pairs: dpo, how much a nat of log-probability over the reference counts; orpo, weight of the odds ratio."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: share of pairs that are expected to be the wrong way round (https://ericmitchell.ai/cdpo.pdf)."""
    sft_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Of pairs: weight of the better answer's own loss; with 0, plain DPO, answers lose probability on both sides."""
    batch_size: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    """Sequences, or pairs of them, a micro-batch; a step has batch_size × accumulation of them."""
    accumulation: Annotated[int, Field(ge=1, le=4096, strict=True)] = 8
    """Micro-batches whose gradients make one step: a larger batch without its memory."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Step size of the optimizer, at the end of the warm-up; of pairs 5e-6 by default, and 5e-4 for tiny."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: Fraction = 0.03
    """Share of all steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Pull of the adapters' weights towards zero, as AdamW decouples it."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A step's gradient is scaled down to this length where it is longer."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often the training rows are gone through."""
    max_steps: Count | None = None
    """Training ends after so many steps, instead of after the epochs."""
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = "paged_adamw_8bit"
    """AdamW with its states in 8 bits, paged to host memory when the GPU is full; in 8 bits; or in fp32."""
    checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0, strict=True)] = "auto"
    """How many decoder layers recompute their activations; auto: as few as the budget allows."""
    keep_attention: bool = True
    """Checkpointed layers save attention's result too and do not recompute it: 16 instead of 8 KiB a token at 7B."""
    offload_activations: bool = False
    """Keep the inputs of checkpointed layers in host memory."""
    offload_gib: Annotated[float, Field(ge=0, le=1024)] = 6.0
    """Host memory for these inputs in GiB, at most; half of what is free where that is less. The rest: on the GPU."""
    loss: Literal["chunked", "full"] = "chunked"
    """How cross-entropy is computed: in chunks, without all logits at once, or from all of them."""
    kernels: Literal["own", "plain"] = "own"
    """Layers that compute; own: custom layers where they know the model, else transformers'; plain: those always."""
    packing: bool = False
    """Several conversations in one sequence, each attending to itself alone: fewer padding tokens."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the embeddings (https://arxiv.org/abs/2310.05914); 0: none."""
    eval_steps: Count | None = None
    """Steps between evaluations of the held-out loss; none evaluates at the end alone."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """A tracker that draws the run elsewhere too, through the trainer's own integration; its package must be there."""
    save_steps: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay on disk."""
    patience: Count | None = None
    """Evaluations without a better held-out loss before training stops."""
    trains: Literal["adapter", "all"] = "adapter"
    """What is trained; adapter: LoRA's matrices; all: every weight (full fine-tuning), 16 bytes each."""
    gpus: Literal["all"] | Count = 1
    """GPUs that share each training step, which stays the step of one GPU; an evaluation opens a model on each."""
    sharding: Literal["none", "fsdp", "zero2", "zero3"] = "none"
    """What several GPUs divide; none: only the micro-batches of a step, each GPU holds the whole model."""

    @property
    def sides(self) -> int:
        """Sequences of one example: a conversation's one, or a pair's two.

        >>> TrainConfig().sides, TrainConfig(method="dpo").sides
        (1, 2)
        """
        return 1 if self.method == "sft" else 2


@dataclass(frozen=True, config=STRICT)
class MergeConfig:
    """The adapter into its base."""

    merge_base: Literal["auto", "original", "nf4"] = "auto"
    """Merged into: original, the fp16 weights; nf4, those rounded to NF4 and back; auto, what training saw."""
    shard_gib: Annotated[float, Field(gt=0, le=50)] = 1.8
    """Size of a file of the merged model, at most, in GiB."""
    free_base: bool = False
    """Delete each base shard when it is merged, for small disks."""


@dataclass(frozen=True, config=STRICT)
class QuantizeConfig:
    """The merged model in few bits; by GPTQ (https://arxiv.org/abs/2210.17323) unless said."""

    quant_method: str = "gptq"
    """The method that makes the weights small, by transformers' name for it."""  # names: quantize.METHODS
    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a quantized weight. Of the tiny model, GPTQ's 3 bits differ from 16 by 0.012 nats a token and its 2 by
    0.070, where its 4 differ by 0.003 and NF4's by 0.007."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Weights that share a scale; -1: a whole row. Smaller groups are more exact and larger on disk."""
    symmetric: bool = True
    """Levels are symmetric about zero, which the fast kernels want."""
    act_order: bool = False
    """Quantize columns by falling activation size: a little better, slower to decode on old kernels."""
    calibration: str = "own"
    """Text that GPTQ looks at: own (the training conversations), general, both, or a file of conversations or text."""
    calibration_samples: Count = 128
    """Texts that GPTQ runs through the model to see its activations."""
    calibration_tokens: Count = 512
    """Length of such a text, in tokens."""


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """What is asked of base, adapter, merged and GPTQ model."""

    questions: str | None = None
    """JSONL of question and answer; without it there is no exact match."""
    preferences: str | None = None
    """A folder of pairs that prepare wrote, to ask which answer is liked and said; none: the data's own, if pairs."""
    max_questions: Count | None = None
    """Questions that are asked, at most; none asks all."""
    max_heldout: Count | None = 200
    """Held-out conversations that perplexity is measured on, at most; none takes all."""
    eval_context: Annotated[int, Field(ge=16, strict=True)] = 1024
    """Tokens that perplexity sees at once; longer texts are cut into windows."""
    eval_stride: Count = 512
    """Tokens by which such a window moves on."""
    eval_batch_size: Count = 8
    """Texts that are evaluated together."""
    max_new_tokens: Count = 128
    """Length of an answer in tokens, at most."""
    tasks: str | None = None
    """Local .jsonl tasks of question, choices and answer, and tasks of lm-evaluation-harness; commas between."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """All of a run. Make one with `helpers.profiles.profile("tiny", rank=16)`."""

    profile: str = "mistral-7b"
    """The set of defaults: mistral-7b for a free T4, tiny for a CPU."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Start of all that is drawn by lot: adapters, order of batches, samples."""
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def with_values(self, **values: Any) -> "RunConfig":
        """A copy with some fields changed, named without their part. Raises ValueError naming field and range.

        >>> RunConfig().with_values(seq_len=2048, batch_size=2).train.batch_size
        2
        """
        unknown = [name for name in values if name not in field_parts()]
        if unknown:
            raise ValueError(f"there is no setting {unknown[0]}; there are {', '.join(field_parts())}")
        tree = asdict(self)
        for name, value in values.items():
            part = field_parts()[name]
            (tree[part] if part else tree)[name] = value
        return from_tree(tree)


def field_parts() -> dict[str, str]:
    """Field name -> the part that holds it ("" for RunConfig's own).

    >>> field_parts()["rank"], field_parts()["seed"]
    ('adapter', '')
    """
    parts = {}
    for outer in fields(RunConfig):
        if is_dataclass(outer.type):
            parts |= {inner.name: outer.name for inner in fields(outer.type)}
        else:
            parts[outer.name] = ""
    return parts


def flat(config: RunConfig) -> dict[str, Any]:
    """Field name -> value, whatever its part.

    >>> flat(RunConfig())["rank"]
    16
    """
    tree = asdict(config)
    return {name: (tree[part] if part else tree)[name] for name, part in field_parts().items()}


def from_tree(tree: dict) -> RunConfig:
    """RunConfig from nested dicts, as YAML holds them. Raises ValueError with one sentence a wrong field."""
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ValueError("; ".join(sentence(problem) for problem in problems(error))) from None


def problems(error: ValidationError) -> list[dict]:
    """One problem a field: a union reports each of its members, and people need the field only once."""
    by_field: dict[str, dict] = {}
    for problem in error.errors():
        name = next((part for part in reversed(problem["loc"]) if part in field_parts()), str(problem["loc"][-1]))
        known = by_field.setdefault(name, problem | {"field": name, "wanted": []})
        known["wanted"].append(problem["msg"].removeprefix("Input should be "))
    return list(by_field.values())


def sentence(problem: dict) -> str:
    """What is wrong with one field, in words that name it and its allowed range."""
    name = problem["field"]
    if problem["type"] == "unexpected_keyword_argument":
        return f"there is no setting {name}"
    if gone := GONE.get(f"{name}={problem['input']}"):
        return gone
    return f"{name} must be {allowed_range(name) or ' or '.join(problem['wanted'])}, not {problem['input']!r}"


def allowed_range(name: str) -> str:
    """The bounds of a numeric field in words, "" for a field without bounds.

    >>> allowed_range("rank"), allowed_range("weights")
    ('a whole number from 1 to 1024', '')
    """
    annotations = [inner.type for inner in fields(owner(name)) if inner.name == name] if name in field_parts() else []
    arms = [arm for annotation in annotations for arm in (annotation, *get_args(annotation))]
    for kind, *notes in (get_args(arm) for arm in arms if get_origin(arm) is Annotated):
        bounds = {
            bound: getattr(note, bound)
            for field_info in notes
            for note in getattr(field_info, "metadata", [])
            for bound in ("ge", "gt", "le", "lt")
            if getattr(note, bound, None) is not None
        }
        if not bounds:
            continue
        low = f"from {bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}"
        high = f" to {bounds['le']}" if "le" in bounds else f" to below {bounds['lt']}" if "lt" in bounds else " up"
        words = {value for arm in arms if get_origin(arm) is Literal for value in get_args(arm)}
        choices = "".join(f"{word}, " for word in sorted(words)) + ("or " if words else "")
        return f"{choices}{'a whole number' if kind is int else 'a number'} {low}{high}"
    return ""


def owner(name: str) -> type:
    """The part of RunConfig, or RunConfig itself, that a setting is a field of."""
    part = field_parts()[name]
    return {outer.name: outer.type for outer in fields(RunConfig)}[part] if part else RunConfig


def explained(name: str) -> str:
    """A setting's sentence: the docstring of its field.

    >>> explained("save_steps")
    'Steps between checkpoints.'
    """
    return " ".join((owner(name).__pydantic_fields__[name].description or "").split())


def values_in_words(name: str) -> str:
    """What a setting can be set to; one whose default is none has that too.

    >>> values_in_words("rank"), values_in_words("weights"), values_in_words("dora"), values_in_words("columns")
    ('a whole number from 1 to 1024', 'nf4, int8, fp16 or aqlm', 'on or off', 'text')
    >>> values_in_words("max_steps")
    'a whole number from 1 up'
    """
    (kind,) = (inner.type for inner in fields(owner(name)) if inner.name == name)
    arms = [kind, *(arm for arm in get_args(kind) if not isinstance(arm, str))]
    words = [str(word) for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]
    listed = f"{', '.join(words[:-1])} or {words[-1]}" if words else ""
    return allowed_range(name) or listed or ("on or off" if kind is bool else "text")


def save_yaml(config: RunConfig, path: Path) -> Path:
    """Write the configuration; `load_yaml` reads it back equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    return path


def load_yaml(path: Path | str, start: RunConfig | None = None) -> RunConfig:
    """Read a configuration: nested as `save_yaml` writes it, or flat field names; what it leaves out comes from start.

    Raises ValueError naming the file and the field.
    """
    path = Path(path)
    try:
        tree = yaml_tree(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ValueError(f"there is no configuration file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    return with_settings(tree, path, start or RunConfig())


def with_settings(tree: dict[str, Any], path: Path, start: RunConfig) -> RunConfig:
    """A configuration with what a YAML file holds. Raises ValueError naming the file and the field."""
    parts = {name for name in field_parts().values() if name}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= value if name in parts and isinstance(value, dict) else {name: value}
    values.pop(CHOSEN, None)
    try:
        return start.with_values(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def yaml_tree(text: str, path: Path) -> dict[str, Any]:
    """A YAML file's text as a dict. Raises ValueError naming the file."""
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold settings as `name: value`, not a {type(tree).__name__}")
    return tree
