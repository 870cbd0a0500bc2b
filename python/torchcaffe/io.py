"""pycaffe's io module: arrays, the messages that hold them, and images made ready for a net.

numpy stands in for scikit-image: images are resized by the arithmetic that scikit-image had in Caffe's days (bilinear, zeros beyond the
edges, no smoothing before an image shrinks).  So do `resize` and `zoom`, which scripts find here because pycaffe imports them; `skimage`
is scikit-image where that is installed, and what recipes use of it where it is not.  Reading image files takes Pillow.  What data
layers read and resize is the work of torchcaffe.data, in OpenCV's arithmetic.  Caffe: python/caffe/io.py.
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from torchcaffe.errors import CaffeError, CaffeImportError, CaffeOSError, CaffeValueError
from torchcaffe.extras import how_to_get
from torchcaffe.files import require_regular
from torchcaffe.proto import caffe_pb2

Shape = tuple[int, ...]
LUMA = (0.2125, 0.7154, 0.0721)                             # of red, green and blue in a gray level (scikit-image's rgb2gray)


# -- messages ------------------------------------------------------------------------------------------------------
def array_to_datum(arr: np.ndarray, label: int | None = None) -> caffe_pb2.Datum:
    """A Datum with `arr` (channels, height, width): as bytes if it is uint8, as floats otherwise.

    Raises CaffeValueError for other axes.
    """
    if arr.ndim != 3:
        raise CaffeValueError(f"an image has three axes (channels, height, width), not shape {arr.shape}")
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


def arraylist_to_blobprotovector_str(arraylist: Sequence[np.ndarray]) -> bytes:
    """A serialized BlobProtoVector of the arrays."""
    return caffe_pb2.BlobProtoVector(blobs=map(array_to_blobproto, arraylist)).SerializeToString()


def blobprotovector_str_to_arraylist(string: bytes) -> list[np.ndarray]:
    """The arrays of a serialized BlobProtoVector, float64."""
    try:
        vector = caffe_pb2.BlobProtoVector.FromString(string)
    except DecodeError:
        raise CaffeError("these bytes are not a serialized BlobProtoVector") from None
    return [blobproto_to_array(blob) for blob in vector.blobs]


def _shaped(data: np.ndarray, shape: Shape, what: str) -> np.ndarray:
    if min(shape, default=1) < 0 or data.size != prod(shape):
        raise CaffeValueError(f"the {what} holds {data.size} values, which do not fit its shape {shape}")
    return data.reshape(shape)


# -- images for nets -----------------------------------------------------------------------------------------------
class Transformer:
    """Turns images (height, width, channels) into what a net's inputs take, and back.

    `inputs` gives the shape of each input blob, (batch, channels, height, width).  Nothing is done but resizing until a setter asks for
    it, in the order transpose, channel_swap, raw_scale, mean, input_scale.  Raises CaffeError for an input that is not in `inputs`.
    """

    def __init__(self, inputs: Mapping[str, Sequence[int]]):
        self.inputs = {name: tuple(shape) for name, shape in inputs.items()}
        self.transpose: dict[str, Sequence[int]] = {}
        self.channel_swap: dict[str, Sequence[int]] = {}
        self.raw_scale: dict[str, float] = {}
        self.mean: dict[str, np.ndarray] = {}
        self.input_scale: dict[str, float] = {}

    def _shape(self, in_: str) -> Shape:
        if in_ not in self.inputs:
            raise CaffeError(f"'{in_}' is not an input of this Transformer; it has {', '.join(self.inputs)}")
        return self.inputs[in_]

    def preprocess(self, in_: str, data: np.ndarray) -> np.ndarray:
        """An image (height, width, channels) as float32 for the input `in_`; `data` is not changed."""
        size = self._shape(in_)[2:]
        image = np.array(data, np.float32)
        if image.shape[:2] != size:
            image = resize_image(image, size)
        if in_ in self.transpose:
            image = image.transpose(self.transpose[in_])
        if in_ in self.channel_swap:
            image = image[list(self.channel_swap[in_])]
        if in_ in self.raw_scale:
            image *= self.raw_scale[in_]
        if in_ in self.mean:
            image -= self.mean[in_]
        if in_ in self.input_scale:
            image *= self.input_scale[in_]
        return image

    def deprocess(self, in_: str, data: np.ndarray) -> np.ndarray:
        """The image that preprocess would have made `data` from, at the net's size."""
        self._shape(in_)
        image = data.copy().squeeze()
        if in_ in self.input_scale:
            image /= self.input_scale[in_]
        if in_ in self.mean:
            image += self.mean[in_]
        if in_ in self.raw_scale:
            image /= self.raw_scale[in_]
        if in_ in self.channel_swap:
            image = image[np.argsort(self.channel_swap[in_])]
        if in_ in self.transpose:
            image = image.transpose(np.argsort(self.transpose[in_]))
        return image

    def set_transpose(self, in_: str, order: Sequence[int]) -> None:
        """The order of an image's axes in the blob: (2, 0, 1) puts the channels first."""
        if len(order) != len(self._shape(in_)) - 1:
            raise CaffeError(f"'{in_}': a transpose order has {len(self._shape(in_)) - 1} axes, not {len(order)}")
        self.transpose[in_] = order

    def set_channel_swap(self, in_: str, order: Sequence[int]) -> None:
        """The order of the channels, which are the first axis by then: (2, 1, 0) makes blue, green, red of red, green, blue."""
        if len(order) != self._shape(in_)[1]:
            raise CaffeError(f"'{in_}': a channel order has {self._shape(in_)[1]} channels, not {len(order)}")
        self.channel_swap[in_] = order

    def set_raw_scale(self, in_: str, scale: float) -> None:
        """A factor before the mean is subtracted: 255 for nets that were trained on bytes."""
        self._shape(in_)
        self.raw_scale[in_] = scale

    def set_mean(self, in_: str, mean: np.ndarray) -> None:
        """What is subtracted: one number per channel, or an image (channels, height, width), resized if its size differs.

        An image of two axes has the size of an input of one channel, and is not resized.  Raises CaffeValueError for any other array.
        """
        shape = self._shape(in_)[1:]
        if mean.ndim == 1:
            if mean.shape != shape[:1]:
                raise CaffeValueError(f"'{in_}' has {shape[0]} channels, the mean {mean.shape[0]}")
            mean = mean[:, None, None]
        elif mean.ndim != 3 and (1, *mean.shape) != shape:
            raise CaffeValueError(f"'{in_}' takes a mean of one number per channel, or an image of three axes (channels, height, width), "
                                  f"not an array of shape {mean.shape}")
        elif mean.ndim == 3 and mean.shape != shape:
            mean = resize_image(mean.transpose(1, 2, 0), shape[1:]).transpose(2, 0, 1)
        self.mean[in_] = mean

    def set_input_scale(self, in_: str, scale: float) -> None:
        """A factor after the mean is subtracted."""
        self._shape(in_)
        self.input_scale[in_] = scale


def load_image(filename: str | os.PathLike[str], color: bool = True) -> np.ndarray:
    """The image in a file, float32 in [0, 1]: (height, width, 3) as red, green, blue, or (height, width, 1) with color=False.

    Transparency is left out.  Raises CaffeError for a file that is no image, or without Pillow.
    """
    pixels = img_as_float(imread(filename))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3 if color else 1, 2)
    elif not color:
        pixels = (pixels @ LUMA)[:, :, None]
    return pixels.astype(np.float32)


def imread(filename: str | os.PathLike[str]) -> np.ndarray:
    """The pixels in a file: (height, width), or (height, width, 3) as red, green, blue; uint8, or uint16 in files of 16 bits."""
    try:
        from PIL import Image
    except ImportError:
        raise CaffeImportError(f"{filename}: reading image files takes Pillow: {how_to_get('images')}") from None
    try:
        require_regular(filename)
        with Image.open(filename) as picture:
            mode = picture.mode
            deep = mode.startswith("I;16")
            pixels = np.array(picture if deep else picture.convert("L" if mode in ("1", "L") else "RGB"))
    except Exception as error:  # noqa: BLE001    Pillow raises a dozen types on damaged images
        raise CaffeOSError(f"{filename}: cannot be read as an image ({error})") from None
    if mode in ("I", "F"):
        raise CaffeValueError(f"{filename}: holds pixels of 32 bits; write it with 8 or 16")
    return pixels.astype(np.uint16) if deep else pixels


def img_as_float(image: np.ndarray) -> np.ndarray:
    """The image as float64, its largest possible value 1; floats stay what they are."""
    if image.dtype.kind == "f":
        return image
    return image / (1.0 if image.dtype.kind == "b" else float(np.iinfo(image.dtype).max))


def resize_image(im: np.ndarray, new_dims: Sequence[int], interp_order: int = 1) -> np.ndarray:
    """`im` (height, width, channels) at another (height, width), float32: interp_order 1 is bilinear, 0 the nearest pixel.

    With 1 or 3 channels a pixel is a square, and beyond the image lies its smallest value; with other numbers of channels the corners
    stay corners.  So do scikit-image's resize and scipy's zoom, which pycaffe calls for the one and the other.
    """
    if im.ndim != 3 or 0 in im.shape or interp_order not in (0, 1):
        raise CaffeValueError("resize_image takes an image (height, width, channels) and interp_order 0 or 1, "
                              f"not shape {im.shape} and {interp_order}")
    least = float(im.min())
    return (_resampled(im.astype(float) - least, new_dims[:2], im.shape[2] in (1, 3), interp_order) + least).astype(np.float32)


def resize(image: np.ndarray, output_shape: Sequence[int], order: int = 1, mode: str = "constant", cval: float = 0, clip: bool = True,
           preserve_range: bool = False) -> np.ndarray:
    """scikit-image's resize: img_as_float of the image (height, width, ...) at another (height, width); float64.

    `output_shape` may name the other axes too, which stay as they are.  `order` is 1, bilinear, or 0, the nearest pixel; beyond the
    image lies `cval`; `clip` keeps values between the image's smallest and largest; `preserve_range` takes values as they are.
    """
    size, rest = tuple(output_shape[:2]), tuple(output_shape[2:])
    fits = image.ndim >= 2 and 0 not in image.shape and len(size) == 2 and rest in ((), image.shape[2:])
    if not fits or order not in (0, 1) or mode != "constant":
        raise CaffeValueError("resize changes the first two axes of an image, with order 0 or 1 and mode 'constant', "
                              f"not {image.shape} to {tuple(output_shape)}, order {order}, mode {mode!r}")
    pixels = (image if preserve_range else img_as_float(image)).astype(float)
    resized = _resampled(pixels - cval, size, True, order) + cval
    return np.where(resized == cval, cval, np.clip(resized, pixels.min(), pixels.max())) if clip else resized


def zoom(input: np.ndarray, zoom: float | Sequence[float], order: int = 3) -> np.ndarray:  # noqa: A002    scipy's name
    """scipy.ndimage.zoom, of the first two axes and with order 1, linear, or 0, the nearest element: corners stay corners."""
    factors = np.broadcast_to(np.asarray(zoom, float), input.ndim)
    if input.ndim < 2 or 0 in input.shape or (factors[2:] != 1).any() or order not in (0, 1):
        raise CaffeValueError(f"zoom changes the first two axes, with order 0 or 1, not {input.shape} by {zoom} with order {order}; "
                              "scipy.ndimage.zoom does more")
    size = [round(length * factor) for length, factor in zip(input.shape, factors[:2].tolist(), strict=False)]
    zoomed = _resampled(input.astype(float), size, False, order)
    return (np.trunc(zoomed + np.copysign(0.5, zoomed)) if input.dtype.kind in "iu" else zoomed).astype(input.dtype)


def _resampled(image: np.ndarray, size: Sequence[int], squares: bool, order: int) -> np.ndarray:
    """An image (height, width, ...) at another size, with zeros beyond it."""
    rows, columns = (_places(old, int(new), squares, order) for old, new in zip(image.shape, size, strict=False))
    return np.moveaxis(np.tensordot(columns, np.tensordot(rows, image, 1), (1, 1)), 0, 1)


def _places(size: int, new: int, squares: bool, order: int) -> np.ndarray:
    """The weights (new, size) of the old pixels along an axis in the new ones."""
    step = size / new if squares else (size - 1) / max(new - 1, 1)
    place = np.arange(new) * step + ((step - 1) / 2 if squares else 0)
    weights = np.zeros((new, size + 2))                     # a pixel before the first and one behind the last, which are left out
    if order == 0:
        weights[np.arange(new), np.floor(place + 0.5).astype(int) + 1] = 1
    else:
        first = np.floor(place).astype(int)
        weights[np.arange(new), first + 1] = 1 - (place - first)
        weights[np.arange(new), np.minimum(first + 2, size + 1)] += place - first
    return weights[:, 1:-1]


def oversample(images: Sequence[np.ndarray], crop_dims: Sequence[int]) -> np.ndarray:
    """Ten crops of each image (height, width, channels): four corners, the centre, and the same mirrored; float32.

    Returns (10 n, *crop_dims, channels).  All images have the size of the first.
    """
    full, size = np.array(images[0].shape[:2]), np.array(crop_dims[:2], int)
    if any(image.shape != images[0].shape for image in images) or (size > full).any():
        raise CaffeValueError(f"crops of {size[0]}x{size[1]} need images of one size, at least as large; they have "
                              f"{', '.join(map(str, sorted({image.shape for image in images})))}")
    bottom, right = full - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    crops = [[image[y:y + size[0], x:x + size[1]] for y, x in corners] for image in images]
    plain = np.array(crops, np.float32)
    return np.stack([plain, plain[:, :, :, ::-1]], 1).reshape(-1, *size, images[0].shape[2])


def _scikit_image() -> Any:
    """scikit-image, or what recipes for pycaffe use of it."""
    try:
        import skimage  # type: ignore[import-not-found, unused-ignore]
        import skimage.io  # type: ignore[import-not-found, unused-ignore]
        import skimage.transform  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return SimpleNamespace(img_as_float=img_as_float, io=SimpleNamespace(imread=imread), transform=SimpleNamespace(resize=resize))
    return skimage


skimage = _scikit_image()
