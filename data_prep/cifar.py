"""CIFAR-10 and CIFAR-100 from their binary versions, unpacked or in the published archive."""
from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.split import Split
from hintkd.errors import UserError

SHAPE = (3, 32, 32)                            # red, green, blue planes
PIXELS = 3 * 32 * 32
BATCH, TRAIN, TEST = 10_000, 50_000, 10_000    # images in a file: of CIFAR-10, of CIFAR-100 for training, of both for testing


def read_cifar10(folder: Path) -> dict[str, Split]:
    """Both splits, in the order of the files: images (n, 3, 32, 32) red, green, blue; labels 0 to 9.

    `folder` is cifar-10-batches-bin, or holds it, or holds cifar-10-binary.tar.gz.  Raises UserError for anything missing or wrong.
    """
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    files = _files(folder, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", [*train, "test_batch.bin"])
    batches = [_split(files, name, BATCH, (10,)) for name in train]
    whole = Split(np.concatenate([b.images for b in batches]), np.concatenate([b.labels for b in batches]))
    return {"train": whole, "test": _split(files, "test_batch.bin", TEST, (10,))}


def read_cifar100(folder: Path) -> dict[str, Split]:
    """As read_cifar10, from cifar-100-binary; the labels are the fine ones, 0 to 99."""
    files = _files(folder, "cifar-100-binary", "cifar-100-binary.tar.gz", ["train.bin", "test.bin"])
    return {"train": _split(files, "train.bin", TRAIN, (20, 100)), "test": _split(files, "test.bin", TEST, (20, 100))}


def _split(files: Callable[[str], bytes], name: str, count: int, classes: tuple[int, ...]) -> Split:
    images, labels = parse_records(files(name), classes, name)
    if len(images) != count:
        raise UserError(f"{name} holds {len(images):,} images instead of {count:,}; get the file again")
    return Split(images, labels[:, -1].astype(np.int32))


def parse_records(data: bytes, classes: tuple[int, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) and labels (n, len(classes)), both uint8, of CIFAR's records: the labels' bytes, then 3072 pixels.

    `classes` says how many values each label byte has.  Raises UserError, naming `where`, for another length or other labels.
    """
    length = len(classes) + PIXELS
    if len(data) % length:
        raise UserError(f"{where} is truncated or no CIFAR file: its {len(data):,} bytes are no multiple of {length}; get it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    labels = records[:, :len(classes)]
    if (labels >= np.array(classes)).any():
        raise UserError(f"{where} holds labels beyond {', '.join(str(n - 1) for n in classes)}; it is another file, get it again")
    return records[:, len(classes):].reshape(-1, *SHAPE), labels


def _files(folder: Path, inner: str, archive: str, names: list[str]) -> Callable[[str], bytes]:
    """How to read the named files, wherever under `folder` they are."""
    for place in (folder / inner, folder):
        if any((place / name).exists() for name in names):
            return lambda name: _read(place / name)
    if (folder / archive).exists():
        content = _unpack(folder / archive, {f"{inner}/{name}": name for name in names})
        return content.__getitem__
    raise UserError(f"{folder} holds neither {inner}/ nor {archive}; name the folder that does, or leave --from away to download it")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _unpack(archive: Path, members: dict[str, str]) -> dict[str, bytes]:
    """Contents of the wanted members (name in the archive: name in the result)."""
    content = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.name in members and member.isfile():
                    content[members[member.name]] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"cannot read {archive} ({error}); get it again") from None
    for name in members.values():
        if name not in content:
            raise UserError(f"{archive} has no {name} in it; get it again")
    return content
