"""`make colab-check`: would pip, on Colab's image, install what the notebooks ask for and leave the image as it is?

pip itself decides, in dry runs, in an environment that says it holds what the image's published package list says:

    python tests/notebooks/colab_check.py [--packages LIST] [--python PYTHON]

LIST is name==version a line, as https://github.com/googlecolab/backend-info publishes it; its first line names the
Python version. Exit status 1 when nothing resolves, or something that the image has would be replaced.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("colab_packages.txt")
NEVER = {"torch", "numpy", "ipywidgets", "protobuf", "pyarrow"}
"""Replacing one of these breaks the image; replacing anything else of it is refused too."""
BUILD_TOOLS = ("ninja", "maturin")
"""GPTQModel declares them for compiling kernels; what the notebooks use of it needs neither."""
FILES = {
    "requirements.txt": ["-r", "requirements.txt"],
    **{f"requirements/{name}.txt": ["--no-deps", "-r", f"requirements/{name}.txt"] for name in ("trl", "gptq", "gguf")},
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]
"""What the image's glibc 2.35 takes."""
SOURCE_ONLY = ("rouge-score",)
"""Published without wheels: pip cannot resolve them for another Python than the one that it runs in."""


class Outcome(NamedTuple):
    """What pip would do for one file."""

    installs: dict[str, str]
    replaces: dict[str, tuple[str, str]]
    """Package -> (the image's version, the new one)."""
    error: str | None
    needs: dict[str, list[str]]
    """Package -> what it declares that it needs."""


def read_list(path: Path) -> tuple[str, dict[str, str]]:
    """Python's version (major.minor) and package -> version of an image's package list."""
    text = path.read_text(encoding="utf-8")
    python = re.search(r"Python (\d+\.\d+)", text)
    packages = dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+)", text))
    if not python or not packages:
        raise SystemExit(f"{path} must name Python's version in a comment and hold name==version lines")
    return python[1], packages


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pretend(packages: dict[str, str], folder: Path) -> Path:
    """A site-packages that says it holds these packages, and holds pip."""
    import pip

    for name, version in packages.items():
        if plain(name) == "pip":
            continue
        about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (about / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (about / "RECORD").write_text("", encoding="utf-8")
    shutil.copytree(Path(pip.__file__).parent, folder / "pip", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def dry_run(arguments: list[str], site: Path, packages: dict[str, str], python: str) -> Outcome:
    """What `pip install` with these arguments would do to the pretended image."""
    report = site.parent / "report.json"
    report.unlink(missing_ok=True)
    command = [python, "-S", "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(site), capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "conflict" in line]
        return Outcome({}, {}, "\n".join(lines) or done.stderr[-800:], {})
    wanted = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    installs = {plain(entry["name"]): entry["version"] for entry in wanted}
    present = {plain(name): version for name, version in packages.items()}
    replaces = {name: (present[name], new) for name, new in installs.items() if present.get(name, new) != new}
    return Outcome(installs, replaces, None, {plain(entry["name"]): entry.get("requires_dist", []) for entry in wanted})


def unmet(outcome: Outcome, present: dict[str, str], python: str) -> tuple[list[str], list[str]]:
    """What packages installed without their dependencies declare and do not get: absent at all, or of another version.

    present: all that will be there, package -> version. Markers are judged for that Python on Linux.
    """
    from packaging.requirements import Requirement

    absent, other = [], []
    for package, needs in outcome.needs.items():
        for need in map(Requirement, needs):
            here = {
                "extra": "",
                "python_version": python,
                "python_full_version": f"{python}.0",
                "sys_platform": "linux",
            }
            if need.marker and not need.marker.evaluate(here):
                continue
            found = present.get(plain(need.name))
            if found is None and plain(need.name) in BUILD_TOOLS:
                continue
            if found is None:
                absent.append(f"{package} needs {need.name}{need.specifier}")
            elif not need.specifier.contains(found, prereleases=True):
                other.append(f"{package} declares {need.name}{need.specifier} and meets {found}")
    return absent, other


def environment(site: Path) -> dict[str, str]:
    """This process's environment, with the pretended packages as the only ones."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONHOME"} | {"PYTHONPATH": str(site)}


def runs(name: str, version: str, python: str | None, folder: Path) -> list[tuple[str, list[str]]]:
    """The pip runs that answer for one file: (Python, arguments). Raises SystemExit when the file is not there.

    With the image's own Python, one. Without, wheels for it are asked of this Python, and what has no wheel alone.
    """
    if not (ROOT / name).is_file():
        raise SystemExit(f"{ROOT / name} is not there")
    if python:
        return [(python, FILES[name])]
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    is_source = [plain(re.split(r"[=<>~! ;\[]", line)[0]) in SOURCE_ONLY for line in lines]
    parts = []
    for what, keep in (("wheels", False), ("sources", True)):
        chosen = [line for line, source in zip(lines, is_source, strict=True) if source == keep and line[:1] != "#"]
        path = folder / f"{what}-{Path(name).name}"
        path.write_text("\n".join(chosen), encoding="utf-8")
        options = [] if keep else ["--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
        options += [] if keep else [f"--platform={platform}" for platform in PLATFORMS]
        if "".join(chosen).strip():
            parts.append((sys.executable, [*FILES[name][:-1], str(path), *options]))
    return parts


def python_of(version: str) -> str | None:
    """A Python of that version on this machine, which answers."""
    for command in (f"python{version}", *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))):
        try:
            asked = subprocess.run(
                [command, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], text=True, capture_output=True
            )
        except OSError:
            continue
        if asked.stdout.strip() == version:
            return str(command)
    return None


def sound(outcome: Outcome, present: dict[str, str] | None, python: str) -> bool:
    """Print what is wrong with an outcome, and what is odd but known; whether the image stays as it is.

    present: what will be there, for packages installed without their dependencies.
    """
    for package, (old, new) in outcome.replaces.items():
        print(f"  {package} {old} would become {new}{', which breaks the image' if package in NEVER else ''}")
    if outcome.error:
        print(f"  nothing resolves: {outcome.error}")
    absent, other = unmet(outcome, present, python) if present else ([], [])
    for line in absent:
        print(f"  {line}, which is neither in the image nor installed")
    for line in other:
        print(f"  {line}: tests/notebooks/colab_versions.txt is where that is tried")
    return not (outcome.replaces or outcome.error or absent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=LIST, help="another image's package list")
    parser.add_argument("--python", help="the image's Python; default: one of its version, if there is one here")
    options = parser.parse_args()
    version, packages = read_list(options.packages)
    python = options.python or python_of(version)
    how = python or f"{sys.executable}, wheels for {version} (markers are this Python's)"
    print(f"image: Python {version}, {len(packages)} packages ({options.packages.name}); pip of {how}")
    failed = False
    present = {plain(name): version for name, version in packages.items()}
    with tempfile.TemporaryDirectory() as scratch:
        site = pretend(packages, Path(scratch) / "site")
        for name in FILES:
            for runner, arguments in runs(name, version, python, Path(scratch)):
                outcome = dry_run(arguments, site, packages, runner)
                present |= outcome.installs
                print(f"{name}: {', '.join(f'{package} {new}' for package, new in outcome.installs.items())}")
                failed |= not sound(outcome, present if "--no-deps" in arguments else None, version)
    print("FAILED" if failed else "OK: nothing of the image is replaced")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
