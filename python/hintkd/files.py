"""Files that appear whole or not at all: what is written here is complete on the disk before it takes its place.

Needs the standard library alone, for the stage program uses it inside any caffe's interpreter.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path`; what the block writes there takes the place of `path`, and nothing is left if the block fails."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, and the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file, and the folders above it."""
    write_file(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
