"""The one place that chooses a `caffe`, and the only door to torchcaffe.

A stage runs on whatever module `load_caffe` returns: torchcaffe, or a real Caffe in its own interpreter.  Prototxts and weight files are read
and written here through torchcaffe, also for stages that a real Caffe will run.  Importing this module imports neither, so that the
stage program starts in an interpreter that has numpy alone beside its caffe.
"""
from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterable, Iterator, List, Sequence, Tuple

from hintkd.errors import UserError

if TYPE_CHECKING:
    import os

    import numpy as np
    from torchcaffe.proto import caffe_pb2 as caffe_pb2

BACKENDS = ("torchcaffe", "caffe")


def __getattr__(name: str) -> Any:
    """`from hintkd.backend import caffe_pb2` loads torchcaffe only when somebody asks for it."""
    if name == "caffe_pb2":
        return importlib.import_module("torchcaffe.proto.caffe_pb2")
    raise AttributeError("module {!r} has no attribute {!r}".format(__name__, name))


def load_caffe(backend: str) -> Any:
    """The module with pycaffe's API that `backend` names: "torchcaffe" or "caffe".

    Raises UserError if it cannot be imported by this interpreter.
    """
    try:
        return importlib.import_module({"torchcaffe": "torchcaffe", "caffe": "caffe"}[backend])
    except KeyError:
        raise UserError("unknown backend {!r}: choose one of {}".format(backend, ", ".join(BACKENDS))) from None
    except ImportError as error:
        raise UserError("this Python cannot import {}: {}; give an interpreter that can with --caffe-python".format(backend, error)) from error


def engine() -> str:
    """Version and number of numerics of torchcaffe: results may differ between two such strings, and not within one."""
    return str(load_caffe("torchcaffe").ENGINE)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what torchcaffe says about bad input into hintkd's UserError."""
    from torchcaffe.errors import CaffeError
    try:
        yield
    except CaffeError as error:
        raise UserError(str(error)) from error


def read_net(path: str | os.PathLike[str]) -> caffe_pb2.NetParameter:
    """The NetParameter in a prototxt file, upgraded.  Raises UserError with file, line and column."""
    from torchcaffe.proto import prototxt
    with user_errors():
        return prototxt.read_net(path)


def read_solver(path: str | os.PathLike[str]) -> caffe_pb2.SolverParameter:
    """The SolverParameter in a prototxt file.  Raises UserError with file, line and column."""
    from torchcaffe.proto import prototxt
    with user_errors():
        return prototxt.read_solver(path)


def write_text(message: Any) -> str:
    """A message as a prototxt, always the same text for the same message."""
    from torchcaffe.proto import prototxt
    return prototxt.write(message)


def read_weights(path: str | os.PathLike[str]) -> List[Tuple[str, List[np.ndarray]]]:
    """(layer name, its blobs) of a .caffemodel or .caffemodel.h5 file, in the file's order.  Raises UserError naming the file."""
    from torchcaffe import formats
    with user_errors():
        return formats.read_weights(path)


def write_weights(path: str | os.PathLike[str], layers: Iterable[Tuple[str, Sequence[np.ndarray]]]) -> None:
    """Write (layer name, its blobs) as a .caffemodel that any Caffe loads; the file appears whole or not at all."""
    from torchcaffe import formats
    from torchcaffe.proto import caffe_pb2
    net = caffe_pb2.NetParameter()
    for name, blobs in layers:
        layer = net.layer.add(name=name)
        layer.blobs.extend(formats.array_to_blob(blob) for blob in blobs)
    with user_errors():
        formats.write_weights(path, net)
