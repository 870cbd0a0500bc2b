"""Stages of a workspace that were trained under an earlier definition of the key."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from experiments import experiment
from hintkd.methods.method import stages_of
from hintkd.methods.stage import Stage
from hintkd.run import digests
from hintkd.run.earlier import kept
from hintkd.run.keys import Keys, Numerics, Parts, digest
from hintkd.run.plan import STAGES, Plan

NUMERICS = Numerics("torchcaffe", "torchcaffe 1 numeric 1")
OLD_LAYERS = "4264bdc1a88135b02a93f39752e9fa775e1a196817e9882fe2866128300198db"      # of the file that once held both losses
FILES = {"hintkd.layers.hint_loss": "06b0f4a511f4c826ebedf41f5ef13d2203064dca12a51bc5192bf988abdee07c",
         "hintkd.layers.softened_cross_entropy": "b5e72a4702ba74fa12e96e8e84c5b15b30760d35a67b3ef00890384270be693f"}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/cifar10").mkdir(parents=True)
    monkeypatch.setattr(digests, "facts", lambda folder: {"fingerprint": "abc"})
    for name in ("train_lmdb", "test_lmdb", "train_mean.binaryproto", "test_mean.binaryproto"):
        (tmp_path / "data/cifar10" / name).touch()
    return tmp_path


def stages() -> list[Stage]:
    """Teacher, hint, KD."""
    hint, kd = stages_of(experiment("hint-kd"))
    return [hint.sources[0], hint, kd]


def older(parts: Parts, stage: Stage, one_module: bool) -> Parts:
    """The parts as the first definition had them, with one module of losses or two."""
    made: Parts = {}
    for name, value in parts.items():
        if name == "solver.random_seed" and stage.solver.test_interval:
            made["solver.test_interval"] = stage.solver.test_interval
        if name.startswith("source of "):
            module = name.removeprefix("source of ")
            made["source of hintkd.layers" if one_module else name] = OLD_LAYERS if one_module else FILES[module]
        else:
            made[name] = "hintkd.layers" if one_module and name.endswith(".python_param.module") else value
    return made


def write(stage: Stage, key: str, parts: Parts, **files: Any) -> None:
    folder = STAGES / f"{stage.title}-{key[:12]}"
    folder.mkdir(parents=True)
    for name, content in {"key": {"key": key, "parts": parts}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("one_module", [False, True])
def test_a_chain_of_stages_is_found_under_its_earlier_keys(one_module: bool) -> None:
    keys, old = Keys(NUMERICS), dict[Stage, str]()
    for stage in stages():
        parts = keys.parts(stage)
        for index, weights in enumerate(stage.weights_in):
            parts = {**parts, f"weights[{index}]": [old[weights.source], *parts[f"weights[{index}]"][1:]]}
        parts = older(parts, stage, one_module)
        old[stage] = digest(parts)
        write(stage, old[stage], parts)
    plan = Plan(stages(), NUMERICS)
    assert [plan.task(stage).key for stage in stages()] == [old[stage] for stage in stages()]
    assert all(plan.task(stage).folder.is_dir() for stage in stages())
    assert [keys.key(stage) for stage in stages()] != [old[stage] for stage in stages()]
    for stage in stages():                                   # a runner writes today's parts into the folder, which keeps its key
        (plan.task(stage).folder / "key.json").write_text(json.dumps({"key": old[stage], "parts": plan.keys.parts(stage)}))
    assert Plan(stages(), NUMERICS).tasks.keys() == plan.tasks.keys()


def test_a_layer_that_computed_something_else_is_not_taken_for_todays() -> None:
    hint = stages()[1]
    parts = older(Keys(NUMERICS).parts(hint), hint, one_module=False) | {"source of hintkd.layers.hint_loss": "f" * 64}
    write(hint, "1" * 64, parts)
    assert Plan([hint], NUMERICS).task(hint).key == Keys(NUMERICS).key(hint)


def test_a_finished_stage_goes_before_others_of_the_same_hash() -> None:
    teacher = stages()[0]
    parts, keys = Keys(NUMERICS).parts(teacher), Keys(NUMERICS)
    write(teacher, keys.key(teacher), parts)
    assert kept(STAGES) == {}
    write(teacher, "1" * 64, parts | {"solver.test_interval": 7}, result={})
    assert kept(STAGES) == {keys.key(teacher): "1" * 64}


def test_folders_that_do_not_say_what_they_are_for_are_left_alone() -> None:
    write(Stage.solve("a", tiny.net(), tiny.solver()), "1" * 64, {})
    (STAGES / "b").mkdir()
    (STAGES / "b/key.json").write_text("{")
    assert kept(STAGES) == {}
