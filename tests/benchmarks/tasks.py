"""A task of a benchmark in a process of its own: a job goes in as JSON, its result is the last line that comes out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def start(script: str, task: str, job: dict, log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Begin; what the libraries print goes to the log."""
    seen = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"} | (environment or {})
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, script, "--task", task],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, env=seen,
            cwd=log.parent,  # GPTQModel writes its logs where it stands
        )  # fmt: skip
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen, limit_s: float) -> object | None:
    """What the task found; None when it failed, or took longer."""
    try:
        out, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    return None if process.returncode else json.loads(out.splitlines()[-1])


def answer(work: Callable[[dict], object]) -> None:
    """In the task's process: do the work on the job that came in, and say what was found."""
    job = json.loads(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    out.write("\n" + json.dumps(work(job)) + "\n")
    out.flush()
    os._exit(0)
