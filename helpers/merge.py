"""The adapter into its base: W + (alpha / rank) BA, tensor by tensor, so that a 7B merges in 2.5 GiB of memory.

PEFT's merge_and_unload holds the whole 16-bit model, 13.5 GiB, where a free Colab has 12.7. Here a tensor is read from
its safetensors shard, gets its adapter in fp32, is rounded once to fp16 and is written; only then is the next one read.
What goes where is planned before the first byte. So a merge that was killed goes on at the first shard that is not
whole, and ends in the same bytes.
"""

import json
import re
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.config import MergeConfig, RunConfig, load_yaml
from helpers.models import aqlm_sizes
from helpers.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARTS, Adapter, adapter_settings, read_adapter
from helpers.models.gpu import gives_back
from helpers.models.hub import snapshot
from helpers.models.stored import (
    SafetensorsWriter,
    Stored,
    UnusableModel,
    for_all_readers,
    stored_tensors,
    unquantized_config,
)
from helpers.models.templates import brings_tokenizer, ends, hand_on
from helpers.show import bars
from helpers.workspace import (
    FINISHED,
    MANIFEST,
    SCRATCH,
    DamagedArtifact,
    Workspace,
    building,
    check_outputs,
    checksum,
    empty_folder,
    exclusive,
    existing,
    fetch,
    identify,
    read_manifest,
    recover,
    refuse_output,
    write_text,
)

if TYPE_CHECKING:
    import torch

GIB = 2**30
DISK_MARGIN_BYTES = GIB // 16
"""For config, tokenizer and manifest."""


@gives_back
def merge(base: str | Path, adapter: Path, output: Path, config: MergeConfig, revision: str | None = None) -> dict:
    """Write base + adapter as fp16 shards that transformers opens; returns the measurements.

    base: a folder with config.json and safetensors, or a hub id. revision: of a hub id; without one, that which the
    adapter was trained on. Goes on where a merge of the same inputs was interrupted. Raises ValueError in one sentence,
    before anything is written, for an adapter of another kind or for another base, a missing shard, a truncated file,
    too little disk, or an output folder that is in use.
    """
    from helpers.models.experts import stored_name

    start = time.monotonic()
    adapter, output = Path(adapter), Path(output)
    work, progress = output.with_name(output.name + ".partial"), progress_file(output)
    loaded = read_adapter(adapter)
    trained = trained_config(adapter) or RunConfig()
    if trained.model.weights == aqlm_sizes.NAME:  # known before a hub's 13 GB are fetched
        raise UnusableModel(f"{base}: {aqlm_sizes.NO_MERGE}")
    config = replace(config, merge_base=base_to_merge(adapter, config.merge_base))
    revision = base_revision(base, adapter, revision)
    base_folder = find_base(base, revision)
    loaded = loaded.as_stored(partial(stored_name, model_type=unquantized_config(base_folder).get("model_type", "")))
    refuse_output(output, [base_folder, adapter], "merge")
    # Two merges into one folder would each count the other's shards as finished, so the lock comes before any look.
    with exclusive(work):
        earlier = read_state(progress)
        # Shards of the base that an earlier try has merged and deleted are known from its notes alone.
        tensors = stored_tensors(
            base_folder, freed=[Stored(n, base_folder / f, tuple(s), *k) for n, f, s, *k in earlier.get("tensors", [])]
        )
        check_fits_base(loaded, tensors, base)
        plan = plan_shards(tensors, int(config.shard_gib * GIB))
        identity = fingerprint(tensors, adapter, config, earlier.get("identity", {}).get("base", {}))
        finished = finished_shards(work, earlier, identity)
        check_disk(output, plan, set(finished), config.free_base)
        run = trained.with_values(model=str(base), revision=revision, **asdict(config))
        try:
            with building(output, "merge", run, {"adapter": source_of(adapter)}, keep=True, held=True) as stage:
                # What is neither a shard that is whole nor the notes is a torn shard, or of a merge of something else.
                for file in stage.folder.iterdir():
                    if file.name not in {*finished, SCRATCH}:
                        file.unlink()
                state = {
                    "identity": identity,
                    "tensors": [[t.name, t.file.name, t.shape, t.kind, t.key] for t in tensors],
                    "finished": finished,
                }
                resumed = len(finished)
                progress.parent.mkdir(exist_ok=True)
                write_text(progress, json.dumps(state))
                figures = write_shards(work, plan, state, progress, loaded, config, trained.model.double_quant)
                write_rest(work, base_folder, adapter, plan)
                check_written(work, plan)
                stage.measurements |= figures | {
                    "merge_base": config.merge_base,
                    "tensors": len(tensors),
                    "adapted_tensors": len(loaded.modules),
                    "shards": len(plan),
                    "shards_resumed": resumed,
                    "size_bytes": sum(2 * tensor.values for tensor in tensors),
                    "merge_s": round(time.monotonic() - start, 2),
                }
        except UnusableModel:
            if not config.free_base:  # what was freed is only there now
                empty_folder(work)
            raise
    return stage.measurements


def merged(run: Workspace, config: RunConfig) -> dict:
    """The measurements of a run's merge: of the one that lies there finished, else of one that is made now.

    Only the machine that made it has it. Found again is a merge of the adapter that lies there now, with the same
    settings, every byte as it was written; anything else is made anew, and what is found says so.
    """
    output, adapter = run.folder("merge"), run.folder("finetune") / "adapter"
    fetch(adapter.parent)
    found = finished(output, adapter, config)
    if found is None:
        return merge(config.model.model, adapter, output, config.merge, config.model.revision)
    print(f"{output} is this adapter's finished merge, every byte checked: used as it is")
    return found["measurements"]


def finished(output: Path, adapter: Path, config: RunConfig) -> dict | None:
    """The manifest of a finished merge of a run's adapter with these settings; None when there is none, or not whole.

    Its base is not read: it may have been deleted shard by shard (free_base).
    """
    recover(output)
    if not (output / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(output)
        now = identify(source_of(adapter))
        made, wanted = manifest["config"], asdict(config)
        asked = wanted["merge"] | {"merge_base": base_to_merge(adapter, config.merge.merge_base)}
        same = (
            manifest["inputs"]["adapter"]["sha256"] == now["sha256"]
            and now["of"] == FINISHED  # names and sizes do not tell an adapter that was trained again
            and made["model"]["model"] == wanted["model"]["model"]
            and made["model"]["revision"] == base_revision(config.model.model, adapter, config.model.revision)
            and made["merge"] | {"free_base": None} == asked | {"free_base": None}  # how it was made, not what
        )
        return check_outputs(output) if same else None
    except (DamagedArtifact, KeyError) as error:
        print(f"merged again: {error}")
        return None


def source_of(adapter: Path) -> Path:
    """The finished stage that an adapter comes from; of one from elsewhere its own folder: beside it one may write."""
    return adapter.parent if (adapter.parent / MANIFEST).is_file() else adapter


def trained_config(adapter: Path) -> RunConfig | None:
    """The configuration that training left beside its adapter; None for an adapter from elsewhere."""
    beside = adapter.parent / "config.yaml"
    return load_yaml(beside) if beside.is_file() else None


def base_to_merge(adapter: Path, merge_base: str) -> str:
    """original or nf4. auto: the weights that training saw; the original ones for an adapter that does not tell.

    An adapter corrects the base it was trained on, NF4's rounding included. Merged into the original weights it
    corrects an error that is not there: 0.0024 nats a token from the trained model, against 0.0000; after GPTQ 0.0025
    against 0.0005 (a model of 26 million parameters, data/measurements/merge_bases.csv).
    """
    if merge_base != "auto":
        return merge_base
    trained = trained_config(adapter)
    return "nf4" if trained is not None and trained.model.weights == "nf4" else "original"


# ---- reading, and refusing what cannot be merged ---------------------------------------------------------------------


def base_revision(base: str | Path, adapter: Path, asked: str | None) -> str | None:
    """The revision of a hub base to merge into: the one asked for, else the one that training saw.

    Says so when they differ: an adapter corrects the weights that it was trained on.
    """
    settings = adapter_settings(adapter)
    trained = settings.get("revision") if settings.get("base_model_name_or_path") == str(base) else None
    if None not in (asked, trained) and asked != trained:
        print(f"{adapter} was trained on revision {trained} of {base} and is merged into revision {asked}")
    return asked or trained


def find_base(base: str | Path, revision: str | None) -> Path:
    """The folder of the base; a hub id is downloaded, safetensors only."""
    if Path(base).is_dir():
        return Path(base)
    if str(base).count("/") != 1 or str(base).startswith((".", "/")):
        raise UnusableModel(f"base {base} is neither a folder nor a hub id")
    return snapshot(str(base), revision)


def check_fits_base(adapter: Adapter, tensors: list[Stored], base: str | Path) -> None:
    """Each module of the adapter is a matrix of the base, of the same shape. Raises UnusableModel if not."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for module in adapter.modules:
        shape = shapes.get(f"{module}.weight")
        (_, inputs), (outputs, _) = (adapter.shapes[adapter.key(module, part)] for part in PARTS[:2])
        if shape is None:
            raise UnusableModel(f"{adapter.folder} is for another base: {base} has no {module}.weight")
        if shape != (outputs, inputs):
            raise UnusableModel(
                f"{adapter.folder} is for another base: {module}.weight is {outputs} × {inputs} in the adapter "
                f"and {' × '.join(map(str, shape))} in {base}"
            )


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_shards(tensors: list[Stored], shard_bytes: int) -> dict[str, list[Stored]]:
    """File name -> the tensors it will hold, in the order of the base, so that each base shard is read once.

    >>> tensors = [Stored(name, Path("base"), (3,), "F16") for name in "abc"]
    >>> [[tensor.name for tensor in shard] for shard in plan_shards(tensors, shard_bytes=12).values()]
    [['a', 'b'], ['c']]
    """
    shards: list[list[Stored]] = []
    room = 0
    # First fit in the base's own order, two bytes a value; a tensor that is larger than a shard gets one to itself.
    for tensor in tensors:
        if not shards or 2 * tensor.values > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= 2 * tensor.values
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def finished_shards(work: Path, state: dict, identity: dict) -> dict[str, str]:
    """Shards that an interrupted merge of the same inputs has written, each read again and held to its checksum."""
    if state.get("identity") != identity:
        return {}
    return {
        name: known
        for name, known in state["finished"].items()
        if (work / name).is_file() and checksum(work / name) == known
    }


def progress_file(output: Path) -> Path:
    """What a merge knows of itself. It goes once the folder has its name, not before: a freed base would be missed."""
    return output.with_name(output.name + ".partial") / SCRATCH / "progress.json"


def read_state(progress: Path) -> dict:
    """What an interrupted merge knew; {} when there is none, or it is not to be read."""
    try:
        return json.loads(progress.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def fingerprint(tensors: list[Stored], adapter: Path, config: MergeConfig, freed: dict) -> dict:
    """What must be the same for an interrupted merge to go on: base, adapter, settings."""
    files = {}
    # Of the base size and time, as checksums of 14.5 GB take up to 40 s; of the adapter every byte.
    for file in {tensor.file for tensor in tensors}:
        files[file.name] = [file.stat().st_size, file.stat().st_mtime_ns] if file.exists() else freed.get(file.name)
    return {
        "base": dict(sorted(files.items())),
        "adapter": {name: checksum(adapter / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)},
        "config": asdict(config),
    }


def disk_needed_bytes(plan: dict[str, list[Stored]], finished: set[str], free_base: bool) -> int:
    """The most that the disk must still take at any moment: all shards, or with free_base those not yet made up for."""
    left = {tensor.file: 0 for shard in plan.values() for tensor in shard}
    for shard in plan.values():
        for tensor in shard:
            left[tensor.file] += 1
    # A walk through the plan: a shard comes, and base files go whose last tensor was in it. The top of the walk counts.
    used = most = 0
    for name, shard in plan.items():
        used += 0 if name in finished else sum(2 * tensor.values for tensor in shard)
        most = max(most, used)
        for tensor in shard:
            left[tensor.file] -= 1
            if free_base and not left[tensor.file] and tensor.file.exists():
                used -= tensor.file.stat().st_size
    return most


def check_disk(output: Path, plan: dict[str, list[Stored]], finished: set[str], free_base: bool) -> None:
    """Raises ValueError with what is needed and what is free."""
    needed = disk_needed_bytes(plan, finished, free_base)
    free = shutil.disk_usage(existing(output)).free
    if needed + DISK_MARGIN_BYTES > free:
        less = disk_needed_bytes(plan, finished, free_base=True) + DISK_MARGIN_BYTES
        remedy = "" if free_base else f"; free_base=True needs {less / GIB:.2f}"
        raise ValueError(
            f"merging needs {(needed + DISK_MARGIN_BYTES) / GIB:.2f} GiB of disk at {output}, "
            f"{free / GIB:.2f} are free{remedy}"
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    work: Path, plan: dict, state: dict, progress: Path, adapter: Adapter, config: MergeConfig, double_quant: bool
) -> dict:
    """Write the shards that are not finished, each under another name until it is whole; returns measurements."""
    import torch
    from safetensors import safe_open

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last_use = {tensor.file: name for name, shard in plan.items() for tensor in shard}
    largest_change, peak_bytes = 0.0, 0
    # In memory: a few fp32 copies of one tensor, 224 MiB each for a matrix of a 7B's MLP (4096 × 14336), not the model.
    total = sum(2 * tensor.values for shard in plan.values() for tensor in shard)
    bar = bars.bar("merging", total, unit="B", unit_scale=True)
    with bar, safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as factors, torch.inference_mode():
        for name, shard in plan.items():
            if name in state["finished"]:
                bar.update(sum(2 * tensor.values for tensor in shard))
            else:
                bar.set_postfix_str(name)
                with SafetensorsWriter(work / name, {tensor.name: tensor.shape for tensor in shard}) as writer:
                    for tensor in shard:
                        merged, change = merged_tensor(
                            tensor, adapter, factors, config.merge_base, double_quant, device
                        )
                        writer.add(merged)
                        largest_change = max(largest_change, change)
                        peak_bytes = max(peak_bytes, anonymous_bytes())
                        bar.update(2 * tensor.values)
                # Noted after the shard has its name: a kill in between costs a shard, never a wrong one.
                state["finished"][name] = writer.sha256
                write_text(progress, json.dumps(state))
            if config.free_base:
                for file in [file for file, last in last_use.items() if last == name and file.exists()]:
                    file.resolve().unlink()  # in the hub's cache the file is a link to the one that takes the room
                    file.unlink(missing_ok=True)
    return {"largest_change": largest_change, "peak_anonymous_gib": round(peak_bytes / GIB, 3)}


def merged_tensor(
    tensor: Stored, adapter: Adapter, factors, merge_base: str, double_quant: bool, device: "torch.device"
) -> tuple["torch.Tensor", float]:
    """One tensor of the result in fp16 on the CPU, and the largest change that the adapter made to it.

    The sum is made in fp32 and rounded once, in the order of PEFT's merge, so that both give the same bits.
    Raises UnusableModel for a value that fp16 cannot hold.
    """
    import torch
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as shard:
        weight = shard.get_tensor(tensor.in_file)
    module = tensor.name.removesuffix(".weight")
    adapted = module in adapter.modules and tensor.name.endswith(".weight")
    change = 0.0
    # Embedding, head and norms are only rounded: a trip to the GPU would cost more than it saves.
    if adapted or (merge_base == "nf4" and is_quantized_in_training(tensor)):
        weight = weight.to(device)
    if merge_base == "nf4" and is_quantized_in_training(tensor):
        weight = through_nf4(weight, double_quant)
    if adapted:
        weight = weight.float()
        a, b, *magnitude = (
            factors.get_tensor(adapter.key(module, part)).to(device, torch.float32)
            for part in PARTS[: 3 if adapter.dora else 2]
        )
        # The product in fp32: in fp16 its sum over the rank would be rounded before it meets the weight.
        delta = (b @ a) * adapter.modules[module]  # (out, rank) @ (rank, in) -> (out, in)
        merged = weight + delta
        if magnitude:  # DoRA, https://arxiv.org/abs/2402.09353, equation 5: m · (W + ΔW) / ‖W + ΔW‖, a norm an output
            factor = magnitude[0] / torch.linalg.norm(merged, dim=1)
            merged = factor.view(-1, 1) * merged
            delta = merged - weight
        change, weight = delta.abs().max().item(), merged
    rounded = weight.to(torch.float16)
    if not torch.isfinite(rounded).all():
        largest = weight.float().abs().max().item()
        raise UnusableModel(f"{tensor.name} holds {largest:.3g}, more than fp16's 65504: this model needs bf16")
    return rounded.cpu().contiguous(), change


def is_quantized_in_training(tensor: Stored) -> bool:
    """QLoRA quantizes the linear layers of the decoder, with or without an adapter; not embedding, head and norms.

    Nor a mixture's router, whose module is called gate.
    """
    matrix = len(tensor.shape) == 2 and ".layers." in tensor.name and tensor.name.endswith(".weight")
    return matrix and not tensor.name.endswith(".gate.weight")


def through_nf4(weight: "torch.Tensor", double_quant: bool) -> "torch.Tensor":
    """A weight as QLoRA's training saw it: rounded to NF4 and back (https://arxiv.org/abs/2305.14314). Shape kept."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(
        *quantize_4bit(weight.to(torch.float16).contiguous(), quant_type="nf4", compress_statistics=double_quant)
    )


def write_rest(work: Path, base: Path, adapter: Path, plan: dict[str, list[Stored]]) -> None:
    """Index, tokenizer (the adapter's own where training saved one), config and generation config that agree with it.

    Training pads with a token of its own, and a template may end answers with another token than eos: servers and
    transformers read both from these files.
    """
    settings = unquantized_config(base)
    if len(plan) > 1:
        total = sum(2 * tensor.values for shard in plan.values() for tensor in shard)
        place = {tensor.name: name for name, shard in plan.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        write_text(work / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    # transformers reads ends and padding of a generation from here, and only without the file from config.json.
    generation = {"_from_model_config": True} | {
        name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in settings
    }
    if (base / "generation_config.json").is_file():
        generation = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = hand_on(adapter if brings_tokenizer(adapter) else base, work, base)
    if tokenizer is not None:
        settings["pad_token_id"] = generation["pad_token_id"] = tokenizer.pad_token_id
        stops = ends(generation.get("eos_token_id"), tokenizer)
        generation["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    write_text(work / "config.json", json.dumps(for_all_readers(settings), indent=2) + "\n")
    write_text(work / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def check_written(work: Path, plan: dict[str, list[Stored]]) -> None:
    """The result read back by its headers: the tensors of the plan, no more, no less, whole files."""
    wanted = {(tensor.name, tensor.shape) for shard in plan.values() for tensor in shard}
    written = stored_tensors(work)
    if {(tensor.name, tensor.shape) for tensor in written} != wanted or len(written) != len(wanted):
        raise RuntimeError(f"{work} does not hold the tensors that were planned")


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, so that a Colab without swap cannot take it back; 0: not known."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
