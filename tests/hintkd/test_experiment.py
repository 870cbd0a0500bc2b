"""Experiments: what is scaled and how, seeds, and what is refused."""
from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import experiment
from hintkd.errors import UserError
from hintkd.experiment import DATASETS
from hintkd.methods.hint_2019 import SCHEDULES, Options, Schedule
from hintkd.nets.resnet import ResNet


def test_known_data_sets_are_tested_whole() -> None:
    sizes = {"mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000, "cifar100-zoo": 10_000, "digits": 1_000,
             "digits-teacher": 1_000}
    assert {name: dataset.test_size for name, dataset in DATASETS.items()} == sizes


def test_stage_1_is_as_long_in_three_steps_as_in_one() -> None:
    for schedule in SCHEDULES.values():
        assert sum(schedule.layerwise_iterations) == schedule.hint_iterations


def test_scaling_shortens_every_stage_and_keeps_rates() -> None:
    short = Schedule().scaled(0.05)
    assert (short.iterations, short.teacher_iterations, short.hint_iterations, short.layerwise_iterations, short.sl_iterations) == (
        3_200, 3_200, 1_250, (150, 350, 750), 600)
    assert (short.steps, short.base_lr, short.hint_lr) == ((0.5, 0.75), 0.1, 1e-4)
    assert Schedule().scaled(1e-9).layerwise_iterations == (1, 1, 1)


@pytest.mark.parametrize(("fraction", "scale", "expected"), [
    (0.999, 1, 0.999), (0.999, 0.05, 0.98), (0.999, 0.001, 0.9), (0.95, 1, 0.95), (0.85, 0.5, 0.85)])
def test_moving_averages_become_as_much_shorter_as_the_run(fraction: float, scale: float, expected: float) -> None:
    assert experiment(scale=scale, options=Options(bn_fraction=fraction)).bn_fraction == pytest.approx(expected)


@pytest.mark.parametrize(("wrong", "complaint"), [
    ({"student": lambda: ResNet(9)}, "depths are 6n \\+ 2"),
    ({"student": lambda: ResNet(8, (16, 8, 4))}, "channel counts"),
    ({"options": lambda: Options(shortcut="C")}, "shortcut is 'C'; it must be one of 'A', 'B'"),
    ({"options": lambda: Options(regressor_kernel=2)}, "regressor_kernel"),
    ({"options": lambda: Options(bn_fraction=1)}, "bn_fraction"),
    ({"scale": lambda: 0}, "scale is 0"),
    ({"net": lambda: 0}, "counted from 1"),
    ({"lambda_schedule": lambda: "cosine"}, "lambda_schedule"),
    ({"teacher_dataset": lambda: DATASETS["mnist"]}, "other classes or images"),
])
def test_what_does_not_exist_is_refused(wrong: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        experiment(**{name: make() for name, make in wrong.items()})


def test_titles_name_unusual_widths() -> None:
    assert ResNet(26).title == "resnet26"
    assert ResNet(26, (32, 64, 128)).title == "resnet26-32-64-128"
    assert replace(ResNet(26), depth=32).n == 5
