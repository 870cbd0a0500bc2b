"""The class probabilities of a trained net on its test set, small enough to be kept beside its record, and what several nets say together.

They are kept in thousandths: 120 kB for 10,000 images of 10 classes where a net is unsure, less where it is sure.  An ensemble is made from
what is kept and from nothing else, so that whoever has the records can make it again; exact probabilities would decide otherwise on a few
images in 10,000.
"""
from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from hintkd.errors import Damaged, UserError
from hintkd.files import fault, written

STEPS = 1000


def keep(path: Path, scores: np.ndarray, labels: np.ndarray) -> list[str]:
    """Write the softmax of class scores (images, classes, ...) and the labels (images, ...) to a .npz file, if they do not lie there.

    Returns what is wrong with the file that was there.
    """
    rows = scores.reshape(len(scores), -1).astype(np.float64)
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    kept = np.round(STEPS * powers / powers.sum(axis=1, keepdims=True)).astype(np.uint16), labels.reshape(-1).astype(np.int32)
    with suppress(Damaged):
        if all(map(np.array_equal, _read(path), kept)):
            return []
    wrong = [f"{path} {fault(path)}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part, part.open("wb") as file:
        np.savez_compressed(file, thousandths=kept[0], labels=kept[1])
    return wrong


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities (images, classes) and the labels (images,).  Raises Damaged if they cannot be read."""
    thousandths, labels = _read(path)
    return thousandths / STEPS, labels


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            thousandths, labels = found["thousandths"], found["labels"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error):
        raise Damaged(f"{path} {fault(path)}") from None
    if thousandths.ndim != 2 or labels.shape != thousandths.shape[:1]:
        raise Damaged(f"{path} {fault(path)}")
    return thousandths, labels


def ensemble(paths: Sequence[Path]) -> float:
    """Accuracy (0 to 1) of the mean of several nets' class probabilities; the first of equal classes counts.

    Raises Damaged if a file cannot be read, UserError if the nets were not tested on the same images.
    """
    found = [read(path) for path in paths]
    labels = found[0][1]
    for path, (_, other) in zip(paths, found, strict=True):
        if not np.array_equal(other, labels):
            raise UserError(f"{path}: was tested on other images than {paths[0]}; delete it and run `hintkd reproduce` again")
    return float(np.mean(np.sum([probabilities for probabilities, _ in found], axis=0).argmax(axis=1) == labels))
