"""Average pooling to a given size, for maps whose sizes no stock pooling brings together."""
from __future__ import annotations

from typing import Any

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers.common import parse


class AdaptivePooling(caffe.Layer):
    """(N, C, H, W) to (N, C, size, size): pixel i is the mean of rows floor(i H / size) to ceil((i + 1) H / size), columns alike.

    Windows overlap where H is no multiple of size, as in torch's adaptive_avg_pool2d.  param_str: size.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 1 or len(top) != 1:
            raise ValueError("AdaptivePooling needs one bottom and one top")
        self.size = parse(self.param_str, {"size": 0})["size"]
        if self.size < 1:
            raise ValueError("param_str: size must be at least 1")

    def reshape(self, bottom: Any, top: Any) -> None:
        n, c, height, width = bottom[0].shape
        self.rows, self.columns = windows(height, self.size), windows(width, self.size)
        top[0].reshape(n, c, self.size, self.size)

    def forward(self, bottom: Any, top: Any) -> None:
        top[0].data[...] = self.rows @ bottom[0].data @ self.columns.T

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        if propagate_down[0]:
            bottom[0].diff[...] = self.rows.T @ top[0].diff @ self.columns

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors."""
        from torch.nn import functional as F
        return F.adaptive_avg_pool2d(bottoms[0], self.size)


def windows(length: int, size: int) -> np.ndarray:
    """The matrix (size, length) that takes the means."""
    matrix = np.zeros((size, length))
    for i in range(size):
        start, stop = i * length // size, -(-(i + 1) * length // size)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
