"""Ranks: the processes that train together, one a GPU, and what they tell each other.

A process that trains alone is rank 0 of 1, and everything here answers at once. Others have been started by workers.py,
or by torchrun, accelerate launch or Slurm, which all say by environment variables who is who (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Rank 0 alone writes, sends and prints; the others compute.

>>> rank(), count(), is_first(), from_first(lambda: "here"), gathered(3), agreed(None)
(0, 1, True, 'here', [3], None)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import check_cuda_p2p_ib_support

from helpers.hardware import Machine
from helpers.models import gpu
from helpers.workspace import StorageError

PATIENCE = timedelta(hours=1)
"""How long a rank waits for another one: a checkpoint may come from Drive meanwhile. Dead ones are noticed sooner."""
HEARING = timedelta(seconds=3)
"""How long one that fails listens whether rank 0 fails with the same sentence."""
Result = TypeVar("Result")


def rank() -> int:
    """This process's number among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return rank() == 0


def expected() -> int:
    """How many processes the environment says were started together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that the environment names, for a while; nothing happens where it names none.

    Objects and flags go through gloo, so that no GPU waits for them, and tensors of a GPU through NCCL. Raises
    ValueError when the ranks cannot meet, or this process uses more than its own GPU already.
    """
    if expected() == 1 or dist.is_initialized():
        yield
        return
    gpu.claim_card()
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch._C._cuda_getDeviceCount() > 1:  # what CUDA itself sees, whatever the environment says since
        raise ValueError(
            "PyTorch used the GPUs before this process took its own: call finetune before anything else does, or give "
            "each process one GPU with CUDA_VISIBLE_DEVICES"
        )
    if on_gpu and not check_cuda_p2p_ib_support():  # GeForce of the 40 series with older drivers
        os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}  # else accelerate refuses to start
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', 'no MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'no MASTER_PORT')}"
        in_use = "EADDRINUSE" in str(error)
        why = "the port is in use" if in_use else str(error).splitlines()[0]
        remedy = "choose another MASTER_PORT" if in_use else "all must name the same reachable machine and free port"
        raise ValueError(f"{expected()} processes could not meet at {where} ({why}): {remedy}") from None
    yield
    dist.destroy_process_group()  # not after an error: others may be gone, and the process ends in any case


def from_first(act: Callable[[], Result]) -> Result:
    """What rank 0 gets by doing something, on every rank.

    Its errors that are sentences (ValueError, StorageError) are raised on all, who would wait for it else; another is
    raised on rank 0 alone, and the others are ended then.
    """
    if count() == 1:
        return act()
    box: list[Result | Exception | None] = [None]
    if is_first():
        try:
            box = [act()]
        except (ValueError, StorageError) as error:
            box = [error]
            dist.broadcast_object_list(box)
            raise
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def is_said_by_the_first(sentence: str) -> bool:
    """Whether this process fails with a sentence that another one says for it.

    Where they have met, rank 0 has left its own in their store, and what it has not met within HEARING is this rank's
    to say. Before that all have read the same settings: the first of each machine says what is wrong with them.
    """
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) > 0
    store = dist.distributed_c10d._get_default_store()
    with suppress(dist.DistError):  # the first has ended, with its store
        if is_first():
            store.set("failed", sentence)
            return False
        try:
            store.wait(["failed"], HEARING)
        except dist.DistStoreError:
            return False
        return store.get("failed").decode() == sentence
    return not is_first()


def gathered(value: Result) -> list[Result]:
    """Every rank's value, on every rank."""
    if count() == 1:
        return [value]
    values: list[Result | None] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def agreed(number: int | None) -> int | None:
    """The largest of the ranks' numbers, None where none has one: a signal reaches them at different steps."""
    if count() == 1:
        return number
    flag = torch.tensor(number or 0)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag) or None


def smallest(machine: Machine) -> Machine:
    """The machine to plan for: the GPU with the least free memory, and this rank's share of the host's.

    Says so when one has less than another. Raises ValueError for GPUs that compute in different types.
    """
    if count() == 1:
        return machine
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", count()))
    machines = gathered(replace(machine, host=replace(machine.host, ram_gib=machine.host.ram_gib / beside)))
    gpus = [one.gpu for one in machines]
    if any(one is not None for one in gpus):
        other = next((one for one in gpus if one.capability[0] != gpus[0].capability[0]), None)
        if other is not None:
            raise ValueError(
                f"GPU 0 is a {gpus[0].name} and GPU {gpus.index(other)} a {other.name}, which compute in different "
                "types: train on GPUs of one kind (CUDA_VISIBLE_DEVICES chooses them)"
            )
    free_gib = [one.vram_gib for one in machines]
    least, most = min(free_gib), max(free_gib)
    if is_first() and least < 0.95 * most:
        print(
            f"GPU {free_gib.index(least)} has {least:.1f} GiB free and GPU {free_gib.index(most)} {most:.1f}: the run "
            "is planned for the smaller one"
        )
    return replace(machines[free_gib.index(least)], host=min((one.host for one in machines), key=lambda h: h.ram_gib))
