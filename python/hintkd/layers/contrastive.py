"""The loss of contrastive representation distillation, with its two memory banks and the draws of what an image is told from."""
from __future__ import annotations

from typing import Any, ClassVar

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers import draws
from hintkd.layers.common import parse
from hintkd.layers.lmdb_records import records

_DEFAULTS = {"samples": 0, "source": "", "negatives": 0, "temperature": 0.07, "momentum": 0.5, "eps": 1e-7}


class ContrastiveLoss(caffe.Layer):
    """Noise-contrastive estimation between a student's and a teacher's embeddings and the other net's memory bank (Tian et al. 2020).

    Bottoms: embeddings of student and teacher (N, D), which are brought to length 1 here (one of zeros stays, and has no gradient, where
    the sources divide by zero); and the positions (N,) of the images among the
    records of `source`, for each of which K = `negatives` others of other classes are drawn, none twice; or, without negatives, indices
    (N, 1 + K) into the training set, the image's own first.  One top of one element; gradients go to both embeddings.  With

      o = exp(<bank of the other net [index], embedding> / temperature) / Z,  c = K / samples

    the loss is -(1/N) sum over images and both nets of log o_0 / (o_0 + c + eps) + sum_k log c / (o_k + c + eps).  Z is, for each net,
    samples times the mean of the first batch's exponentials, a constant from then on.  After the loss the own rows of both banks move:
    row = momentum * row + (1 - momentum) * embedding, brought to length 1; where a record comes twice in a batch its last image counts.
    Blobs that never learn (`param { lr_mult: 0 decay_mult: 0 }` for each) hold the state: the student's bank, the teacher's (samples, D),
    (Z of the student, Z of the teacher), 0 while unknown, and, with negatives, the number of passes that have drawn.  Rows begin uniform in
    +-1 / sqrt(D / 3).  In TEST nothing moves.
    param_str: samples (of the training set, must be given); source (an LMDB's folder) and negatives, or neither; temperature 0.07,
    momentum 0.5, eps 1e-7.

    Scores of all samples are one matrix product, of which the asked ones are picked: for K above a few hundredths of the samples that is
    less to compute and to move than picking rows of the banks.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = _DEFAULTS

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 3 or len(top) != 1:
            raise ValueError("ContrastiveLoss needs three bottoms (student's embedding, teacher's embedding, indices) and one top")
        self.p = parse(self.param_str, _DEFAULTS)
        if self.p["samples"] < 1 or self.p["temperature"] <= 0 or not 0 <= self.p["momentum"] < 1:
            raise ValueError("param_str: samples must be at least 1, temperature above 0, momentum from 0 to below 1")
        if bool(self.p["source"]) != bool(self.p["negatives"]):
            raise ValueError("param_str: source and negatives go together; write both, or neither where a bottom has the indices")
        width = bottom[0].count // bottom[0].shape[0]
        draw, bound = np.random.default_rng(draws.key(draws.seed_of(self), "banks")), 1 / np.sqrt(width / 3)
        for bank in range(2):
            self.blobs.add_blob(self.p["samples"], width)
            self.blobs[bank].data[...] = draw.uniform(-bound, bound, (self.p["samples"], width))
        self.blobs.add_blob(2)
        if self.p["negatives"]:
            self.blobs.add_blob(1)
        self.known: Negatives | None = None
        self.stream = draws.key(draws.seed_of(self), "negatives", draws.solver(caffe, "rank", 0))

    @property
    def negatives(self) -> Negatives:
        """Made when it is first asked for, so that a net can be looked at without its data."""
        if self.known is None:
            labels = records(self.p["source"]).labels()
            if len(labels) != self.p["samples"]:
                raise ValueError(f"ContrastiveLoss: {self.p['source']} has {len(labels)} records, and samples is {self.p['samples']}")
            self.known = Negatives(labels, self.p["negatives"])
        return self.known

    def reshape(self, bottom: Any, top: Any) -> None:
        shapes = [tuple(bottom[i].shape) for i in range(3)]
        third = "(N,)" if self.p["negatives"] else "(N, 1 + K)"
        fits = bottom[2].count == shapes[2][0] if self.p["negatives"] else len(shapes[2]) == 2 and shapes[2][1] > 1
        if bottom[0].count != bottom[1].count or len({shape[0] for shape in shapes}) > 1 or not fits:
            raise ValueError("ContrastiveLoss: embeddings {} and {} and indices {} do not fit: (N, D), (N, D), {}".format(*shapes, third))
        top[0].reshape(1)

    def forward(self, bottom: Any, top: Any) -> None:
        own = bottom[2].data.astype(np.int64).reshape(len(bottom[2].data), -1)
        if own.min() < 0 or own.max() >= self.p["samples"]:
            raise ValueError(f"ContrastiveLoss: indices {own.min()} to {own.max()} do not fit {self.p['samples']} samples")
        indices, counted = own, np.ones(own.shape)
        if self.p["negatives"]:
            indices, counted = self.negatives.of(own[:, 0], self.stream, np.array([int(self.blobs[3].data[0])]))
        units, lengths = zip(*(self._unit(bottom[i].data.reshape(len(indices), -1)) for i in range(2)))
        banks, z = [self.blobs[0].data, self.blobs[1].data], np.array(self.blobs[2].data)
        loss, self.gradients = 0.0, []
        for side in range(2):
            term, du, z[side] = self._side(units[side], banks[1 - side], indices, counted, z[side])
            loss += term
            self.gradients.append((du - units[side] * (du * units[side]).sum(1, keepdims=True)) / lengths[side])
        top[0].data[...] = loss
        if self.phase == caffe.TRAIN:
            self.blobs[2].data[...] = z
            if self.p["negatives"]:
                self.blobs[3].data[...] += 1
            for bank, unit in zip(banks, units):
                moved = self.p["momentum"] * bank[indices[:, 0]] + (1 - self.p["momentum"]) * unit
                bank[indices[:, 0]] = self._unit(moved)[0]

    @staticmethod
    def _unit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = np.sqrt(np.square(x).sum(1, keepdims=True))
        length[length == 0] = np.inf
        return x / length, length

    def _share(self, asked: int) -> float:
        """K / samples, where a row asks for so many."""
        return (self.p["negatives"] or asked - 1) / self.p["samples"]

    def _side(self, unit: np.ndarray, bank: np.ndarray, indices: np.ndarray, counted: np.ndarray,
              z: float) -> tuple[Any, np.ndarray, Any]:
        """One net's part of the loss, its gradient for the embedding of length 1, and Z."""
        n, asked = indices.shape
        t, eps, c = self.p["temperature"], self.p["eps"], self._share(asked)
        raw = np.exp(np.take_along_axis(unit @ bank.T, indices, 1) / t)
        z = z or (raw * counted).sum() / counted.sum() * self.p["samples"]
        o = raw / z
        loss = -(np.log(o[:, 0] / (o[:, 0] + c + eps)).sum() + (np.log(c / (o[:, 1:] + c + eps)) * counted[:, 1:]).sum()) / n
        slope = o / (o + c + eps) * counted                  # of -log c / (o + c + eps), times o
        slope[:, 0] -= 1
        places = (indices + np.arange(n)[:, None] * len(bank)).reshape(-1)
        spread = np.bincount(places, (slope / (t * n)).reshape(-1), n * len(bank)).reshape(n, -1).astype(unit.dtype)
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
        indices, counted = bottoms[2].detach().long().reshape(len(bottoms[2]), -1), None
        if self.p["negatives"]:
            indices, counted = self.negatives.torch_form(indices[:, 0], self.stream, blobs[3].detach().long())
        n, asked = indices.shape
        t, eps, c = self.p["temperature"], self.p["eps"], self._share(asked)

        def unit(x: Any) -> Any:
            length = x.norm(dim=1, keepdim=True)
            return x / length.masked_fill(length == 0, float("inf"))
        leaves = [bottom.detach().flatten(1).requires_grad_() for bottom in bottoms[:2]]
        loss, zs = bottoms[0].new_zeros(()), []
        with torch.enable_grad():
            units = [unit(leaf) for leaf in leaves]
            for side in range(2):
                raw = (units[side] @ blobs[1 - side].detach().T).gather(1, indices).div(t).exp()
                known, seen = blobs[2][side].detach(), raw.detach()
                mean = seen.mean() if counted is None else (seen * counted).sum() / counted.sum()
                z = torch.where(known > 0, known, mean * self.p["samples"])
                zs.append(z)
                o = raw / z
                others = (c / (o[:, 1:] + c + eps)).log()
                loss = loss - (o[:, 0] / (o[:, 0] + c + eps)).log().sum() / n
                loss = loss - (others if counted is None else others * counted[:, 1:]).sum() / n
        gradients = torch.autograd.grad(loss, leaves)
        if self.phase == caffe.TRAIN:
            with torch.no_grad():
                blobs[2].copy_(torch.stack(zs))
                if self.p["negatives"]:
                    blobs[3].add_(1)
                own = indices[:, 0]
                last = ((own[:, None] == own) * torch.arange(n, device=own.device)).amax(1)        # of images that are the same record
                for bank, seen in zip(blobs[:2], units):
                    moved = bank[own] * self.p["momentum"] + seen.detach() * (1 - self.p["momentum"])
                    bank.index_copy_(0, own, unit(moved)[last])
        return known_gradient()(loss.detach().reshape(1), gradients[0], gradients[1], bottoms[0], bottoms[1])


class Negatives:
    """What images are told from: `count` records of other classes for each, none twice, every such set as likely as any other.

    In each pass all records are brought into one order.  An image walks through it from a place of its own in steps of its own, which have
    no divisor in common with the number of records, and takes the first `count` that have another label.  So each image's set is
    drawn as if the records were sorted for it alone, for the cost of one sort; the sets of a batch's images are not independent, but
    have on average as much in common as if they were.
    """

    def __init__(self, labels: np.ndarray, count: int):
        self.labels, self.count = labels, count
        self.walked = count + int(np.bincount(labels).max()) if count > 0 else 0
        if not 0 < self.walked <= len(labels):
            raise ValueError(f"param_str: negatives is {count}, and {len(labels)} records of these classes have at least 1 and at most "
                             f"{len(labels) - int(np.bincount(labels).max())} of other classes for each")
        self.steps = np.flatnonzero(np.gcd(np.arange(len(labels)), len(labels)) == 1) if len(labels) > 1 else np.array([1])
        self._tensors: dict[Any, Any] = {}

    def of(self, own: np.ndarray, stream: int, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the images at `own` (N,): indices (N, 1 + M), their own first, and which of them count, as numbers: 1 + `count` in each row.

        stream, now    what is drawn from: a key, and the number of the pass as an array of one element
        """
        order = np.argsort(draws.bits(stream, now, np.arange(len(self.labels))), kind="stable")
        chosen, counted = self._walk(own, order, draws.bits(stream, now, np.arange(2 * len(own)) - 2 * len(own)), np.arange(self.walked),
                                     self.labels, self.steps)
        return np.column_stack([own, chosen]), np.column_stack([np.ones(len(own)), counted])

    def torch_form(self, own: Any, stream: int, now: Any) -> Any:
        """The same of tensors."""
        import torch
        if own.device not in self._tensors:
            self._tensors[own.device] = [torch.from_numpy(table).to(own.device) for table in (self.labels, self.steps)]
        numbers = torch.arange(-2 * len(own), max(len(self.labels), self.walked), device=own.device)
        drawn, numbers = draws.bits(stream, now, numbers[:2 * len(own)]), numbers[2 * len(own):]
        order = draws.bits(stream, now, numbers[:len(self.labels)]).argsort(stable=True)
        chosen, counted = self._walk(own, order, drawn, numbers[:self.walked], *self._tensors[own.device])
        return torch.column_stack([own, chosen]), torch.column_stack([torch.ones_like(own), counted])

    def _walk(self, own: Any, order: Any, drawn: Any, numbers: Any, labels: Any, steps: Any) -> tuple[Any, Any]:
        """The records that each image meets (N, M), and whether it takes them; all arrays, or all tensors.

        drawn    64 bits for the step and the start of each image, (2 N,)
        """
        first, second = draws.fractions(drawn).reshape(2, -1)
        step, start = steps[(first * len(steps)) >> 24], (second * len(labels)) >> 24
        met = order[(start[:, None] + step[:, None] * numbers) % len(labels)]
        other = labels[met] != labels[own][:, None]
        return met, other & (other.cumsum(1) <= self.count)


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
