"""Datum messages: images with a label, raw or encoded.  Reading them from a database is lmdb_reader.py's work."""
from __future__ import annotations

import io
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from torchcaffe.errors import CaffeError
from torchcaffe.extras import how_to_get
from torchcaffe.proto import caffe_pb2


def parse(record: bytes, where: str) -> caffe_pb2.Datum:
    """The message in `record`; `where` names the record in the CaffeError that other bytes raise."""
    try:
        return caffe_pb2.Datum.FromString(record)
    except DecodeError:
        raise CaffeError(f"{where} is not a Datum message; write the database again") from None


def image(datum: caffe_pb2.Datum, where: str, color: bool | None = None) -> np.ndarray:
    """The image as (channels, height, width): uint8, or float32 where the Datum holds float_data.

    Encoded colour images come as blue, green, red, as Caffe decodes them.  `color` True or False turns an encoded image into
    three channels or one; None leaves it as it was stored.  Raises CaffeError for data that are not what the Datum says.
    Caffe: data_transformer.cpp, io.cpp (DecodeDatumToCVMat).
    """
    if datum.encoded:
        return decode(datum.data, where, color)
    shape = datum.channels, datum.height, datum.width
    data = np.frombuffer(datum.data, np.uint8) if datum.data else np.array(datum.float_data, np.float32)
    if min(shape) <= 0 or data.size != shape[0] * shape[1] * shape[2]:
        raise CaffeError(f"{where} holds {data.size} values for {shape[0]} channels of {shape[1]}x{shape[2]}; write the database again")
    return data.reshape(shape)


def pillow(action: str) -> Any:
    """Pillow's module Image; where it is not installed a CaffeError says what `action` takes."""
    try:
        from PIL import Image
    except ImportError:
        raise CaffeError(f"{action} takes Pillow: {how_to_get('images')}") from None
    return Image


def decode(data: bytes, where: str, color: bool | None) -> np.ndarray:
    """An encoded image as Caffe's OpenCV decodes it, up to a rounding of 1 where colour becomes gray; arguments and axes as in image()."""
    Image = pillow(f"{where} holds an encoded image; decoding it")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            if color is not None:
                wanted = "RGB" if color else "L"
            else:
                wanted = {"1": "L", "L": "L", "LA": "RGBA", "PA": "RGBA", "RGBA": "RGBA"}.get(mode, "RGB")
            pixels = np.asarray(picture.convert(wanted))
    except Exception as error:  # noqa: BLE001    Pillow raises a dozen types on damaged images
        raise CaffeError(f"{where} is encoded, but not as an image that can be decoded ({error}); write it again") from None
    if mode[0] in "IF":
        raise CaffeError(f"{where} holds an image of more than 8 bits per channel; write it with 8 bits")
    if pixels.ndim == 2:
        return pixels[None]
    order = [2, 1, 0, 3][:pixels.shape[2]]
    return np.ascontiguousarray(pixels[:, :, order].transpose(2, 0, 1))


def encode(image: np.ndarray, kind: str, quality: int) -> bytes:
    """A uint8 image, (1, height, width) or (3, height, width) as blue, green, red, encoded as `kind`, which is a file name's extension.

    `quality` is for kinds that lose something (JPEG: 1 to 100).  Raises CaffeError for an unknown kind.
    """
    Image = pillow("encoding images")
    name = Image.registered_extensions().get(f".{kind}")
    if name not in Image.SAVE:
        raise CaffeError(f"images cannot be encoded as '{kind}'; png and jpg are usual")
    picture = Image.fromarray(image[0] if len(image) == 1 else image[::-1].transpose(1, 2, 0))
    file = io.BytesIO()
    picture.save(file, name, quality=quality)
    return file.getvalue()
