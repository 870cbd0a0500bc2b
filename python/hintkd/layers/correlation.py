"""The loss of probabilistic knowledge transfer."""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hintkd.layers.pair_loss import PairLoss


class ProbabilisticLoss(PairLoss):
    """mean over N x N of p_t log((p_t + eps) / (p_s + eps)), p the rows of (u u' + 1) / 2 divided by their sum (Passalis and Tefas 2018).

    u are the rows of a feature (N, everything else) divided by their length plus eps.  A row of zeros has u = 0; its gradient is that
    of u / eps, where the sources' own is not a number.
    param_str: eps 1e-7.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"eps": 1e-7}

    def check(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        """Any two shapes of one batch size will do."""

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        eps, n = self.p["eps"], len(s)
        f = s.reshape(n, -1)
        u, length = self._unit(f)
        p, total = self._probabilities(u)
        q, _ = self._probabilities(self._unit(t.reshape(n, -1))[0])
        dp = -q / (p + eps) / n ** 2
        dsimilar = (dp - (dp * p).sum(1, keepdims=True)) / total / 2
        du = (dsimilar + dsimilar.T) @ u
        along = np.divide((du * f).sum(1, keepdims=True), length * (length + eps) ** 2, out=np.zeros_like(length), where=length > 0)
        return (q * np.log((q + eps) / (p + eps))).sum() / n ** 2, du / (length + eps) - f * along

    def _unit(self, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = np.sqrt(np.square(f).sum(1, keepdims=True))
        return f / (length + self.p["eps"]), length

    def _probabilities(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similar = (u @ u.T + 1) / 2
        total = similar.sum(1, keepdims=True)
        return similar / total, total

    def torch_form(self, s: Any, t: Any) -> Any:
        import torch
        eps = self.p["eps"]

        def probabilities(f: Any) -> Any:
            f = f.flatten(1)
            squared = f.square().sum(1, keepdim=True)
            length = torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)         # sqrt has no gradient at 0
            u = f / (length + eps)
            similar = (u @ u.T + 1) / 2
            return similar / similar.sum(1, keepdim=True)
        p, q = probabilities(s), probabilities(t)
        return (q * ((q + eps) / (p + eps)).log()).mean()
