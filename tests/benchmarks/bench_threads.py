"""How PyTorch's threads on a CPU wait for each other: seconds of a small training alone, and beside another one.

    python tests/benchmarks/bench_threads.py

A line of JSON for each number of turns that a waiting thread spins before it sleeps; "" is the library's own. The other
training always waits as the library's own does, as a neighbour of another project would.
"""

import json
import os
import subprocess
import sys

SPINS = ("", "0", "1000", "10000", "30000")
TRAINING = """
import sys, time, torch
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(12)])
rows = torch.randn(512, 256)
start = time.perf_counter()
for _ in range(int(sys.argv[1])):
    model(rows).sum().backward()
print(time.perf_counter() - start)
"""


def training(steps: int, spins: str) -> subprocess.Popen:
    """A training of so many steps in a process of its own, which prints its seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": spins} if spins else {}
    return subprocess.Popen([sys.executable, "-c", TRAINING, str(steps)], env=environment, stdout=subprocess.PIPE)


def main() -> None:
    """Measure every number of turns."""
    for spins in SPINS:
        alone_s = float(training(60, spins).communicate()[0])
        other = training(10**9, "")
        beside_s = float(training(60, spins).communicate()[0])
        other.kill()
        print(
            json.dumps({"spins": spins, "cores": os.cpu_count(), "alone_s": alone_s, "beside_s": beside_s}), flush=True
        )


if __name__ == "__main__":
    main()
