"""WindowData: windows of images, some on objects and some on background, cut out and warped to one size (R-CNN's training data)."""
from __future__ import annotations

from math import copysign, floor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from torchcaffe.data.images import read_file, resize
from torchcaffe.errors import CaffeError
from torchcaffe.files import read_text
from torchcaffe.formats import read_mean
from torchcaffe.glog import warning
from torchcaffe.layers.base import Shape, layer
from torchcaffe.layers.data import Source

IMAGE, LABEL, X1, Y1, X2, Y2 = range(6)


class WindowFile(NamedTuple):
    """What a window file lists; both kinds of windows are rows (image, label, x1, y1, x2, y2)."""
    images: list[str]
    objects: np.ndarray
    background: np.ndarray


class Placement(NamedTuple):
    """Where a window is in its image, the size it is warped to, and where that is put in the crop."""
    x1: int
    y1: int
    x2: int
    y2: int
    height: int
    width: int
    top: int
    left: int
    right: int


def read_windows(path: str, fg_threshold: float, bg_threshold: float) -> WindowFile:
    """A window file: for each image, each on a line, `# index`, path, channels, height, width, number of windows, and the windows
    `label overlap x1 y1 x2 y2`.  Overlap of at least fg_threshold makes an object, less than bg_threshold background (label 0).
    """
    try:
        lines = [line for line in read_text(path, "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise CaffeError(f"cannot read the window file {path} ({error.strerror or error})") from None
    images: list[str] = []
    parts, at = [np.zeros((0, 7))], 0
    try:
        while at < len(lines):
            mark, index = lines[at].split()
            channels, _, _, count = (int(line) for line in lines[at + 2:at + 6])
            if (mark, int(index), channels) != ("#", len(images), 3) or count < 0:
                raise ValueError
            images.append(lines[at + 1].strip())
            windows = np.array(" ".join(lines[at + 6:at + 6 + count]).split(), float).reshape(count, 6)
            parts.append(np.column_stack([np.full(count, len(images) - 1.0), windows]))
            at += 6 + count
    except ValueError:
        raise CaffeError(f"{path}: image {len(images)} is not written as `# {len(images)}`, path, 3, height, width, number of windows, "
                         "and `label overlap x1 y1 x2 y2` for each window, all on lines of their own") from None
    windows = np.concatenate(parts)
    overlap, windows = windows[:, 2].astype(np.float32), np.delete(windows, 2, axis=1).astype(np.int64)
    objects = windows[overlap >= np.float32(fg_threshold)]
    background = windows[(overlap < np.float32(fg_threshold)) & (overlap < np.float32(bg_threshold))]
    background[:, LABEL] = 0
    if (objects[:, LABEL] <= 0).any():
        raise CaffeError(f"{path}: a window with an overlap of at least fg_threshold {fg_threshold:g} has label "
                         f"{objects[:, LABEL].min()}; labels of objects begin at 1, 0 is the background")
    return WindowFile(images, objects, background)


def place(window: np.ndarray, height: int, width: int, crop: int, context_pad: int, square: bool) -> Placement:
    """How a window of an image of height x width gets into a crop of crop x crop with context_pad pixels around it.

    The window grows by the context (and to a square); what of it lies outside of the image stays empty.  In float32, as Caffe does.
    """
    x1, y1, x2, y2 = (int(v) for v in window[X1:])
    if not context_pad and not square:
        return Placement(x1, y1, x2, y2, crop, crop, 0, 0, 0)
    scale = np.float32(crop) / np.float32(crop - 2 * context_pad)
    half_h, half_w = np.float32((y2 - y1 + 1) / 2), np.float32((x2 - x1 + 1) / 2)
    center_x, center_y = np.float32(x1) + half_w, np.float32(y1) + half_h
    if square:
        half_h = half_w = max(half_h, half_w)
    x1, x2 = _round(center_x - half_w * scale), _round(center_x + half_w * scale)
    y1, y2 = _round(center_y - half_h * scale), _round(center_y + half_h * scale)
    scale_x, scale_y = np.float32(crop) / np.float32(x2 - x1 + 1), np.float32(crop) / np.float32(y2 - y1 + 1)
    left, top, right, bottom = max(0, -x1), max(0, -y1), max(0, x2 - width + 1), max(0, y2 - height + 1)
    x1, y1, x2, y2 = x1 + left, y1 + top, x2 - right, y2 - bottom
    left, right, top = _round(left * scale_x), _round(right * scale_x), _round(top * scale_y)
    return Placement(x1, y1, x2, y2, _round((y2 - y1 + 1) * scale_y), _round((x2 - x1 + 1) * scale_x), top, left, right)


def _round(value: np.floating) -> int:
    """C's round: halves go away from zero."""
    return int(copysign(floor(abs(float(value)) + 0.5), float(value)))


@layer("WindowData")
class WindowData(Source):
    """Windows drawn anew for each batch: the last fg_fraction of it objects, the others background.

    Tops: (batch_size, 3, crop_size, crop_size), and labels (batch_size,).  crop_size, mirror and the mean are transform_param's, scale
    is window_data_param's (Caffe does not read the other).  A mean file is used from its centre.  cache_images has no effect.
    Caffe: window_data_layer.cpp.
    """

    tops = 2

    def setup(self) -> None:
        param, transform = self.param.window_data_param, self.param.transform_param
        self.batch, self.crop = param.batch_size, transform.crop_size
        self.require(param.source, "window_data_param has no source")
        self.require(self.batch > 0, "window_data_param has no batch_size")
        self.require(self.crop > 0, "transform_param has no crop_size, the size that windows are warped to")
        self.require(2 * param.context_pad < self.crop, f"context_pad {param.context_pad} leaves nothing of crop_size {self.crop}")
        self.require(0 <= param.fg_fraction <= 1, f"fg_fraction is {param.fg_fraction:g}; it is between 0 and 1")
        if transform.scale != 1:
            warning(f"layer '{self.name}' (WindowData): Caffe ignores transform_param's scale here; write it in window_data_param")
        with self.naming_errors():
            self.windows = read_windows(param.source, param.fg_threshold, param.bg_threshold)
        self.objects = int(np.float32(self.batch) * np.float32(param.fg_fraction))
        for what, wanted, found in (("objects", self.objects, self.windows.objects),
                                    ("background", self.batch - self.objects, self.windows.background)):
            self.require(len(found) or not wanted, f"{wanted} windows of each batch are {what}, but {param.source} has none")
        self.mean = self._mean()

    def _mean(self) -> np.ndarray:
        """What is subtracted from a crop, (3, crop, crop)."""
        transform = self.param.transform_param
        mean = np.zeros((3, self.crop, self.crop), np.float32)
        self.require(not (transform.HasField("mean_file") and transform.mean_value), "write mean_file or mean_value, not both")
        if transform.mean_value:
            self.require(len(transform.mean_value) in (1, 3), f"{len(transform.mean_value)} mean_values; write 1 or 3")
            mean += np.array(transform.mean_value, np.float32)[:, None, None]
        if transform.HasField("mean_file"):
            with self.naming_errors():
                whole = read_mean(transform.mean_file)
            offset = (whole.shape[2] - self.crop) // 2
            mean = whole[:, offset:offset + self.crop, offset:offset + self.crop].astype(np.float32)
            self.require(offset >= 0 and mean.shape == (3, self.crop, self.crop),
                         f"the mean file {transform.mean_file} has shape {whole.shape}; 3 channels of at least crop_size are needed")
        return mean

    def top_shapes(self) -> list[Shape]:
        return [(self.batch, 3, self.crop, self.crop), (self.batch,)]

    def forward(self) -> list[Tensor]:
        random = self.context.streams.numpy("windows", self.name, self.cursor)
        self.cursor += 1
        pixels, labels = np.zeros(self.top_shapes()[0], np.float32), np.empty(self.batch, np.float32)
        with self.naming_errors():
            for item in range(self.batch):
                windows = self.windows.objects if item >= self.batch - self.objects else self.windows.background
                window = windows[random.integers(len(windows))]
                mirrored = self.param.transform_param.mirror and random.random() < 0.5
                self._cut(window, mirrored, pixels[item])
                labels[item] = window[LABEL]
        return [self.tensor(pixels), self.tensor(labels)]

    def _cut(self, window: np.ndarray, mirrored: bool, crop: np.ndarray) -> None:
        """Put a window, warped, less the mean and scaled, into `crop`, which is zero."""
        param = self.param.window_data_param
        path = param.root_folder + self.windows.images[window[IMAGE]]
        image = read_file(path)
        _, height, width = image.shape
        at = place(window, height, width, self.crop, param.context_pad, param.crop_mode == "square")
        if not (0 <= at.x1 <= at.x2 < width and 0 <= at.y1 <= at.y2 < height):
            raise CaffeError(f"{param.source} has the window {window[X1:].tolist()} in {path}, which has only {width} x {height} pixels")
        left = at.right if mirrored else at.left
        rows, columns = min(at.height, self.crop - at.top), min(at.width, self.crop - left)
        if rows <= 0 or columns <= 0:
            raise CaffeError(f"of the window {window[X1:].tolist()} in {path}, context included, nothing is left after warping")
        patch = resize(image[:, at.y1:at.y2 + 1, at.x1:at.x2 + 1], rows, columns)
        if mirrored:
            patch = patch[:, :, ::-1]
        area = np.s_[:, at.top:at.top + rows, left:left + columns]
        crop[area] = (patch - self.mean[area]) * np.float32(param.scale)
