"""The one place that chooses a `caffe`, and the only door to torchcaffe.

A stage runs on whatever module `load_caffe` returns: torchcaffe, or a real Caffe in its own interpreter.  Prototxts and weight files
are read and written here through torchcaffe, also for stages that a real Caffe will run.  Importing this module imports neither, so
that the stage process starts in an interpreter that has numpy alone beside its caffe.
"""
from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hintkd.errors import UserError

if TYPE_CHECKING:
    import os

    import numpy as np

    from torchcaffe.proto import caffe_pb2 as caffe_pb2

BACKENDS = ("torchcaffe", "caffe")
PRECISIONS = ("fp32", "tf32", "bf16")                        # torchcaffe's; a real Caffe has the first


def __getattr__(name: str) -> Any:
    """`from hintkd.backend import caffe_pb2` loads torchcaffe only when somebody asks for it."""
    if name == "caffe_pb2":
        return importlib.import_module("torchcaffe.proto.caffe_pb2")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_caffe(backend: str) -> Any:
    """The module with pycaffe's API that `backend`, one of BACKENDS, names.  Raises UserError if this interpreter cannot import it.

    Beyond that API stages use these of torchcaffe's extensions: ENGINE, set_threads, set_precision, a solver's fast, exact, remember and
    memory, CaffeError, Together.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(backend)
    except ImportError as error:
        raise UserError(f"this Python cannot import {backend} ({error}): give one that can with --caffe-python") from error


def how_to_get(extra: str) -> str:
    """How to install what an extra of the package needs, as a command."""
    return str(importlib.import_module("torchcaffe.extras").how_to_get(extra))


def engine(backend: str) -> str:
    """The version of a backend that this interpreter has; between two torchcaffes of one such string results are the same."""
    caffe = load_caffe(backend)
    return str(getattr(caffe, "ENGINE", f"caffe {getattr(caffe, '__version__', 'of unknown version')}"))


def environment(backend: str, device: str) -> dict[str, str]:
    """What else decides the last bits of a result in this interpreter: versions and, for torchcaffe, the kind of processor or GPU.

    device is "cpu" or "gpu".
    """
    import numpy
    found = {"python": platform.python_version(), "numpy": numpy.__version__, "engine": engine(backend)}
    if backend == "torchcaffe":
        import torch
        found["torch"] = torch.__version__
        if device == "gpu":
            found["gpu"] = torch.cuda.get_device_name()
        else:
            found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def has_gpu() -> bool:
    """Whether torchcaffe can run on a GPU here."""
    import torch
    return torch.cuda.is_available()


def require_gpu(number: int) -> None:
    """Raise UserError where torchcaffe has no GPU of this number."""
    caffe = load_caffe("torchcaffe")
    with user_errors():
        caffe.set_device(number)
        caffe.set_mode_gpu()
    caffe.set_mode_cpu()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what torchcaffe says about bad input into hintkd's UserError."""
    from torchcaffe.errors import CaffeError
    try:
        yield
    except CaffeError as error:
        raise UserError(str(error)) from error


def count_records(lmdb: str | os.PathLike[str]) -> int:
    """How many records an LMDB holds.  Raises UserError if there is none, or an empty or damaged one."""
    from torchcaffe.data.lmdb_reader import open_database
    with user_errors():
        return len(open_database(lmdb))


def read_net(path: str | os.PathLike[str]) -> caffe_pb2.NetParameter:
    """The NetParameter in a prototxt file, upgraded.  Raises UserError with file, line and column."""
    from torchcaffe.proto import prototxt
    with user_errors():
        return prototxt.read_net(path)


def write_text(message: Any) -> str:
    """A message as a prototxt, always the same text for the same message."""
    from torchcaffe.proto import prototxt
    return prototxt.write(message)


def read_weights(path: str | os.PathLike[str]) -> list[tuple[str, list[np.ndarray]]]:
    """(layer name, its blobs) of a .caffemodel or .caffemodel.h5 file, in the file's order, without layers that have none.

    Raises UserError naming the file if it is none, or has shared weights in a form that leaves some out.
    """
    from torchcaffe import formats
    with user_errors():
        found = formats.read_weights(path)
    if any(blob is None for _, blobs in found for blob in blobs):
        raise UserError(f"{path}: holds shared weights once only; give them as a .caffemodel, which holds them for every layer")
    return [(name, [blob for blob in blobs if blob is not None]) for name, blobs in found if blobs]


def write_weights(path: str | os.PathLike[str], layers: Iterable[tuple[str, Sequence[np.ndarray]]]) -> None:
    """Write (layer name, its blobs) as a .caffemodel that any Caffe loads; the file appears whole or not at all."""
    from torchcaffe import formats
    from torchcaffe.proto import caffe_pb2
    net = caffe_pb2.NetParameter()
    for name, blobs in layers:
        net.layer.add(name=name).blobs.extend(formats.array_to_blob(blob) for blob in blobs)
    with user_errors():
        formats.write_weights(path, net)
