"""Rows of HDF5 files in the endless order in which training reads them: file by file, again and again, shuffled or not."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import h5py  # type: ignore[import-untyped]
import numpy as np

from torchcaffe.errors import CaffeError
from torchcaffe.files import read_text, require_regular
from torchcaffe.formats import require_stored

Permutation = Callable[[str, int, int], np.ndarray]         # (what is permuted, pass, length) -> order


def in_order(what: str, epoch: int, length: int) -> np.ndarray:
    """The permutation that changes nothing."""
    return np.arange(length)


class RowFiles:
    """The rows of `datasets` (names) in the files that the text file `source` lists.  One file at a time is in memory.

    Raises CaffeError for a list or a file that cannot be read, a dataset that is missing, has no rows, holds no numbers, or
    has another shape or length than its neighbours.  Caffe: hdf5_data_layer.cpp.
    """

    def __init__(self, source: str, datasets: Sequence[str], permutation: Permutation = in_order):
        self.datasets, self.permutation = list(datasets), permutation
        try:
            self.files = read_text(source).split()
        except (OSError, UnicodeDecodeError) as error:
            raise CaffeError(f"cannot read the list of HDF5 files {source}: {error}") from None
        if not self.files:
            raise CaffeError(f"{source} lists no HDF5 file; write one name per line")
        shapes = [self._shapes(file) for file in self.files]
        for file, other in zip(self.files, shapes, strict=True):
            for name, first, here in zip(self.datasets, shapes[0], other, strict=True):
                if first[1:] != here[1:]:
                    raise CaffeError(f"rows of '{name}' have shape {here[1:]} in {file}, but {first[1:]} in {self.files[0]}")
        self.row_shapes = [shape[1:] for shape in shapes[0]]
        self._counts = np.array([shape[0][0] for shape in shapes])
        self._loaded: tuple[int, list[np.ndarray]] | None = None

    def read(self, positions: range) -> list[np.ndarray]:
        """The rows of every dataset at `positions` of the endless order; float32."""
        parts = []
        while positions:
            epoch, row = divmod(positions[0], int(self._counts.sum()))
            files = self.permutation("files", epoch, len(self.files))
            ends = np.cumsum(self._counts[files])
            place = int(np.searchsorted(ends, row, side="right"))
            file = int(files[place])
            length = int(self._counts[file])
            first = row - int(ends[place]) + length
            rows = self.permutation(f"rows of file {file}", epoch, length)[first::positions.step][:len(positions)]
            parts.append([data[rows] for data in self._load(file)])
            positions = positions[len(rows):]
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def _shapes(self, path: str) -> list[tuple[int, ...]]:
        """Shapes of the datasets in one file, checked."""
        with _opened(path) as file:
            shapes = []
            for name in self.datasets:
                data = file.get(name)
                if not isinstance(data, h5py.Dataset):
                    raise CaffeError(f"{path} has no dataset '{name}' for the top of this name; it has {', '.join(file) or 'none'}")
                if data.dtype.kind not in "fiu" or data.ndim < 1 or data.shape[0] == 0:
                    raise CaffeError(f"dataset '{name}' in {path} has type {data.dtype} and shape {data.shape}; rows of numbers are needed")
                if not (data.external or data.is_virtual):              # whose numbers lie in other files
                    try:
                        require_stored(data)
                    except CaffeError as error:
                        raise CaffeError(f"{path}: {error}") from None
                shapes.append(data.shape)
            if len({shape[0] for shape in shapes}) > 1:
                raise CaffeError(f"the datasets {', '.join(self.datasets)} in {path} have {', '.join(str(s[0]) for s in shapes)} rows; "
                                 "they must have the same number")
            return shapes

    def _load(self, index: int) -> list[np.ndarray]:
        if self._loaded is None or self._loaded[0] != index:
            with _opened(self.files[index]) as file:
                self._loaded = index, [np.asarray(file[name][()], np.float32) for name in self.datasets]
        return self._loaded[1]


def _opened(path: str) -> h5py.File:
    try:
        require_regular(path)
        return h5py.File(path, "r")
    except OSError as error:
        raise CaffeError(f"cannot read the HDF5 file {path}: {error}") from None
