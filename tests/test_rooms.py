"""The house's rule: imports go down only, no stage imports a stage, and what a budget needs imports no PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "helpers"
FLOORS = [
    {"cli", "setup", "badges"},
    {"prepare", "finetune", "merge", "quantize", "evaluate", "export", "serve"},
    {"show", "inference", "budget", "sources"},
    {"models"},
    {"workspace"},
    {"profiles", "jobs"},
    {"config", "hardware", "tokens"},
]
"""From the top of the house to its ground. Rooms of one floor may use each other, but for the stages."""
STAGES = FLOORS[1]
FLOOR = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = ["budget", "models", "workspace", "config", "hardware", "profiles", "jobs"]


def room_of(path: Path) -> str:
    """The room that a file lies in: its folder, or itself."""
    part = path.relative_to(HELPERS).parts[0]
    return part.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in it: helpers.a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("helpers.")}
    return found


def rooms(path: Path) -> set[str]:
    """The other rooms that a file imports."""
    return {name.split(".")[1] for name in imports(path)} - {room_of(path)}


FILES = [path for path in sorted(HELPERS.rglob("*.py")) if path.name != "__main__.py" and path.parent != HELPERS]
FILES += [path for path in sorted(HELPERS.glob("*.py")) if path.stem in FLOOR]


def test_every_file_lies_in_a_room_of_the_house():
    here = {room_of(path) for path in HELPERS.rglob("*.py")} - {"__init__", "__main__"}
    assert here <= set(FLOOR), f"{here - set(FLOOR)}: write it into FLOORS, and helpers/README.md"
    assert len(list(HELPERS.glob("*.py"))) <= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HELPERS)))
def test_imports_go_down(path):
    here = room_of(path)
    for room in rooms(path):
        assert FLOOR[room] >= FLOOR[here], f"{here} imports {room}, which lies above it"
        assert not (here in STAGES and room in STAGES), f"stage {here} imports stage {room}: put it below both"


def test_rooms_of_one_floor_make_no_circle():
    below = {room: set() for room in FLOOR}
    for path in FILES:
        below[room_of(path)] |= rooms(path)
    done: set[str] = set()
    while set(below) - done:
        free = {room for room in set(below) - done if below[room] <= done}
        assert free, f"a circle among {', '.join(sorted(set(below) - done))}"
        done |= free


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_a_budget_needs_no_pytorch(room):
    code = f"import sys, helpers.{room}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
