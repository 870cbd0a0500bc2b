"""Files that appear whole or not at all, and that say so themselves: what is written here is complete on the disk before it takes its
place, and JSON that is sealed holds a digest of its content, so that a changed byte is noticed when it is read.

Needs the standard library alone, for the stage process uses it inside any caffe's interpreter.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hintkd.errors import Damaged

SEAL = "sha256"                             # the name under which a sealed file holds the digest of the rest of it


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


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder and those above it; if the block fails, those that were not there before and are empty are gone again."""
    folder = Path(path)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def is_whole(path: str | os.PathLike[str], digest: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def fault(path: str | os.PathLike[str]) -> str:
    """What is wrong with a file that is not what was written, as the end of a sentence that begins with its name."""
    if not os.path.exists(path):
        return "is missing"
    return "is damaged" if os.path.getsize(path) else "is empty"


def write_sealed(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a JSON object with its seal, and the folders above it."""
    write_json(path, {**content, SEAL: _seal(content)})


def read_sealed(path: str | os.PathLike[str], *names: str) -> dict[str, Any]:
    """The content of a file that write_sealed wrote, without the seal; one without a seal is older than seals are, and is believed.

    Raises Damaged if it is missing, no JSON object, lacks one of `names` or does not fit its seal.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or any(name not in content for name in names):
        raise Damaged(f"{path} {fault(path)}")
    seal = content.pop(SEAL, None)
    if seal is not None and seal != _seal(content):
        raise Damaged(f"{path} is damaged")
    return content


def _seal(content: dict[str, Any]) -> str:
    """The digest of a JSON object, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()
