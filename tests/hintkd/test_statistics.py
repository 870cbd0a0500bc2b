"""Means, spreads and verdicts, against numbers worked out by hand and rules that must hold for any numbers."""
from __future__ import annotations

from math import isclose, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintkd.metrics import METRICS
from hintkd.results.verdicts import Spread, against_best, difference, over_nets, overall, spread, student_t, verdict

VALUES = st.dictionaries(st.tuples(st.integers(1, 3), st.integers(1, 4)), st.integers(0, 1000).map(lambda tenths: tenths / 8), min_size=1)


def test_spread_of_three_nets():
    found = spread([91.0, 92.0, 93.0])
    assert found == Spread(92.0, 1.0, 3)
    assert isclose(found.error, 1 / sqrt(3))


@pytest.mark.parametrize(("freedom", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_students_t_is_that_of_the_printed_tables(freedom, printed):
    assert round(student_t(freedom), 3) == printed


def test_students_t_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for freedom in range(1, 60):
        for confidence in (0.9, 0.95, 0.99):
            assert isclose(student_t(freedom, confidence), stats.t.ppf((1 + confidence) / 2, freedom), rel_tol=1e-9)


def test_where_there_is_no_difference_few_are_found():
    draws = np.random.default_rng(3).normal(size=(4000, 3))
    verdicts = [verdict(spread(list(each))) for each in draws]
    assert verdicts.count("within noise") / len(verdicts) == pytest.approx(0.95, abs=0.01)
    assert np.mean(np.abs(draws.mean(axis=1)) > 2 * draws.std(axis=1, ddof=1) / sqrt(3)) > 0.15        # what two standard errors would say


def test_the_interval_lies_around_the_mean():
    low, high = spread([91.0, 92.0, 93.0]).interval
    assert isclose(low, 92 - 4.302653 / sqrt(3), rel_tol=1e-6) and isclose(high, 92 + 4.302653 / sqrt(3), rel_tol=1e-6)


def test_one_value_has_no_error_and_none_no_spread():
    one = spread([90.0])
    assert one == Spread(90.0, None, 1) and one.error is None and one.interval is None
    assert spread([]) is None


def test_differences_are_paired_by_net():
    left, right = {(1, 1): 93.0, (1, 2): 91.0, (1, 3): 95.0}, {(1, 1): 92.0, (1, 2): 90.0, (1, 4): 0.0}
    assert difference(left, right) == Spread(1.0, 0.0, 2)          # unpaired, the spread of 93 and 91 would hide it
    assert difference({(1, 1): 1.0}, {(1, 2): 1.0}) is None


def test_replications_count_once_each():
    left = {(1, 1): 3.0, (1, 2): 5.0, (2, 1): 1.0, (2, 2): 1.0}
    right = dict.fromkeys(left, 0.0)
    assert difference(left, right) == Spread(2.5, sqrt(4.5), 2)     # of the means 4 and 1
    assert overall(left) == Spread(2.5, sqrt(4.5), 2)


def test_a_teacher_stands_for_every_net_of_its_replication():
    nets = {(1, 1): 90.0, (1, 2): 92.0, (2, 1): 91.0}
    assert over_nets({(1, 1): 95.0, (2, 1): 96.0}, nets) == {(1, 1): 95.0, (1, 2): 95.0, (2, 1): 96.0}
    assert over_nets({(1, 1): 95.0}, {(2, 1): 91.0}) == {}


def test_the_best_net_of_a_replication_is_one_sample():
    left = {(1, 1): -0.41, (1, 2): -0.38, (2, 1): -0.40}
    right = {(1, 1): -0.39, (1, 2): -0.39, (2, 1): -0.41}
    found = against_best(left, right)
    assert found is not None and found.n == 2
    assert isclose(found.mean, 0.01) and isclose(found.deviation, 0.0, abs_tol=1e-12)
    once = against_best({(1, 1): 1.0}, {(1, 1): 2.0})
    assert once is not None and (once.mean, once.n, verdict(once)) == (-1.0, 1, "not judged")


@pytest.mark.parametrize(("gain", "expected"), [
    (Spread(4.31, sqrt(3), 3), "holds"),                            # of a standard error of 1; t is 4.303
    (Spread(4.30, sqrt(3), 3), "within noise"),
    (Spread(-4.31, sqrt(3), 3), "does not hold"),
    (Spread(2.79, sqrt(5), 5), "holds"),                            # 2.776
    (Spread(2.77, sqrt(5), 5), "within noise"),
    (Spread(0.0, 0.0, 3), "within noise"),
    (Spread(0.1, 0.0, 3), "holds"),
    (Spread(5.0, None, 1), "not judged"),
    (None, "not judged"),
])
def test_verdicts(gain, expected):
    assert verdict(gain) == expected


@pytest.mark.parametrize(("measured", "metric", "expected"), [
    (91.40, "accuracy", True), (92.00, "accuracy", True), (91.39, "accuracy", False), (92.01, "accuracy", False)])
def test_reproduced_within_three_tenths(measured, metric, expected):
    assert METRICS[metric].reproduces(measured, 91.70) is expected


def test_reproduced_error_within_a_twentieth():
    assert METRICS["error"].reproduces(0.466, 0.416) and not METRICS["error"].reproduces(0.467, 0.416)


def test_metrics_turn_what_a_test_kept_into_what_is_printed():
    accuracy, error, top5 = METRICS["accuracy"], METRICS["error"], METRICS["top-5"]
    assert (accuracy.value(0.9), error.value(0.9)) == (90, pytest.approx(10))
    assert accuracy.gain(91, 90) == 1 and error.gain(0.4, 0.5) == pytest.approx(0.1)
    assert accuracy.best(90, 91) == 91 and error.best(0.4, 0.5) == 0.4
    scores = np.array([[6, 5, 4, 3, 2, 1.0], [6, 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    assert top5.count(scores, np.array([4, 5, 0, 5])) == 0.5          # equal scores count as better, as in Caffe's Accuracy


@given(VALUES, VALUES)
def test_swapping_the_sides_turns_the_verdict(left, right):
    turned = {"holds": "does not hold", "does not hold": "holds"}
    there, back = verdict(difference(left, right)), verdict(difference(right, left))
    assert back == turned.get(there, there)


@given(VALUES, st.integers(-40, 40))
def test_a_method_is_never_better_than_itself_and_a_shift_is_found(values, shift):
    moved = {cell: value + shift for cell, value in values.items()}
    found = difference(moved, values)
    assert found is not None and found.mean == shift                # multiples of 1/8 are exact
    if found.error is not None:
        assert verdict(found) == ("holds" if shift > 0 else "does not hold" if shift < 0 else "within noise")


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_the_standard_deviation_is_numpys(values):
    found = spread(values)
    assert found is not None and found.deviation is not None
    assert isclose(found.mean, np.mean(values), abs_tol=1e-9)
    assert isclose(found.deviation, np.std(values, ddof=1), rel_tol=1e-9, abs_tol=1e-9)
