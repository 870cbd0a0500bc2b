"""The loss of relational knowledge distillation."""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hintkd.layers.pair_loss import PairLoss
from hintkd.layers.units import through_unit_rows, unit_rows

CLAMP, EPS = 1e-12, 1e-12                   # squared distances are at least CLAMP; a difference is divided by at least EPS


class RelationalLoss(PairLoss):
    """distance * L_d + angle * L_a for features (N, everything else) of student and teacher (Park et al. 2019).

    L_d: smooth L1 (knee 1), mean over N x N, between the distances of all pairs, each divided by the mean of its net's positive ones.
    L_a: the same, mean over N x N x N, between the cosines at i of the differences to j and k.
    Two equal rows of the student have the distance 1e-6, as in the sources; their difference has no direction, and no gradient goes
    through it, where the sources' own is of the order of 1e11.
    param_str: distance 25, angle 50.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"distance": 25.0, "angle": 50.0}

    def check(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        """Any two shapes of one batch size will do."""

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        n = len(s)
        f, g = s.reshape(n, -1), t.reshape(n, -1)
        distance, d_distance = self._distances(f, g)
        angle, d_angle = self._angles(f, g)
        return (self.p["distance"] * distance + self.p["angle"] * angle,
                self.p["distance"] * d_distance + self.p["angle"] * d_angle)

    @staticmethod
    def _distances(f: np.ndarray, g: np.ndarray) -> tuple[Any, np.ndarray]:
        """L_d and its gradient for f."""
        (mine, clamped), (other, _) = distances(f), distances(g)
        positive = mine > 0
        count = max(int(positive.sum()), 1)
        mean, other_mean = mine.sum() / count, other.sum() / max(int((other > 0).sum()), 1)
        if not mean or not other_mean:                       # a batch of one image has no distances
            return np.float64(0), np.zeros_like(f)
        loss, slope = smooth_l1(mine / mean - other / other_mean)
        dd = (slope / mean - positive * (slope * mine).sum() / (mean ** 2 * count)) / slope.size
        w = np.divide(dd, mine, out=np.zeros_like(dd), where=positive & ~clamped)       # of d squared, twice
        w = w + w.T
        return loss.mean(), w.sum(1, keepdims=True) * f - w @ f

    @staticmethod
    def _angles(f: np.ndarray, g: np.ndarray) -> tuple[Any, np.ndarray]:
        """L_a and its gradient for f, one i after the other: N x N x N cosines are never there at once."""
        n = len(f)
        loss, df = 0.0, np.zeros_like(f)
        for i in range(n):
            u, length = unit_rows(f - f[i], EPS)
            v, _ = unit_rows(g - g[i], EPS)
            value, slope = smooth_l1(u @ u.T - v @ v.T)
            loss += value.sum() / n ** 3
            du = through_unit_rows((slope + slope.T) @ u / n ** 3, u, length, EPS)
            du[length[:, 0] <= EPS] = 0
            df += du
            df[i] -= du.sum(0)
        return loss, df

    def torch_form(self, s: Any, t: Any) -> Any:
        import torch
        from torch.nn import functional as F

        def relations(f: Any) -> tuple[Any, Any]:
            f = f.flatten(1)
            difference = f[None] - f[:, None]                # not by products, which lose small distances
            squared = difference.square().sum(2)
            own = torch.eye(len(f), dtype=torch.bool, device=f.device)
            distance = torch.where(own | (squared < CLAMP), CLAMP, squared).sqrt().masked_fill(own, 0)
            distance = distance / (distance.sum() / max(len(f) * (len(f) - 1), 1)).clamp_min(EPS)
            length = squared.detach()[:, :, None].sqrt()
            known = torch.where(length > EPS, difference, 1)                             # a difference of 0 has no direction
            unit = torch.where(length > EPS, F.normalize(known, dim=2), 0)
            return distance, unit @ unit.transpose(1, 2)
        (distance, angle), (other_distance, other_angle) = relations(s), relations(t)
        return (self.p["distance"] * F.smooth_l1_loss(distance, other_distance)
                + self.p["angle"] * F.smooth_l1_loss(angle, other_angle))


def distances(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all pairs of rows, 0 of a row to itself; and where they are clamped, so that no gradient passes."""
    squared = np.stack([np.square(f - row).sum(1) for row in f])      # not by products, which lose small distances
    clamped = squared < CLAMP
    result = np.sqrt(np.maximum(squared, CLAMP))
    np.fill_diagonal(result, 0)
    return result, clamped


def smooth_l1(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x^2 / 2 below 1, |x| - 1/2 above, and its slope."""
    return np.where(np.abs(x) < 1, x * x / 2, np.abs(x) - 0.5), np.clip(x, -1, 1)
