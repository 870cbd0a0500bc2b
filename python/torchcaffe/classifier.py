"""Classifier: a net that takes images as they come and gives class probabilities.  Caffe: python/caffe/classifier.py."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchcaffe import io
from torchcaffe.net import TEST, Net


class Classifier(Net):
    """A net of phase TEST whose images are scaled to `image_dims` (the net's size by default) and then cropped to the net's size.

    `mean`, `input_scale`, `raw_scale` and `channel_swap` are what io.Transformer's setters take.  Raises CaffeError as Net does.
    """

    def __init__(self, model_file: str | Path, pretrained_file: str | Path, image_dims: Sequence[int] | None = None,
                 mean: np.ndarray | None = None, input_scale: float | None = None, raw_scale: float | None = None,
                 channel_swap: Sequence[int] | None = None):
        super().__init__(model_file, TEST, weights=pretrained_file)
        self.transformer = transformer_of(self, mean, input_scale, raw_scale, channel_swap)
        self.crop_dims = self.blobs[self.inputs[0]].shape[2:]
        self.image_dims = self.crop_dims if image_dims is None else tuple(int(size) for size in image_dims)

    def predict(self, inputs: Sequence[np.ndarray], oversample: bool = True) -> np.ndarray:
        """Probabilities (n, classes) of n images (height, width, channels), as load_image gives them.

        With `oversample` they are the mean over four corners, the centre and their mirrors; else those of the centre.
        """
        images = [io.resize_image(image, self.image_dims) for image in inputs]
        if oversample:
            crops = io.oversample(images, self.crop_dims)
        else:
            top, left = ((full - size) // 2 for full, size in zip(self.image_dims, self.crop_dims, strict=True))
            crops = np.array(images)[:, top:top + self.crop_dims[0], left:left + self.crop_dims[1]]
        name = self.inputs[0]
        found = self.forward_all(None, **{name: np.array([self.transformer.preprocess(name, crop) for crop in crops])})[self.outputs[0]]
        return found.reshape(len(images), 10, -1).mean(1) if oversample else found


def transformer_of(net: Net, mean: np.ndarray | None, input_scale: float | None, raw_scale: float | None,
                   channel_swap: Sequence[int] | None) -> io.Transformer:
    """A Transformer for the net's first input, for images with the channels last."""
    name = net.inputs[0]
    transformer = io.Transformer({name: net.blobs[name].shape})
    transformer.set_transpose(name, (2, 0, 1))
    if mean is not None:
        transformer.set_mean(name, mean)
    if input_scale is not None:
        transformer.set_input_scale(name, input_scale)
    if raw_scale is not None:
        transformer.set_raw_scale(name, raw_scale)
    if channel_swap is not None:
        transformer.set_channel_swap(name, channel_swap)
    return transformer
