"""What transform_param does to images: subtract a mean, scale, cut out a window, mirror.  Works on whole batches, on any device.

Which windows and mirrors are drawn is decided by the numbers that the caller passes in.
"""
from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from math import prod

import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.formats import read_mean
from torchcaffe.proto import caffe_pb2

Shape = tuple[int, ...]


class Transformer:
    """(image - mean) * scale in a window of crop_size, perhaps mirrored.  Caffe: data_transformer.cpp.

    The window is random in training, in the centre otherwise (offset (size - crop_size) / 2, rounded down); mirror acts in
    both.  A mean file has the size of the image before cutting; each pixel loses the mean of the place it came from.
    """

    def __init__(self, param: caffe_pb2.TransformationParameter, training: bool):
        if param.HasField("mean_file") and param.mean_value:
            raise CaffeError("transform_param has both mean_file and mean_value; leave one away")
        if param.force_color and param.force_gray:
            raise CaffeError("transform_param has both force_color and force_gray; leave one away")
        self.crop, self.mirror, self.training = param.crop_size, param.mirror, training
        self.scale = param.scale
        self.color = True if param.force_color else False if param.force_gray else None
        self._mean_file = param.mean_file
        self._mean = torch.as_tensor(read_mean(param.mean_file), dtype=torch.float32) if param.HasField("mean_file") else None
        if param.mean_value:
            self._mean = torch.tensor(list(param.mean_value), dtype=torch.float32)[:, None, None]

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """Shape of a transformed image; CaffeError where the image is too small, or the mean does not belong to it."""
        channels, height, width = shape
        if self.crop > min(height, width):
            raise CaffeError(f"crop_size {self.crop} is larger than the images of {height}x{width}")
        if self._mean is not None:
            if self._mean_file and self._mean.shape != (channels, height, width):
                raise CaffeError(f"the mean file {self._mean_file} is for images of shape {tuple(self._mean.shape)}, "
                                 f"but the records have {(channels, height, width)}; a mean file has the size before cropping")
            if self._mean.shape[0] not in (1, channels):
                raise CaffeError(f"{self._mean.shape[0]} mean_values for images of {channels} channels; write one, or one per channel")
        return (channels, self.crop, self.crop) if self.crop else (channels, height, width)

    def __call__(self, images: Tensor | Sequence[Tensor], draws: Tensor) -> Tensor:
        """Transform n images, (n, channels, height, width) or a list of unequal ones; float32, C-contiguous.

        draws: (3, n) numbers in [0, 1) on the device of the images, for mirror, top and left.
        """
        if isinstance(images, Tensor):
            return self._batch(images, draws)
        if len({self.output_shape(image.shape) for image in images}) > 1:
            raise CaffeError("the images of a batch differ in shape; set crop_size, or give all images one size")
        return torch.cat([self._batch(image[None], draws[:, i:i + 1]) for i, image in enumerate(images)])

    def _batch(self, images: Tensor, draws: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        _, high, wide = self.output_shape(images.shape[1:])
        mean = None
        if self._mean is not None:
            mean = self._mean = self._mean.to(images.device)
        if self.mirror or (self.crop and self.training):
            places = self._places(draws, height, width, high, wide).expand(-1, channels, -1)
            if mean is not None and self._mean_file:
                images, mean = images - mean, None           # before the window is cut, so that it is cut out of one and not of both
            images = images.reshape(count, channels, -1).gather(2, places)
        else:
            top, left = (height - high) // 2, (width - wide) // 2
            images = images[:, :, top:top + high, left:left + wide]
            if mean is not None and self._mean_file:
                mean = mean[:, top:top + high, left:left + wide]
        result = images.reshape(count, channels, high, wide).to(torch.float32, copy=True)
        if mean is not None:
            result -= mean
        if self.scale != 1:
            result *= self.scale
        return result

    def identity(self) -> str:
        """A digest of what happens to an image, whatever is drawn."""
        mean = b"" if self._mean is None else f"{self._mean.shape} {bool(self._mean_file)}".encode() + self._mean.cpu().numpy().tobytes()
        return sha256(repr((self.crop, self.mirror, self.training, self.scale, self.color)).encode() + mean).hexdigest()

    # -- which of all windows and mirrors an image is shown in ---------------------------------------------------------
    def _rooms(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """How many tops, lefts and mirrors there are to draw from for images of this shape."""
        _, height, width = shape
        cuts = bool(self.crop) and self.training
        return (height - self.crop + 1 if cuts else 1), (width - self.crop + 1 if cuts else 1), 2 if self.mirror else 1

    def variants(self, shape: Sequence[int]) -> int:
        """In how many ways an image of this shape can come out."""
        return prod(self._rooms(shape))

    def variant(self, draws: Tensor, shape: Sequence[int]) -> Tensor:
        """In which of these ways n images come out with their draws (3, n): (n,) int64."""
        high, wide, mirrors = self._rooms(shape)
        windows = (draws[1] * high).long() * wide + (draws[2] * wide).long()
        return windows * mirrors + (draws[0] < 0.5) if mirrors > 1 else windows

    def draws(self, variants: Tensor, shape: Sequence[int]) -> Tensor:
        """Draws (3, n) that lead to these variants (n,)."""
        high, wide, mirrors = self._rooms(shape)
        windows = variants.div(mirrors, rounding_mode="floor")
        mirrored, top, left = variants % mirrors, windows.div(wide, rounding_mode="floor"), windows % wide
        return torch.stack([torch.where(mirrored == 1, 0.25, 0.75), (top + 0.5) / high, (left + 0.5) / wide])

    def _places(self, draws: Tensor, height: int, width: int, high: int, wide: int) -> Tensor:
        """Which pixel of an image, row by row, comes where in its window: (n, 1, high * wide)."""
        rows, columns = torch.arange(high, device=draws.device), torch.arange(wide, device=draws.device)[None]
        top: Tensor | int = (height - high) // 2
        left: Tensor | int = (width - wide) // 2
        if self.crop and self.training:
            top, left = ((draw * room).long()[:, None] for draw, room in zip(draws[1:], (height - high + 1, width - wide + 1), strict=True))
        if self.mirror:
            columns = torch.where(draws[0, :, None] < 0.5, wide - 1 - columns, columns)
        return ((rows + top) * width)[..., :, None].add((columns + left)[..., None, :]).reshape(-1, 1, prod((high, wide)))
