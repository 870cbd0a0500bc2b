"""The loss of contrastive representation distillation, with its two memory banks."""
from __future__ import annotations

from typing import Any, ClassVar

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers.common import parse

_DEFAULTS = {"samples": 0, "temperature": 0.07, "momentum": 0.5, "eps": 1e-7, "seed": 0}


class ContrastiveLoss(caffe.Layer):
    """Noise-contrastive estimation between a student's and a teacher's embeddings and the other net's memory bank (Tian et al. 2020).

    Bottoms: embeddings of student and teacher (N, D), which are brought to length 1 here; indices (N, 1 + K) into the training set, the
    image's own first, then the K it is told from.  One top of one element; gradients go to both embeddings.  With

      o = exp(<bank of the other net [index], embedding> / temperature) / Z,  c = K / samples

    the loss is -(1/N) sum over images and both nets of log o_0 / (o_0 + c + eps) + sum_k log c / (o_k + c + eps).  Z is, for each net,
    samples times the mean of the first batch's exponentials, a constant from then on.  After the loss the own rows of both banks move:
    row = momentum * row + (1 - momentum) * embedding, brought to length 1.
    Three blobs that never learn (`param { lr_mult: 0 decay_mult: 0 }` three times) hold the state: the student's bank, the teacher's
    (samples, D), and (Z of the student, Z of the teacher), 0 while unknown.  Rows begin uniform in +-1 / sqrt(D / 3), from `seed`.
    In TEST nothing moves.
    param_str: samples (of the training set, must be given), temperature 0.07, momentum 0.5, eps 1e-7, seed 0.

    Scores of all samples are one matrix product, of which the asked ones are picked: for K above a few hundredths of the samples that is
    less to compute and to move than picking rows of the banks.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = _DEFAULTS

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 3 or len(top) != 1:
            raise ValueError("ContrastiveLoss needs three bottoms (student's embedding, teacher's embedding, indices) and one top")
        self.p = parse(self.param_str, _DEFAULTS)
        samples, width = self.p["samples"], bottom[0].count // bottom[0].shape[0]
        if samples < 1 or self.p["temperature"] <= 0 or not 0 <= self.p["momentum"] < 1:
            raise ValueError("param_str: samples must be at least 1, temperature above 0, momentum from 0 to below 1")
        draw, bound = np.random.default_rng(self.p["seed"]), 1 / np.sqrt(width / 3)
        for bank in range(2):
            self.blobs.add_blob(samples, width)
            self.blobs[bank].data[...] = draw.uniform(-bound, bound, (samples, width))
        self.blobs.add_blob(2)

    def reshape(self, bottom: Any, top: Any) -> None:
        shapes = [tuple(bottom[i].shape) for i in range(3)]
        if bottom[0].count != bottom[1].count or len({shape[0] for shape in shapes}) > 1 or len(shapes[2]) != 2 or shapes[2][1] < 2:
            raise ValueError("ContrastiveLoss: embeddings {} and {} and indices {} do not fit: (N, D), (N, D), (N, 1 + K)".format(*shapes))
        top[0].reshape(1)

    def forward(self, bottom: Any, top: Any) -> None:
        indices = bottom[2].data.astype(np.int64)
        if indices.min() < 0 or indices.max() >= self.p["samples"]:
            raise ValueError(f"ContrastiveLoss: indices {indices.min()} to {indices.max()} do not fit {self.p['samples']} samples")
        units, lengths = zip(*(self._unit(bottom[i].data.reshape(len(indices), -1)) for i in range(2)))
        banks, z = [self.blobs[0].data, self.blobs[1].data], np.array(self.blobs[2].data)
        loss, self.gradients = 0.0, []
        for side in range(2):
            term, du, z[side] = self._side(units[side], banks[1 - side], indices, z[side])
            loss += term
            self.gradients.append((du - units[side] * (du * units[side]).sum(1, keepdims=True)) / lengths[side])
        top[0].data[...] = loss
        if self.phase == caffe.TRAIN:
            self.blobs[2].data[...] = z
            for bank, unit in zip(banks, units):
                moved = self.p["momentum"] * bank[indices[:, 0]] + (1 - self.p["momentum"]) * unit
                bank[indices[:, 0]] = self._unit(moved)[0]

    @staticmethod
    def _unit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = np.sqrt(np.square(x).sum(1, keepdims=True))
        return x / length, length

    def _side(self, unit: np.ndarray, bank: np.ndarray, indices: np.ndarray, z: float) -> tuple[Any, np.ndarray, Any]:
        """One net's part of the loss, its gradient for the embedding of length 1, and Z."""
        n, asked = indices.shape
        t, eps, c = self.p["temperature"], self.p["eps"], (asked - 1) / self.p["samples"]
        raw = np.exp(np.take_along_axis(unit @ bank.T, indices, 1) / t)
        z = z or raw.mean() * self.p["samples"]
        o = raw / z
        loss = -(np.log(o[:, 0] / (o[:, 0] + c + eps)).sum() + np.log(c / (o[:, 1:] + c + eps)).sum()) / n
        slope = o / (o + c + eps)                            # of -log c / (o + c + eps), times o
        slope[:, 0] -= 1
        spread = np.zeros((n, len(bank)), unit.dtype)
        np.add.at(spread, (np.arange(n)[:, None], indices), slope / (t * n))
        return loss, spread @ bank, z

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        scale = top[0].diff.reshape(-1)[0]
        for i in range(2):
            if propagate_down[i]:
                bottom[i].diff[...] = (scale * self.gradients[i]).reshape(bottom[i].diff.shape)
        if propagate_down[2]:
            bottom[2].diff[...] = 0

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors; the banks move in place, once their gradients are known."""
        import torch
        from torch.nn import functional as F
        indices = bottoms[2].long()
        n, asked = indices.shape
        t, eps, c, samples = self.p["temperature"], self.p["eps"], (asked - 1) / self.p["samples"], self.p["samples"]
        leaves = [bottom.detach().flatten(1).requires_grad_() for bottom in bottoms[:2]]
        loss, zs = bottoms[0].new_zeros(()), []
        with torch.enable_grad():
            units = [F.normalize(leaf, dim=1, eps=0) for leaf in leaves]
            for side in range(2):
                raw = (units[side] @ blobs[1 - side].detach().T).gather(1, indices).div(t).exp()
                known = blobs[2][side].detach()
                z = torch.where(known > 0, known, raw.detach().mean() * samples)
                zs.append(z)
                o = raw / z
                loss = loss - (o[:, 0] / (o[:, 0] + c + eps)).log().sum() / n - (c / (o[:, 1:] + c + eps)).log().sum() / n
        gradients = torch.autograd.grad(loss, leaves)
        if self.phase == caffe.TRAIN:
            with torch.no_grad():
                blobs[2].copy_(torch.stack(zs))
                for bank, unit in zip(blobs[:2], units):
                    moved = bank[indices[:, 0]] * self.p["momentum"] + unit.detach() * (1 - self.p["momentum"])
                    bank.index_copy_(0, indices[:, 0], F.normalize(moved, dim=1, eps=0))
        return known_gradient()(loss.detach().reshape(1), gradients[0], gradients[1], bottoms[0], bottoms[1])


def known_gradient() -> Any:
    """A function of (value, gradients, bottoms) whose gradients for the bottoms are those given."""
    import torch

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Any, first: Any, second: Any, *bottoms: Any) -> Any:
            ctx.save_for_backward(first, second)
            ctx.shapes = [bottom.shape for bottom in bottoms]
            return value.clone()

        @staticmethod
        def backward(ctx: Any, slope: Any) -> Any:
            return (None, None, None, *(slope * g.reshape(shape) for g, shape in zip(ctx.saved_tensors, ctx.shapes)))
    return Known.apply
