"""What a folder with a data set holds, prepared here or one's own: shapes, counts, classes, fingerprint."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hintkd.errors import Damaged, UserError
from hintkd.files import fault, is_whole, read_sealed, sha256_of
from torchcaffe.data import datum
from torchcaffe.data.lmdb_reader import Database, open_database
from torchcaffe.errors import CaffeError
from torchcaffe.formats import read_mean

DESCRIPTION = "dataset.json"
SAMPLED = 64                                   # records per split in a summary


@dataclass(frozen=True)
class SplitInfo:
    """One LMDB: how many records, and their shape (channels, height, width)."""
    count: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """`splits` by name (train, test, perhaps more); `means` says whether there are mean files; labels are 0 to classes - 1."""
    path: Path
    splits: dict[str, SplitInfo]
    classes: int
    means: bool
    fingerprint: str


class Fingerprint:
    """SHA-256 over all splits and means in the order of their names: pixels, then labels, in the order of the records."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.hexdigest = self._hash.hexdigest

    def split(self, name: str, count: int, shape: tuple[int, ...], images: Iterable[Any], labels: np.ndarray | list[int]) -> None:
        """Add a split; `images` gives the pixels' bytes in any pieces, `labels` is read after them."""
        self._hash.update(f"{name} {count} {list(shape)}\n".encode())
        for piece in images:
            self._hash.update(np.ascontiguousarray(piece).data)
        self._hash.update(np.asarray(labels, "<i4").tobytes())

    def mean(self, name: str, image: np.ndarray) -> None:
        """Add a mean image."""
        self._hash.update(f"{name} mean {list(image.shape)}\n".encode())
        self._hash.update(np.ascontiguousarray(image, "<f4").tobytes())


def records_path(folder: Path, split: str) -> Path:
    return folder / f"{split}_lmdb"


def mean_path(folder: Path, split: str) -> Path:
    return folder / f"{split}_mean.binaryproto"


def check_dataset(path: str | os.PathLike[str]) -> DatasetInfo:
    """Look at all of the data set in folder `path`: LMDBs train_lmdb and test_lmdb, and perhaps train_mean.binaryproto and
    test_mean.binaryproto.

    The files of a folder that `prepare` wrote are compared with the digests in its dataset.json; of any other all records are read, and
    compared with the fingerprint where there is one.
    Raises UserError for what is missing or damaged, for records of unequal shape, and for means that do not fit their records.
    """
    folder = Path(path)
    with _naming(folder):
        if not (folder / DESCRIPTION).exists():
            return _read(folder, *_open(folder))
        about = describe(folder)
        require_files(folder, about)
        databases, means = _open(folder)
        if _summary(databases, means) != about["summary"]:
            raise UserError(f"{folder} does not hold what its {DESCRIPTION} describes; prepare it again")
        if "files" not in about and _read(folder, databases, means).fingerprint != about["fingerprint"]:
            raise UserError(f"{folder} does not hold the records that its {DESCRIPTION} describes; prepare it again")
        splits = {name: SplitInfo(len(database), database.images().shape) for name, database in databases.items()}
        return DatasetInfo(folder, splits, about["classes"], bool(means), about["fingerprint"])


def read_dataset(path: str | os.PathLike[str]) -> DatasetInfo:
    """The same of any folder with all its records read, whatever its dataset.json says."""
    folder = Path(path)
    with _naming(folder):
        return _read(folder, *_open(folder))


def require_files(folder: Path, about: dict[str, Any]) -> None:
    """Read all files whose digests dataset.json holds.  Raises Damaged naming the first that is not as it was prepared."""
    known = about.get("files", {})
    if not isinstance(known, dict):
        raise Damaged(f"{folder / DESCRIPTION} is damaged; prepare {folder} again")
    for name, digest in known.items():
        if not is_whole(folder / name, digest):
            raise Damaged(f"{folder / name} {fault(folder / name)}; prepare {folder} again")


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of the LMDBs' files and of the means in `folder`."""
    paths = [*sorted(folder.glob("*_lmdb/data.mdb")), *sorted(folder.glob("*_mean.binaryproto"))]
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths}


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn what the readers raise into UserError."""
    try:
        yield
    except CaffeError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot read the data set {folder}: {error.strerror}") from None


def describe(folder: Path) -> dict[str, Any]:
    """The content of dataset.json.  Raises UserError where it is not what `prepare` writes."""
    try:
        return read_sealed(folder / DESCRIPTION, "format", "name", "seed", "classes", "summary", "fingerprint")
    except Damaged as damage:
        raise UserError(f"{damage}, or does not describe a data set; remove it to have the records themselves read") from None


def summary(folder: Path) -> dict[str, Any]:
    """What is quick to compare, as JSON: count, shape and the digest of a few records per split; digests of the means."""
    return _summary(*_open(folder))


def _summary(databases: dict[str, Database], means: dict[str, np.ndarray]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, database in databases.items():
        digest = hashlib.sha256()
        for position in np.linspace(0, len(database) - 1, SAMPLED).astype(int).tolist():
            digest.update(database[position])
        result[name] = {"count": len(database), "shape": list(database.images().shape), "sample": digest.hexdigest()}
    for split, mean in means.items():
        result[f"{split} mean"] = hashlib.sha256(np.ascontiguousarray(mean, "<f4").tobytes()).hexdigest()
    return result


def _open(folder: Path) -> tuple[dict[str, Database], dict[str, np.ndarray]]:
    """LMDBs and means in `folder` by split: the LMDBs of train and test at least, and two means or none."""
    databases = {name.removesuffix("_lmdb"): open_database(folder / name)
                 for name in sorted(os.listdir(folder)) if name.endswith("_lmdb")}
    for split in ("train", "test"):
        if split not in databases:
            raise UserError(f"{folder} has no {split}_lmdb; a data set has train_lmdb and test_lmdb")
    present = [split for split in ("test", "train") if mean_path(folder, split).exists()]
    if len(present) == 1:
        raise UserError(f"{folder} has {mean_path(folder, present[0]).name} only; give both mean files, each of its records' size, "
                        "or neither")
    means = {split: read_mean(mean_path(folder, split)) for split in present}
    for split, mean in means.items():
        if mean.shape != databases[split].images().shape:
            raise UserError(f"{mean_path(folder, split)} has shape {mean.shape}, but the records of {split}_lmdb have "
                            f"{databases[split].images().shape}")
    return databases, means


def _read(folder: Path, databases: dict[str, Database], means: dict[str, np.ndarray]) -> DatasetInfo:
    fingerprint, splits, classes = Fingerprint(), {}, 0
    for name, database in databases.items():
        labels: list[int] = []
        shape = database.images().shape
        fingerprint.split(name, len(database), shape, _pixels(database, shape, labels), labels)
        if min(labels) < 0:
            raise UserError(f"{records_path(folder, name)} holds the label {min(labels)}; labels are 0 and up")
        classes = max(classes, max(labels) + 1)
        splits[name] = SplitInfo(len(database), shape)
    for split, mean in means.items():
        fingerprint.mean(split, mean)
    return DatasetInfo(folder, splits, classes, bool(means), fingerprint.hexdigest())


def _pixels(database: Database, shape: tuple[int, ...], labels: list[int]) -> Iterable[np.ndarray]:
    """The stored pixels of every record, encoded ones as they are stored; fills `labels`."""
    for position in range(len(database)):
        where = database.where(position)
        record = datum.parse(database[position], where)
        pixels = np.frombuffer(record.data, np.uint8) if record.encoded else datum.image(record, where)
        if not record.encoded and pixels.shape != shape:
            raise UserError(f"{where} has shape {pixels.shape}, but the first record has {shape}; write all records with one size")
        labels.append(record.label)
        yield pixels
