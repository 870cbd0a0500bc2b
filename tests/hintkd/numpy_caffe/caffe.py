"""A stand-in for a real Caffe that trains: pycaffe's functions as far as stages use them, and numpy blobs for Python layers.

Stock layers are torchcaffe's, layer by layer.  A Python layer is not asked for a torch form, and what it sees of a blob is data, diff and
shape, as of a real one.
"""
import sys
from functools import wraps
from types import ModuleType

import numpy as np

import torchcaffe
from torchcaffe.layers import python

TRAIN, TEST = torchcaffe.TRAIN, torchcaffe.TEST
__version__ = "1.0.0-numpy"
set_mode_cpu = torchcaffe.set_mode_cpu


class Blob:
    """What pycaffe shows of a blob."""

    def __init__(self, raw):
        self._raw = raw

    @property
    def data(self):
        return np.asarray(self._raw.data)

    @property
    def diff(self):
        return np.asarray(self._raw.diff)

    @property
    def shape(self):
        return list(self._raw.shape)

    @property
    def num(self):
        return self.shape[0]

    @property
    def count(self):
        return int(np.prod(self.shape))

    def reshape(self, *shape):
        self._raw.reshape(*shape)


class Blobs:
    """A layer's own."""

    def __init__(self, raw):
        self._raw = raw

    def add_blob(self, *shape):
        self._raw.add_blob(*shape)

    def __len__(self):
        return len(self._raw)

    def __getitem__(self, index):
        return Blob(self._raw[index])

    def __iter__(self):
        return (Blob(raw) for raw in self._raw)


def plain(found):
    """The class, shown numpy blobs alone."""
    def shown(name):
        method = getattr(found, name)

        @wraps(method)
        def call(self, first, second, third=None):
            blobs = [list(map(Blob, each)) for each in ((first, second) if third is None else (first, third))]
            return method(self, *blobs) if third is None else method(self, blobs[0], list(second), blobs[1])
        return call

    def without(self):
        raise AttributeError("forward_torch")

    def blobs(self):
        return Blobs(self._raw_blobs)

    def set_blobs(self, raw):
        self._raw_blobs = raw
    return type(found.__name__, (found,), {**{name: shown(name) for name in ("setup", "reshape", "forward", "backward")},
                                           "forward_torch": property(without), "records": None, "blobs": property(blobs, set_blobs)})


def _within(make):
    """Call with this module out of the way: the classes that a net names import torchcaffe as their caffe."""
    @wraps(make)
    def call(*arguments, **named):
        here: ModuleType = sys.modules.pop("caffe")
        try:
            return make(*arguments, **named)
        finally:
            sys.modules["caffe"] = here
    return call


python.load_class = (lambda load: lambda *arguments: plain(load(*arguments)))(python.load_class)
Net, get_solver = _within(torchcaffe.Net), _within(torchcaffe.get_solver)
