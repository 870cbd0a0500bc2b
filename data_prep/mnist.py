"""MNIST from its idx files, packed with gzip or not."""
from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from data_prep.split import Split
from hintkd.errors import UserError

COUNTS = {"train": 60_000, "test": 10_000}
SIZE = 28


def read_mnist(folder: Path) -> dict[str, Split]:
    """Both splits from `folder`, or from mnist/ in it: images (n, 1, 28, 28), in the published order.

    Raises UserError for a file that is missing, damaged, or not what its name says.
    """
    if (folder / "mnist").is_dir():
        folder = folder / "mnist"
    return {split: _split(folder, prefix, COUNTS[split]) for split, prefix in (("train", "train"), ("test", "t10k"))}


def _split(folder: Path, prefix: str, count: int) -> Split:
    images = _array(folder, f"{prefix}-images-idx3-ubyte", (count, SIZE, SIZE))
    labels = _array(folder, f"{prefix}-labels-idx1-ubyte", (count,))
    if labels.max() > 9:
        raise UserError(f"{folder}/{prefix}-labels-idx1-ubyte holds the label {labels.max()}; MNIST's are 0 to 9, get the file again")
    return Split(images[:, None], labels.astype(np.int32))


def _array(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise UserError(f"{folder} has no {name} (or {name}.gz); get MNIST's four files, or leave --from away to download them")
    array = parse_idx(read_file(path), str(path))
    if array.shape != shape:
        raise UserError(f"{path} holds an array of shape {array.shape} instead of {shape}; get the file again")
    return array


def read_file(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path} is truncated or not a gzip file; get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def parse_idx(data: bytes, where: str) -> np.ndarray:
    """An idx array of unsigned bytes: two zeros, type 8, the number of axes, big-endian 32-bit lengths, then the elements.

    `where` names the data in the UserError that anything else raises.
    """
    axes = data[3] if len(data) >= 4 else 0
    start = 4 + 4 * axes
    if data[:3] != b"\0\0\x08" or axes == 0 or len(data) < start:
        raise UserError(f"{where} is not an idx file of unsigned bytes; get it again")
    shape = [int.from_bytes(data[4 + 4 * i:8 + 4 * i], "big") for i in range(axes)]
    if len(data) - start != prod(shape):
        raise UserError(f"{where} has {len(data) - start:,} bytes of content where its header promises {prod(shape):,}; get it again")
    try:
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    except ValueError:                          # more axes or longer ones than an array can have
        raise UserError(f"{where} has an impossible header ({axes} axes); get it again") from None
