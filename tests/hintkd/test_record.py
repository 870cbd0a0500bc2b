"""Parts of records and of what is printed about a run, against values worked out by hand."""
from __future__ import annotations

from pathlib import Path

import pytest

import experiments
from hintkd.experiment import DATASETS, Experiment
from hintkd.run.progress import clock
from hintkd.study import record
from hintkd.study.record import Run, best, changes, fingerprints


def experiment(**changes: object) -> Experiment:
    return experiments.experiment(**{"dataset": DATASETS["mnist"], "net": 2, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value", "iteration"), [("accuracy", 0.9, 20), ("loss", 0.1, 10), ("kd_loss", 0.1, 10)])
def test_the_best_of_a_loss_is_its_lowest_and_the_first_of_equals_counts(name: str, value: float, iteration: int) -> None:
    assert best(name, [(10, 0.1), (20, 0.9), (30, 0.9), (40, 0.1)]) == {"value": value, "iteration": iteration}


def test_a_rate_is_recorded_where_it_changes() -> None:
    assert changes([(0, 0.1), (5, 0.1), (10, 0.01), (15, 0.01)]) == [(0, 0.1), (10, 0.01)]
    assert changes([]) == []


def test_results_lie_under_names_that_say_what_they_are() -> None:
    named = Run("table3", experiment(row="falling"), ())
    assert named.record == Path("results/measured/table3/falling/net2.json")
    first, third = Run("table3-scale0.05", experiment(), ()), Run("table3", experiment(net=1), (), repeat=3)
    assert first.record == Path("results/measured/table3-scale0.05/kd/net2.json")
    assert first.weights == Path("runs/weights/table3-scale0.05/kd/net2")
    assert third.record == Path("results/measured/table3/repeat3/kd/net1.json")


def test_all_data_that_were_read_are_named_by_their_fingerprint() -> None:
    parts = {"net.data.data_param.source": "data abc/train_lmdb", "net.data.transform_param.mean_file": "data abc/train_mean.binaryproto",
             "solver.base_lr": 0.1, "net.conv.type": "Convolution"}
    assert fingerprints([parts]) == {"data.data_param.source": "abc/train_lmdb",
                                     "data.transform_param.mean_file": "abc/train_mean.binaryproto"}


def test_outside_a_git_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "__file__", str(tmp_path / "study" / "record.py"))
    assert record.commit() == {"commit": None, "dirty": None}


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (59.9, "59.9 s"), (187, "03:07"), (18000, "5:00:00")])
def test_durations_are_told_for_people(seconds: float, text: str) -> None:
    assert clock(seconds) == text
