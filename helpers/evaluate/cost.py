"""What a model costs: bytes on disk, peak memory, time to the first token, tokens a second."""

import os
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.inference import GIB, Loaded, generation_config, pad_left
from helpers.workspace import size_bytes

BATCHES = (1, 8)
REPEATS = 3
PROMPT_TOKENS, NEW_TOKENS = 128, 32


def disk_bytes(name: str | Path) -> int | None:
    """Bytes of a model's file or folder; of a hub model, of its snapshot in the cache. None when not there."""
    if Path(name).is_file():
        return Path(name).stat().st_size
    folder = on_disk(name)
    return None if folder is None else size_bytes(folder)


def on_disk(name: str | Path) -> Path | None:
    """The folder of a model; of a hub model, its snapshot in the cache, which has its commit for a name."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except Exception:  # the hub's client raises many kinds for "not in the cache"
        return None


def speed(loaded: Loaded) -> dict[str, float | None]:
    """Greedy decoding of random prompts, which it may not end, and reading of prompts; medians of three.

    first_token_s: from the call to the first new token, prompt of prompt_tokens; decode: tokens after the first, of
    all rows, a second; prompt_tokens_per_s: what the first token's time makes of the prompt. By the clock a fast GPU
    waits for Python; gpu_ms_per_token is what its kernels take for a token of one answer (None without a GPU).
    """
    prompt = min(PROMPT_TOKENS, loaded.context // 2)
    new = min(NEW_TOKENS, loaded.context - prompt)
    figures: dict[str, float | None] = {"prompt_tokens": prompt, "gpu_ms_per_token": gpu_ms_per_token(loaded, prompt)}
    for batch in BATCHES:
        decode_times(loaded, batch, prompt, 4)  # kernels are chosen and compiled at the first call
        runs = [decode_times(loaded, batch, prompt, new) for _ in range(REPEATS)]
        first_s = statistics.median(run[0] for run in runs)
        rate = statistics.median(batch * (len(run) - 1) / (run[-1] - run[0]) for run in runs)
        if batch == 1:
            figures |= {"first_token_s": first_s, "tokens_per_s": rate, "prompt_tokens_per_s": prompt / first_s}
        else:
            figures |= {f"tokens_per_s_batch_{batch}": rate}
    return figures


def gpu_ms_per_token(loaded: Loaded, prompt: int, batch: int = 1) -> float | None:
    """Milliseconds that the GPU's kernels take for one decoding step, without its waiting; None without a GPU.

    Two answers that differ only in length are profiled: what a prompt costs, and starting, is in both.
    """
    import torch

    if torch.device(loaded.model.device).type != "cuda":
        return None
    most = min(NEW_TOKENS, loaded.context - prompt)
    few = max(1, most // 4)
    decode_times(loaded, batch, prompt, few)  # kernels are chosen and compiled at the first call
    busy_ms = {}
    for new in (few, most):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            decode_times(loaded, batch, prompt, new)
            wait(loaded.model.device)
        busy_ms[new] = kernel_ms(profiler.events())
    return (busy_ms[most] - busy_ms[few]) / (most - few) if most > few else None


def kernel_ms(events: Iterable[Any]) -> float:
    """Summed time of what ran on the GPU, without copies from and to the host, which run beside it.

    Device time of profiler events is in microseconds.
    """
    import torch

    return sum(
        event.device_time / 1e3
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))
    )


def decode_times(loaded: Loaded, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds from the call of generate to each of `new` tokens, none of which may be the last."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    settings = generation_config(loaded, new, temperature=0.0, top_p=1.0)
    settings.min_new_tokens = new
    words = torch.randint(
        0, loaded.model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)
    )
    rows = pad_left(words.tolist(), settings.pad_token_id, loaded.model.device)
    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            wait(input_ids.device)
            times.append(time.perf_counter() - started)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    wait(loaded.model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        loaded.model.generate(**rows, generation_config=settings, stopping_criteria=StoppingCriteriaList([Clock()]))
    return times


def wait(device: Any) -> None:
    """Let a GPU finish what it was given: its work is asynchronous, a clock is not."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Peaks inside the block: of VRAM (peak_allocated_gib, peak_reserved_gib) and of this process.

    peak_anonymous_gib is what the system cannot take back, looked at twenty times a second; peak_host_gib counts pages
    of files too, all of a model's among them, which it drops when memory is short. The dict is filled when the block
    ends.
    """
    import torch

    found: dict[str, float] = {}
    reset_host_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ended, highest = threading.Event(), [anonymous_bytes()]
    watch = threading.Thread(target=watch_anonymous, args=(ended, highest), daemon=True)
    watch.start()
    try:
        yield found
    finally:
        ended.set()
        watch.join()
        found["peak_anonymous_gib"] = max(highest[0], anonymous_bytes()) / GIB
        if torch.cuda.is_available():
            found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["peak_host_gib"] = host_peak_bytes() / GIB


def watch_anonymous(ended: threading.Event, highest: list[int]) -> None:
    """Keep the highest anonymous memory in highest[0] until ended."""
    while not ended.wait(0.05):
        highest[0] = max(highest[0], anonymous_bytes())


def anonymous_bytes() -> int:
    """This process's memory that no file backs; elsewhere than on Linux all that is resident."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("RssAnon:")[1].split()[0])
    except (OSError, IndexError):
        import psutil

        return psutil.Process(os.getpid()).memory_info().rss


def reset_host_peak() -> None:
    """Start the kernel's count of this process's resident memory anew, where it lets us (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def host_peak_bytes() -> int:
    """The most resident memory since the count was started anew; without a count, what is resident now."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import psutil

        return psutil.Process(os.getpid()).memory_info().rss
