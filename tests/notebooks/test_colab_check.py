"""`make colab-check` itself, without a network: wheels made here, an image that holds version 1 of two packages."""

import ast
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import colab_check
import nbformat
import pytest
from packaging.requirements import Requirement

from helpers.workspace.versions import IMAGE_PINS, SHOWN, advice, version_table


@pytest.fixture
def image(tmp_path, monkeypatch) -> tuple[Path, dict[str, str]]:
    """The pretended image; pip sees only wheels of: torch 1 and 2, helper 1, which needs torch 2, and lonely, bare."""
    for name, version, needs in (
        ("torch", "1.0", ""),
        ("torch", "2.0", ""),
        ("needy", "1.0", "Requires-Dist: torch>=2\n"),
        ("modest", "1.0", "Requires-Dist: torch\n"),
    ):
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    packages = {"torch": "1.0", "Other_Thing": "3.1"}
    return colab_check.pretend(packages, tmp_path / "site"), packages


@pytest.mark.parametrize(
    ("arguments", "replaced", "fine"),
    [
        (["modest", "other-thing"], {}, True),
        (["needy"], {"torch": ("1.0", "2.0")}, False),
        (["--no-deps", "needy"], {}, True),
        (["nowhere"], {}, False),
    ],
)
def test_pip_decides_what_the_image_would_lose(image, capsys, arguments, replaced, fine):
    site, packages = image
    outcome = colab_check.dry_run(arguments, site, packages, sys.executable)
    assert outcome.replaces == replaced
    there = packages | outcome.installs if "--no-deps" in arguments else None
    assert colab_check.sound(outcome, there, "3.13") is fine
    said = capsys.readouterr().out
    assert ("breaks the image" in said) is bool(replaced)
    assert ("declares torch>=2 and meets 1.0" in said) is (arguments[0] == "--no-deps")
    assert ("nothing resolves" in said) is (arguments == ["nowhere"])


def test_a_dependency_that_nobody_installs_is_noticed():
    outcome = colab_check.Outcome({"needy": "1.0"}, {}, None, {"needy": ["absent>=1", 'never; python_version < "3"']})
    assert colab_check.unmet(outcome, {"torch": "1.0"}, "3.13")[0] == ["needy needs absent>=1"]


def test_the_shipped_list_names_its_python_and_the_second_environment_follows_it():
    python, packages = colab_check.read_list(colab_check.LIST)
    assert python == "3.13" and len(packages) > 600
    pins = dict(
        line.split("==")
        for line in (colab_check.ROOT / IMAGE_PINS).read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert pins == {name: packages[name] for name in pins}


def bounds(name):
    """Package -> specifier of a requirements file."""
    lines = (colab_check.ROOT / name).read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {colab_check.plain(one.name): one.specifier for one in wanted}


def test_colabs_image_meets_the_requirements_but_for_what_it_lacks():
    """Without a network; pip itself is asked by `make colab-check`."""
    packages = colab_check.read_list(colab_check.LIST)[1]
    there, wanted = {colab_check.plain(name): version for name, version in packages.items()}, bounds("requirements.txt")
    assert {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib"} <= set(wanted)
    assert set(wanted) - set(there) == {"bitsandbytes", "optimum", "py3langid", "rouge-score", "sacrebleu"}
    assert [name for name in wanted if name in there and not wanted[name].contains(there[name])] == []


def test_the_tested_machines_pins_meet_the_requirements():
    wanted, pins = bounds("requirements.txt"), bounds("requirements/pins.txt")
    assert all(str(pin).startswith("==") for pin in pins.values())
    assert set(wanted) - set(pins) == {"packaging", "requests", "ipython"}, "which others bring"
    assert [name for name in wanted if name in pins and not wanted[name].contains(str(pins[name])[2:])] == []


def test_every_package_that_is_imported_is_required():
    """By helpers and by notebooks' cells; what a user may add, and a rented machine's own, are not ours."""
    not_ours = {"google", "kaggle_secrets", "lm_eval", "deepspeed"}
    root = colab_check.ROOT
    sources = [path.read_text(encoding="utf-8") for path in root.glob("helpers/**/*.py")]
    for path in root.glob("notebooks/*.ipynb"):
        sources += [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"helpers"} - not_ours
    required = {name for path in colab_check.FILES for name in bounds(path)} | {"triton"}  # torch brings it
    providers = {name: {*map(colab_check.plain, found)} for name, found in metadata.packages_distributions().items()}
    assert len(names) > 20
    assert [name for name in names if not providers.get(name, {name}) & required] == []


def test_the_top_of_the_repository_has_few_files():
    listed = subprocess.run(["git", "ls-files"], cwd=colab_check.ROOT, capture_output=True, text=True)
    files = {line for line in listed.stdout.splitlines() if "/" not in line and not line.startswith(".")}
    assert files == {"README.md", "requirements.txt", "colab_badges.md", "Makefile", "pyproject.toml", "LICENSE"}


def test_versions_say_what_to_do():
    assert advice("numpy", "9.9.9", ["2.1.3"]).startswith("newer than tested: leave it")
    assert "2026.01" in advice("torch", "1.0.0", ["2.13.0"])
    assert "pip install trl==1.16.0" in advice("trl", "1.2.0", ["1.16.0"])
    assert advice("peft", "0.21.9", ["0.20.0", "0.21.2"]) == "nothing"
    rows = version_table()
    assert [row["package"] for row in rows] == list(SHOWN)
    assert [row["package"] for row in rows if not row["tested"]] == []
