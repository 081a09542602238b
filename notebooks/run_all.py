"""Runs the eight notebooks in order, each in a kernel of its own, sharing nothing but the run's folder.

usage: python notebooks/run_all.py --profile tiny --workspace runs/tiny
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

import papermill
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def run_all(profile: str, workspace: Path, names: list[str] | None = None) -> Path:
    """Execute the notebooks; returns the workspace. The executed copies lie in workspace/notebooks.

    Raises papermill's PapermillExecutionError, whose text is the failed cell's own error.
    """
    # What the tiny profile needs lies in the repository; a kernel that asks a hub for it has a mistake to show.
    if profile == "tiny":
        os.environ["HF_HUB_OFFLINE"] = "1"
    workspace = workspace.resolve()
    (workspace / "notebooks").mkdir(parents=True, exist_ok=True)
    for notebook in sorted(HERE.glob("*.ipynb")):
        if names and notebook.name not in names:
            continue
        started = time.monotonic()
        print(f"== {notebook.name} ", end="", flush=True)
        papermill.execute_notebook(
            notebook,
            workspace / "notebooks" / notebook.name,
            parameters={"profile": profile, "workspace": str(workspace)},
            kernel_name="python3",
            cwd=HERE,
            progress_bar=False,
            coalesce_streams=True,  # a word a line otherwise, where an answer is streamed
            config=Config({"KernelManager": {"transport": "ipc"}}),  # nobody else on this machine can listen in
        )
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    return workspace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny", choices=("tiny", "mistral-7b"))
    parser.add_argument("--workspace", type=Path, default=Path("runs/tiny"))
    names = sorted(path.name for path in HERE.glob("*.ipynb"))
    parser.add_argument("--only", nargs="+", metavar="NOTEBOOK", choices=names, help=f"some of {', '.join(names)}")
    options = parser.parse_args()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        workspace = run_all(options.profile, options.workspace, options.only)
    except papermill.PapermillExecutionError as error:
        print(f"failed in cell {error.cell_index}\n{error}", file=sys.stderr)
        return 1
    if (workspace / "report.json").is_file():
        from helpers.evaluate import table  # not sooner: it brings PyTorch, and the kernels have their own

        print(f"\n{table(json.loads((workspace / 'report.json').read_text(encoding='utf-8')))}")
    print(f"\nIn {workspace}:")
    for path in sorted(workspace.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
