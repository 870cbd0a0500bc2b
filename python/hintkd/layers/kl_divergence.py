"""Knowledge distillation as Hinton et al. 2015 have it in the code bases that came later: a divergence, scaled by tau^2."""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hintkd.layers.common import log_softmax
from hintkd.layers.pair_loss import PairLoss


class KLDivergence(PairLoss):
    """tau^2 / N * sum p_t log(p_t / p_s), p = softmax(logits / tau), for logits (N, C) of student and teacher.

    Unlike SoftenedCrossEntropy it is 0 where both agree, and has no label term: the label's loss is a SoftmaxWithLoss beside it.
    param_str: tau 4.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"tau": 4.0}

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        tau, n = self.p["tau"], len(s)
        soft, target = log_softmax(s.reshape(n, -1) / tau), log_softmax(t.reshape(n, -1) / tau)
        p = np.exp(target)
        return (p * (target - soft)).sum() * tau ** 2 / n, (np.exp(soft) - p) * (tau / n)

    def torch_form(self, s: Any, t: Any) -> Any:
        from torch.nn import functional as F
        tau = self.p["tau"]
        soft, target = F.log_softmax(s.flatten(1) / tau, 1), F.log_softmax(t.flatten(1) / tau, 1)
        return F.kl_div(soft, target, reduction="sum", log_target=True) * (tau ** 2 / len(s))
