"""A teacher is asked once: what that saves is counted, stages of all nets share what it has said, and no result depends on it."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny
from hintkd.backend import caffe_pb2
from hintkd.methods.stage import Stage, Weights
from hintkd.run.estimate import Estimate, estimate
from hintkd.run.executor import LocalExecutor
from hintkd.run.folders import REMEMBERED
from hintkd.run.plan import Plan
from hintkd.run.remembering import Memory, shares_asked
from running import interpreter, numerics, run

pytestmark = pytest.mark.usefixtures("workspace")
INPUTS, HIDDEN = tiny.TRAIN * 9, 16                          # windows of 6x6 in 8x8
BYTES = 4096 + INPUTS * (8 + 4 * HIDDEN)


def kd_net(weight: float = 1) -> caffe_pb2.NetParameter:
    """The tiny net with a teacher whose hidden layer it follows."""
    net = tiny.net(prefix="teacher/")
    net.layer.add(name="hint", type="EuclideanLoss", bottom=["hidden", "teacher/hidden"], top=["hint"], include=[{"phase": "TRAIN"}],
                  loss_weight=[weight], propagate_down=[True, False])
    return net


def stages(teacher_seed: int = 1, iterations: int = 60) -> list[Stage]:
    """A teacher and three stages under it, whose nets differ in a loss weight."""
    teacher = Stage.solve("teacher", tiny.net(), tiny.solver(teacher_seed))
    source = (Weights(teacher, prefix="teacher/", layers=("hidden",)),)
    return [teacher, *(Stage.solve("kd", kd_net(weight), tiny.solver(seed, iterations), source, ("teacher/",))
                       for seed, weight in ((2, 1), (3, 1), (4, 0.5)))]


@pytest.mark.parametrize("variants", [1, 6])
def test_how_many_different_inputs_are_asked_for(variants: int) -> None:
    records, random = 50, np.random.default_rng(0)
    memory = Memory("", records * variants, variants, 1, 0)
    for asked in (20, 50, 75, 130, 500):
        seen = [len({(i % records, v) for i, v in enumerate(random.integers(0, variants, asked))}) for _ in range(300)]
        assert memory.known(asked) == pytest.approx(np.mean(seen), abs=1e-9 if variants == 1 else 0.5)


def test_stages_under_one_teacher_share_what_it_says() -> None:
    plan = Plan([*stages(), *stages(teacher_seed=9)], numerics())
    keys = [key for key, task in plan.tasks.items() if task.stage.title == "kd"]
    shares = shares_asked(plan, {key: Memory("kind", 64, 1, 8, 0) for key in keys})
    assert list(shares.values()) == pytest.approx([64 / 480, 0, 0, 64 / 480, 0, 0])
    other = shares_asked(plan, {key: Memory(key, 64, 1, 8, 0) for key in keys})
    assert list(other.values()) == pytest.approx([64 / 480] * 6)


def test_an_estimate_counts_what_teachers_say_once(workspace: Path) -> None:
    with LocalExecutor(1) as executor:
        one, two = (estimate(Plan(plan, numerics()), executor, interpreter()) for plan in (stages(), [*stages(), *stages(teacher_seed=9)]))
    assert (one.remembered, two.remembered) == (BYTES, 2 * BYTES)
    assert isinstance(one, Estimate) and one.bytes > BYTES
    assert not REMEMBERED.exists() and not list(Path("runs").glob("estimate-*"))


def test_no_result_depends_on_what_is_remembered(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for remember in (True, False):
        (workspace / str(remember)).mkdir()
        (workspace / str(remember) / "data").symlink_to(workspace / "data")
        monkeypatch.chdir(workspace / str(remember))
        with LocalExecutor(2) as executor:
            plan = Plan(stages(), numerics())
            if not remember:
                REMEMBERED.parent.mkdir()
                REMEMBERED.write_text("")                    # where no folder can be
            _, runner, _ = run(stages(), executor)
            assert not runner.failures
        weights.append([task.weights.read_bytes() for task in plan.tasks.values()])
        logs = "".join((task.folder / "log.txt").read_text() for task in plan.tasks.values() if task.stage.title == "kd")
        assert ("remembers teacher/hidden" in logs) == remember and ("is not remembered" in logs) != remember
    assert weights[0] == weights[1]
    file, = (workspace / "True" / REMEMBERED).glob("*.table")
    assert file.stat().st_size == BYTES
    assert all("remember" not in json.dumps(plan.keys.parts(task.stage)) for task in plan.tasks.values())
