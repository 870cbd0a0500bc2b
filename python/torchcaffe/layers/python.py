"""The Python layer: runs a user's class written for pycaffe, unmodified.

A prototxt names `module:` and `layer:`; the class has setup, reshape, forward and backward on numpy blobs.  It may also offer
`forward_torch(self, bottoms, blobs)`, a differentiable torch form of forward, and then the whole-iteration step can use it; or, where it
has no bottoms, `records()`, and then its reading is done as a Data layer's (records.py).  What it draws it draws from `self.seed`, the
net's, and from a count of its own, in a blob: then a resumed run draws what the uninterrupted one would have drawn.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from torchcaffe import settings
from torchcaffe.alias import installed
from torchcaffe.errors import CaffeError, blame
from torchcaffe.graph.blob import Blob
from torchcaffe.graph.vectors import BlobVec, BoolVec, RawBlobVec
from torchcaffe.layers.base import Context, Layer, Shape, layer
from torchcaffe.layers.records import Records
from torchcaffe.proto import caffe_pb2


class PyLayer:
    """What `caffe.Layer` is to a Python layer: the base class with param_str, phase, blobs and the four methods."""

    param_str: str
    phase: int
    seed: int
    blobs: BlobVec
    type: ClassVar[str] = "Python"

    def __init__(self, param: Any = None):
        """Caffe hands over the LayerParameter; classes that define their own __init__ pass it on."""

    def setup(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Once, before the first reshape."""
        raise NotImplementedError(f"{type(self).__name__} has no setup")

    def reshape(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Before each forward: give the tops their shapes."""
        raise NotImplementedError(f"{type(self).__name__} has no reshape")

    def forward(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Write top[i].data."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, top: Sequence[Blob], propagate_down: Sequence[bool], bottom: Sequence[Blob]) -> None:
        """Write bottom[i].diff where propagate_down[i], and add to the diffs of self.blobs."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")


def load_class(module: str, name: str, complain: Layer) -> type[PyLayer]:
    """Import the class; while its module is imported, `import caffe` is torchcaffe."""
    try:
        with installed():
            loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module.split(".")[0], module):
            blame(error, complain.name, _file(module))
            raise
        raise CaffeError(f"layer '{complain.name}' (Python): no module '{module}' on sys.path; put its folder on PYTHONPATH",
                         layer=complain.name) from None
    except (Exception, SystemExit) as error:
        blame(error, complain.name, _file(module))
        raise
    complain.require(hasattr(loaded, name), f"module '{module}' ({getattr(loaded, '__file__', '?')}) has no class '{name}'")
    found = getattr(loaded, name)
    complain.require(isinstance(found, type) and issubclass(found, PyLayer), f"'{module}.{name}' is not a caffe.Layer")
    return found


def _file(module: str) -> str:
    """The file of a module that may not be imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):                       # of the package it is in
        spec = None
    return spec.origin or "" if spec else ""


@layer("Python")
class PythonLayer(Layer):
    """Caffe: python_layer.hpp.  A loss needs its loss_weight written out.

    Exceptions of the class reach the caller as they are, blamed on this layer (errors.blame).
    """

    bottoms, tops = (0, None), (0, None)
    reshapes_itself = True

    @classmethod
    def made(cls, param: caffe_pb2.LayerParameter, context: Context) -> Layer:
        """Records where the class says what it reads."""
        made = cls(param, context)
        return Records(param, context, made) if not param.bottom and callable(getattr(made.load(), "records", None)) else made

    def attach(self, bottoms: list[Blob], tops: list[Blob]) -> None:
        self.bottom_blobs, self.top_blobs = RawBlobVec(bottoms), RawBlobVec(tops)

    def setup(self, *bottoms: Shape) -> None:
        cls = self.load()
        with self._users_code():
            self.user = cls(self.param)
            self.user.param_str = self.param.python_param.param_str
            self.user.phase = self.phase
            self.user.seed = self.context.streams.seed
            self.user.blobs = self.blobs
            self.user.setup(self.bottom_blobs, self.top_blobs)

    def load(self) -> type[PyLayer]:
        """The user's class."""
        p = self.param.python_param
        self.require(settings.python_layers(), f"module '{p.module}' is not imported, as --no-python-layers says; "
                     "leave that flag away if you trust the module")
        return load_class(p.module, p.layer, self)

    def told(self) -> dict[str, Any]:
        """What a class that reads records says of them."""
        with self._users_code():
            return dict(self.user.records())  # type: ignore[attr-defined]

    def top_shapes(self, *bottoms: Shape) -> list[Shape]:
        with self._users_code():
            self.user.reshape(self.bottom_blobs, self.top_blobs)
        return [blob.shape for blob in self.top_blobs]

    @property
    def has_torch_form(self) -> bool:
        """Whether the whole-iteration step can run this layer."""
        return hasattr(self.user, "forward_torch")

    def forward(self, *bottoms: Tensor) -> Tensor | Sequence[Tensor]:
        with self._users_code():
            return self.user.forward_torch(bottoms, self.params)  # type: ignore[attr-defined]

    def forward_numpy(self) -> None:
        """The class's own forward, on live arrays."""
        with self._users_code():
            self.user.forward(self.bottom_blobs, self.top_blobs)

    def backward_numpy(self, propagate_down: Sequence[bool]) -> None:
        """The class's own backward; bottoms it leaves alone keep their diffs."""
        with self._users_code():
            self.user.backward(self.top_blobs, BoolVec(propagate_down), self.bottom_blobs)

    @contextmanager
    def _users_code(self) -> Iterator[None]:
        """Blame what is raised within the block on this layer."""
        try:
            yield
        except (Exception, SystemExit) as error:
            blame(error, self.name, getattr(sys.modules.get(self.param.python_param.module), "__file__", None) or "")
            raise
