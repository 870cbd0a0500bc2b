"""Layers that read records: Data (LMDB), HDF5Data, MemoryData.

Their whole state is `cursor`, the number of batches read: batch k starts at record k * batch_size, and goes on with the first
record after the last.  Of n solvers that train together, number r reads every n-th record from record r on.  Reading and transforming
are the work of torchcaffe.data.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from torchcaffe.data.augmentation import Augmentation
from torchcaffe.data.hdf5 import RowFiles, in_order
from torchcaffe.data.lmdb_reader import open_database
from torchcaffe.data.transformer import Transformer
from torchcaffe.errors import CaffeError, CaffeRuntimeError
from torchcaffe.layers.base import Layer, Shape, layer
from torchcaffe.proto import caffe_pb2


class Source(Layer):
    """A layer without bottoms that reads `batch` records per pass."""

    bottoms = 0
    tops: ClassVar[int | tuple[int, int | None]] = (1, 2)
    needs_host = True
    batch: int

    def start(self) -> int:
        """Position of the next batch's first record in the endless sequence; counts the pass."""
        position = self.cursor * self.batch
        self.cursor += 1
        return position

    @property
    def turn(self) -> tuple[int, int]:
        """(r, n): this layer reads record r of every n.

        Solvers that train together take records in turn; a test net, which only the root has, reads all (Caffe: DataLayer::Skip).
        """
        return self.context.share if self.phase == caffe_pb2.TRAIN else (0, 1)

    def dealt(self) -> range:
        """Positions of the next batch's records where records are dealt out; counts the pass."""
        rank, count = self.turn
        start = self.start() * count + rank
        return range(start, start + self.batch * count, count)

    def tensor(self, array: np.ndarray) -> Tensor:
        """`array`, which nobody else may change, as a tensor where this layer lives."""
        return self.moved(array).to(self.context.dtype)

    def moved(self, array: np.ndarray) -> Tensor:
        """`array` on this layer's device; a GPU fetches it while the host goes on, from memory that stays in place."""
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor.pin_memory().to(self.context.device, non_blocking=True) if self.context.device.type == "cuda" else tensor

    def draws(self, now: int | Tensor, device: torch.device | str) -> Tensor:
        """What is drawn for the transformation of pass `now`, (3, batch)."""
        return self.context.streams.uniform("transform", self.name, now, (3, self.batch), device)

    def transformed(self, transform: Transformer | Augmentation, images: Tensor | np.ndarray | list[np.ndarray],
                    now: int | Tensor) -> Tensor:
        """A batch as `transform` makes it with what is drawn for pass `now`."""
        if isinstance(images, list):
            batch: Tensor | list[Tensor] = [self.moved(image) for image in images]
        else:
            batch = self.moved(images) if isinstance(images, np.ndarray) else images
        draws = self.draws(now, self.context.device)
        with self.naming_errors():
            return transform(batch, draws).to(self.context.dtype)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Put the layer's name before what the reading side has to say."""
        try:
            yield
        except CaffeError as error:
            raise CaffeError(f"layer '{self.name}' ({self.type}): {error}", layer=self.name) from None


@layer("Data")
class Data(Source):
    """Images and, with a second top, labels from an LMDB of Datum messages, in the order of their keys.

    Tops: (batch_size, channels, height, width) after transform_param, and (batch_size,).  A window's place and the mirror are
    drawn from streams.uniform("transform", name, cursor).  With a batch_size of 1 and no crop_size the top takes each image's size.
    rand_skip and prefetch have no effect, nor have force_color and force_gray on images that are not encoded.
    Caffe: data_layer.cpp, data_transformer.cpp.
    source          the LMDB's folder
    is_numbered     whether the first top has a row for each record, which has a number
    """

    transform: Transformer | Augmentation
    is_numbered = True

    def setup(self) -> None:
        param = self.param.data_param
        self.batch = param.batch_size
        self.require(param.source, "data_param has no source")
        self.require(self.batch > 0, "data_param has no batch_size")
        if param.backend != caffe_pb2.DataParameter.LMDB:
            is_lmdb = os.path.exists(os.path.join(param.source, "data.mdb"))
            self.require(False, "the backend is LEVELDB, Caffe's default, which is not read here; "
                         + (f"{param.source} is an LMDB, so write `backend: LMDB` in data_param" if is_lmdb else
                            f"run `torchcaffe convert_leveldb {param.source} {param.source}_lmdb`, make that the source and "
                            "write `backend: LMDB` in data_param"))
        self.source = param.source
        with self.naming_errors():
            self.transform = Transformer(self.param.transform_param, self.phase == caffe_pb2.TRAIN)
            self.images = open_database(param.source).images(self.transform.color)
        self.varies = self.batch == 1 and not self.transform.crop
        self.resident: tuple[Tensor, Tensor] | None = None
        self.ticks = True

    def reside(self, limit: int) -> None:
        """Keep all records on this layer's device as they are stored, a byte per value, if they have one shape and `limit` bytes hold them.

        Passes that step/capture.py runs then need nothing of the host.
        """
        if self.resident is None and not self.varies and self.images.count * prod(self.images.shape) <= limit:
            with self.naming_errors():
                images, labels = self.images.read(np.arange(self.images.count))
            if isinstance(images, np.ndarray) and images.dtype == np.uint8:
                self.resident = self.moved(images), self.moved(labels).to(self.context.dtype)
                self.needs_host = False

    def top_shapes(self) -> list[Shape]:
        with self.naming_errors():
            shape = self.transform.output_shape(self.images.shape)
        return [(self.batch, *shape), (self.batch,)][:len(self.param.top)]

    def forward(self) -> list[Tensor]:
        now = self.cursor if self.clock is None else self.clock.clone()
        positions = self.positions(now, "cpu" if self.clock is None else self.context.device)
        if self.clock is None:
            with self.naming_errors():
                found, numbers = self.images.read(positions.numpy())
            images, labels, places = self.transformed(self.transform, found, now), self.tensor(numbers), self.tensor(positions.numpy())
        else:
            assert self.resident is not None
            stored, labels = (each.index_select(0, positions) for each in self.resident)
            images, places = self.transformed(self.transform, stored, now), positions.to(self.context.dtype)
        self.tick()
        return [images, labels, places][:len(self.param.top)]

    # -- its inputs by number: what the first top holds for an item depends on the record, its window and its mirror alone ------
    @property
    def variants(self) -> int:
        """In how many ways the transformation shows one record."""
        return self.transform.variants(self.images.shape)

    def entries(self, now: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The numbers of the inputs of pass `now`, (batch,) int64: position of the record times `variants` plus its variant."""
        positions = self.positions(now, device)
        if self.variants == 1:
            return positions
        return positions * self.variants + self.transform.variant(self.draws(now, device), self.images.shape)

    def inputs(self, entries: Tensor) -> Tensor:
        """What the first top holds for inputs of these numbers, (n,) on the host.  All records must have the shape of the first one."""
        positions, variants = entries.div(self.variants, rounding_mode="floor"), entries % self.variants
        device = self.context.device
        with self.naming_errors():
            if self.resident is not None:
                images = self.resident[0].index_select(0, positions.to(device))
            else:
                found, _ = self.images.read(positions.numpy())
                if not isinstance(found, np.ndarray) or found.shape[1:] != self.images.shape:
                    raise CaffeError("its records differ in shape, so that they have no numbers")
                images = self.moved(found)
            return self.transform(images, self.transform.draws(variants, self.images.shape).to(device)).to(self.context.dtype)

    def size(self, now: int) -> int:
        """How many records pass `now` reads."""
        return self.batch

    def positions(self, now: int | Tensor, device: torch.device | str) -> Tensor:
        """The positions of the records of pass `now`, (batch,)."""
        return self.places(now, device) % self.images.count

    def places(self, now: int | Tensor, device: torch.device | str) -> Tensor:
        """The places of the records of pass `now` in the endless sequence, (batch,)."""
        rank, count = self.turn
        return (now * self.batch + torch.arange(self.batch, device=device)) * count + rank


@layer("HDF5Data")
class HDF5Data(Source):
    """Rows of the datasets that bear the tops' names, from the HDF5 files that the text file `source` lists.

    Tops: (batch_size, ...) as in the files.  `shuffle` draws an order of the files for each pass over all of them, and an order of
    the rows for each file in each pass.  Nothing is transformed.  Caffe: hdf5_data_layer.cpp.
    """

    tops = (1, None)

    def setup(self) -> None:
        param = self.param.hdf5_data_param
        self.batch = param.batch_size
        self.require(param.source, "hdf5_data_param has no source")
        self.require(self.batch > 0, "hdf5_data_param has no batch_size")
        self.require(not self.param.HasField("transform_param"), "HDF5 rows are not transformed; take transform_param out")
        with self.naming_errors():
            self.rows = RowFiles(param.source, self.param.top, self._shuffled if param.shuffle else in_order)

    def _shuffled(self, what: str, epoch: int, length: int) -> np.ndarray:
        return self.context.streams.common.numpy(f"shuffle {what}", self.name, epoch).permutation(length)

    def top_shapes(self) -> list[Shape]:
        return [(self.batch, *shape) for shape in self.rows.row_shapes]

    def forward(self) -> list[Tensor]:
        with self.naming_errors():
            return [self.tensor(rows) for rows in self.rows.read(self.dealt())]


@layer("MemoryData")
class MemoryData(Source):
    """Records handed over with set_arrays.

    Tops: (batch_size, channels, height, width), and labels, of shape (batch_size,) before the first forward pass and
    (batch_size, 1, 1, 1) after it, as in Caffe.  Nothing is transformed.  Caffe: memory_data_layer.cpp.
    """

    tops = 2

    def setup(self) -> None:
        param = self.param.memory_data_param
        self.batch = param.batch_size
        self.shape = param.channels, param.height, param.width
        self.require(min(self.batch, *self.shape) > 0, "memory_data_param needs batch_size, channels, height and width")
        self.arrays: tuple[np.ndarray, np.ndarray] | None = None

    def top_shapes(self) -> list[Shape]:
        return [(self.batch, *self.shape), (self.batch,)]

    def set_arrays(self, data: np.ndarray, labels: np.ndarray) -> None:
        """Read from `data` (n, channels, height, width) and `labels` (n,) or (n, 1, 1, 1) from now on, from their first record.

        Both are float32 and C-contiguous, and n is a multiple of batch_size.  They are not copied.
        """
        for name, array, shape in (("data", data, self.shape), ("labels", labels, (1, 1, 1))):
            self._require_array(array.dtype == np.float32, f"the {name} array must be float32, not {array.dtype}")
            self._require_array(array.flags.c_contiguous, f"the {name} array must be C-contiguous")
            self._require_array(array.shape[1:] == shape or (name == "labels" and array.ndim == 1),
                                f"the {name} array has shape {array.shape}; it must be (n, {', '.join(map(str, shape))})")
        self._require_array(len(data) == len(labels), f"there are {len(data)} records and {len(labels)} labels")
        self._require_array(len(data) > 0 and len(data) % self.batch == 0,
                            f"the number of records, {len(data)}, must be a multiple of batch_size {self.batch}")
        self.arrays = data, labels.reshape(-1, 1, 1, 1)
        self.cursor = 0

    def _require_array(self, condition: bool, message: str) -> None:
        self.require(condition, message, CaffeRuntimeError)

    def forward(self) -> list[Tensor]:
        self.require(self.arrays, "there are no records yet; call set_input_arrays before the first forward pass")
        assert self.arrays is not None
        data, labels = self.arrays
        start = self.start() % len(data)
        return [self.tensor(array[start:start + self.batch].copy()) for array in (data, labels)]
