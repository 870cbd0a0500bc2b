"""The loss of hint training."""
from __future__ import annotations

from typing import Any

import caffe  # type: ignore[import-not-found]
import numpy as np


class HintLoss(caffe.Layer):
    """sum((G - H)^2) / (2 N) for the guided layer G and the hint H, both (N, C, H, W) (Bae et al. 2019, equations 1 and 3 to 6).

    A sum over features and a mean over the batch, as Caffe's EuclideanLoss, not a mean over elements: the gradient grows with the
    feature map, which is why hint training uses a rate of 1e-4.  One top of one element; write its loss_weight.
    Raises ValueError where the shapes differ.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 2 or len(top) != 1:
            raise ValueError("HintLoss needs two bottoms (guided layer, hint layer) and one top")

    def reshape(self, bottom: Any, top: Any) -> None:
        guided, hint = (tuple(bottom[i].shape) for i in range(2))
        if guided != hint:
            raise ValueError(f"HintLoss: the guided layer {guided} and the hint layer {hint} differ in shape")
        top[0].reshape(1)

    def forward(self, bottom: Any, top: Any) -> None:
        difference = bottom[0].data - bottom[1].data
        top[0].data[...] = np.square(difference).sum() / (2 * len(difference))

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        gradient = (bottom[0].data - bottom[1].data) * (top[0].diff.reshape(-1)[0] / len(bottom[0].data))
        for i, sign in enumerate((1, -1)):
            if propagate_down[i]:
                bottom[i].diff[...] = sign * gradient

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors."""
        guided, hint = bottoms
        return ((guided - hint).square().sum() / (2 * len(guided))).reshape(1)
