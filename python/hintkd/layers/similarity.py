"""The loss of similarity-preserving distillation."""
from __future__ import annotations

from typing import Any

import numpy as np

from hintkd.layers.pair_loss import PairLoss
from hintkd.layers.units import through_unit_rows, unit_rows

EPS = 1e-12


class SimilarityLoss(PairLoss):
    """|N_t - N_s|^2 / N^2 (Frobenius), N the rows of F F' divided by their length, F (N, everything else) (Tung and Mori 2019).

    It couples the images of a batch, so that iter_size changes what it means.  A student's image of zeros has a row of zeros; its
    gradient, which grows as one over the row's length in the limit, is that of a row whose direction does not count.
    """

    def check(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        """Any two shapes of one batch size will do."""

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        n = len(s)
        f, g = s.reshape(n, -1), t.reshape(n, -1)
        (mine, length), (other, _) = unit_rows(f @ f.T, EPS), unit_rows(g @ g.T, EPS)
        difference = mine - other
        e = through_unit_rows(2 * difference / n ** 2, mine, length, EPS)
        e[length[:, 0] <= EPS] = 0
        return np.square(difference).sum() / n ** 2, (e + e.T) @ f

    def torch_form(self, s: Any, t: Any) -> Any:
        import torch
        n = len(s)
        f, g = s.flatten(1), t.flatten(1)
        mine, other = f @ f.T, g @ g.T
        rows = mine.norm(dim=1, keepdim=True)
        mine = torch.where(rows > EPS, mine, mine.detach()) / rows.clamp_min(EPS)
        return (other / other.norm(dim=1, keepdim=True).clamp_min(EPS) - mine).square().sum() / n ** 2
