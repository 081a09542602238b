# @title Set-up: the same cell in every notebook, safe to run twice
import os
import subprocess
import sys
from pathlib import Path

HOME = Path("/content" if "COLAB_RELEASE_TAG" in os.environ else "/kaggle/working")  # a rented machine's
places = [Path.cwd(), *Path.cwd().parents, HOME / "recipes", *map(Path, sys.path)]
ROOT = next((str(place) for place in places if (place / "helpers/setup.py").is_file()), str(HOME / "recipes"))
clone = ["git", "clone", "--quiet", "--depth=1", "--branch=REVISION", "https://github.com/OWNER/NAME", ROOT]
if not Path(ROOT).is_dir() and (not HOME.is_dir() or subprocess.run(clone).returncode):
    stop = type("NoRecipes", (Exception,), {"_render_traceback_": lambda error: [str(error)]})  # a sentence, no more
    raise stop("No recipes above this notebook and none to fetch: turn Internet on, or open it where it lies.")
sys.path.insert(0, ROOT)
from helpers import setup

setup.ready(HOME)
