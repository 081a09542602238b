"""What the other GPUs of a machine buy: each way of using them, what fits, and what is fastest."""

from dataclasses import dataclass, replace

from helpers.budget import estimate, sharding
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape

NEAR = 0.05
"""Share of a step's time that a plainer way may take more: predictions of time are not that exact."""
ROUGH = 0.25
"""Share that predictions of several GPUs' time were off at most on two H200: what the second adds to a step, and steps
with divided weights. Their memory is within 3 %."""
SAYS = {
    "none": "each GPU holds the whole model",
    "fsdp": "weights divided by fully_shard",
    "zero2": "gradients and optimizer divided by DeepSpeed",
    "zero3": "weights divided by DeepSpeed",
}


@dataclass(frozen=True)
class Way:
    """One way of training a configuration on a machine, as its plan would."""

    gpus: int
    sharding: str
    fits: bool
    process_gib: float
    """Of each GPU."""
    limit_gib: float
    step_s: float
    """Of as many sequences on any number of GPUs."""
    total_h: float

    @property
    def words(self) -> str:
        """The way as flags, and what it means."""
        if self.gpus == 1:
            return "gpus=1"
        return f"gpus={self.gpus} sharding={self.sharding}: {SAYS[self.sharding]}"


def every(
    config: RunConfig, shape: ModelShape, machine: Machine, shardings: tuple[str, ...] = sharding.WAYS
) -> tuple[Way, ...]:
    """One GPU, and all of the machine's in each of these ways; () where there is one only.

    Each computes the same steps as its own plan does: context and rank stay, or it does not fit.
    """
    count = machine.gpu.count if machine.gpu else 1
    if count == 1:
        return ()
    asked = [(1, "none"), *((count, how) for how in shardings)]
    return tuple(way(config, shape, machine, gpus, how) for gpus, how in asked)


def way(config: RunConfig, shape: ModelShape, machine: Machine, gpus: int, how: str) -> Way:
    """One of them."""
    asked = replace(config, train=replace(config.train, gpus=gpus, sharding=how, checkpointing="auto"))
    needs = estimate.settle(asked, shape, machine).budget
    memory, time = needs.vram, needs.time
    return Way(gpus, how, needs.fits, memory.process_gib, memory.limit_gib, time.step_s, time.total_h)


def fastest(ways: tuple[Way, ...]) -> Way | None:
    """The first of the proposed that fits within `NEAR` of the fastest: less is divided, and less can go wrong."""
    fitting = [way for way in ways if way.fits and way.sharding in sharding.PROPOSED]
    least_s = min((way.step_s for way in fitting), default=0.0)
    return next((way for way in fitting if way.step_s <= (1 + NEAR) * least_s), None)


def table(ways: tuple[Way, ...]) -> str:
    """A row a way, for people: GiB of each GPU, seconds of a step, hours, and which to take; "" without any."""
    if not ways:
        return ""
    best = fastest(ways)
    lines = [f"With the {ways[-1].gpus} GPUs of this machine, the same steps, each way as it is planned:"]
    for found in ways:
        said = "the fastest that fits" if found is best else "" if found.fits else "does not fit"
        figures = f"{found.process_gib:6.2f} GiB each, {found.step_s:8.2f} s a step, {found.total_h:7.2f} h"
        lines.append(f"  {found.words:<68}{figures}  {said}".rstrip())
    rough = f"  Their times are rough: on two H200 off by up to {ROUGH:.0%}; over PCIe nobody has measured any."
    lines.append(rough if best else "  None fits: take a smaller model, or GPUs with more.")
    return "\n".join(lines)
