"""Stages are equal by what they do, not by who made them or what they are called."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hintkd.backend import caffe_pb2
from hintkd.methods.stage import Part, Stage, Weights


def part(name: str = "", seed: int = 1, **more: object) -> Part:
    net = caffe_pb2.NetParameter(name="net")
    net.layer.add(name="x", type="Input", top=["x"])
    return Part(name, net, caffe_pb2.SolverParameter(random_seed=seed, max_iter=10 * seed), **more)  # type: ignore[arg-type]


def stage(title: str = "kd", seed: int = 1, **more: object) -> Stage:
    return Stage(title, (part(seed=seed, **more),))


def test_the_title_does_not_distinguish_stages() -> None:
    assert stage("hint") == stage("hint2") and hash(stage("hint")) == hash(stage("hint2"))
    assert {stage("hint"): 1}[stage("hint2")] == 1


@pytest.mark.parametrize("other", [
    stage(seed=2), stage(drop=("fc",)), replace(stage(), program="fight"), stage(weights_in=(Weights(Path("a.caffemodel")),)),
    replace(stage(), source="mine.py"), Stage("kd", (part(), part("other"))),
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
    assert first.digest != replace(first, program="fight").digest


def test_weights_out_leave_the_dropped_behind() -> None:
    kept = stage(drop=("teacher/", "regressor"))
    assert [name for name in ("first_conv", "teacher/fc", "regressor2", "fc") if kept.keeps(name)] == ["first_conv", "fc"]
    assert stage().keeps("teacher/fc")


def test_a_stage_of_one_part_is_asked_as_if_it_were_the_part() -> None:
    one = Stage.solve("kd", part().net, part().solver, drop=("fc",))
    assert (one.net, one.solver, one.drop, one.weights_in, one.iterations) == (part().net, part().solver, ("fc",), (), 10)
    assert one == stage(drop=("fc",)) and one.part().name == ""


def test_a_stage_of_several_parts_has_the_sources_of_all_and_the_longest_ones_iterations() -> None:
    first, second = stage(seed=3), stage(seed=4)
    both = Stage("fight", (part("g", weights_in=(Weights(first),)), part("d", seed=2, weights_in=(Weights(second, part="d"),))))
    assert both.sources == (first, second) and both.iterations == 20
    assert both.net == part().net and both.solver == both.part("g").solver and both.weights_in == (Weights(first),)
    assert both.part("d").solver.random_seed == 2


def test_sources_are_the_stages_among_the_weights() -> None:
    first = stage(seed=3)
    assert stage(weights_in=(Weights(Path("a.caffemodel")), Weights(first))).sources == (first,)
