"""The handwritten digits that come with scikit-learn, as the demo uses them.

Saturated when a net sees all of them, so the sets are small: a teacher's of 797 images, a student's of 200 of these, and the
other 1,000 to test on.
"""
from __future__ import annotations

import numpy as np

from data_prep.split import Split
from hintkd.backend import how_to_get
from hintkd.errors import UserError

TEACHER, STUDENT, TEST = 797, 200, 1000
SPLIT_SEED = 0                                 # the sets are always the same


def read_digits() -> dict[str, Split]:
    """Splits teacher, train (the student's, part of teacher) and test: images (n, 1, 8, 8) with values 0 to 16.

    Raises UserError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"the digits come with scikit-learn, which is not installed: {how_to_get('demo')}") from None
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[:, None], digits.target.astype(np.int32)
    order = stratified_order(labels, SPLIT_SEED)
    parts = {"teacher": order[:TEACHER], "train": order[:STUDENT], "test": order[TEACHER:]}
    return {name: Split(images[part], labels[part]) for name, part in parts.items()}


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of the records in which every beginning has each class in its share of the whole, up to rounding."""
    order = np.random.default_rng(seed).permutation(len(labels))
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(share[order], kind="stable")]
