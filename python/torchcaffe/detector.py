"""Detector: a net that classifies windows of images, as R-CNN does.  Caffe: python/caffe/detector.py.

Where the windows come from is left to the caller: Selective Search, which pycaffe calls in MATLAB, is not here.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchcaffe import io
from torchcaffe.classifier import transformer_of
from torchcaffe.errors import CaffeAssertionError, CaffeError, CaffeImportError
from torchcaffe.net import TEST, Net

Window = Sequence[float]                                    # ymin, xmin, ymax, xmax in pixels, the last two not included


class Detector(Net):
    """A net of phase TEST for windows, which are warped to the net's size, with `context_pad` pixels around them (of the net's).

    The other arguments are what io.Transformer's setters take.  What lies beyond the image is the mean.
    """

    def __init__(self, model_file: str | Path, pretrained_file: str | Path, mean: np.ndarray | None = None,
                 input_scale: float | None = None, raw_scale: float | None = None, channel_swap: Sequence[int] | None = None,
                 context_pad: int | None = None):
        super().__init__(model_file, TEST, weights=pretrained_file)
        self.transformer = transformer_of(self, mean, input_scale, raw_scale, channel_swap)
        self.configure_crop(context_pad)

    def detect_windows(self, images_windows: Iterable[tuple[str | os.PathLike[str], Sequence[Window]]]) -> list[dict[str, Any]]:
        """Predictions for windows of image files: a dict of window, prediction (the net's first output) and filename for each."""
        pairs = [(filename, list(windows)) for filename, windows in images_windows]
        crops = [self.crop(image, window) for filename, windows in pairs for image in [io.load_image(filename)] for window in windows]
        if not crops:
            return []
        name = self.inputs[0]
        found = self.forward_all(None, **{name: np.array([self.transformer.preprocess(name, crop) for crop in crops])})[self.outputs[0]]
        asked = [(window, filename) for filename, windows in pairs for window in windows]
        return [{"window": window, "prediction": row, "filename": filename} for (window, filename), row in zip(asked, found, strict=True)]

    def detect_selective_search(self, image_fnames: Sequence[str]) -> list[dict[str, Any]]:
        """Raises CaffeImportError: pycaffe runs Selective Search in MATLAB here."""
        raise CaffeImportError("Selective Search is MATLAB code and not part of this; "
                               "find the windows by other means and call detect_windows")

    def crop(self, im: np.ndarray, window: Window) -> np.ndarray:
        """The window of an image (height, width, channels), with its context at the net's size if context_pad is set."""
        top, left, bottom, right = (int(edge) for edge in window)
        if not self.context_pad:
            return im[top:bottom, left:right]
        size = self.crop_dims[0]                            # the net's input is a square
        scale = size / (size - 2 * self.context_pad)
        half = np.array([bottom - top + 1, right - left + 1]) / 2
        centre = np.array([top, left]) + half
        first, last = np.round(centre - scale * half), np.round(centre + scale * half)
        per_pixel = size / (last - first + 1)               # of the image, in pixels of the net's input
        pad = np.rint(np.maximum(0, -first) * per_pixel).astype(int)
        first, last = np.clip(first, 0, im.shape[:2]).astype(int), np.clip(last, 0, im.shape[:2]).astype(int)
        inside = np.minimum(np.rint((last - first + 1) * per_pixel).astype(int), size - pad)
        if (last <= first).any() or (inside <= 0).any():
            raise CaffeAssertionError(f"the window {tuple(window)} lies outside of its image of {im.shape[0]}x{im.shape[1]} pixels")
        crop = np.array(self.crop_mean)
        crop[pad[0]:pad[0] + inside[0], pad[1]:pad[1] + inside[1]] = io.resize_image(im[first[0]:last[0], first[1]:last[1]], inside)
        return crop

    def configure_crop(self, context_pad: int | None) -> None:
        """Set the context, and what fills it beyond the image: the mean, or zeros."""
        name = self.inputs[0]
        channels, height, width = self.blobs[name].shape[1:]
        if context_pad and not (height == width > 2 * context_pad):
            raise CaffeError(f"context_pad {context_pad} takes a square input of more than {2 * context_pad} pixels, not {height}x{width}")
        self.crop_dims, self.context_pad = np.array([height, width, channels]), context_pad
        self.crop_mean = np.zeros(self.crop_dims, np.float32)
        mean = self.transformer.mean.get(name)
        if context_pad and mean is not None:
            if name in self.transformer.channel_swap:
                mean = mean[np.argsort(self.transformer.channel_swap[name])]
            self.crop_mean += mean.transpose(1, 2, 0) / self.transformer.raw_scale.get(name, 1)
