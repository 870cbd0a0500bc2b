"""The loss of the overhaul of feature distillation: a partial distance to a teacher's features behind a margin ReLU."""
from __future__ import annotations

from math import erf, exp, pi, sqrt
from typing import Any

import numpy as np

from hintkd.layers.pair_loss import PairLoss


class MarginLoss(PairLoss):
    """Sum over all elements of (s - t')^2 where s > t' or t' > 0, divided by N; t' = max(t, margin of the channel) (Heo et al. 2019b).

    Bottoms (N, C, H, W): the student's connector and the teacher's feature before ReLU.  Two blobs (C), gamma and beta of the BatchNorm
    that the teacher's feature comes from, of which `margins` makes the margins: they are its Scale layer's parameters, shared by their
    names, and never learn (`param { name: "..." lr_mult: 0 decay_mult: 0 }` twice).  In the sources each map's loss has the weight
    1 / (1000 * 2^(L - l)), l = 1 .. L.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        super().setup(bottom, top)
        for _ in range(2):
            self.blobs.add_blob(bottom[1].shape[1])
        self.known: Any = None

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        gamma, beta = (np.array(blob.data) for blob in self.blobs)
        if self.known is None or not (np.array_equal(gamma, self.known[0]) and np.array_equal(beta, self.known[1])):
            self.known = gamma, beta, margins(gamma, beta).astype(gamma.dtype)
        t = np.maximum(t, self.known[2].reshape(1, -1, *[1] * (t.ndim - 2)))
        away = np.where((s > t) | (t > 0), s - t, 0)
        return np.square(away).sum() / len(s), 2 * away / len(s)

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        import torch
        s, t = bottoms[0], bottoms[1].detach()
        t = torch.maximum(t, margins_torch(*(blob.detach() for blob in blobs)).reshape(1, -1, *[1] * (t.dim() - 2)))
        return (((s - t) * ((s > t) | (t > 0))).square().sum() / len(s)).reshape(1)


def margins(gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Per channel the mean of what a BatchNorm with scale gamma and shift beta gives below 0, if it is Gaussian; -3 |gamma| in rare tails.

    m = beta - s phi(beta / s) / Phi(-beta / s), s = |gamma|; -3 s where Phi <= 0.001.  A gamma of 0 has no Gaussian: the margin is
    min(beta, 0) there, the limit, where the sources divide by zero.
    """
    result = np.empty(len(gamma))
    for channel, (g, b) in enumerate(zip(np.asarray(gamma, float), np.asarray(beta, float))):
        s = abs(g)
        if s == 0:
            result[channel] = min(b, 0.0)
            continue
        below = 0.5 * (1 + erf(-b / s / sqrt(2)))
        result[channel] = b - s * exp(-(b / s) ** 2 / 2) / sqrt(2 * pi) / below if below > 0.001 else -3 * s
    return result


def margins_torch(gamma: Any, beta: Any) -> Any:
    """The same of tensors, in float64 on the way."""
    import torch
    s, b = gamma.double().abs(), beta.double()
    ratio = b / torch.where(s > 0, s, 1)
    below = torch.special.ndtr(-ratio)
    mean = b - s * torch.exp(-ratio.square() / 2) / (2 * pi) ** 0.5 / torch.where(below > 0.001, below, 1)
    return torch.where(s > 0, torch.where(below > 0.001, mean, -3 * s), b.clamp(max=0)).to(gamma.dtype)
