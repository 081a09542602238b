"""Measure data preparation: conversations a second on one core, tokens a second, peak memory on a large file.

    python tests/benchmarks/bench_data.py                   # speed, a minute
    python tests/benchmarks/bench_data.py --file-gb 2       # and the memory of a 2 GB JSONL, 13 minutes
    python tests/benchmarks/bench_data.py --books-gb 1      # or of 1 GB whose rows are books of half a megabyte

Prints one JSON object a line; `data/measurements/bench_data.jsonl` holds those of the machine it names. Its large file
was prepared under a hard limit of 2 GiB, file pages included, which this makes as root with cgroup v1:

    mkdir /sys/fs/cgroup/memory/two; echo 2G > /sys/fs/cgroup/memory/two/memory.limit_in_bytes
    (echo $BASHPID > /sys/fs/cgroup/memory/two/cgroup.procs; exec python tests/benchmarks/bench_data.py --file-gb 2)
"""

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from t4 import ROOT

from helpers import prepare
from helpers.models import TINY, profile
from helpers.models.templates import Template, load_tokenizer
from helpers.prepare.checks import Findings, actions
from helpers.prepare.duplicates import groups, jaccard, sketches, windows
from helpers.prepare.outliers import languages, scripts
from helpers.sources.readers import read

SHORT = 30_000
"""Conversations of the speed measurement."""


def write(path: Path, size_bytes: int = 0, count: int = 0, exchanges: tuple = (2, 4), more: str = "") -> int:
    """Short conversations until the file has a size or a count; the number written. more: a field nobody trains on."""
    rng = random.Random(0)
    words = [line.split() for line in (ROOT / "data" / "prose.txt").read_text(encoding="utf-8").splitlines() if line]
    words = [word for line in words for word in line]
    written = size = 0
    with path.open("w", encoding="utf-8") as file:
        while written < count or size < size_bytes:
            messages = [
                {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(5, length)))}
                for _ in range(rng.randint(*exchanges))
                for role, length in (("user", 20), ("assistant", 40))
            ]
            size += file.write(json.dumps({"prompt_id": f"{written:08}{more}", "messages": messages}) + "\n")
            written += 1
    return written


def write_books(path: Path, size_bytes: int, letters: int = 500_000) -> int:
    """Plain texts of so many letters until the file has a size; the number written."""
    rng = random.Random(0)
    words = (ROOT / "data" / "prose.txt").read_text(encoding="utf-8").split()
    written = size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < size_bytes:
            size += file.write(json.dumps({"text": " ".join(rng.choices(words, k=letters // 5))}) + "\n")
            written += 1
    return written


def timed(name: str, count: int, unit: str, work) -> object:
    """Run work, print what it reached."""
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    print(json.dumps({"what": name, unit: count, "cpu_s": round(seconds, 2), f"{unit}_per_s": round(count / seconds)}))
    return result


def speed(folder: Path) -> None:
    """Each step by itself, in processor seconds of one core."""
    path = folder / "short.jsonl"
    write(path, count=SHORT)
    size = path.stat().st_size
    print(json.dumps({"what": "file", "conversations": SHORT, "bytes": size, "bytes_each": round(size / SHORT)}))
    config = profile("tiny", seq_len=512)
    template = Template(load_tokenizer(TINY))

    def talks():
        return list(prepare.conversations(str(path), config, prepare.Reading(Findings(actions())), template))

    def templated():
        reading = prepare.Reading(Findings(actions()))
        return [template.chunks(talk.messages) for talk in prepare.conversations(str(path), config, reading, template)]

    timed("read", SHORT, "conversations", lambda: sum(1 for _ in read(str(path))))
    checked = timed("read and check", SHORT, "conversations", talks)
    chunked = timed("read, check and template", SHORT, "conversations", templated)
    texts = [text for chunks in chunked for text, _ in chunks]
    ids = timed(
        "the tokenizer alone",
        SHORT,
        "conversations",
        lambda: [template.tokenizer(texts[i : i + 2048], add_special_tokens=False) for i in range(0, len(texts), 2048)],
    )
    tokens = sum(len(row) for batch in ids for row in batch["input_ids"])
    timed(
        "template and tokenize",
        tokens,
        "tokens",
        lambda: [template.encode([talk.messages for talk in checked[i : i + 512]]) for i in range(0, SHORT, 512)],
    )
    bodies = [talk.text for talk in checked]
    sketched = timed("sketches", SHORT, "conversations", lambda: sketches(bodies))
    share = lambda i, k: jaccard(windows(bodies[i]), windows(bodies[k]))  # noqa: E731
    timed("groups of near duplicates", SHORT, "conversations", lambda: groups(sketched, share))
    timed("scripts", SHORT, "conversations", lambda: scripts(bodies))
    timed("languages", SHORT, "conversations", lambda: languages(bodies))
    config = profile("tiny", seq_len=512)
    timed("prepare, all of it", SHORT, "conversations", lambda: prepare.prepare(config, folder / "out", str(path)))


def memory(folder: Path, file_gb: float, books: bool = False) -> None:
    """Peak memory of prepare on a file of so many GB (10⁹ bytes): resident, and of it anonymous, that is not files.

    Memory grows with the conversations and hardly with their tokens, so they are many and of one exchange; or each is a
    book, of which a batch must not hold as many.
    """
    path = folder / "large.jsonl"
    size_bytes = int(file_gb * 1e9)
    count = write_books(path, size_bytes) if books else write(path, size_bytes, exchanges=(1, 1), more="x" * 400)
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.2):
            status = Path("/proc/self/status").read_text()
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(anonymous.split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    try:
        made = prepare.prepare(profile("tiny", seq_len=512), folder / "out", str(path))
    finally:
        stop.set()
        watcher.join()
    assert made["in"] == count == made["kept"] + sum(made["dropped"].values())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"what": "prepare of a large file" + (" of books" if books else ""), "bytes": path.stat().st_size}
    found |= {"conversations": count, "tokens": made["train_tokens"] + made["heldout_tokens"]}
    found |= {"wall_s": round(time.monotonic() - start), "peak_anonymous_gib": round(peak[0] / 2**30, 2)}
    print(json.dumps(found | {"peak_resident_gib": round(resident / 2**30, 2)}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file-gb", type=float, default=0)
    parser.add_argument("--books-gb", type=float, default=0)
    parser.add_argument("--skip-speed", action="store_true")
    arguments = parser.parse_args()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    print(json.dumps({"what": "machine", "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}))
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.skip_speed:
            speed(Path(folder))
        if arguments.file_gb:
            memory(Path(folder), arguments.file_gb)
        if arguments.books_gb:
            memory(Path(folder), arguments.books_gb, books=True)


if __name__ == "__main__":
    main()
