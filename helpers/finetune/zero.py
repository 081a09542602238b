"""DeepSpeed's ZeRO-2 (https://arxiv.org/abs/1910.02054): gradients and optimizer states divided among the ranks, of
16-bit LoRA and of full fine-tuning. Weights are divided by fully_shard instead (sharded.py).

`Optimizer` looks like any other to the trainer; DeepSpeed's engine is inside. States go into a checkpoint whole, as one
process alone has them, so that any number of processes goes on from it, with DeepSpeed or without.
"""

from importlib.util import find_spec
from typing import Any

import torch

from helpers.budget.sharding import BUCKET_VALUES
from helpers.config import RunConfig
from helpers.finetune import base, ranks

PACKAGES = "deepspeed==0.19.8 hjson py-cpuinfo msgpack einops ninja"
INSTALL = f"DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation {PACKAGES}"
STATES = ("exp_avg", "exp_avg_sq")


def is_used(config: RunConfig) -> bool:
    """Whether DeepSpeed divides a training's work: among several ranks, if it was asked to."""
    return config.train.sharding == "zero2" and ranks.count() > 1


def refuse(config: RunConfig) -> None:
    """Raise ValueError for what DeepSpeed is not asked to do here, or where it is not installed."""
    asked, how = config.train, config.train.sharding
    if how not in ("zero2", "zero3"):
        return
    if config.model.weights != "fp16":
        raise ValueError(
            f"sharding={how} with weights={config.model.weights}: of a 7B in 4 bits two H200 made 7,656 tokens/s by "
            "zero2 and 2,026 by zero3, 9,038 by none; set sharding=none, or fsdp where one GPU does not hold the base"
        )
    if how == "zero3":
        raise ValueError("sharding=zero3 is not run here: what it divides, fsdp divides too: set sharding=fsdp")
    if asked.patience:
        raise ValueError(f"patience goes back to an earlier adapter, which sharding={how} cannot: set sharding=fsdp")
    if asked.method != "sft":
        raise ValueError(f"method={asked.method} was never tried with sharding={how}: set sharding=none or fsdp")
    if find_spec("deepspeed") is None:
        raise ValueError(f"sharding={how} needs DeepSpeed, which is not installed: {INSTALL}; or set sharding=fsdp")


def refuse_fp16() -> None:
    """Raise ValueError for a GPU without bf16: DeepSpeed's loss scaling is another than the trainer's."""
    if torch.cuda.is_available() and base.precision().dtype == torch.float16:
        raise ValueError("DeepSpeed's ZeRO computes in bf16 here, which this GPU has not: set sharding=fsdp")


def settings(config: RunConfig, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration; accumulation: micro-batches of a rank in a step.

    Its own buckets, of 5e8 values, take 1.9 to 3.7 GiB.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": BUCKET_VALUES,
            "allgather_bucket_size": BUCKET_VALUES,
        },
    }


class Optimizer(torch.optim.Optimizer):
    """Looks like the optimizer that the trainer made; DeepSpeed divides its states, averages, clips and updates."""

    def __init__(self, model: torch.nn.Module, made: torch.optim.Optimizer, config: RunConfig, accumulation: int):
        import deepspeed

        super().__init__([dict(group) for group in made.param_groups], made.defaults)
        self.inner = type(made)([dict(group) for group in self.filled()])
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.inner, config=settings(config, accumulation), dist_init_required=False
        )
        self.make_states()

    def filled(self) -> list[dict[str, Any]]:
        """Groups that have parameters, which DeepSpeed joins; the trainer makes one for norms and biases anyway."""
        return [group for group in self.param_groups if group["params"]]

    def make_states(self) -> None:
        """States of no step: DeepSpeed makes them at its first, after those of a checkpoint have to be there."""
        divided = self.engine.optimizer
        for flat in divided.single_partition_of_fp32_groups:  # this rank's part of a group's weights
            start = {name: torch.zeros_like(flat.data) for name in STATES}
            self.inner.state[flat] = {"step": torch.zeros((), device=flat.device), **start}
        divided._lazy_init_hp_params_optimizer_state()  # which part is whose

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, in the order of a state's entries."""
        return [value for group in self.param_groups for value in group["params"]]

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Gradients of a micro-batch; of a step's last one they are averaged."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # counts the micro-batch: uncounted, a later step's gradients are added to old ones

    def update(self) -> torch.Tensor:
        """Clip and update; returns the norm of the gradient before. DeepSpeed does it all at once."""
        for inner, group in zip(self.inner.param_groups, self.filled(), strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        self.engine.step()
        return torch.as_tensor(float(self.engine.get_global_grad_norm()))

    def step(self, closure: None = None) -> None:
        """Nothing: `update` has done it."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed does it when it has updated."""

    def state_dict(self) -> dict[str, Any]:
        """The states as one rank alone would have them. All ranks ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self.inner.state.values()))["step"]
        entries = {
            number: {"step": step.detach().cpu().clone()}
            | {name: safe_get_full_optimizer_state(value, name).detach().cpu().clone() for name in STATES}
            for number, value in enumerate(self.parameters)
        }
        return super().state_dict() | {"state": entries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, or one process's AdamW."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for number, value in enumerate(self.parameters):
            entry = state_dict["state"].get(number, {})
            for name in STATES:
                if name in entry:
                    safe_set_full_optimizer_state(value, entry[name], name)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            group.update({name: value for name, value in saved.items() if name != "params"})
        steps = [entry["step"] for entry in state_dict["state"].values()]
        for state in self.inner.state.values() if steps else ():
            state["step"].fill_(float(steps[0]))


def whole(value: torch.nn.Parameter) -> torch.Tensor:
    """A trained weight as all ranks hold it together, in fp32, on the CPU. All ranks ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(value).detach().cpu().clone()
