"""Files out of the notebook's upload widget, whichever ipywidgets it is: Colab has 7.7, others 8."""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def save_upload(value: Any, folder: Path) -> Path:
    """Write the file of a FileUpload's value into folder and return its path.

    ipywidgets 7 gives {name: {"content": bytes, …}}, ipywidgets 8 ({"name": …, "content": memoryview, …},).
    Raises ValueError when nothing was chosen, or more than one file.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_upload(({"name": "a.jsonl", "content": memoryview(b"{}")},), folder).read_bytes()
    b'{}'
    >>> save_upload({"../b.jsonl": {"content": b"[]"}}, folder).name
    'b.jsonl'
    """
    files = (
        [(name, file["content"]) for name, file in value.items()]
        if isinstance(value, dict)
        else [(file["name"], file["content"]) for file in value]
    )
    if len(files) != 1:
        count = "no file is" if not files else f"{len(files)} files are"
        raise ValueError(f"{count} chosen: choose one, and put several into one zip")
    name, content = files[0]
    # A browser may send a path, and a path may lead anywhere: only its last part counts.
    name = PureWindowsPath(PurePosixPath(name).name).name.lstrip(".") or "upload"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path
