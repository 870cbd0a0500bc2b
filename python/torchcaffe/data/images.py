"""Images by position: decoded on first use and kept, and image files read and resized as Caffe has OpenCV do it.

Where the images are (a database, a list of files) is the business of whoever hands over the function that reads one.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torchcaffe.data import datum
from torchcaffe.errors import CaffeError
from torchcaffe.files import read_bytes, read_text

KEEP_BYTES = 2 * 2**30
FIXED = 2048                                    # one, in the fixed-point weights of OpenCV's bilinear resize


class Images:
    """`count` images and their labels; read_one(position) gives one of each.  `shape` is that of the first image.

    Images are kept as long as all have one shape and fit KEEP_BYTES; a set that does not fit is decoded again for every batch.
    """

    def __init__(self, count: int, read_one: Callable[[int], tuple[np.ndarray, int]]):
        self.count, self._read_one = count, read_one
        first, _ = read_one(0)
        self.shape = first.shape
        self._kept: np.ndarray | None = None
        if first.dtype == np.uint8 and first.size * count <= KEEP_BYTES:
            self._kept = np.empty((count, *self.shape), np.uint8)
        self._labels = np.empty(count, np.int32)
        self._known = np.zeros(count, bool)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray | list[np.ndarray], np.ndarray]:
        """Images and int32 labels at `positions`: one (n, channels, height, width) array, or a list where shapes or types differ."""
        if self._keep(positions):
            assert self._kept is not None
            return self._kept[positions], self._labels[positions]
        images, labels = zip(*(self._read_one(i) for i in positions.tolist()), strict=True)
        alike = len({(image.shape, image.dtype) for image in images}) == 1
        return np.stack(images) if alike else list(images), np.array(labels, np.int32)

    def _keep(self, positions: np.ndarray) -> bool:
        """Decode what is not known yet; False, for good, once an image is met that does not fit the array."""
        if self._kept is None:
            return False
        for i in positions[~self._known[positions]].tolist():
            image, self._labels[i] = self._read_one(i)
            if image.shape != self.shape or image.dtype != np.uint8:
                self._kept = None
                return False
            self._kept[i] = image
            self._known[i] = True
        return True


def read_list(path: str) -> list[tuple[str, int]]:
    """(file name, label) of each line of a list of images; names may hold blanks.  Raises CaffeError naming file and line.

    Caffe: image_data_layer.cpp, convert_imageset.cpp.
    """
    try:
        lines = read_text(path, "surrogateescape").splitlines()
    except OSError as error:
        raise CaffeError(f"cannot read the list of images {path} ({error.strerror or error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        if not line.strip():
            continue
        try:
            found.append((name, int(label)))
        except ValueError:
            name = ""
        if not name:
            raise CaffeError(f"{path}:{number}: a line of a list of images is a file name, a blank and a whole number, not {line[:80]!r}")
    if not found:
        raise CaffeError(f"{path} lists no images; write a file name and a label per line")
    return found


def read_file(path: str, color: bool = True, height: int = 0, width: int = 0) -> np.ndarray:
    """The image in a file, uint8 (3, height, width) as blue, green, red, or (1, height, width); resized where both sizes are given.

    Caffe: io.cpp (ReadImageToCVMat).
    """
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise CaffeError(f"cannot read the image {path} ({getattr(error, 'strerror', None) or error})") from None
    image = datum.decode(data, path, color)
    return resize(image, height, width) if height and width else image


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image (channels, h, w) of bytes as cv::resize makes it with INTER_LINEAR, in the same fixed-point arithmetic."""
    y0, y1, top, bottom = _bilinear(image.shape[1], height)
    x0, x1, left, right = _bilinear(image.shape[2], width)
    rows = (image[:, :, x0] * left + image[:, :, x1] * right) >> 4
    result = (top[:, None] * rows[:, y0] >> 16) + (bottom[:, None] * rows[:, y1] >> 16)
    return ((result + 2) >> 2).astype(np.uint8)


def _bilinear(size: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places along an axis: its two neighbours among `size` pixels, and their weights, which add up to FIXED."""
    place = ((np.arange(new) + 0.5) * (size / new) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    part = (place - first).astype(np.float32)
    part[(first < 0) | (first >= size - 1)] = 0
    first = np.clip(first, 0, size - 1)
    near, far = (np.rint(weight * FIXED).astype(np.int64) for weight in (1 - part, part))
    return first, np.minimum(first + 1, size - 1), near, far
