"""Knowledge distillation as Hinton et al. 2015 have it in the code bases that came later: a divergence, scaled by tau^2."""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hintkd.layers.common import log_softmax
from hintkd.layers.pair_loss import PairLoss


class KLDivergence(PairLoss):
    """tau^2 / N * sum p_t log(p_t / p_s), p = softmax(logits / tau), for logits (N, C) of student and teacher.

    Unlike SoftenedCrossEntropy it is 0 where both agree, and has no label term: the label's loss is a SoftmaxWithLoss beside it.
    param_str: tau 4; detached true: false lets the gradient into the teacher's logits, too, for one that learns beside its student.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"tau": 4.0, "detached": True}

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        tau, n = self.p["tau"], len(s)
        soft, target = log_softmax(s.reshape(n, -1) / tau), log_softmax(t.reshape(n, -1) / tau)
        p, ratio = np.exp(target), target - soft
        self.for_teacher = p * (ratio - (p * ratio).sum(axis=1, keepdims=True)) * (tau / n)
        return (p * ratio).sum() * tau ** 2 / n, (np.exp(soft) - p) * (tau / n)

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        super().backward(top, propagate_down, bottom)
        if propagate_down[1] and not self.p["detached"]:
            bottom[1].diff[...] = (self.for_teacher * top[0].diff.reshape(-1)[0]).reshape(bottom[1].diff.shape)

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors."""
        student, teacher = bottoms
        return self.torch_form(student, teacher.detach() if self.p["detached"] else teacher).reshape(1)

    def torch_form(self, s: Any, t: Any) -> Any:
        from torch.nn import functional as F
        tau = self.p["tau"]
        soft, target = F.log_softmax(s.flatten(1) / tau, 1), F.log_softmax(t.flatten(1) / tau, 1)
        return F.kl_div(soft, target, reduction="sum", log_target=True) * (tau ** 2 / len(s))
