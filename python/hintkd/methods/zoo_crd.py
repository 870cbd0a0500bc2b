"""Contrastive representation distillation: the zoo's method that tells an image's teacher from other images' teachers, and back."""
from __future__ import annotations

from math import prod

from hintkd.errors import UserError
from hintkd.experiment import Experiment
from hintkd.methods.method import Line, method
from hintkd.methods.stage import Stage
from hintkd.methods.zoo_protocol import distilled_stage, options, weighed
from hintkd.nets import adapters
from hintkd.nets.distilled import Distilled


@method(line=Line("#D55E00", "-."))
def crd(x: Experiment) -> list[Stage]:
    """An image against K others of other classes: CE - 0.8 sum over both nets of log h(e_s, e_t) + sum_k log(1 - h(e_s, e_t^k)), h =
    o / (o + K / N), o = exp(e_s e_t / 0.07) / Z, with memory banks (Tian et al. 2020)."""
    return [_stage(x, "crd", alpha=0)]


@method(line=Line("#D55E00", ":"))
def crd_kd(x: Experiment) -> list[Stage]:
    """CRD and, with the weight 1, KD: the row "CRD + KD" (Tian et al. 2020)."""
    return [_stage(x, "crd-kd", alpha=1)]


def _stage(x: Experiment, title: str, alpha: float) -> Stage:
    """The student, a linear embedding of each net's pooled features, and the loss with its banks, all left behind."""
    samples = x.dataset.train_size
    if not samples:
        raise UserError(f"data set {x.dataset.name}: {x.name} needs its train_size, for a row of a memory bank for each image")
    d = Distilled(x, positions=True)
    embedded = [adapters.linear(d.losses, f"crd_{side}", feature.blob, prod(feature.shape), options(x).crd_width)
                for side, feature in (("student", d.student.pooled), ("teacher", d.teacher.pooled))]
    d.loss("crd_loss", "contrastive", "ContrastiveLoss", [*embedded, "position"], weighed(options(x).beta, 0.8), blobs=4, towards=2,
           samples=samples, source=x.dataset.train_lmdb, negatives=min(options(x).crd_negatives, samples // 2))
    return distilled_stage(x, d, title, alpha=alpha)
