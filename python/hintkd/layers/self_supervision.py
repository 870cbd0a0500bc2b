"""The losses of self-supervised knowledge distillation, over batches in which each image stands in four rotations."""
from __future__ import annotations

from typing import Any, ClassVar

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers.common import log_softmax, parse, rows
from hintkd.layers.units import through_unit_rows, unit_rows

VIEWS, EPS = 4, 1e-8                        # upright and three rotations; lengths of projections are at least EPS


class ViewMatching(caffe.Layer):
    """Cross-entropy of telling, for each rotated view, which upright one it is of: the training of a projection head (Xu et al. 2020).

    Bottom: projections (4 N, D), rows 4 b to 4 b + 3 the views of image b, the upright one first.  The 3 N x N scores are the cosines
    themselves; the loss is the mean over the 3 N rows.  One top of one element.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 1 or len(top) != 1:
            raise ValueError("ViewMatching needs one bottom and one top")

    def reshape(self, bottom: Any, top: Any) -> None:
        require_views("ViewMatching", bottom[0].shape[0])
        top[0].reshape(1)

    def forward(self, bottom: Any, top: Any) -> None:
        views = Views(rows(bottom[0]))
        soft, own = log_softmax(views.cosines), owners(views.n)
        top[0].data[...] = -soft[np.arange(len(own)), own].mean()
        slope = np.exp(soft)
        slope[np.arange(len(own)), own] -= 1
        self.gradient = views.gradient(slope / len(own))

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        if propagate_down[0]:
            bottom[0].diff[...] = (self.gradient * top[0].diff.reshape(-1)[0]).reshape(bottom[0].diff.shape)

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors."""
        import torch
        from torch.nn import functional as F
        scores = cosines(bottoms[0].flatten(1))
        own = torch.arange(scores.shape[1], device=scores.device).repeat_interleave(VIEWS - 1)
        return F.cross_entropy(scores, own).reshape(1)


class SelfSupervisedLoss(caffe.Layer):
    """The student's four losses, weighted (Xu et al. 2020), for batches of 4 N views as ViewMatching's.

    Bottoms: the student's class scores (4 N, C), the teacher's, the student's projections (4 N, D), the teacher's (4 N, E), labels (N).
    One top of one element, the sum of

      ce * cross-entropy of the upright rows
      kd * T^2 KL(teacher || student), T = kd_tau, of the upright rows, mean over them
      tf * the same of the rotated rows that are kept, T = tf_tau
      ss * the same of the cosines between rotated and upright projections, T = ss_tau, of the rotated rows that are kept

    Kept are the rows that the teacher gets right and of its N_w wrong ones the floor(ratio N_w) for which the fewest others are ranked
    above the right one, earlier rows first; ratio is tf_ratio or ss_ratio.  Gradients go to the student's two bottoms.
    param_str: ce 0.1, kd 0.9, tf 2.7, ss 10, kd_tau 4, tf_tau 4, ss_tau 0.5, tf_ratio 1, ss_ratio 0.75.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10.0, "kd_tau": 4.0, "tf_tau": 4.0, "ss_tau": 0.5,
                                          "tf_ratio": 1.0, "ss_ratio": 0.75}

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 5 or len(top) != 1:
            raise ValueError("SelfSupervisedLoss needs five bottoms (scores and projections of student and teacher, labels) and one top")
        self.p = parse(self.param_str, self.DEFAULTS)
        if min(self.p[name] for name in ("kd_tau", "tf_tau", "ss_tau")) <= 0:
            raise ValueError("param_str: kd_tau, tf_tau and ss_tau must be above 0")
        if not all(0 <= self.p[name] <= 1 for name in ("tf_ratio", "ss_ratio")):
            raise ValueError("param_str: tf_ratio and ss_ratio must lie between 0 and 1")

    def reshape(self, bottom: Any, top: Any) -> None:
        counts = [bottom[i].shape[0] for i in range(5)]
        require_views("SelfSupervisedLoss", counts[0])
        if len(set(counts[:4])) > 1 or bottom[4].count * VIEWS != counts[0] or bottom[0].count != bottom[1].count:
            raise ValueError("SelfSupervisedLoss: scores and projections need a row for each view, labels one for each image, not "
                             + ", ".join(map(str, counts)))
        top[0].reshape(1)

    def forward(self, bottom: Any, top: Any) -> None:
        p, (s, t), label = self.p, (rows(bottom[0]), rows(bottom[1])), bottom[4].data.reshape(-1).astype(int)
        n, images = len(label), np.arange(len(label))
        if label.min() < 0 or label.max() >= s.shape[1]:
            raise ValueError(f"SelfSupervisedLoss: labels {label.min()} to {label.max()} do not fit {s.shape[1]} classes")
        mine, other = Views(rows(bottom[2])), Views(rows(bottom[3]))
        upright = np.arange(len(s)) % VIEWS == 0
        hard = log_softmax(s[upright])
        slope = np.exp(hard)
        slope[images, label] -= 1
        scores = np.zeros(s.shape, s.dtype)
        scores[upright] = p["ce"] * slope / n
        kd, slope = divergence(s[upright], t[upright], p["kd_tau"], np.ones(n, bool))
        scores[upright] += p["kd"] * slope
        tf, slope = divergence(s[~upright], t[~upright], p["tf_tau"], kept(t[~upright], np.repeat(label, VIEWS - 1), p["tf_ratio"]))
        scores[~upright] = p["tf"] * slope
        ss, slope = divergence(mine.cosines, other.cosines, p["ss_tau"], kept(other.cosines, owners(n), p["ss_ratio"]))
        top[0].data[...] = -p["ce"] * hard[images, label].mean() + p["kd"] * kd + p["tf"] * tf + p["ss"] * ss
        self.gradients = {0: scores, 2: p["ss"] * mine.gradient(slope)}

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        for i in range(5):
            if propagate_down[i] and i in self.gradients:
                bottom[i].diff[...] = (self.gradients[i] * top[0].diff.reshape(-1)[0]).reshape(bottom[i].diff.shape)
            elif propagate_down[i]:
                bottom[i].diff[...] = 0

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors; rows are left out by a mask, so that shapes do not depend on values."""
        import torch
        from torch.nn import functional as F
        p, label = self.p, bottoms[4].reshape(-1).long()
        n, views = len(label), [len(label), VIEWS, -1]
        s, t = bottoms[0].flatten(1).reshape(views), bottoms[1].detach().flatten(1).reshape(views)
        mine, other = cosines(bottoms[2].flatten(1)), cosines(bottoms[3].detach().flatten(1))

        def keep(scores: Any, right: Any, ratio: float) -> Any:
            rank = (scores > scores.gather(1, right[:, None])).sum(1)
            place = torch.argsort(torch.argsort(rank, stable=True))
            wrong = (rank > 0).sum()
            return place < len(rank) - wrong + (wrong * ratio).floor()

        def divide(a: Any, b: Any, tau: float, rows_kept: Any) -> Any:
            each = F.kl_div(F.log_softmax(a / tau, 1), F.log_softmax(b / tau, 1), reduction="none", log_target=True).sum(1)
            return (each * rows_kept).sum() / rows_kept.sum().clamp_min(1) * tau ** 2
        rotated, target = s[:, 1:].flatten(0, 1), t[:, 1:].flatten(0, 1)
        own = torch.arange(n, device=s.device).repeat_interleave(VIEWS - 1)
        loss = p["ce"] * F.cross_entropy(s[:, 0], label) + p["kd"] * divide(s[:, 0], t[:, 0], p["kd_tau"], s.new_ones(n))
        loss = loss + p["tf"] * divide(rotated, target, p["tf_tau"], keep(target, label.repeat_interleave(VIEWS - 1), p["tf_ratio"]))
        return (loss + p["ss"] * divide(mine, other, p["ss_tau"], keep(other, own, p["ss_ratio"]))).reshape(1)


class Views:
    """Projections (4 N, D) as views: the cosines (3 N, N) between rotated and upright ones, and the way back."""

    def __init__(self, projections: np.ndarray):
        self.n = len(projections) // VIEWS
        self.units, self.lengths = unit_rows(projections.reshape(self.n, VIEWS, -1), EPS)
        self.cosines = self.units[:, 1:].reshape(-1, self.units.shape[-1]) @ self.units[:, 0].T

    def gradient(self, slope: np.ndarray) -> np.ndarray:
        """For the projections, given that for the cosines."""
        du = np.empty_like(self.units)
        du[:, 1:] = (slope @ self.units[:, 0]).reshape(self.n, VIEWS - 1, -1)
        du[:, 0] = slope.T @ self.units[:, 1:].reshape(-1, self.units.shape[-1])
        return through_unit_rows(du, self.units, self.lengths, EPS).reshape(self.n * VIEWS, -1)


def cosines(projections: Any) -> Any:
    """As Views.cosines, of tensors."""
    from torch.nn import functional as F
    units = F.normalize(projections, dim=1, eps=EPS).reshape(len(projections) // VIEWS, VIEWS, -1)
    return units[:, 1:].flatten(0, 1) @ units[:, 0].T


def owners(n: int) -> np.ndarray:
    """Which image each of the 3 N rotated views is of."""
    return np.repeat(np.arange(n), VIEWS - 1)


def kept(scores: np.ndarray, right: np.ndarray, ratio: float) -> np.ndarray:
    """Which rows count: the right ones, and of the others the floor(ratio * their number) that come nearest, earlier ones first."""
    rank = (scores > scores[np.arange(len(right)), right][:, None]).sum(1)
    order, wrong = np.argsort(rank, kind="stable"), int((rank > 0).sum())
    result = np.zeros(len(rank), bool)
    result[order[:len(rank) - wrong + int(wrong * ratio)]] = True
    return result


def divergence(s: np.ndarray, t: np.ndarray, tau: float, counted: np.ndarray) -> tuple[Any, np.ndarray]:
    """tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over the rows that are counted, and its gradient for s."""
    soft, target = log_softmax(s / tau), log_softmax(t / tau)
    p, count = np.exp(target), max(int(counted.sum()), 1)
    each = (p * (target - soft)).sum(1)
    return (each * counted).sum() * tau ** 2 / count, (np.exp(soft) - p) * counted[:, None] * (tau / count)


def require_views(layer: str, count: int) -> None:
    if count % VIEWS:
        raise ValueError(f"{layer}: {count} rows are no batch of images in {VIEWS} views each")
