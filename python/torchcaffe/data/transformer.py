"""What transform_param does to images: subtract a mean, scale, cut out a window, mirror.  Works on whole batches.

Which windows and mirrors are drawn is decided by the generator that the caller passes in.
"""
from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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
        self.scale = np.float32(param.scale)
        self.color = True if param.force_color else False if param.force_gray else None
        self._mean_file = param.mean_file
        self._mean = np.asarray(read_mean(param.mean_file), np.float32) if param.HasField("mean_file") else None
        if param.mean_value:
            self._mean = np.array(param.mean_value, np.float32)[:, None, None]

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of a transformed image; CaffeError where the image is too small, or the mean does not belong to it."""
        channels, height, width = shape
        if self.crop > min(height, width):
            raise CaffeError(f"crop_size {self.crop} is larger than the images of {height}x{width}")
        if self._mean is not None:
            if self._mean_file and self._mean.shape != shape:
                raise CaffeError(f"the mean file {self._mean_file} is for images of shape {self._mean.shape}, "
                                 f"but the records have {shape}; a mean file has the size before cropping")
            if self._mean.shape[0] not in (1, channels):
                raise CaffeError(f"{self._mean.shape[0]} mean_values for images of {channels} channels; write one, or one per channel")
        return (channels, self.crop, self.crop) if self.crop else shape

    def __call__(self, images: np.ndarray | list[np.ndarray], random: np.random.Generator) -> np.ndarray:
        """Transform n images, (n, channels, height, width) or a list of unequal ones; float32, C-contiguous.

        Three numbers per image are drawn, always: for mirror, top and left.
        """
        draws = random.random((3, len(images)))
        if isinstance(images, np.ndarray):
            return self._batch(images, draws)
        if len({self.output_shape(image.shape) for image in images}) > 1:
            raise CaffeError("the images of a batch differ in shape; set crop_size, or give all images one size")
        return np.concatenate([self._batch(image[None], draws[:, i:i + 1]) for i, image in enumerate(images)])

    def _batch(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        shape, size = images.shape[1:], self.crop
        self.output_shape(shape)
        mean = self._mean
        if size and self.training:
            room = np.array([shape[1] - size + 1, shape[2] - size + 1])
            top, left = (draws[1:] * room[:, None]).astype(np.intp)
            images = _windows(images, size)[np.arange(len(images)), top, left]
            if mean is not None and self._mean_file:
                mean = _windows(mean[None], size)[0][top, left]
        elif size:
            top, left = (shape[1] - size) // 2, (shape[2] - size) // 2
            images = images[:, :, top:top + size, left:left + size]
            if mean is not None and self._mean_file:
                mean = mean[:, top:top + size, left:left + size]
        result = images.astype(np.float32, order="C")
        if mean is not None:
            result -= mean
        if self.scale != 1:
            result *= self.scale
        if self.mirror:
            chosen = draws[0] < 0.5
            result[chosen] = result[chosen][..., ::-1]
        return result


def _windows(images: np.ndarray, size: int) -> np.ndarray:
    """A view (n, top, left, channels, size, size) of all windows of images (n, channels, height, width)."""
    return sliding_window_view(images, (size, size), (2, 3)).transpose(0, 2, 3, 1, 4, 5)
