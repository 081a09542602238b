"""Trainings on two ranks: the cases of FOLDER/cases.json, one after the other, by two processes without a GPU.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/finetune/two_ranks.py FOLDER

Libraries are imported once and the ranks meet once. A case is a configuration, where its rows lie, and perhaps the
step at which rank 1, and nobody else, is asked to stop. Rank 0 leaves FOLDER/NAME/finetune, and in facts.json what
PyTorch's DistributedDataParallel was told.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from helpers import finetune  # noqa: E402
from helpers.config import from_tree  # noqa: E402
from helpers.finetune import ranks  # noqa: E402
from helpers.finetune.watch import Watch  # noqa: E402


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainers, unsynced, facts = [], [], {}
    train, no_sync, on_step_end = finetune.train, DistributedDataParallel.no_sync, Watch.on_step_end

    def kept(trainer, resume):
        trainers.append(trainer)
        return train(trainer, resume)

    def counted(ddp):
        unsynced.append(ddp)
        return no_sync(ddp)

    def stopped(watch, args, state, control, **kwargs):
        if ranks.rank() == 1 and state.global_step == stop_at:
            watch.interrupted = 15
        return on_step_end(watch, args, state, control, **kwargs)

    finetune.train, DistributedDataParallel.no_sync, Watch.on_step_end = kept, counted, stopped
    with ranks.joined():
        for name, case in json.loads((folder / "cases.json").read_text(encoding="utf-8")).items():
            stop_at, output = case.get("stop_at"), folder / name / "finetune"
            trainers.clear()
            unsynced.clear()
            try:
                finetune.finetune(from_tree(case["config"]), Path(case["prepared"]), output)
            except KeyboardInterrupt as stop:
                facts[name] = {"stopped": str(stop)}
                continue
            (trainer,) = trainers
            ddp = trainer.model_wrapped
            ignored = set(ddp.parameters_to_ignore)
            facts[name] = {
                "ddp": type(ddp).__name__,
                "unsynced": len(unsynced),
                "steps": trainer.state.global_step,
                "micro_batches": trainer.args.gradient_accumulation_steps,
                "bucket_view": ddp.gradient_as_bucket_view,
                "find_unused": ddp.find_unused_parameters,
                "sent": sorted(name for name, _ in trainer.model.named_parameters() if name not in ignored),
                "trained": sorted(name for name, value in trainer.model.named_parameters() if value.requires_grad),
                "seed": trainer.args.seed,
            }
        everyone = ranks.gathered(facts)
    if os.environ["RANK"] == "0":
        (folder / "facts.json").write_text(json.dumps(everyone), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
