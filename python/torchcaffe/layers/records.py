"""Python layers that read records: those of them that say what they read are run as a Data layer is.

The records of an LMDB come in another order in each epoch, in batches that go on with the next epoch or end with this one, framed, scaled
per channel and in several views, with labels and positions.  No layer of Caffe does that, so a prototxt asks a Python layer for it, which
any pycaffe runs.  Such a class may say what it reads, in a method `records()` without arguments that returns a dict of

    source, batch     the LMDB's folder; records per pass
    shuffle           in an order drawn for each epoch, or in that of their keys
    last              "wrapped": batches go on with the next epoch; "kept": the last batch of an epoch may be a short one
    border, pad       pixels around the stored images that are taken away, and that are then put there
    padding           what these are: "zeros", or the image reflected at its outermost pixels: "reflect"
    crop, mirror      side of the window, 0 for the whole; whether half of the images are mirrored
    mean, std         lists of a value per channel, or of one, or empty
    views             1, or 4: each image upright and turned by one, two and three quarters, a row of the first top each

and this module then does the reading: ahead, or from device memory, by the numbers that a memory knows inputs by.  The class's own
forward is not called.
"""
from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from torchcaffe.data.augmentation import Augmentation
from torchcaffe.data.lmdb_reader import open_database
from torchcaffe.graph.blob import Blob
from torchcaffe.layers.base import Context, Shape
from torchcaffe.layers.data import Data
from torchcaffe.proto import caffe_pb2

ORDERS = 8                                      # of epochs that are kept on the host


class Told(Protocol):
    """As much of a Python layer (python.py) as is needed here."""
    def attach(self, bottoms: list[Blob], tops: list[Blob]) -> None: ...
    def setup(self) -> None: ...
    def told(self) -> dict[str, Any]: ...


class Records(Data):
    """Images, labels and positions, as a Python layer's records() says.

    Tops: (batch * views, channels, height, width), (batch,) labels, (batch,) positions among the records; a short last batch has fewer.
    Orders are drawn from streams.common.order("order", "", epoch), and windows and mirrors from streams.uniform("transform", "", pass).
    """

    type = "Python"
    tops = (1, 3)

    def __init__(self, param: caffe_pb2.LayerParameter, context: Context, user: Told):
        super().__init__(param, context)
        self.user = user

    def attach(self, bottoms: list[Blob], tops: list[Blob]) -> None:
        self.user.attach(bottoms, tops)

    def setup(self) -> None:
        self.user.setup()
        p = self.user.told()
        self.source, self.batch, self.shuffles, self.keeps = p["source"], p["batch"], p["shuffle"], p["last"] == "kept"
        with self.naming_errors():
            self.transform = self.shown = Augmentation(p, self.phase == caffe_pb2.TRAIN)
            self.images = open_database(self.source).images()
        self.resident = None
        self.ticks = True
        self.is_numbered = self.shown.views == 1
        self._orders: dict[int, Tensor] = {}

    def top_shapes(self) -> list[Shape]:
        with self.naming_errors():
            shape = self.transform.output_shape(self.images.shape)
        size = self.size(self.cursor)
        return [(size * self.shown.views, *shape), (size,), (size,)][:len(self.param.top)]

    def draws(self, now: int | Tensor, device: torch.device | str) -> Tensor:
        return self.context.streams.uniform("transform", "", now, (self.shown.drawn, self._size(now)), device)

    # -- which records ----------------------------------------------------------------------------------------------------
    def size(self, now: int) -> int:
        if not self.keeps:
            return self.batch
        return min(self.batch, self.images.count - self._start(now)[1])

    def _size(self, now: int | Tensor) -> int:
        """The same where the number of the pass may lie in device memory: that of the pass that is coming."""
        return self.size(self.cursor + self.ticked if isinstance(now, Tensor) else now)

    def _start(self, now: Any) -> tuple[Any, Any]:
        """Epoch and first record's place in it of pass `now`, where no batch goes on with the next epoch."""
        rank, count = self.turn
        number, batches = now * count + rank, -(-self.images.count // self.batch)
        return number // batches, number % batches * self.batch

    def positions(self, now: int | Tensor, device: torch.device | str) -> Tensor:
        records = self.images.count
        if self.keeps:
            epoch, start = self._start(now)
            places = (start + torch.arange(self._size(now), device=device)) % records      # while a recording warms up, passes are others
            return self._orders_of(epoch, 1)[0, places] if self.shuffles else places
        places = self.places(now, device)
        if not self.shuffles:
            return places % records
        epochs = places // records
        first = epochs[0] if isinstance(now, Tensor) else int(epochs[0])
        return self._orders_of(first, (self.batch * self.turn[1] - 1) // records + 2)[epochs - first, places % records]

    def _orders_of(self, first: int | Tensor, count: int) -> Tensor:
        """The orders of so many epochs from the first on, (count, records)."""
        if isinstance(first, Tensor):
            return self._drawn(first + torch.arange(count, device=first.device))
        return torch.stack([self._order(epoch) for epoch in range(first, first + count)])

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            if len(self._orders) >= ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._drawn(torch.tensor([epoch]))[0]
        return self._orders[epoch]

    def _drawn(self, epochs: Tensor) -> Tensor:
        """Orders of all records, (epochs, records); the same for all solvers that train together."""
        return self.context.streams.common.order("order", "", epochs, self.images.count)
