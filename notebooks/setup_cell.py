# @title Set-up: the same cell in every notebook, safe to run twice
import os
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

HOME = Path("/content" if "COLAB_RELEASE_TAG" in os.environ else "/kaggle/working")  # a rented machine's
SETUP = "helpers/setup.py"

# The recipes: above this notebook, put there by an earlier run of this cell, or importable already
places = [Path.cwd(), *Path.cwd().parents, HOME / "recipes", *map(Path, sys.path)]
found = [str(place) for place in places if (place / SETUP).is_file()]
for folder in (HOME, HOME / "drive" / "MyDrive"):  # else in a zip of the repository, uploaded here or to Drive
    if found:
        break
    if folder != HOME and not folder.is_dir():
        with suppress(Exception):  # no Drive, or no leave to see it: what else to do is said below
            from google.colab import drive

            drive.mount(str(HOME / "drive"))
    for path in sorted(filter(zipfile.is_zipfile, folder.glob("*.zip")), key=os.path.getmtime, reverse=True):
        with zipfile.ZipFile(path) as archive:
            names = sorted((name for name in archive.namelist() if name.endswith(SETUP)), key=len)
        found += [str(path / name.removesuffix(SETUP)) for name in names]
found = found or [str(path.parents[1]) for path in Path("/kaggle/input").rglob(SETUP)]
if not found:
    stop = type("NoRecipes", (Exception,), {"_render_traceback_": lambda error: [str(error)]})  # a sentence, no more
    raise stop(
        f"There are no recipes above {Path.cwd()}, and no zip of them in {HOME} or in Drive: open this notebook "
        "where it lies, or upload a zip of its repository (in Kaggle: Add input, turn Internet on), and run it again."
    )
sys.path.insert(0, found[0])
from helpers import setup

setup.ready(HOME)
