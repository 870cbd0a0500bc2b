"""The loss of attention transfer, which factor transfer uses, too."""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hintkd.layers.pair_loss import PairLoss
from hintkd.layers.units import through_unit_rows, unit_rows

EPS = 1e-12                                 # torch.nn.functional.normalize's


class AttentionLoss(PairLoss):
    """mean |A_s - A_t|^norm over N x H W, where A is the mean over channels of F^power, of length 1 per image.

    Bottoms (N, C_s, H, W) and (N, C_t, H, W); sizes are made equal by a pooling layer before.  norm 2 and power 2: Zagoruyko and
    Komodakis 2017 as RepDistiller has it, for one pair of maps.  norm 1: the loss between factors of Kim et al. 2018.
    An image of zeros has an attention of zeros and a gradient of zeros.
    param_str: power 2, norm 2 (or 1).
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"power": 2, "norm": 2}

    def setup(self, bottom: Any, top: Any) -> None:
        super().setup(bottom, top)
        if self.p["power"] < 1 or self.p["norm"] not in (1, 2):
            raise ValueError("param_str: power must be at least 1, and norm 1 or 2")

    def check(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        if student[2:] != teacher[2:] or len(student) != 4:
            raise ValueError(f"AttentionLoss: the maps {student} and {teacher} differ in height or width; pool the larger one")

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        power, n = self.p["power"], len(s)
        (mine, length), (other, _) = (unit_rows((x ** power).mean(1).reshape(n, -1), EPS) for x in (s, t))
        difference = mine - other
        if self.p["norm"] == 2:
            loss, da = np.square(difference).mean(), 2 * difference / difference.size
        else:
            loss, da = np.abs(difference).mean(), np.sign(difference) / difference.size
        mean = through_unit_rows(da, mine, length, EPS).reshape(n, 1, *s.shape[2:])
        return loss, mean * power * s ** (power - 1) / s.shape[1]

    def torch_form(self, s: Any, t: Any) -> Any:
        from torch.nn import functional as F
        mine, other = (F.normalize(x.pow(self.p["power"]).mean(1).flatten(1)) for x in (s, t))
        return F.mse_loss(mine, other) if self.p["norm"] == 2 else F.l1_loss(mine, other)
