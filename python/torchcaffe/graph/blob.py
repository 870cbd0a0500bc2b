"""Blobs: tensors for the engine, live numpy arrays for whoever looks.

The engine computes on tensors of any memory layout and device.  Only when somebody asks for `data` or `diff` does a blob get a
contiguous host array; from then on what the engine produces is copied out to it and what was written there is copied in
before the next layer reads, so an array taken once stays live, as in pycaffe.  A parameter on the CPU is its own host array.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from torchcaffe.errors import CaffeError

Shape = tuple[int, ...]
MAX_COUNT = 2**31 - 1                      # Caffe's Blob counts in int


def check_shape(shape: Sequence[int], what: str = "blob") -> Shape:
    """`shape` as a tuple of ints.  Raises CaffeError for negative axes, more than 32 axes or more elements than Caffe counts."""
    dims = tuple(int(d) for d in shape)
    if len(dims) > 32 or any(d < 0 for d in dims) or prod(dims) > MAX_COUNT:
        raise CaffeError(f"{what}: shape {dims} is not possible (at most 32 axes, none negative, at most {MAX_COUNT} elements)")
    return dims


class Slot:
    """One of the two arrays of a blob.

    A fixed slot (a parameter) keeps one tensor for life, and on the CPU its host array is that tensor's memory.  Any other slot (an
    activation) takes whatever tensor its producer assigns.  Between two moments in which a user can look, the host array may be older
    than the tensor (`stale`); whoever hands control back to the user flushes first.  `layout` is that of a fixed slot's tensor.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, fixed: bool = False,
                 layout: torch.memory_format = torch.contiguous_format):
        self.shape, self.device, self.dtype, self.fixed, self.layout = shape, device, dtype, fixed, layout
        self.tensor: Tensor | None = None
        if fixed:
            self.tensor = torch.empty(shape, device=device, dtype=dtype, memory_format=layout).zero_()
        self.host: np.ndarray | None = None
        self.stale = False
        self._deferred: tuple[dict[str, Tensor], str] | None = None

    @property
    def _aliased(self) -> bool:
        return self.fixed and self.device.type == "cpu"

    def value(self) -> Tensor:
        """The tensor to read, with what was written to the host array since.  4-D activations come channels-last from there."""
        self._fetch()
        if self.tensor is None:
            self.tensor = torch.zeros(self.shape, device=self.device, dtype=self.dtype)
        if self.host is not None and not self.stale and not self._aliased:
            source = torch.from_numpy(self.host)
            if self.fixed:
                self.tensor.copy_(source)
            else:
                layout = torch.channels_last if source.dim() == 4 else torch.contiguous_format
                self.tensor = source.to(self.device, copy=True, memory_format=layout)
        return self.tensor

    def assign(self, tensor: Tensor) -> None:
        """Take a producer's result."""
        self._deferred = None
        if self.fixed:
            assert self.tensor is not None
            self.tensor.copy_(tensor)
        else:
            self.tensor = tensor
            if tuple(tensor.shape) != self.shape:
                self.shape, self.host = tuple(tensor.shape), None
        self.stale = self.host is not None and not self._aliased

    def defer(self, tops: dict[str, Tensor], name: str) -> None:
        """Take tops[name] when somebody asks, if it is still there then; nothing is kept alive until that."""
        self._deferred = (tops, name)

    def _fetch(self) -> None:
        if self._deferred is not None:
            tops, name = self._deferred
            self._deferred = None
            if name in tops:
                self.assign(tops[name].detach().to(self.dtype))

    def flush(self) -> None:
        """Show the tensor on the host array, if somebody has it and it is older."""
        if self.host is not None:
            self._fetch()
        if self.stale:
            assert self.tensor is not None and self.host is not None
            torch.from_numpy(self.host).copy_(self.tensor)
            self.stale = False

    def touched(self) -> None:
        """The tensor was changed in place; flush() shows it on the host array."""
        self.stale = self.host is not None and not self._aliased

    def publish(self) -> None:
        """Show the tensor on the host array after it was changed in place."""
        self.touched()
        self.flush()

    def array(self) -> np.ndarray:
        """The live host array, of the blob's shape, C-contiguous; zeros where there are no contents (settings.shapes_only)."""
        if self.device.type == "meta":
            return np.zeros(self.shape, np.float32)
        self._fetch()
        if self.host is None:
            tensor = self.value().detach()
            self.host = tensor.numpy() if self._aliased else np.array(tensor.cpu().numpy(), order="C")
        self.flush()
        return self.host

    def view(self, shape: Shape) -> Slot:
        """A fixed slot of another shape over the same memory (parameters shared with share_mode PERMISSIVE)."""
        assert self.tensor is not None
        other = copy.copy(self)
        other.shape, other.tensor = shape, self.tensor.view(shape)
        other.host = None if self._aliased else self.array().reshape(shape)
        return other


class Blob:
    """pycaffe's Blob: `data` and `diff` are live arrays of `shape`; float32 except in nets built in another number type."""

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, fixed: bool = False,
                 layout: torch.memory_format = torch.contiguous_format):
        dims = check_shape(shape)
        self.data_slot = Slot(dims, device, dtype, fixed, layout)
        self.diff_slot = Slot(dims, device, dtype, fixed, layout)

    @property
    def shape(self) -> Shape:
        return self.data_slot.shape

    @property
    def data(self) -> np.ndarray:
        return self.data_slot.array()

    @property
    def diff(self) -> np.ndarray:
        self.diff_value()
        return self.diff_slot.array()

    def diff_value(self) -> Tensor:
        """The tensor of the diff, zeros if the data has taken another shape since."""
        if self.diff_slot.shape != self.shape:
            self.diff_slot = Slot(self.shape, self.diff_slot.device, self.diff_slot.dtype, self.diff_slot.fixed)
        return self.diff_slot.value()

    @property
    def count(self) -> int:
        return prod(self.shape)

    def _legacy(self, axis: int) -> int:
        if len(self.shape) > 4:
            raise CaffeError(f"num, channels, height and width are for blobs of at most four axes, not {self.shape}")
        return self.shape[axis] if axis < len(self.shape) else 1

    num = property(lambda self: self._legacy(0), doc="First axis, 1 if missing (legacy accessor).")
    channels = property(lambda self: self._legacy(1), doc="Second axis, 1 if missing.")
    height = property(lambda self: self._legacy(2), doc="Third axis, 1 if missing.")
    width = property(lambda self: self._legacy(3), doc="Fourth axis, 1 if missing.")

    def reshape(self, *shape: int) -> None:
        """Change the shape.  Contents are kept only if the shape is the same; arrays taken before are stale otherwise."""
        dims = check_shape(shape)
        if dims == self.shape:
            return
        old = self.data_slot
        self.data_slot = Slot(dims, old.device, old.dtype, old.fixed)
        self.diff_slot = Slot(dims, old.device, old.dtype, old.fixed)

    def share_data(self, other: Blob) -> None:
        """Use the other blob's data from now on (Caffe: Blob::ShareData); shapes may differ if the counts agree."""
        self.data_slot = other.data_slot if other.shape == self.shape else other.data_slot.view(self.shape)

    def share_diff(self, other: Blob) -> None:
        """Use the other blob's diff from now on (Caffe: Blob::ShareDiff)."""
        self.diff_slot = other.diff_slot if other.shape == self.shape else other.diff_slot.view(self.shape)
