"""pycaffe's io module: between numpy arrays and the messages that hold them."""
from __future__ import annotations

from math import prod

import numpy as np

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2


def array_to_datum(arr: np.ndarray, label: int | None = None) -> caffe_pb2.Datum:
    """A Datum with `arr` (channels, height, width): as bytes if it is uint8, as floats otherwise.  Raises CaffeError for other axes."""
    if arr.ndim != 3:
        raise CaffeError(f"an image has three axes (channels, height, width), not shape {arr.shape}")
    datum = caffe_pb2.Datum(channels=arr.shape[0], height=arr.shape[1], width=arr.shape[2])
    if arr.dtype == np.uint8:
        datum.data = arr.tobytes()
    else:
        datum.float_data.extend(arr.astype(float).ravel())
    if label is not None:
        datum.label = int(label)
    return datum


def datum_to_array(datum: caffe_pb2.Datum) -> np.ndarray:
    """The image of a Datum that is not encoded, (channels, height, width): uint8, or float64 where it holds floats."""
    data = np.frombuffer(datum.data, np.uint8) if datum.data else np.array(datum.float_data, float)
    return _shaped(data, (datum.channels, datum.height, datum.width), "Datum")


def blobproto_to_array(blob: caffe_pb2.BlobProto, return_diff: bool = False) -> np.ndarray:
    """The data of a blob, or its diff; float64.  Legacy dims, where there are any, win over `shape`."""
    data = np.array(blob.diff if return_diff else blob.data, float)
    legacy = any(blob.HasField(axis) for axis in ("num", "channels", "height", "width"))
    return _shaped(data, (blob.num, blob.channels, blob.height, blob.width) if legacy else tuple(blob.shape.dim), "BlobProto")


def array_to_blobproto(arr: np.ndarray, diff: np.ndarray | None = None) -> caffe_pb2.BlobProto:
    """A blob with `arr` and perhaps a diff of the same shape."""
    blob = caffe_pb2.BlobProto(shape=caffe_pb2.BlobShape(dim=arr.shape))
    blob.data.extend(arr.astype(float).ravel())
    if diff is not None:
        blob.diff.extend(diff.astype(float).ravel())
    return blob


def _shaped(data: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    if min(shape, default=1) < 0 or data.size != prod(shape):
        raise CaffeError(f"the {what} holds {data.size} values, which do not fit its shape {shape}")
    return data.reshape(shape)
