"""A file of prompts through `serve --batch`, and the same prompts through the server's loop: tokens a second of each.

Random weights in Mistral 7B's shape with an adapter, the base in NF4, inside a T4's 14.42 GiB of memory; 256 prompts
of 8 to 250 words, answers of at most 128 tokens. Prints one JSON object a way: tokens, tokens_per_s, peak_reserved_gib
and, of the batch, how large its batches were. A T4's room for keys and values is what bounds them.

    python tests/benchmarks/bench_batch.py --work /tmp/batch           one GPU, some four minutes
    python tests/benchmarks/bench_batch.py --work /tmp/toy --toy       the script on a CPU, a minute
"""

import argparse
import asyncio
import json
import random
import time
from pathlib import Path

import random_model
import t4

ANSWER = 128


def main() -> None:
    """Make model and prompts, answer them both ways, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/batch"))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--toy", action="store_true", help="a small shape and few prompts")
    options = parser.parse_args()
    t4.limit()
    shape, layers = (str(t4.ROOT / "data" / "tiny-mistral"), 2) if options.toy else (random_model.SHAPE, None)
    work, count = options.work.resolve(), 24 if options.toy else options.prompts
    base, adapter = work / "base", work / "adapter"
    random_model.make(base, shape, layers, adapter)
    asked = [{"prompt": prompt, "max_tokens": ANSWER} for prompt in prompts(count)]
    file = work / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in asked), encoding="utf-8")
    print(json.dumps(in_batches(adapter, file)), flush=True)
    print(json.dumps(in_the_loop(adapter, asked)), flush=True)


def prompts(count: int) -> list[str]:
    """Texts of 8 to 250 words that a random model's tokenizer knows, the same at every run."""
    drawn = random.Random(0)
    return [" ".join(f"w{drawn.randrange(1500)}" for _ in range(drawn.randint(8, 250))) for _ in range(count)]


def in_batches(model: Path, file: Path) -> dict:
    """The file through `batch.answer`."""
    import torch

    from helpers.config import RunConfig
    from helpers.serve import batch

    sizes, generate = [], batch.batch_generate

    def counted(loaded, some, *arguments, **settings):
        sizes.append(len(some))
        return generate(loaded, some, *arguments, **settings)

    batch.batch_generate = counted
    made = batch.answer(model, RunConfig(), file, batch.free(file.with_name("answers.jsonl")))
    peak = torch.cuda.max_memory_reserved() / t4.GIB if torch.cuda.is_available() else None
    return {"way": "batch", **made, "batches": len(sizes), "largest": max(sizes), "peak_reserved_gib": peak}


def in_the_loop(model: Path, asked: list[dict]) -> dict:
    """The same requests through the server's engine, 64 at a time."""
    import torch

    from helpers.config import RunConfig
    from helpers.serve.batching import Engine, opened
    from helpers.serve.folder import Folder

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    loaded = opened(str(model), RunConfig())
    engine = Engine(loaded)
    served, begun = Folder("model", loaded, engine), time.perf_counter()

    async def all_of_them() -> list[dict]:
        places = asyncio.Semaphore(64)

        async def one(body: dict) -> dict:
            async with places:
                reply = await served.reply(body | {"model": "model", "temperature": 0}, chat=False)
                return json.loads(b"".join([chunk async for chunk in reply.chunks]))

        return await asyncio.gather(*map(one, asked))

    tokens = sum(answer["usage"]["completion_tokens"] for answer in asyncio.run(all_of_them()))
    took_s = time.perf_counter() - begun
    engine.close()
    peak = torch.cuda.max_memory_reserved() / t4.GIB if torch.cuda.is_available() else None
    figures = {"tokens": tokens, "tokens_per_s": round(tokens / took_s, 1), "seconds": round(took_s, 1)}
    return {"way": "loop", **figures, "peak_reserved_gib": peak}


if __name__ == "__main__":
    main()
