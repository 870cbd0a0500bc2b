"""The zoo's methods as somebody would write them for PyTorch by hand: eager modules, channels-last, losses in their usual vectorised form.

What the engine's iterations are measured against.  Modules hold their parameters in the order of hintkd's nets, from which they take
them, so that both compute the same numbers.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, MOMENTUM, DECAY, TAU = 0.05, 0.9, 5e-4, 4.0
CLASSES = 100


class Features(NamedTuple):
    """The ends of the stages, these before ReLU, the pooled features and the class scores."""
    stages: list[Tensor]
    preacts: list[Tensor]
    pooled: Tensor
    scores: Tensor


def conv(before: int, width: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=bias)


# -- networks ------------------------------------------------------------------------------------------------------------------
class Basic(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(before, width, 3, stride), nn.BatchNorm2d(width), conv(width, width), \
            nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(conv(before, width, 1, stride), nn.BatchNorm2d(width)) if stride > 1 or before != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Up to the last ReLU."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ResNet(nn.Module):
    """resnet8x4 and its kind."""

    def __init__(self, depth: int, wide: int = 1):
        super().__init__()
        self.widths = [16 * wide, 32 * wide, 64 * wide]
        before = 8 * wide if wide > 1 else 16
        self.conv1, self.bn1 = conv(3, before), nn.BatchNorm2d(before)
        self.stages = nn.ModuleList()
        for group, width in enumerate(self.widths):
            blocks = [Basic(before if i == 0 else width, width, 2 if group and not i else 1) for i in range((depth - 2) // 6)]
            self.stages.append(nn.ModuleList(blocks))
            before = width
        self.fc = nn.Linear(before, CLASSES)

    def forward(self, x: Tensor) -> Features:
        x, ends, below = F.relu(self.bn1(self.conv1(x))), [], []
        for stage in self.stages:
            for block in stage:
                last = block(x)
                x = F.relu(last)
            ends.append(x)
            below.append(last)
        pooled = x.mean((2, 3))
        return Features(ends, below, pooled, self.fc(pooled))

    def norms(self) -> list[nn.BatchNorm2d]:
        """Before the last ReLU of each stage."""
        return [stage[-1].bn2 for stage in self.stages]


class Wide(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(before), conv(before, width, 3, stride), nn.BatchNorm2d(width), \
            conv(width, width)
        self.shortcut = conv(before, width, 1, stride) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + (x if self.shortcut is None else self.shortcut(y))


class WideResNet(nn.Module):
    def __init__(self, depth: int, wide: int):
        super().__init__()
        self.widths, before = [16 * wide, 32 * wide, 64 * wide], 16
        self.conv1, self.stages = conv(3, 16), nn.ModuleList()
        for group, width in enumerate(self.widths):
            blocks = [Wide(before if i == 0 else width, width, 2 if group and not i else 1) for i in range((depth - 4) // 6)]
            self.stages.append(nn.Sequential(*blocks))
            before = width
        self.bn1, self.fc = nn.BatchNorm2d(before), nn.Linear(before, CLASSES)
        self.tapped = False                                  # whether the preacts are asked for

    def forward(self, x: Tensor) -> Features:
        x, ends = self.conv1(x), []
        for stage in self.stages:
            x = stage(x)
            ends.append(x)
        below = [norm(end) for norm, end in zip(self.norms(), ends, strict=True)] if self.tapped else []
        pooled = F.relu(self.bn1(x)).mean((2, 3))
        return Features(ends, below, pooled, self.fc(pooled))

    def norms(self) -> list[nn.BatchNorm2d]:
        return [self.stages[1][0].bn1, self.stages[2][0].bn1, self.bn1]


# -- losses: made of the two nets, a function of their features and labels, with the modules that learn beside the student ----------
Loss = Callable[[Features, Features, Tensor], Tensor]
Nets = tuple[Any, Any]


def soft(s: Tensor, t: Tensor, tau: float = TAU) -> Tensor:
    return F.kl_div(F.log_softmax(s / tau, 1), F.softmax(t / tau, 1), reduction="batchmean") * tau ** 2


def kd(nets: Nets, aux: nn.ModuleList) -> Loss:
    return lambda s, t, y: 0.1 * F.cross_entropy(s.scores, y) + 0.9 * soft(s.scores, t.scores)


def fitnet(nets: Nets, aux: nn.ModuleList) -> Loss:
    before, width = (net.widths[1] for net in nets)
    aux.append(nn.Sequential(conv(before, width, 1, bias=True), nn.BatchNorm2d(width), nn.ReLU()))
    return lambda s, t, y: F.cross_entropy(s.scores, y) + 100 * F.mse_loss(aux[0](s.stages[1]), t.stages[1])


def attention(x: Tensor) -> Tensor:
    return F.normalize(x.square().mean(1).flatten(1))


def at(nets: Nets, aux: nn.ModuleList) -> Loss:
    return lambda s, t, y: F.cross_entropy(s.scores, y) + 1000 * sum(
        (attention(a) - attention(b)).square().mean() for a, b in zip(s.stages, t.stages, strict=True))


def sp(nets: Nets, aux: nn.ModuleList) -> Loss:
    def similarity(f: Tensor) -> Tensor:
        f = f.flatten(1)
        return F.normalize(f @ f.T)
    return lambda s, t, y: F.cross_entropy(s.scores, y) + 3000 * (similarity(t.stages[-1]) - similarity(s.stages[-1])).square().mean()


class Variational(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.mu = nn.Sequential(conv(before, width, 1), nn.ReLU(), conv(width, width, 1), nn.ReLU(), conv(width, width, 1))
        self.rho = nn.ParameterList([torch.zeros(width)])     # a list, so that it comes behind the convolutions

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        v = (F.softplus(self.rho[0]) + 1e-5).view(1, -1, 1, 1)
        return (0.5 * ((self.mu(s) - t).square() / v + v.log())).mean()


def vid(nets: Nets, aux: nn.ModuleList) -> Loss:
    aux.extend(Variational(*widths) for widths in zip(*(net.widths for net in nets), strict=True))
    return lambda s, t, y: F.cross_entropy(s.scores, y) + sum(each(a, b) for each, a, b in zip(aux, s.stages, t.stages, strict=True))


def distances(f: Tensor) -> Tensor:
    squared = f.square().sum(1)
    d = (squared[:, None] + squared - 2 * f @ f.T).clamp_min(1e-12).sqrt() * (1 - torch.eye(len(f), device=f.device))
    return d / d[d > 0].mean()


def angles(f: Tensor) -> Tensor:
    e = F.normalize(f[None] - f[:, None], dim=2)
    return torch.bmm(e, e.transpose(1, 2)).view(-1)


def rkd(nets: Nets, aux: nn.ModuleList) -> Loss:
    def loss(s: Features, t: Features, y: Tensor) -> Tensor:
        with torch.no_grad():
            d, a = distances(t.pooled), angles(t.pooled)
        return F.cross_entropy(s.scores, y) + 25 * F.smooth_l1_loss(distances(s.pooled), d) + 50 * F.smooth_l1_loss(angles(s.pooled), a)
    return loss


def pkt(nets: Nets, aux: nn.ModuleList) -> Loss:
    def probabilities(f: Tensor) -> Tensor:
        u = f / (f.norm(dim=1, keepdim=True) + 1e-7)
        similar = (u @ u.T + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    def loss(s: Features, t: Features, y: Tensor) -> Tensor:
        p, q = probabilities(s.pooled), probabilities(t.pooled)
        return F.cross_entropy(s.scores, y) + 30000 * (q * ((q + 1e-7) / (p + 1e-7)).log()).mean()
    return loss


def ab(nets: Nets, aux: nn.ModuleList) -> Loss:
    """The second stage: the labels alone."""
    return lambda s, t, y: F.cross_entropy(s.scores, y)


def encoder(before: int, width: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise((before, before, width, width)):
        layers += [conv(a, b, bias=True), *[nn.BatchNorm2d(b)] * norm, nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers)


def ft(nets: Nets, aux: nn.ModuleList) -> Loss:
    """The second stage, with a paraphraser that is there already."""
    before, width = (net.widths[2] for net in nets)
    paraphraser, translator = encoder(width, width // 2, norm=False), encoder(before, width // 2, norm=True)
    paraphraser.requires_grad_(False)
    aux.extend([paraphraser, translator])

    def loss(s: Features, t: Features, y: Tensor) -> Tensor:
        with torch.no_grad():
            other = attention(paraphraser(t.stages[-1]))
        return F.cross_entropy(s.scores, y) + 200 * (attention(translator(s.stages[-1])) - other).abs().mean()
    return loss


def oh(nets: Nets, aux: nn.ModuleList) -> Loss:
    """The teacher's BatchNorm follows the batches."""
    student, teacher = nets
    teacher.train()
    for net in nets:
        net.tapped = True
    aux.extend(nn.Sequential(conv(a, b, 1), nn.BatchNorm2d(b)) for a, b in zip(student.widths, teacher.widths, strict=True))
    found: list[Tensor] = []

    def margin(norm: nn.BatchNorm2d) -> Tensor:
        s, b = norm.weight.detach().abs(), norm.bias.detach()
        below = torch.special.ndtr(-b / s)
        return torch.where(below > 1e-3, b - s * torch.exp(-(b / s).square() / 2) / (2 * torch.pi) ** 0.5 / below, -3 * s).view(1, -1, 1, 1)

    def loss(s: Features, t: Features, y: Tensor) -> Tensor:
        if not found:
            found.extend(map(margin, teacher.norms()))
        total = F.cross_entropy(s.scores, y)
        for i, (a, b, m) in enumerate(zip(s.preacts, t.preacts, found, strict=True)):
            mine, other = aux[i](a), torch.maximum(b, m)
            total = total + ((mine - other).square() * ((mine > other) | (other > 0))).sum() / len(y) / 1000 / 2 ** (2 - i)
        return total
    return loss


def crd(nets: Nets, aux: nn.ModuleList, samples: int = 50_000, negatives: int = 16_384) -> Loss:
    """The negatives come with the batch, as the authors' data set draws them in other processes: here they are drawn once."""
    aux.extend(nn.Linear(net.widths[2], 128) for net in nets)
    banks = [F.normalize(torch.randn(samples, 128)) for _ in nets]
    c, z, drawn = negatives / samples, list[Tensor](), list[Tensor]()

    def loss(s: Features, t: Features, y: Tensor) -> Tensor:
        if not drawn:
            drawn.append(torch.randint(0, samples, (len(y), 1 + negatives)))
        indices = drawn[0]
        e = [F.normalize(embed(f.pooled)) for embed, f in zip(aux, (s, t), strict=True)]
        total = F.cross_entropy(s.scores, y)
        for side in range(2):
            rows = banks[1 - side].index_select(0, indices.view(-1)).view(len(y), -1, 128)
            o = torch.exp(torch.bmm(rows, e[side][:, :, None])[..., 0] / 0.07)
            if len(z) <= side:
                z.append(o.detach().mean() * samples)
            o = o / z[side]
            total = total - 0.8 / len(y) * ((o[:, 0] / (o[:, 0] + c + 1e-7)).log().sum() + (c / (o[:, 1:] + c + 1e-7)).log().sum())
        with torch.no_grad():
            for bank, each in zip(banks, e, strict=True):
                bank.index_copy_(0, indices[:, 0], F.normalize(bank[indices[:, 0]] * 0.5 + each * 0.5))
        return total
    return loss


LOSSES: dict[str, Callable[[Nets, nn.ModuleList], Loss]] = {
    "kd": kd, "fitnet": fitnet, "at": at, "sp": sp, "vid": vid, "rkd": rkd, "pkt": pkt, "ab": ab, "ft": ft, "oh": oh, "crd": crd}


# -- an iteration --------------------------------------------------------------------------------------------------------------
def training_step(method: str, student: Any, teacher: Any, weights: dict[str, Sequence[Tensor]], images: Tensor,
                  labels: Tensor) -> Callable[[], Tensor]:
    """A function that trains for one iteration on the batch and returns its loss.

    weights    of "student", "teacher" and "adapters": the parameters in the order of hintkd's nets, whose teachers end where nothing
               above is asked for
    """
    aux = nn.ModuleList()
    student.train()
    teacher.eval().requires_grad_(False)
    loss_of = LOSSES[method]((student, teacher), aux)
    for name, module in (("teacher", teacher), ("student", student), ("adapters", aux)):
        with torch.no_grad():
            for target, value in zip(module.parameters(), weights[name], strict=name != "teacher"):
                target.copy_(value.view(target.shape))
        module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in (*student.parameters(), *aux.parameters()) if p.requires_grad], RATE, MOMENTUM,
                                weight_decay=DECAY, foreach=True)

    def step() -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            other = teacher(x)
        loss = loss_of(student(x), other, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step
