"""The distillation methods of the CIFAR-100 zoo, as RepDistiller, SSKD and the overhaul's authors train them.

A method is what it adds to a student beside its teacher: adapters of stock layers (nets/adapters.py) and losses (layers/).  Weights and
taps are RepDistiller's; f is the list (stem, ends of the stages, pooled features), so f[-1] are the pooled features.
"""
from __future__ import annotations

from hintkd.experiment import Experiment
from hintkd.methods import common
from hintkd.methods.method import Line, method
from hintkd.methods.stage import Stage
from hintkd.methods.zoo_protocol import SCHEDULES, Options, Schedule, at_own_rate, distilled_stage
from hintkd.nets.distilled import Distilled

__all__ = ["SCHEDULES", "SOURCE", "Options", "Schedule"]
SOURCE = ("Tian, Krishnan, Isola 2020, Contrastive Representation Distillation, arXiv 1910.10699, and the methods that it compares with; "
          "Xu, Liu, Li, Loy 2020 (SSKD), arXiv 2006.07114; Heo et al. 2019 (overhaul), arXiv 1904.01866")


@method(needs_teacher=False, line=Line("#000000", ":"))
def original(x: Experiment) -> list[Stage]:
    """No teacher: plain softmax cross-entropy."""
    return common.original(at_own_rate(x))


@method(line=Line("#E69F00"))
def kd(x: Experiment) -> list[Stage]:
    """Softened class scores: 0.1 CE + 0.9 tau^2 KL(p_t, p_s) (Hinton et al. 2015)."""
    return [distilled_stage(x, Distilled(x), "kd", gamma=0.1, alpha=0.9)]
