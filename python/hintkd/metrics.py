"""Metrics: from what a test kept to the number that a paper prints, which way is better, and how close counts as reproduced.

A test keeps every output of the TEST net, averaged over the test set, and the class scores and labels of all its images.  A metric is a
function of one of these outputs, or of the scores and labels, from which a number of its own name is then counted when a record is written.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Scores = np.ndarray                                          # (images, classes)
Labels = np.ndarray                                          # (images,)


@dataclass(frozen=True)
class Metric:
    """How a paper's numbers are made.

    name              as tables call it
    output            the test's number that it is made from
    value             from that number to the printed one
    more_is_better    whether a higher value is better
    close             by how much a mean of full schedules may differ from the published mean and count as reproduced, in the printed unit
    digits            decimals of a mean; a net's value has 2
    unit              of the printed number
    count             makes the test's number of the class scores and labels, where no output of the TEST net is it
    """
    name: str
    output: str
    value: Callable[[float], float]
    more_is_better: bool = True
    close: float = 0.3
    digits: int = 2
    unit: str = "%"
    count: Callable[[Scores, Labels], float] | None = None

    def gain(self, left: float, right: float) -> float:
        """By how much the first printed value is better than the second."""
        return left - right if self.more_is_better else right - left

    def reproduces(self, measured: float, published: float) -> bool:
        """Whether a mean of full-schedule runs counts as the published mean."""
        return round(abs(measured - published), 9) <= self.close

    def best(self, *values: float) -> float:
        """The best of some printed values."""
        return max(values) if self.more_is_better else min(values)


def top_k(scores: Scores, labels: Labels, k: int) -> float:
    """The part of the images whose class is among the k with the highest scores; as in Caffe's Accuracy, equal scores count against it."""
    own = scores[np.arange(len(labels)), labels]
    return float(np.mean((scores >= own[:, None]).sum(axis=1) <= k))


METRICS = {each.name: each for each in (
    Metric("accuracy", "accuracy", lambda part: 100 * part),
    Metric("error", "accuracy", lambda part: 100 * (1 - part), more_is_better=False, close=0.05, digits=3),
    Metric("top-5", "top-5", lambda part: 100 * part, count=lambda scores, labels: top_k(scores, labels, 5)),
)}


def metric_of(output: str) -> Metric:
    """The first metric that is made from the test's number of this name."""
    return next(metric for metric in METRICS.values() if metric.output == output)


def with_counted(outputs: Mapping[str, float], output: str, kept: Callable[[], tuple[Scores, Labels]]) -> dict[str, float]:
    """What a test measured, with the number of this name: where no output is it, it is counted of the scores and labels that were kept."""
    count = None if output in outputs else metric_of(output).count
    return {**outputs, **({output: count(*kept())} if count else {})}
