"""Small LMDBs of Datum messages, and nets that read them, for tests."""
from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np

import torchcaffe as caffe
from torchcaffe.io import array_to_datum
from torchcaffe.proto import caffe_pb2


def write(folder: Path, records: dict[bytes, bytes]) -> Path:
    """An LMDB with exactly these keys and values."""
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    return folder


def write_images(folder: Path, images: list[np.ndarray] | np.ndarray, labels: list[int] | None = None) -> Path:
    """An LMDB of raw Datums under padded keys; labels count up unless given."""
    labels = list(range(len(images))) if labels is None else labels
    return write(folder, {b"%06d" % i: array_to_datum(image, label).SerializeToString()
                          for i, (image, label) in enumerate(zip(images, labels, strict=True))})


def numbered(count: int, height: int = 12, width: int = 12) -> np.ndarray:
    """Images of two channels: channel 0 numbers the pixels of a row-major image, channel 1 the image."""
    images = np.empty((count, 2, height, width), np.uint8)
    images[:, 0] = np.arange(height * width).reshape(height, width)
    images[:, 1] = np.arange(count)[:, None, None]
    return images


def data_layer(source: Path, batch: int, transform: str = "", name: str = "data", backend: str = "LMDB") -> str:
    return (f'layer {{ name: "{name}" type: "Data" top: "{name}" top: "{name}_label" transform_param {{ {transform} }} '
            f'data_param {{ source: "{source}" batch_size: {batch} backend: {backend} }} }}\n')


def net(folder: Path, text: str, phase: int = caffe_pb2.TRAIN, seed: int = 1) -> caffe.Net:
    """A net of this text, with seeded draws."""
    path = folder / "net.prototxt"
    path.write_text(text)
    caffe.set_random_seed(seed)
    return caffe.Net(str(path), phase)


def batches(net: caffe.Net, count: int, blob: str = "data") -> np.ndarray:
    """The blob after each of `count` forward passes."""
    result = []
    for _ in range(count):
        net.forward()
        result.append(net.blobs[blob].data.copy())
    return np.array(result)
