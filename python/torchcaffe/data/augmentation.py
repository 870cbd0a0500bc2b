"""What a Python layer that reads records has done to its images: more than transform_param can say.

Each image is given a frame, and shown through a window, perhaps mirrored, or in four rotations through a window each; then a mean is
subtracted and divided by a standard deviation per channel.  Windows and mirrors are the transformer's, and drawn as there.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcaffe.data.transformer import Shape, Transformer
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

NOT_MIRRORED = 1.0                              # a draw


class Augmentation:
    """(image - mean) / std in a window of crop x crop pixels of a framed image; made as a Transformer is used.

    told     what the layer says (layers/records.py): of it border, pad, padding, crop, mirror, mean, std and views
    drawn    how many numbers are drawn for an image: its mirror, and top and left of each window
    Windows are random and images mirrored in training alone; otherwise windows are in the centre.
    """
    color: bool | None = None

    def __init__(self, told: Mapping[str, Any], training: bool):
        self.border, self.pad, self.reflects, self.views = told["border"], told["pad"], told["padding"] == "reflect", told["views"]
        self.crop, self.drawn, self._mirrors = told["crop"], 1 + 2 * self.views, told["mirror"] and training
        self._std = torch.tensor(told["std"], dtype=torch.float32)[:, None, None]
        self._window = Transformer(caffe_pb2.TransformationParameter(
            crop_size=self.crop, mirror=self._mirrors and self.views == 1, mean_value=told["mean"]), training)

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """Shape of one image as it is shown; CaffeError where the settings do not fit images of this shape."""
        framed = self._framed_shape(shape)
        if len(self._std) not in (0, 1, framed[0]):
            raise CaffeError(f"{len(self._std)} values of std for images of {framed[0]} channels; write one, or one per channel")
        if self.views > 1 and framed[1] != framed[2]:
            raise CaffeError(f"images of {framed[1]}x{framed[2]} cannot be turned; they must be square")
        return self._window.output_shape(framed)

    def _framed_shape(self, shape: Sequence[int]) -> Shape:
        channels, height, width = shape
        least = min(height, width) - 2 * self.border
        if least < 1 or (self.reflects and self.pad >= least):
            raise CaffeError(f"images of {height}x{width} cannot lose {self.border} pixels on each side and be given {self.pad}")
        return channels, height + 2 * (self.pad - self.border), width + 2 * (self.pad - self.border)

    def __call__(self, images: Tensor | Sequence[Tensor], draws: Tensor) -> Tensor:
        """Show n images (n, channels, height, width): (n * views, ...) float32, the views of an image in a row, each turned by a quarter
        more to the left.

        draws: (drawn, n) numbers in [0, 1) on the device of the images.
        """
        if not isinstance(images, Tensor):
            raise CaffeError("the images of a batch differ in shape; give all images one size")
        self.output_shape(images.shape[1:])
        images = self._framed(images)
        if self.views == 1:
            return self._scaled(self._window(images, draws))
        if self._mirrors:
            images = torch.where(draws[0, :, None, None, None] < 0.5, images.flip(3), images)
        as_they_are = torch.full_like(draws[:1], NOT_MIRRORED)
        shown = [self._window(images.rot90(view, (2, 3)), torch.cat([as_they_are, draws[1 + 2 * view:3 + 2 * view]]))
                 for view in range(self.views)]
        return self._scaled(torch.stack(shown, 1).flatten(0, 1))

    def _framed(self, images: Tensor) -> Tensor:
        """Without the border that the records have, within a new one."""
        if self.border:
            images = images[:, :, self.border:-self.border, self.border:-self.border]
        if not self.reflects:
            return F.pad(images, (self.pad,) * 4) if self.pad else images
        for axis in (2, 3):
            size = images.shape[axis]
            places = torch.arange(-self.pad, size + self.pad, device=images.device).abs()
            images = images.index_select(axis, torch.where(places < size, places, 2 * (size - 1) - places))
        return images

    def _scaled(self, images: Tensor) -> Tensor:
        if len(self._std):
            self._std = self._std.to(images.device)
            images /= self._std
        return images

    def identity(self) -> str:
        """A digest of what happens to an image, whatever is drawn."""
        frame = self.border, self.pad, self.reflects, self.views, self._mirrors, self._std.flatten().tolist()
        return f"{self._window.identity()} {frame}"

    # -- which of all windows and mirrors an image is shown in, where it is shown once --------------------------------------
    def variants(self, shape: Sequence[int]) -> int:
        """In how many ways an image of this shape can come out."""
        return self._window.variants(self._framed_shape(shape))

    def variant(self, draws: Tensor, shape: Sequence[int]) -> Tensor:
        """In which of these ways n images come out with their draws (3, n): (n,) int64."""
        return self._window.variant(draws, self._framed_shape(shape))

    def draws(self, variants: Tensor, shape: Sequence[int]) -> Tensor:
        """Draws (3, n) that lead to these variants (n,)."""
        return self._window.draws(variants, self._framed_shape(shape))
