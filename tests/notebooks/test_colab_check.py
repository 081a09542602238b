"""`make colab-check` itself, without a network: wheels made here, an image that holds version 1 of two packages."""

import sys
import zipfile
from pathlib import Path

import colab_check
import pytest

from helpers.workspace import versions


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
        for line in (colab_check.ROOT / versions.IMAGE_PINS).read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert pins == {name: packages[name] for name in pins}


def test_versions_say_what_to_do():
    assert versions.advice("numpy", "9.9.9", ["2.1.3"]).startswith("newer than tested: leave it")
    assert "2026.01" in versions.advice("torch", "1.0.0", ["2.13.0"])
    assert "pip install trl==1.16.0" in versions.advice("trl", "1.2.0", ["1.16.0"])
    assert versions.advice("peft", "0.21.9", ["0.20.0", "0.21.2"]) == "nothing"
    rows = versions.version_table()
    assert [row["package"] for row in rows] == list(versions.SHOWN)
