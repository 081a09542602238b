"""Finding a configuration that fits and finishes first, and the words for what mends one that does not."""

from collections.abc import Callable, Iterator

from helpers import activations
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape

CONTEXTS = (32768, 24576, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128)
RANKS = (256, 128, 64, 32, 16, 8, 4)
VramOf = Callable[[RunConfig, ModelShape, Machine, str], object]


def search(
    config: RunConfig, shape: ModelShape, machine: Machine, vram_of: VramOf
) -> tuple[RunConfig, tuple[str, ...]]:
    """(configuration without "auto", reasons): the fastest that fits."""
    if config.train.checkpointing != "auto":
        return config, ()
    if machine.gpu is None:
        return config.with_values(checkpointing="none"), ("without a card nothing is checkpointed",)
    for count in range(shape.layers + 1):
        candidate = config.with_values(checkpointing=count)
        found = vram_of(candidate, shape, machine, "train")
        if found.process_gib <= found.limit_gib:
            break
    return candidate, (f"{count} of {shape.layers} layers are checkpointed: the fewest that fit",)


def single_changes(config: RunConfig, shape: ModelShape) -> Iterator[tuple[str, RunConfig]]:
    """(in words, configuration) for each single setting that needs less VRAM, what costs least first."""
    if activations.checked_layers(shape, config) < shape.layers:
        yield "checkpointing=all", config.with_values(checkpointing="all")
    if config.model.attention != "efficient":
        yield "attention=efficient", config.with_values(attention="efficient")
    if config.model.weights != "nf4":
        yield "weights=nf4", config.with_values(weights="nf4")
    if config.model.upcast:
        yield "upcast=False", config.with_values(upcast=False)
    if config.train.loss == "full":
        yield "loss=chunked", config.with_values(loss="chunked")
    if config.train.optimizer == "adamw_torch":
        yield "optimizer=paged_adamw_8bit", config.with_values(optimizer="paged_adamw_8bit")
    batch = config.train.batch_size
    while batch > 1:
        batch = max(batch // 2, 1)
        times = config.train.accumulation * (config.train.batch_size // batch)
        yield f"batch_size={batch} accumulation={times}", config.with_values(batch_size=batch, accumulation=times)
    if not config.train.offload_activations and activations.checked_layers(shape, config):
        yield "offload_activations=True", config.with_values(offload_activations=True)
    for seq_len in CONTEXTS:
        if seq_len < config.data.seq_len:
            yield f"seq_len={seq_len}", config.with_values(seq_len=seq_len)
    for rank in RANKS:
        if rank < config.adapter.rank:
            yield f"rank={rank}", config.with_values(rank=rank)


def vram_remedy(config: RunConfig, shape: ModelShape, machine: Machine, stage: str, vram_of: VramOf) -> str:
    """Which single change fits; when none does, which frees most."""
    if stage not in ("train", "run"):
        return "take a smaller model, or a card with more"
    best, best_gib = "", float("inf")
    for words, candidate in single_changes(config, shape):
        needed = vram_of(candidate, shape, machine, "train")
        if needed.process_gib <= needed.limit_gib:
            return f"{words} fits, with {needed.process_gib:.1f} GiB"
        if needed.process_gib < best_gib:
            best, best_gib = words, needed.process_gib
    if not best:
        return "no setting makes it fit; take a smaller model, or a card with more"
    return f"no single change makes it fit; {best} frees most, and leaves {best_gib:.1f} GiB"


def ram_remedy(config: RunConfig, parts: dict[str, float]) -> str:
    """What frees most of the host's memory."""
    if "offloaded activations" in parts:
        return "offload_activations=False"
    if "calibration activations" in parts:
        return "fewer calibration_samples, or a machine with more"
    return "close what else runs, or take a smaller model"


def disk_remedy(config: RunConfig, parts: dict[str, float]) -> str:
    """What frees most of the disk."""
    if "merged model" in parts and "base, 16 bits" in parts and not config.merge.free_base:
        return "free_base=True deletes each shard of the base once it is merged"
    return "delete what lies there, or choose another disk for the run"
