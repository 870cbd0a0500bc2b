"""Stages are equal by what they do, not by who made them or what they are called."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hintkd.backend import caffe_pb2
from hintkd.methods.stage import Stage, Weights


def stage(title: str = "kd", seed: int = 1, **more: object) -> Stage:
    net = caffe_pb2.NetParameter(name="net")
    net.layer.add(name="x", type="Input", top=["x"])
    return Stage(title, net, caffe_pb2.SolverParameter(random_seed=seed), **more)  # type: ignore[arg-type]


def test_the_title_does_not_distinguish_stages() -> None:
    assert stage("hint") == stage("hint2") and hash(stage("hint")) == hash(stage("hint2"))
    assert {stage("hint"): 1}[stage("hint2")] == 1


@pytest.mark.parametrize("other", [
    stage(seed=2), stage(drop=("fc",)), stage(program="fight"), stage(weights_in=(Weights(Path("a.caffemodel")),)),
])
def test_whatever_decides_the_outcome_distinguishes_stages(other: Stage) -> None:
    assert stage() != other


def test_weights_in_are_part_of_a_stage_all_the_way_down() -> None:
    def built(seed: int, prefix: str = "", layers: tuple[str, ...] | None = None) -> Stage:
        return stage(weights_in=(Weights(stage(weights_in=(Weights(stage(seed=seed)),)), prefix, layers),))
    assert built(1) == built(1)
    assert len({built(1), built(2), built(1, "teacher/"), built(1, "", ("fc",))}) == 4


def test_changing_a_copy_does_not_keep_the_old_digest() -> None:
    first = stage()
    assert first.digest != replace(first, drop=("fc",)).digest


def test_weights_out_leave_the_dropped_behind() -> None:
    kept = stage(drop=("teacher/", "regressor"))
    assert [name for name in ("first_conv", "teacher/fc", "regressor2", "fc") if kept.keeps(name)] == ["first_conv", "fc"]
    assert stage().keeps("teacher/fc")


def test_sources_are_the_stages_among_the_weights() -> None:
    first = stage(seed=3)
    assert stage(weights_in=(Weights(Path("a.caffemodel")), Weights(first))).sources == (first,)
