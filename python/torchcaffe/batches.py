"""What pycaffe adds to a net in Python: arrays of any length run through it in batches, and the private names that scripts use."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from torchcaffe.errors import CaffeError
from torchcaffe.graph.blob import Blob
from torchcaffe.graph.vectors import BlobVec, IntVec, StringVec

Arrays = dict[str, np.ndarray]


class Batches:
    """The part of Net that is made of its other parts.  Caffe: python/caffe/pycaffe.py."""

    source: str
    blobs: Mapping[str, Blob]
    inputs: list[str]
    outputs: list[str]
    bottom_names: Mapping[str, list[str]]
    top_names: Mapping[str, list[str]]
    _layer_names: StringVec
    _blob_names: StringVec
    forward: Any
    backward: Any
    set_input_arrays: Any

    def forward_all(self, blobs: Sequence[str] | None = None, **arrays: np.ndarray) -> Arrays:
        """forward() for as many batches as `arrays` (one per input, of equal lengths) need; {output or asked blob: rows of all batches}.

        The last batch is filled up with zeros, whose rows are left out of the result.  Outputs that do not have one row per item (a
        loss) come as one entry per batch.
        """
        if not arrays:
            raise CaffeError(f"{self.source}: forward_all needs an array for each input ({', '.join(self.inputs)})")
        found = [_copies(self.forward(blobs=blobs, **batch)) for batch in self._batch(arrays)]
        return self._join(found, len(next(iter(arrays.values()))))

    def forward_backward_all(self, blobs: Sequence[str] | None = None, diffs: Sequence[str] | None = None,
                             **arrays: np.ndarray) -> tuple[Arrays, Arrays]:
        """forward() and backward() for as many batches as needed: the results of both, as forward_all gives them.

        `arrays` are inputs and diffs of outputs, by name; without any of one kind, that pass takes what the blobs hold.
        """
        if not arrays:
            raise CaffeError(f"{self.source}: forward_backward_all needs arrays for the inputs or for diffs of the outputs")
        forwards = self._batch({name: arrays[name] for name in self.inputs if name in arrays})
        backwards = self._batch({name: arrays[name] for name in self.outputs if name in arrays})
        tops, bottoms = [], []
        nothing: Arrays = {}
        for given, wanted in zip_longest(forwards, backwards, fillvalue=nothing):
            tops.append(_copies(self.forward(blobs=blobs, **given)))
            bottoms.append(_copies(self.backward(diffs=diffs, **wanted)))
        count = len(next(iter(arrays.values())))
        return self._join(tops, count), self._join(bottoms, count)

    def _batch(self, blobs: Mapping[str, np.ndarray]) -> Iterator[Arrays]:
        """The arrays cut into batches of the net's size, the last one filled up with zeros."""
        lengths = {len(array) for array in blobs.values()}
        if len(lengths) > 1:
            raise CaffeError(f"{self.source}: the arrays differ in length: {', '.join(f'{k} {len(v)}' for k, v in blobs.items())}")
        size = self._batch_size
        for start in range(0, max(lengths, default=0), size):
            parts = {name: np.asarray(array[start:start + size]) for name, array in blobs.items()}
            yield {name: np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)]) for name, part in parts.items()}

    def _join(self, found: Sequence[Arrays], count: int) -> Arrays:
        def join(parts: list[np.ndarray]) -> np.ndarray:
            if any(part.shape[:1] != (self._batch_size,) for part in parts):
                return np.array(parts)
            return np.concatenate(parts)[:count]
        return {name: join([batch[name] for batch in found]) for name in (found[0] if found else ())}

    @property
    def _batch_size(self) -> int:
        return next(iter(self.blobs.values())).shape[0]

    # -- names without a place in the documentation that scripts use all the same -----------------------------------------
    @property
    def _blobs(self) -> BlobVec:
        return BlobVec(self.blobs.values())

    @property
    def _inputs(self) -> IntVec:
        return self._ids(self.inputs)

    @property
    def _outputs(self) -> IntVec:
        return self._ids(self.outputs)

    def _bottom_ids(self, layer: int) -> IntVec:
        return self._ids(self.bottom_names[self._layer_names[layer]])

    def _top_ids(self, layer: int) -> IntVec:
        return self._ids(self.top_names[self._layer_names[layer]])

    def _ids(self, names: Iterable[str]) -> IntVec:
        return IntVec(self._blob_names.index(name) for name in names)

    def _set_input_arrays(self, data: np.ndarray, labels: np.ndarray) -> None:
        self.set_input_arrays(data, labels)


def _copies(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}
