"""The loss of activation boundaries."""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hintkd.layers.pair_loss import PairLoss


class BoundaryLoss(PairLoss):
    """Sum over all elements, divided by N, of (s + m)^2 where t <= 0 and s > -m, and (s - m)^2 where t > 0 and s <= m (Heo et al. 2019).

    Bottoms: responses before ReLU, of the student's connector and of the teacher, equal in shape.  In the sources each map's loss has
    the weight .003 / 2^(L - l), l = 1 .. L.
    param_str: margin 1.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"margin": 1.0}

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        m, on = self.p["margin"], t > 0
        away = np.where(on, np.where(s <= m, s - m, 0), np.where(s > -m, s + m, 0))
        return np.square(away).sum() / len(s), 2 * away / len(s)

    def torch_form(self, s: Any, t: Any) -> Any:
        m = self.p["margin"]
        on = (t > 0).to(s.dtype)
        away = (s - m).clamp(max=0) * on + (s + m).clamp(min=0) * (1 - on)
        return away.square().sum() / len(s)
