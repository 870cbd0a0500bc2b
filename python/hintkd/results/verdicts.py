"""Means, spreads and verdicts that know noise.  Pure functions of numbers: where these come from and how they are shown is left to others.

A verdict is taken on paired differences: net k of one method against net k of the other, because these share their seed.  Nets of one
run also share their teacher and Stage 1, so their spread understates the noise; over several complete replications the
verdict is therefore taken on one difference per replication.  With the few samples that there are, two standard errors would call a
difference real 18 times in 100 where there is none (n = 3); the interval is therefore Student's.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin, sqrt, tan
from typing import Literal

Verdict = Literal["holds", "does not hold", "within noise", "not judged"]
Values = Mapping[tuple[int, int], float]                     # (replication, net) -> value, both counted from 1

CONFIDENCE = 0.95                                            # of the interval that a verdict is taken on


@dataclass(frozen=True)
class Spread:
    """Mean of n values, their standard deviation (n - 1) and the standard error of the mean; both None for one value."""
    mean: float
    deviation: float | None
    n: int

    @property
    def error(self) -> float | None:
        return None if self.deviation is None else self.deviation / sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true mean lies with CONFIDENCE, by Student's t with n - 1 degrees of freedom; None for one value."""
        if self.error is None:
            return None
        half = student_t(self.n - 1) * self.error
        return self.mean - half, self.mean + half


@cache
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution with so many degrees of freedom exceeds, up or down, in 1 - confidence of all cases."""
    low, high = 0.0, pi / 2                                  # bounds of atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return sqrt(freedom) * tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= t) for t = sqrt(freedom) tan(angle) (Abramowitz and Stegun, 26.7.3 for odd and 26.7.4 for even degrees of freedom)."""
    odd = freedom % 2
    term, total = 1.0, 0.0
    for k in range(1, freedom - odd, 2):
        total += term
        term *= (k + odd) / (k + odd + 1) * cos(angle) ** 2
    return 2 / pi * (angle + sin(angle) * cos(angle) * total) if odd else sin(angle) * total


def spread(values: Sequence[float]) -> Spread | None:
    """The Spread of some values; None for no values."""
    if not values:
        return None
    mean = sum(values) / len(values)
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
    return Spread(mean, deviation, len(values))


def overall(values: Values) -> Spread | None:
    """The Spread over nets, or over the replications' means where there are several."""
    return spread(_samples(values))


def difference(left: Values, right: Values) -> Spread | None:
    """The Spread of left - right over the nets that both have, or over replications if there are several; None if they share no net.

    With several replications a sample is the mean over the nets of one of them.
    """
    return spread(_samples({cell: left[cell] - right[cell] for cell in sorted(left.keys() & right.keys())}))


def against_best(left: Values, right: Values) -> Spread | None:
    """As `difference`, of the best net of `left` in each replication; a sample is one replication."""
    common = sorted({cell[0] for cell in left} & {cell[0] for cell in right})

    def of(values: Values, repeat: int) -> list[float]:
        return [value for cell, value in values.items() if cell[0] == repeat]
    return spread([max(of(left, repeat)) - sum(of(right, repeat)) / len(of(right, repeat)) for repeat in common])


def over_nets(value: Values, nets: Values) -> Values:
    """What each replication has one of (a teacher), once for every net of `nets` in that replication."""
    single = {repeat: v for (repeat, _), v in value.items()}
    return {(repeat, net): single[repeat] for repeat, net in nets if repeat in single}


def verdict(gain: Spread | None) -> Verdict:
    """Whether a positive gain was found: the mean decides where its interval leaves 0 out.

    "not judged" where there is no interval: nothing was measured, or one sample only.
    """
    if gain is None or gain.interval is None:
        return "not judged"
    low, high = gain.interval
    return "holds" if low > 0 else "does not hold" if high < 0 else "within noise"


def _samples(values: Values) -> list[float]:
    """One value per net, or with several replications one mean per replication."""
    by_repeat: dict[int, list[float]] = {}
    for (repeat, _), value in sorted(values.items()):
        by_repeat.setdefault(repeat, []).append(value)
    if len(by_repeat) > 1:
        return [sum(each) / len(each) for each in by_repeat.values()]
    return [value for each in by_repeat.values() for value in each]
