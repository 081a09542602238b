"""`make test-colab-versions`: the suite in a second environment, with the versions of Colab's image.

    python tests/notebooks/colab_versions.py [--environment FOLDER] [PYTEST ARGUMENT …]

Builds a virtual environment from colab_versions.txt beside it (once; on this Python, with PyTorch for a CPU), adds what
the notebooks add to the image as the set-up cell does, and runs the tests there: by default the notebooks', and
those of what rests on transformers' inner parts, mixtures and AQLM.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGE = Path(__file__).with_name("colab_versions.txt")
TOOLS = ["papermill", "ipykernel", "nbformat", "nbclient", "pytest", "hypothesis", "sentencepiece"]
TOOLS += ["nbclassic", "selenium"]
"""What runs the notebooks here and is not part of what is tested; sentencepiece is in the image. The classic page is
the last that draws ipywidgets 7.7 in a browser of one's own."""
REQUIREMENTS = ["requirements.txt", *(f"requirements/{name}.txt" for name in ("trl", "gptq", "gguf"))]
"""All that the set-up cell and notebooks 4 and 6 install."""
DEFAULT_TESTS = [
    "tests/notebooks/test_notebooks.py",
    "tests/notebooks/test_pipeline.py",
    "tests/show/test_panel.py",
    "tests/show/test_panel_browser.py",
    "tests/show/test_page_browser.py",
    "tests/finetune/test_finetune.py",
    "tests/finetune/test_mixture.py",
    "tests/models/test_experts.py",
    "tests/models/test_aqlm.py",
    "tests/models/test_checkpoints.py",
    "tests/quantize/test_additive.py",
    "tests/show/test_mixture.py",
]


def build(folder: Path, torch: str) -> Path:
    """The environment's Python; building it when its requirements changed since."""
    python, stamp = folder / "bin" / "python", folder / "built-from"
    files = [IMAGE, *(ROOT / name for name in REQUIREMENTS)]
    made_of = b"".join(file.read_bytes() for file in files) + " ".join([torch, *TOOLS]).encode()
    wanted = hashlib.sha256(made_of).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"== building {folder} with the image's versions: a few minutes, once", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "setuptools", "wheel", torch], check=True)
    subprocess.run([*pip, "-r", str(IMAGE), "-r", str(ROOT / "requirements.txt"), *TOOLS, "-c", str(IMAGE)], check=True)
    for name in files[2:]:
        subprocess.run([*pip, "--no-deps", "-r", str(name)], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-colab", help="where it is built")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip is asked for: the image's has CUDA")
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="arguments for pytest, a file first")
    options = parser.parse_args()
    python = build(options.environment.absolute(), options.torch)
    listing = [python, "-c", "from helpers.workspace.versions import versions; print(versions())"]
    subprocess.run(listing, cwd=ROOT, check=True)
    tests = options.tests or [name for name in DEFAULT_TESTS if (ROOT / name).is_file()]
    return subprocess.run([str(python), "-m", "pytest", *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
