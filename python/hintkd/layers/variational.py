"""The loss of variational information distillation."""
from __future__ import annotations

from math import exp, log
from typing import Any, ClassVar

import numpy as np

from hintkd.layers.pair_loss import PairLoss


class VariationalLoss(PairLoss):
    """mean of ((mu - t)^2 / v + log v) / 2 over all elements, v = log(1 + e^rho) + eps per channel (Ahn et al. 2019).

    Bottoms (N, C, H, W): mu, made by a regressor of stock layers from the student's map, and the teacher's map.  One blob of its own,
    rho (C), which learns and decays as weights do; at first v is `variance`.
    param_str: variance 5, eps 1e-5.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"variance": 5.0, "eps": 1e-5}

    def setup(self, bottom: Any, top: Any) -> None:
        super().setup(bottom, top)
        self.blobs.add_blob(bottom[1].shape[1])
        self.blobs[0].data[...] = log(exp(self.p["variance"] - self.p["eps"]) - 1)

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        rho = np.array(self.blobs[0].data).reshape(1, -1, *[1] * (s.ndim - 2))
        v = np.logaddexp(0, rho) + self.p["eps"]
        away = s - t
        dv = (1 / v - np.square(away) / v ** 2) / (2 * s.size)
        self.drho = dv.sum(axis=(0, *range(2, s.ndim))) / (1 + np.exp(-rho.reshape(-1)))
        return ((np.square(away) / v + np.log(v)) / 2).mean(), away / v / s.size

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        super().backward(top, propagate_down, bottom)
        self.blobs[0].diff[...] += self.drho * top[0].diff.reshape(-1)[0]

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        from torch.nn import functional as F
        mu, t = bottoms[0], bottoms[1].detach()
        v = F.softplus(blobs[0]).reshape(1, -1, *[1] * (mu.dim() - 2)) + self.p["eps"]
        return (((mu - t).square() / v).mean() / 2 + v.log().mean() / 2).reshape(1)
