"""Caffe's binary files: weights (.caffemodel), solver states (.solverstate), mean images (.binaryproto), and the HDF5 forms of
the first two.  Numbers in, numbers out: which layer they belong to in a net is the net's business.

Every file is written whole or not at all.  What is read is held against its own declared shape before anything is allocated.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, EncodeError, Message

from torchcaffe import glog
from torchcaffe.errors import CaffeError, CaffeRuntimeError
from torchcaffe.files import StrPath, read_bytes, require_regular
from torchcaffe.proto import caffe_pb2, upgrade

M = TypeVar("M", bound=Message)
Weights = list[tuple[str, list[np.ndarray | None]]]
DEFLATE = 1032                                  # the most that HDF5's compression can shrink anything


@dataclass
class State:
    """What a .solverstate holds: Caffe's message SolverState, or its HDF5 form."""
    iter: int
    learned_net: str                            # path of the weights, as it was when the state was written
    current_step: int = 0                       # how many steps of the multistep policy are done
    history: list[np.ndarray] = field(default_factory=list)


# -- blobs ---------------------------------------------------------------------------------------------------------
def _raw_blob_class() -> Any:
    """BlobProto with its packed numbers seen as bytes, which is what they are in the file: no number passes through Python."""
    file = descriptor_pb2.FileDescriptorProto(name="raw_blob.proto", package="torchcaffe", syntax="proto2")
    message = file.message_type.add(name="RawBlob")
    for name in ("data", "diff", "double_data", "double_diff"):
        number = caffe_pb2.BlobProto.DESCRIPTOR.fields_by_name[name].number
        message.field.add(name=name, number=number, type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
                          label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("torchcaffe.RawBlob"))


_RawBlob = _raw_blob_class()


def blob_to_array(blob: caffe_pb2.BlobProto, diff: bool = False) -> np.ndarray:
    """The data (or the diff) of a blob, float32 or float64, in its shape; the four legacy dims, where one is set, win over `shape`.

    Raises CaffeError where the shape asks for another number of elements than there are.
    """
    raw = _RawBlob.FromString(blob.SerializeToString())
    double, single = (raw.double_diff, raw.diff) if diff else (raw.double_data, raw.data)
    data = np.frombuffer(double, "<f8") if double else np.frombuffer(single, "<f4")
    legacy = ("num", "channels", "height", "width")
    shape = [getattr(blob, name) for name in legacy] if any(blob.HasField(name) for name in legacy) else list(blob.shape.dim)
    vast = prod(size for size in shape if size) >= 2**31 and not data.size       # numpy multiplies the axes of empty arrays too
    if any(size < 0 for size in shape) or prod(shape) != data.size or len(shape) > 32 or vast:
        raise CaffeError(f"a blob has shape {tuple(shape)} but {data.size} elements")
    return data.reshape(shape).astype(data.dtype.newbyteorder("="))         # a copy, which can be written to


def array_to_blob(array: np.ndarray, diff: np.ndarray | None = None) -> caffe_pb2.BlobProto:
    """A BlobProto of an array and, if given, its diff of the same shape; float64 goes to `double_data`, all else to `data`."""
    double = array.dtype == np.float64
    names, dtype = (("double_data", "double_diff"), "<f8") if double else (("data", "diff"), "<f4")
    raw = _RawBlob()
    for name, values in zip(names, (array, diff), strict=True):
        if values is not None:
            setattr(raw, name, np.ascontiguousarray(values, dtype).tobytes())
    blob = caffe_pb2.BlobProto.FromString(raw.SerializeToString())
    blob.shape.dim.extend(array.shape)
    return blob


# -- files ---------------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place, all written out, when the block ends well, and is gone otherwise."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CaffeError(f"{path}: is not a file; write to another name")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CaffeError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)


def write_message(path: StrPath, message: Message) -> None:
    """Write a message in binary form."""
    try:
        data = message.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise CaffeError(f"{path}: cannot be written in binary form ({error}); use HDF5") from None
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: StrPath, text: str) -> None:
    """Write a text file."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_message(path: StrPath, message: M, what: str) -> M:
    """Merge the binary file into `message` and return it; `what` it should be is for errors only."""
    try:
        message.ParseFromString(read_bytes(path))
    except OSError as error:
        raise CaffeError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (DecodeError, ValueError):
        raise CaffeError(f"{path}: is not {what}, or is damaged or cut off") from None
    return message


def is_hdf5(path: StrPath) -> bool:
    """Whether the file is in HDF5, by its first bytes."""
    try:
        require_regular(path)
        with open(path, "rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n"
    except (OSError, ValueError) as error:                  # a path with a zero in it
        raise CaffeRuntimeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _named(path: StrPath, action: Callable[[], Any]) -> Any:
    """Run `action`; what is wrong with the content of the file is said with the file's name."""
    try:
        return action()
    except CaffeError as error:
        raise CaffeError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise CaffeError(f"{path}: is damaged: a name in it is not UTF-8") from None


# -- weights -------------------------------------------------------------------------------------------------------
def read_weights(path: StrPath) -> Weights:
    """(layer name, its blobs) of every layer in a caffemodel, binary or HDF5, in the file's order.

    The blobs of binary files may have four legacy dims (leading ones).  HDF5 files hold a shared parameter only with its owner: a
    blob left out before others of its layer is None, one left out at the end is not there.  Caffe: Net::CopyTrainedLayersFrom.
    """
    if is_hdf5(path):
        return _read_hdf5(path, "a caffemodel", _weights_from_hdf5)
    net = read_message(path, caffe_pb2.NetParameter(), "a caffemodel")
    if not net.layer and not net.layers:
        raise CaffeError(f"{path}: holds no layers, so it is not a caffemodel")
    return _named(path, lambda: [(layer.name, [blob_to_array(blob) for blob in layer.blobs]) for layer in upgrade.upgrade_net(net).layer])


def write_weights(path: StrPath, net: caffe_pb2.NetParameter) -> None:
    """Write a net with blobs as a caffemodel, HDF5 if the name ends in .h5."""
    if str(path).endswith(".h5"):
        write_weights_hdf5(path, net)
    else:
        write_message(path, net)


def write_weights_hdf5(path: StrPath, net: caffe_pb2.NetParameter) -> None:
    """Write a net with blobs as Caffe's HDF5 caffemodel: data/{layer}/{i}, and diff/{layer}/{i} if the blobs have diffs.

    A parameter that shares another's name is left to its owner, the first (Caffe: Net::ToHDF5).  HDF5 takes a `/` in a layer's name for
    a group in a group: torchcaffe reads such a file, and a line in the log says that Caffe does not find the layer.
    """
    nested = [layer.name for layer in net.layer if layer.blobs and "/" in layer.name]
    if nested:
        glog.warning(f"{path}: Caffe itself will not find {len(nested)} layer(s) of this file with a / in their names, '{nested[0]}' "
                     "first; write binary weights for it", "net.cpp:0")

    def write(file: h5py.File) -> None:
        owned: set[str] = set()
        diffs = any(blob.diff or blob.double_diff for layer in net.layer for blob in layer.blobs)
        for layer in net.layer:
            data = file.require_group("data").require_group(layer.name)
            diff = file.require_group("diff").require_group(layer.name) if diffs else None
            for i, blob in enumerate(layer.blobs):
                name = layer.param[i].name if i < len(layer.param) else ""
                if not name or name not in owned:
                    data[str(i)] = blob_to_array(blob)
                if diff is not None:
                    diff[str(i)] = blob_to_array(blob, diff=True)
                owned.add(name)

    write_hdf5(path, write)


def _weights_from_hdf5(file: h5py.File) -> Weights:
    layers: dict[str, dict[int, np.ndarray]] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            layer, _, index = name.rpartition("/")
            layers.setdefault(layer, {})[_index(index)] = _dataset(item)
        elif not len(item):                     # a layer without parameters; a group of groups is a part of a name with `/`
            layers.setdefault(name, {})

    _group(file, "data").visititems(visit)      # follows no links out of the file, and none twice
    return [(name, [blobs.get(i) for i in range(max(blobs, default=-1) + 1)]) for name, blobs in layers.items()]


# -- solver states -------------------------------------------------------------------------------------------------
def read_state(path: StrPath) -> State:
    """A .solverstate, binary or HDF5 (Caffe: SGDSolver::RestoreSolverStateFromBinaryProto and ...HDF5)."""
    state = _read_hdf5(path, "a solver state", _state_from_hdf5) if is_hdf5(path) else _state_from_binary(path)
    if any(character < " " for character in state.learned_net):
        raise CaffeError(f"{path}: is damaged: it names {state.learned_net!r} as the file of its weights")
    return state


def _state_from_binary(path: StrPath) -> State:
    state = read_message(path, caffe_pb2.SolverState(), "a solver state")
    if not (state.HasField("iter") and state.HasField("learned_net")):      # a mean image has a field 1 too
        raise CaffeError(f"{path}: holds no iteration, so it is not a solver state")
    learned_net = os.fsdecode(state.learned_net)            # bytes where the path is not UTF-8
    return _named(path, lambda: State(state.iter, learned_net, state.current_step, [blob_to_array(blob) for blob in state.history]))


def write_state(path: StrPath, state: State) -> None:
    """Write a .solverstate, HDF5 if the name ends in .h5."""
    if not str(path).endswith(".h5"):
        write_message(path, caffe_pb2.SolverState(iter=state.iter, learned_net=state.learned_net, current_step=state.current_step,
                                                   history=[array_to_blob(array) for array in state.history]))
        return

    def write(file: h5py.File) -> None:
        for name in ("iter", "current_step"):
            file[name] = np.array([getattr(state, name)], np.int32)
        text = state.learned_net.encode()
        file["learned_net"] = np.array(text, f"S{len(text) + 1}")           # Caffe reads up to the zero at the end
        history = file.create_group("history")
        for i, array in enumerate(state.history):
            history[str(i)] = array

    write_hdf5(path, write)


def _state_from_hdf5(file: h5py.File) -> State:
    history = {_index(name): _dataset(item) for name, item in _group(file, "history").items()}
    if sorted(history) != list(range(len(history))):
        raise CaffeError("its history is not numbered from 0")
    return State(int(_dataset(file["iter"]).ravel()[0]), _text(file["learned_net"]), int(_dataset(file["current_step"]).ravel()[0]),
                 [history[i] for i in range(len(history))])


# -- mean images ---------------------------------------------------------------------------------------------------
def read_mean(path: StrPath) -> np.ndarray:
    """The image in a mean.binaryproto, (channels, height, width)."""
    blob = read_message(path, caffe_pb2.BlobProto(), "a mean image")
    array = _named(path, lambda: blob_to_array(blob))
    if array.ndim < 3 or prod(array.shape[:-3]) != 1:
        raise CaffeError(f"{path}: has shape {array.shape}, a mean image has channels, height and width")
    return array.reshape(array.shape[-3:])


def write_mean(path: StrPath, image: np.ndarray) -> None:
    """Write an image (channels, height, width) as compute_image_mean does, with the four legacy dims."""
    blob = array_to_blob(image.astype(np.float32))
    blob.ClearField("shape")
    blob.num, (blob.channels, blob.height, blob.width) = 1, image.shape
    write_message(path, blob)


# -- HDF5 ----------------------------------------------------------------------------------------------------------
def _read_hdf5(path: StrPath, what: str, read: Callable[[h5py.File], Any]) -> Any:
    try:
        with h5py.File(path, "r") as file:
            return _named(path, lambda: read(file))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        raise CaffeError(f"{path}: is not {what} in HDF5, or is damaged or cut off") from None


def write_hdf5(path: StrPath, write: Callable[[h5py.File], None]) -> None:
    """Write an HDF5 file with what `write` puts into it."""
    with replacing(path) as part:
        try:
            with h5py.File(part, "w") as file:
                write(file)
        except (ValueError, RuntimeError, TypeError) as error:
            raise CaffeError(f"{path}: cannot be written as HDF5 ({error})") from None


def _group(file: h5py.File, name: str) -> h5py.Group:
    group = file.get(name) if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(group, h5py.Group):
        raise CaffeError(f"has no group '{name}'")
    return group


def _index(name: str) -> int:
    """The number of a blob, which is its name."""
    if not name.isascii() or not name.isdigit() or len(name) > 4:
        raise CaffeError(f"holds '{name[:40]}' where the number of a blob is expected")
    return int(name)


def _dataset(item: Any) -> np.ndarray:
    """The numbers of a dataset, if they are there: a shape beyond what the file can hold is refused."""
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu" or item.external or item.is_virtual or item.shape is None:
        raise CaffeError(f"'{item.name}' is not a plain array of numbers")
    require_stored(item)
    array = item[()]
    return np.asarray(array, np.float64 if item.dtype == np.float64 else np.float32 if item.dtype.kind == "f" else np.int64)


def require_stored(item: h5py.Dataset) -> None:
    """Raise CaffeError for a dataset whose shape is beyond what its file can hold, before memory of that shape is taken."""
    if item.nbytes > DEFLATE * os.path.getsize(item.file.filename):
        raise CaffeError(f"'{item.name}' has shape {item.shape}, more than the file can hold")


def _text(item: Any) -> str:
    value = item[()] if isinstance(item, h5py.Dataset) and item.shape == () else b""
    return value.decode() if isinstance(value, bytes) else str(value)
