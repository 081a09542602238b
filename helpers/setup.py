"""What the set-up cell calls once it has found the recipes: a Python that works, packages, errors as one sentence.

    python -m helpers.setup FILE …    exit status 1, and what is missing, unless the environment has all that they list

Before pip has run there is only the standard library to count on: nothing else is imported at the top of this file.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The recipes: a folder, or a path into the zip that this file was imported from."""
OLDEST, NEWEST = (3, 11), (3, 13)
RENTED = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
IMAGE_KEEPS = ("torch", "numpy", "ipywidgets")
"""Other builds of these break a rented machine's image: whatever else pip does, they stay."""
NO_DEPENDENCIES = "requirements/trl.txt"


class NotReady(Exception):
    """Stops a set-up with one sentence.

    A class, because IPython asks an error how it wants to be shown; of a SystemExit it says how to leave IPython.
    """

    def _render_traceback_(self) -> list[str]:
        """The sentence, and nothing around it."""
        return [str(self)]


def ready(home: Path | None = None) -> None:
    """Make this interpreter ready for a notebook: right Python, recipes in a folder, packages there, plain errors.

    home: where a rented machine keeps files. Recipes in a zip, or in an input that cannot be written to, are put into
    home/recipes first. On your own machine nothing is installed. Safe to call twice. Raises NotReady with one
    sentence.
    """
    check_python()
    if home and not is_lasting(ROOT, Path(home)):
        take_over(settle(ROOT, Path(home) / "recipes"))
        return
    if any(name in os.environ for name in RENTED):
        install_packages()
    sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place) != ROOT)]
    from helpers.show import troubleshooting

    troubleshooting.plain_errors()
    print(f"Ready: the recipes are in {ROOT}")


def check_python() -> None:
    """Raise NotReady for a Python that the packages have no wheels for."""
    here, oldest, newest = (".".join(map(str, version)) for version in (sys.version_info[:2], OLDEST, NEWEST))
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise NotReady(
            f"This is Python {here} and the recipes need {oldest} to {newest}: "
            "choose another kernel (in Colab: Runtime > Change runtime type > Runtime version)."
        )


def is_lasting(root: Path, home: Path) -> bool:
    """Whether recipes can be used where they are: in a folder, and not among Kaggle's inputs, which are beside home.

    >>> is_lasting(ROOT, Path("/kaggle/working")), is_lasting(Path("/content/recipes.zip/main"), Path("/content"))
    (True, False)
    """
    return root.is_dir() and not root.is_relative_to(home.parent / "input")


def settle(root: Path, folder: Path) -> Path:
    """Recipes from a zip or a read-only folder as a folder of their own: whole, or not there. Returns the folder.

    What a zip holds outside of the recipes, or under a name that leads out of them, stays in it. Raises NotReady
    when the folder is there already, since it is somebody's.
    """
    if folder.exists():
        raise NotReady(f"{folder} is there and holds no recipes: rename it, and run this cell again.")
    unpacking = folder.with_name(folder.name + ".unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    archive = next((place for place in (root, *root.parents) if place.is_file()), None)
    if archive is None:
        shutil.copytree(root, unpacking)
    else:
        print(f"Unpacking the recipes from {archive}")
        top = root.relative_to(archive).as_posix() + "/" if root != archive else ""
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if name.startswith(top) and ".." not in Path(name).parts]
            packed.extractall(unpacking, [name for name in names if name[0] not in "/\\"])
    (unpacking / top if archive else unpacking).rename(folder)
    shutil.rmtree(unpacking, ignore_errors=True)
    return folder


def take_over(folder: Path) -> None:
    """Go on with the recipes of a folder: what was imported from elsewhere is imported anew from there."""
    for name in [name for name in sys.modules if name.split(".")[0] == "helpers"]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place) != ROOT)]
    importlib.invalidate_caches()
    importlib.import_module("helpers.setup").ready()


def install_packages() -> None:
    """Add what a rented machine's image lacks; its own torch, numpy and widgets stay. Raises NotReady."""
    present = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    keep = [f"{name}=={present[name]}" for name in IMAGE_KEEPS if name in present]
    print("Installing what the recipes need, about a minute the first time ...")
    for options in (["-r", "requirements.txt", *keep], ["--no-deps", "-r", NO_DEPENDENCIES]):
        complaint = pip(*options)
        if complaint:
            raise NotReady(complaint)


def pip(*options: str) -> str:
    """`pip install` in this environment, from the recipes' folder; "" or one sentence with pip's last words."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace")
    importlib.invalidate_caches()
    if done.returncode:
        return f"pip install {' '.join(options)} failed; its last words: {done.stderr.strip()[-600:]}"
    return ""


def ensure(requirements: str) -> str:
    """Install a pinned set without its dependencies, where this environment has other versions; says what was done.

    So the image's torch, numpy, protobuf and pyarrow stay as they are. Raises ValueError with pip's last words.

    >>> ensure("requirements/trl.txt")
    'requirements/trl.txt: already here'
    """
    absent = missing([ROOT / requirements])
    if not absent:
        return f"{requirements}: already here"
    complaint = pip("--no-deps", "-r", str(ROOT / requirements))
    if complaint:
        raise ValueError(complaint)
    return f"{requirements}: installed {', '.join(re.split('[=<>~! ]', line)[0] for line in absent)}"


def missing(files: Iterable[Path]) -> list[str]:
    """The lines of requirements files that this environment does not meet."""
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for file in files for line in Path(file).read_text("utf-8").splitlines()]
    absent = []
    for wanted in (Requirement(line) for line in lines if line):
        if wanted.marker is None or wanted.marker.evaluate():
            found = next(iter(metadata.distributions(name=wanted.name)), None)
            if found is None or not wanted.specifier.contains(found.version, prereleases=True):
                absent.append(str(wanted))
    return absent


if __name__ == "__main__":
    unmet = missing(map(Path, sys.argv[1:]))
    print("\n".join(unmet), end="\n" if unmet else "", file=sys.stderr)
    sys.exit(1 if unmet else 0)
