"""Stages of one kind that train together: who joins whom, and what happens to a group."""
from __future__ import annotations

import json

import pytest

import tiny
from hintkd.methods.stage import Stage, Weights
from hintkd.run.executor import LocalExecutor
from hintkd.run.plan import Plan, Task
from running import Immediate, numerics, run

pytestmark = pytest.mark.usefixtures("workspace")


def second_stages() -> list[Stage]:
    """A first stage, and four of one kind that start from it: s2, s3, s4 and s5."""
    first = Stage.solve("first", tiny.net(), tiny.solver(iterations=20))
    return [first, *(Stage.solve(f"s{seed}", tiny.net(), tiny.solver(seed), weights_in=(Weights(first, layers=("hidden",)),))
                     for seed in (2, 3, 4, 5))]


def test_stages_of_one_kind_train_together() -> None:
    executor = Immediate()
    wide = Stage.solve("wide", tiny.net(hidden=8), tiny.solver(2))
    _, _, watcher = run([*second_stages(), wide], executor, slots=1, together=3)
    assert sorted(executor.order) == ["first", "s2+s3+s4", "s5", "wide"]
    assert sorted(what for what, _ in watcher.events) == ["begin", *["finished"] * 6, *["started"] * 6]


def test_a_begun_group_stays_together_and_one_that_cannot_is_made_anew() -> None:
    stages = second_stages()
    plan = Plan(stages, numerics(together=2))
    first, *tasks = (plan.task(stage) for stage in stages)
    ready = [task.key for task in reversed(tasks)]

    def begin(*group: Task) -> None:
        for task in group:
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / "progress.json").write_text(json.dumps({"group": [each.key for each in group]}))
    assert plan.group(tasks[0], ready) == tasks[:2]
    begin(tasks[0], tasks[2])
    assert plan.group(tasks[2], ready) == [tasks[0], tasks[2]] and plan.group(tasks[1], ready) == [tasks[1], tasks[3]]
    assert plan.group(tasks[2], ready[:3]) == [tasks[1], tasks[2]]
    begin(tasks[1])
    assert plan.group(tasks[1], ready) == [tasks[1]] and plan.group(tasks[3], ready) == [tasks[3]]
    assert plan.group(first, [first.key]) == [first]


def test_a_failed_group_fails_all_of_its_stages_and_says_why_once() -> None:
    plan, runner, _ = run(second_stages(), Immediate(failing="s3"), together=3)
    why, *others = runner.failures.values()
    first = plan.tasks[next(iter(runner.failures))].folder.name
    assert why == "it diverged" and others == [f"it trains together with {first}, which failed"] * 2


def test_a_stage_without_its_weights_leaves_its_group() -> None:
    stages = second_stages()
    stages[2] = Stage.solve("bad", tiny.net(), tiny.solver(3), weights_in=(Weights(stages[0], layers=("nowhere",)),))
    executor = Immediate()
    _, runner, _ = run(stages, executor, slots=1, together=3)
    assert executor.order == ["first", "s2+s4+s5"] and len(runner.failures) == 1


def test_the_stage_program_trains_a_group(executor: LocalExecutor) -> None:
    plan, runner, _ = run(second_stages(), executor, together=4)
    assert not runner.failures and all(task.is_finished for task in plan.tasks.values())
    assert [task.result()["together"] for task in plan.tasks.values()] == [1, 4, 4, 4, 4]
