"""Which versions are here, which ones this project was tested with, and what to do about a difference.

>>> verdict("2.13.1", ["2.11.0", "2.13.0"])
'tested'
>>> verdict("3.0.0", ["2.11.0", "2.13.0"])
'newer than tested'
"""

import platform
import re
import sys
from contextlib import suppress
from importlib import metadata

from helpers.profiles import ROOT

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "optimum", "gptqmodel")
SHOWN = ("python", *PACKAGES, "numpy", "ipywidgets")
TESTED_PYTHON = ["3.11"]
PINS = ("requirements/pins.txt", "requirements/trl.txt", "requirements/gptq.txt")
IMAGE_PINS = "tests/notebooks/colab_versions.txt"
"""The second environment of the tests: what Colab's image has."""
COLAB_RUNTIMES = (
    # https://github.com/googlecolab/backend-info, https://github.com/googlecolab/colabtools/issues/6081
    {"runtime": "2026.07", "python": "3.12", "torch": ""},
    {"runtime": "2026.04", "python": "3.12", "torch": ""},
    {"runtime": "2026.01", "python": "3.12", "torch": "2.9.0"},
    {"runtime": "2025.10", "python": "3.12", "torch": "2.8.0"},
    {"runtime": "2025.07", "python": "3.11", "torch": "2.6.0"},
)
"""Past Colab runtimes that can be chosen, newest first; an empty figure is one that nobody has published."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, without importing them."""
    return {"python": platform.python_version()} | installed(PACKAGES)


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Package -> version, of those that are here."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def known_versions() -> dict[str, list[str]]:
    """Package -> the versions that the tests run with: on a machine of one's own, and as on Colab's image."""
    pins: dict[str, list[str]] = {"python": TESTED_PYTHON}
    for name in (*PINS, IMAGE_PINS):
        path = ROOT / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for package, version in re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;#]+)", "\n".join(lines)):
            known = pins.setdefault(package.lower(), [])
            if version not in known:
                known.append(version)
    return {package: sorted(known, key=numbers) for package, known in pins.items()}


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers, to compare by.

    >>> numbers("2.11.0+cu128")
    (2, 11, 0)
    """
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)


def verdict(found: str, known: list[str]) -> str:
    """tested, newer or older than tested, or between two tested ones; the third number does not matter."""
    here, range_ = numbers(found)[:2], [numbers(version)[:2] for version in known]
    if here in range_:
        return "tested"
    if here > max(range_):
        return "newer than tested"
    return "older than tested" if here < min(range_) else "between two tested versions"


def version_table() -> list[dict[str, str]]:
    """A row a package: found, tested, and what to do about a difference."""
    known = known_versions()
    found = {"python": platform.python_version()} | installed(SHOWN[1:])
    return [
        {
            "package": package,
            "found": found.get(package, "not here"),
            "tested": ", ".join(known.get(package, [])),
            "what to do": todo(package, found.get(package), known.get(package, [])),
        }
        for package in SHOWN
    ]


def todo(package: str, found: str | None, known: list[str]) -> str:
    """The advice as a table shows it: a mark where there is nothing to do."""
    said = advice(package, found, known)
    return "✓" if said == "nothing" else said


def advice(package: str, found: str | None, known: list[str]) -> str:
    """What to do about a package whose version is not a tested one."""
    if found is None:
        return "nothing: notebook 04 installs it" if package in ("gptqmodel", "optimum") else "run the set-up cell"
    if not known:
        return "nothing"
    seen = verdict(found, known)
    if seen in ("tested", "between two tested versions"):
        return "nothing"
    if package in ("python", "torch", "numpy", "ipywidgets"):
        return f"{seen}: leave it, pip must not replace it; if a cell fails, choose a past runtime: {runtimes()}"
    return f"{seen}: go on; if a cell fails, pip install {package}=={known[-1]}, then Runtime > Restart session"


def runtimes() -> str:
    """The past Colab runtimes, in words."""
    return "Ctrl-Shift-P > Change runtime version > " + " or ".join(row["runtime"] for row in COLAB_RUNTIMES[:3]) + " …"


def forget_old_torchao() -> None:
    """Have PEFT take a torchao that it finds too old for none at all, as nothing here is torchao's.

    Colab's image has torchao 0.10; PEFT wants 0.16 and would refuse to wrap any layer that is not quantized.
    """
    from unittest import mock

    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError:
        with mock.patch.dict(sys.modules, torchao=None):  # importlib finds no spec for it
            is_torchao_available()  # and remembers the answer
