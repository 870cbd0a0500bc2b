"""One number per channel from a whole batch, and back: exact sums, batch normalisation, scales and shifts on a CPU.

torch's own channels-last kernels add a channel's numbers one after the other, in float32: where many are equal, as zeros after ReLU are,
every addition rounds alike, and a variance of 131,072 numbers is wrong by 4e-4.  Here sums of BLOCK rows, which torch adds pairwise, are
added in float64, and what is summed is centred first, so that a large mean costs no digit.  Other devices' kernels do both
themselves, so there torch's are taken.  What the layers are, and which numbers they keep, is norm.py's and vision.py's business.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from torchcaffe.layers.layout import channels_last, is_channels_last

BLOCK = 256                            # rows whose sum is float32
PART = 2**19                           # numbers for each thread that several operations take in turn, so that caches hold them
WIDE = 256                             # numbers in a row from which on the cost of starting rows no longer counts
LITTLE = 2**16                         # so many numbers at most cost less than the calls that a careful sum of many takes
PLANE = 2**10                          # numbers that torch's kernel adds in float32 before it goes on in float64
EVERY = 15                             # of so many blocks one tells roughly where a channel's numbers lie; odd, to hit all parts of images


def rows(x: Tensor, abreast: int = 1) -> Tensor:
    """x (N, C, ...) as a matrix of C columns and a row for each place, or for so many places; a view where channels are last in memory.

    It is float32 where x has fewer bits.
    """
    found = x.movedim(1, -1).reshape(-1, abreast * x.shape[1])
    return found if found.dtype == torch.float64 else found.float()


def _like(matrix: Tensor, x: Tensor) -> Tensor:
    """rows() backwards: the numbers of a matrix in x's shape and number type, their channels last in memory."""
    return matrix.to(x.dtype).reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _room(x: Tensor) -> Tensor:
    """A tensor of x's shape for results, of which rows() is a view."""
    return torch.empty_permuted(x.shape, (0, *range(2, x.dim()), 1), device=x.device,
                                dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _abreast(count: int, channels: int) -> int:
    """How many of `count` rows are best seen as one, so that loops over a row are long: some power of 2 that divides the count."""
    n = 1
    while n * channels < WIDE and n < BLOCK and count % (2 * n) == 0:
        n *= 2
    return n


def _block_sums(matrix: Tensor, channels: int) -> Tensor:
    """The sums of BLOCK rows each, and of what rows are left, (blocks, C)."""
    count = matrix.numel() // channels
    blocks, rest = divmod(count, BLOCK)
    if not rest:
        return matrix.view(blocks, BLOCK, channels).sum(1)
    matrix = matrix.view(count, channels)
    return torch.cat([matrix[:-rest].view(blocks, BLOCK, channels).sum(1), matrix[-rest:].sum(0, keepdim=True)])


def _total(sums: list[Tensor]) -> Tensor:
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum(0, dtype=torch.float64)


def column_sums(matrix: Tensor) -> Tensor:
    """The sum of every column, (C) in float64: right to some 1e-7 of the sum of magnitudes, and the same for any number of threads."""
    return _total([_block_sums(matrix, matrix.shape[1])])


def _step(matrix: Tensor, channels: int) -> int:
    """How many rows of a matrix are a part: whole blocks."""
    return max(PART * torch.get_num_threads() // (BLOCK * channels), 1) * BLOCK * channels // matrix.shape[1]


def _parts(step: int, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `step` rows of each matrix, and the next."""
    return iter([matrices]) if len(matrices[0]) <= step else zip(*(matrix.split(step) for matrix in matrices), strict=True)


class _Products:
    """Sums of products of parts, which lie in memory that is used again and again, so that caches hold it."""

    def __init__(self, matrix: Tensor, channels: int, step: int):
        self.channels, self.room = channels, torch.empty_like(matrix[:step])

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """_block_sums(a * b)."""
        return _block_sums(torch.mul(a, b, out=self.room if len(a) == len(self.room) else self.room[:len(a)]), self.channels)


def _rough_means(matrix: Tensor, channels: int) -> Tensor:
    """Numbers near the columns' means, from one block in EVERY: at most sqrt(EVERY - 1) standard deviations off, whatever the rows are."""
    blocks = matrix.numel() // (BLOCK * channels)
    if not blocks:
        return matrix.view(-1, channels).mean(0)
    some = matrix.view(-1)[:blocks * BLOCK * channels].view(blocks, -1)[::EVERY].mean(0)
    return some.view(BLOCK, channels).mean(0)


def _sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """column_sums(a * b)."""
    step = _step(a, a.shape[1])
    products = _Products(a, a.shape[1], step)
    return _total([products(*some) for some in _parts(step, a, b)])


class _Vectors:
    """What is computed from a few numbers per channel, in float64: by numpy, whose operations on so few cost a fifth of torch's.

    A pass that is traced must see every operation, so there they stay tensors; the same expressions serve both.
    """

    def __init__(self, traced: bool):
        self.traced = traced

    def take(self, vector: Tensor | None) -> Any:
        """A vector to compute with."""
        return vector if vector is None or self.traced else vector.detach().numpy()

    def give(self, vector: Any, like: Tensor, abreast: int = 1) -> Tensor:
        """A vector as a tensor in like's number type, so many times over."""
        found = vector if self.traced else torch.from_numpy(vector)
        found = found.to(like.dtype)
        return found if abreast == 1 else found.expand(abreast, -1).reshape(-1)


class _Normalise(torch.autograd.Function):
    """[relu]((x - mean) / sqrt(variance + eps) * weight + bias), and the batch's mean and variance (biased), without gradients.

    The numbers minus rough means, c, are what is summed and kept: mean(c) and mean(c^2) - mean(c)^2 lose nothing then, and y is one factor
    and one summand per channel of c.  With `own`, c takes the memory of x, and in backward the gradient that of c; with `own_gradient`,
    what ReLU lets pass takes the memory of the top's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, own: bool,
                own_gradient: bool, traced: bool) -> tuple[Tensor, ...]:
        channels = x.shape[1]
        count, vectors = x.numel() // channels, _Vectors(traced)
        n = _abreast(count, channels)
        matrix, y = rows(x.detach(), n), _room(x)
        near = _rough_means(matrix, channels)
        c = matrix if own else torch.empty_like(matrix)
        step = max(len(c), 1) if traced else _step(c, channels)
        low, sums, squares, products = vectors.give(vectors.take(near), c, n), [], [], _Products(c, channels, step)
        for before, centred in _parts(step, matrix, c):
            torch.sub(before, low, out=centred)
            sums.append(_block_sums(centred, channels))
            squares.append(products(centred, centred))
        first, second = (vectors.take(_total(found)) / count for found in (sums, squares))
        variance = (second - first * first).clip(0)
        scale = (variance + eps) ** -0.5
        factor = scale if weight is None else scale * vectors.take(weight)
        shift = -first * factor if bias is None else vectors.take(bias) - first * factor
        low, gain = vectors.give(shift, c, n), vectors.give(factor, c, n)
        for centred, into in _parts(step, c, rows(y, n)):
            torch.addcmul(low, centred, gain, out=into)
            if relu:
                into.relu_()
        y = y.to(x.dtype)
        mean, variance = vectors.give(vectors.take(near) + first, c), vectors.give(variance, c)
        ctx.own, ctx.own_gradient, ctx.vectors, ctx.abreast, ctx.step = own, own_gradient, vectors, n, step
        ctx.numbers = first, scale, factor
        ctx.save_for_backward(c, y if relu else None)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        (c, y), (first, scale, factor) = ctx.saved_tensors, ctx.numbers
        wanted, vectors, n, step, channels = ctx.needs_input_grad, ctx.vectors, ctx.abreast, ctx.step, len(first)
        count = c.numel() // channels
        d = rows(dy, n)
        sums, found, passed, products = [], [], d, _Products(c, channels, step)
        if y is None:
            for centred, part in _parts(step, c, d):
                sums.append(_block_sums(part, channels))
                found.append(products(part, centred))
        else:
            passed = d if ctx.own_gradient else torch.empty_like(d)
            for centred, part, top, let in _parts(step, c, d, rows(y, n), passed):
                torch.ops.aten.threshold_backward.grad_input(part, top, 0, grad_input=let)
                sums.append(_block_sums(let, channels))
                found.append(products(let, centred))
        total, product = vectors.take(_total(sums)), vectors.take(_total(found))
        product = product - first * total                                      # with what is centred at the mean itself
        dx = torch.zeros_like(dy) if count == 1 else None                      # where nothing but rounding would be left
        if wanted[0] and dx is None:
            share = factor / -count
            slope = share * scale * scale * product
            low, slope, gain = (vectors.give(v, c, n) for v in (share * total - slope * first, slope, factor))
            into = c if ctx.own else torch.empty_like(c)
            for place, centred, part in _parts(step, into, c, passed):
                torch.addcmul(low, centred, slope, out=place).addcmul_(part, gain)
            dx = _like(into, dy)
        return (dx, vectors.give(product * scale, c) if wanted[1] else None, vectors.give(total, c) if wanted[2] else None,
                None, None, None, None, None)


class _NormaliseLittle(torch.autograd.Function):
    """normalise_little() and its gradients for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float,
                relu: bool) -> Tensor:
        y, ctx.gradients = normalise_little(x, weight, bias, mean, variance, eps, relu)
        ctx.save_for_backward(y if relu else None)          # which ctx itself must not hold: it belongs to y
        ctx.is_last = is_channels_last(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, *others = ctx.gradients(ctx.saved_tensors[0], dy, ctx.needs_input_grad[:3])
        return (channels_last(dx) if dx is not None and ctx.is_last else dx, *others, None, None, None, None)


class _Affine(torch.autograd.Function):
    """x * scale + shift per channel; either may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if scale is not None and scale.requires_grad else None, scale)
        view = (-1, *[1] * (x.dim() - 2))
        if scale is None:
            assert shift is not None
            y = x + shift.reshape(view)
        else:
            y = x * scale.reshape(view) if shift is None else torch.addcmul(shift.reshape(view), x, scale.reshape(view))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, scale = ctx.saved_tensors
        dx = dscale = dshift = None
        if ctx.needs_input_grad[0]:
            dx = dy if scale is None else (dy * scale.reshape(-1, *[1] * (dy.dim() - 2))).to(dy.dtype)
        d = rows(dy)
        if ctx.needs_input_grad[1]:
            dscale = _sums_of_products(d, rows(x)).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            dshift = column_sums(d).to(d.dtype)
        return dx, dscale, dshift


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool = False, own: bool = False,
              own_gradient: bool = False, traced: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x by its own statistics, [relu]((x - mean) / sqrt(variance + eps) * weight + bias); the mean and the biased variance, (C) each.

    `own`: nothing else needs x, and backward comes once, so that its memory may be used again.  `own_gradient`: nothing else needs the
    top's gradient.  `traced`: the operations are being traced.
    """
    if x.device.type == "cpu":
        found: tuple[Tensor, Tensor, Tensor] = _Normalise.apply(x, weight, bias, eps, relu, own and not traced,
                                                                own_gradient and not traced, traced)
        return found
    mean, variance = (torch.zeros(x.shape[1], device=x.device, dtype=x.dtype if x.dtype == torch.float64 else torch.float32) for _ in "mv")
    y = torch.batch_norm(x, weight, bias, mean, variance, True, 1.0, eps, True)         # which gives it to cuDNN, in one kernel each way
    count = x.numel() // max(x.shape[1], 1)
    variance = variance * ((count - 1) / count) if count > 1 else torch.zeros_like(variance)
    return y.relu_() if relu else y, mean, variance


def is_little(shape: Sequence[int]) -> bool:
    """Whether normalise_little() takes tensors of this shape: few numbers in all, in images of more than one pixel, but not of many."""
    return 0 < prod(shape) <= LITTLE and 1 < prod(shape[2:]) <= PLANE


def normalise_little(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float,
                     relu: bool) -> tuple[Tensor, Callable[..., Sequence[Tensor | None]]]:
    """normalise() where x is_little(), and gradients(y if relu else None, dy, wanted) of x, weight and bias.

    torch's own kernel, one call each way, is careful with numbers that lie row by row.  It is given their differences from the first
    of each channel, so that a large mean costs no digit.  The mean and the unbiased variance are left in `mean` and `variance`, (C)
    zeros.
    """
    first = x.as_strided((1, x.shape[1], *[1] * (x.dim() - 2)), x.stride())
    c = torch.sub(x, first, out=torch.empty(x.shape, dtype=x.dtype))
    y, middle, deviation = torch.native_batch_norm(c, weight, bias, mean, variance, True, 1.0, eps)
    mean.add_(first.view(-1))
    y = torch.clamp_min(y, 0, out=torch.empty_like(x)) if relu else torch.empty_like(x).copy_(y)

    def gradients(y: Tensor | None, dy: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        d = dy.contiguous() if y is None else torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=torch.empty_like(c))
        found = torch.ops.aten.native_batch_norm_backward.default(d, c, weight, None, None, middle, deviation, True, eps, wanted)
        return [value if want else None for value, want in zip(found, wanted, strict=True)]
    return y, gradients


def little(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float, relu: bool) -> Tensor:
    """normalise_little() with gradients by autograd."""
    y: Tensor = _NormaliseLittle.apply(x, weight, bias, mean, variance, eps, relu)
    return y


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift, one of each per channel (axis 1); either may be None."""
    if x.device.type == "cpu":
        y: Tensor = _Affine.apply(x, scale, shift)
        return y
    like = scale if scale is not None else shift
    assert like is not None
    ones = torch.ones_like(like.detach())
    scale = ones if scale is None else scale                # which CUDA's kernels do not do without
    return torch.native_batch_norm(x, scale, shift, torch.zeros_like(ones), ones, False, 0.0, 0.0)[0]
