"""Whether prepared data are still what their dataset.json says, whose fingerprint stands in the stages' keys.

All of a data set is read when a file's size, times or place changed since it was last checked, and a random part of it otherwise, because a
disk may also lose bytes that nobody wrote.  What was checked is remembered in the workspace.  How a data set is read is data_prep's
business.
"""
from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from hintkd.errors import Damaged, UserError
from hintkd.files import fault, read_sealed, write_sealed
from hintkd.methods.stage import Stage
from hintkd.nets.records import source_of

CHECKED = Path("runs/checked.json")         # relative to the workspace
DESCRIPTION = "dataset.json"
BLOCK = 1 << 20                             # bytes that are compared at once
SAMPLED = 16                                # blocks of a file that are compared when it seems unchanged

Stamps = tuple[tuple[str, int, int, int, int], ...]          # per file: its name, size, times of change of content and of anything, inode


def facts(folder: Path) -> dict[str, Any] | None:
    """The dataset.json of a prepared data set, whose files are compared with it; None where nothing was ever prepared.

    Raises UserError for what is missing or damaged.
    """
    if not (folder / DESCRIPTION).exists():
        if str(folder) in _remembered():
            raise Damaged(f"{folder / DESCRIPTION} is missing; move {folder} away and prepare the data set again")
        return None
    try:
        content = read_sealed(folder / DESCRIPTION, "fingerprint")
    except Damaged as damage:
        raise Damaged(f"{damage}; prepare the data set again") from None
    _require(str(folder), str(content["fingerprint"]), tuple(_stamps(folder, content)))
    return content


def check_all(folder: Path) -> None:
    """Read all of a prepared data set and compare it with its dataset.json, whatever was checked before.  Raises UserError."""
    from data_prep import check_dataset
    check_dataset(folder)


def restore_descriptions(stages: Iterable[Stage], tell: Callable[[str], None]) -> None:
    """Write each missing or damaged dataset.json of the stages' data again, if it is remembered and the data are what it says."""
    layers = [layer for stage in stages for part in stage.parts for layer in part.net.layer]
    for folder in {Path(source).parent for source in map(source_of, layers) if source}:
        known, path = _remembered().get(str(folder)), folder / DESCRIPTION
        try:
            read_sealed(path, "fingerprint")
        except Damaged as damage:
            if known and folder.is_dir():
                write_sealed(path, known["facts"])
                tell(f"{damage}; it is written again")


@lru_cache(maxsize=64)
def _require(folder: str, fingerprint: str, stamps: Stamps) -> None:
    """Compare a data set with its dataset.json, once in a process."""
    known = _remembered().get(folder)
    if known and known["facts"]["fingerprint"] == fingerprint and known["stamps"] == [list(stamp) for stamp in stamps]:
        for name, blocks in known["blocks"].items():
            _compare(Path(folder, name), blocks)
        return
    check_all(Path(folder))
    content = {"stamps": stamps, "blocks": {name: list(_blocks(Path(folder, name))) for name, *_ in stamps},
               "facts": read_sealed(Path(folder, DESCRIPTION))}
    with suppress(OSError):                                  # a workspace that cannot be written costs another reading
        write_sealed(CHECKED, {**_remembered(), folder: content})


def _stamps(folder: Path, content: dict[str, Any]) -> Iterator[tuple[str, int, int, int, int]]:
    """Of all files of the data set.  Raises UserError where one is missing."""
    files = content.get("files")
    names = files if isinstance(files, dict) else [str(path.relative_to(folder)) for kind in ("*_lmdb/data.mdb", "*_mean.binaryproto")
                                                   for path in folder.glob(kind)]
    for name in sorted(names):
        try:
            found = os.stat(folder / name)
        except OSError:
            raise Damaged(f"{folder / name} {fault(folder / name)}; prepare the data set again") from None
        yield name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _remembered() -> dict[str, Any]:
    """What was checked in this workspace: folder -> stamps and digests of blocks of its files, and its dataset.json."""
    with suppress(Damaged):
        return read_sealed(CHECKED)
    return {}


def _blocks(path: Path) -> Iterator[str]:
    """The digest of each block of a file, short: it is to find damage, not forgery."""
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            yield _short(block)


def _short(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()[:16]


def _compare(path: Path, blocks: list[str]) -> None:
    """Compare some blocks of a file, or all if there are few.  Raises UserError."""
    with path.open("rb") as file:
        for number in sorted(random.sample(range(len(blocks)), min(SAMPLED, len(blocks)))):
            file.seek(number * BLOCK)
            if _short(file.read(BLOCK)) != blocks[number]:
                raise UserError(f"{path} is damaged at bytes {number * BLOCK:,} to {(number + 1) * BLOCK:,}; prepare the data set again")
