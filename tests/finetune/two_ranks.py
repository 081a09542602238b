"""Trainings on two ranks: the cases of FOLDER/cases.json, one after the other, by two processes without a GPU.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/finetune/two_ranks.py FOLDER

Libraries are imported once and the ranks meet once. A case is a configuration, where its rows lie, and perhaps the
step at which rank 1, and nobody else, is asked to stop. Rank 0 leaves FOLDER/NAME/finetune, and in facts.json what
PyTorch's DistributedDataParallel was told.
"""

import io
import json
import os
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from helpers import cli, finetune  # noqa: E402
from helpers.config import from_tree  # noqa: E402
from helpers.finetune import ranks  # noqa: E402
from helpers.finetune.watch import Watch  # noqa: E402
from helpers.workspace import checkpoints  # noqa: E402


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

    def sealed(beside, *rest):
        """Rank 0 takes its time over the last checkpoint of a stopped run: does rank 1 go before it is whole?"""
        until = time.monotonic() + 2
        while stop_at and not (folder / "left").exists() and time.monotonic() < until:
            time.sleep(0.01)
        facts["left before the checkpoint was whole"] = (folder / "left").exists()
        return seal(beside, *rest)

    seal, checkpoints.seal = checkpoints.seal, sealed
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
                (folder / "left").touch()
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
        facts["said"] = said_of_errors(folder)
        everyone = ranks.gathered(facts)
    if os.environ["RANK"] == "0":
        (folder / "facts.json").write_text(json.dumps(everyone), encoding="utf-8")


def said_of_errors(folder: Path) -> dict:
    """What this rank says of an error that it alone has, and of one that both have."""
    with redirect_stderr(io.StringIO()) as alone:
        if ranks.rank() == 1:
            cli.say("a disk that is not shared")
    ranks.gathered(None)
    nowhere = ["--prepared", str(folder / "nowhere"), "--output", str(folder / "never")]
    with redirect_stderr(io.StringIO()) as together:
        status = cli.main(["finetune", "--profile", "tiny", *nowhere])
    return {"alone": alone.getvalue(), "together": together.getvalue(), "status": status}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
