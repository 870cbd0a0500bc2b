"""One set of labelled images in memory: what the readers return and the writer takes; and how progress is shown."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

T = TypeVar("T")


class Progress(Protocol):
    """Passes items on and shows how far it is; rich.progress.track is one.  `total` None: unknown."""

    def __call__(self, items: Iterable[T], description: str, total: int | None, /) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None, /) -> Iterable[T]:
    """Progress that shows nothing."""
    return items


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width) uint8 and labels (n,) int32."""
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def padded(self, border: int) -> Split:
        """With `border` zeros on each side of every image."""
        sides = [(0, 0), (0, 0), (border, border), (border, border)]
        return Split(np.pad(self.images, sides), self.labels) if border else self

    def shuffled(self, seed: int) -> Split:
        """In an order drawn from `seed`."""
        order = np.random.default_rng(seed).permutation(len(self))
        return Split(self.images[order], self.labels[order])

    def mean(self) -> np.ndarray:
        """Mean image (channels, height, width), float32."""
        return (self.images.sum(axis=0, dtype=np.int64) / len(self)).astype(np.float32)
