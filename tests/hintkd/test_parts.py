"""Stages of several parts: a folder, weights in and weights out for each, and one iteration from which all of them go on."""
from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from hintkd.backend import environment, read_weights
from hintkd.methods.stage import Part, Stage, Weights
from hintkd.run.executor import Interpreter
from hintkd.run.keys import Keys
from hintkd.run.mend import mend
from hintkd.run.plan import Plan
from hintkd.stage import program
from hintkd.stage.group import KEPT, Member, begin, now, prune, snapshot
from running import Immediate, numerics, run

pytestmark = pytest.mark.usefixtures("workspace")


class Killed(BaseException):
    """As a kill would stop it."""


def in_turns(members: list[Member], stop: int = 10**9) -> list[dict[str, Any]]:
    """A program of a cohort: an iteration of the one, an iteration of the other; then the first is tested."""
    (whole,) = members
    caffe, parts = program.prepare(whole.stage), whole.parts()
    begin(caffe, parts, environment("torchcaffe", "cpu"))
    while parts[0].solver.iter < parts[0].stage["iterations"]:
        for part in parts:
            part.solver.step(1)
        if parts[0].solver.iter % parts[0].stage["snapshot"] == 0:
            for part in parts:
                part.solver.snapshot()
                prune(part.folder, KEPT)
                part.note(iteration=part.solver.iter)
        if parts[0].solver.iter >= stop:
            raise Killed
    finals = [snapshot(part.folder, part.stage["iterations"], "caffemodel") for part in parts]
    outputs = program.measure(caffe, parts[0].folder, finals[0], parts[0].stage)
    return [{"title": whole.stage["title"], "iterations": parts[0].stage["iterations"], "outputs": outputs, "started": now(),
             "weights": {name: Path(final).name for name, final in zip(whole.stage["parts"], finals, strict=True)},
             "wall_s": time.time() - whole.clock, "finished": now(), "resumed": parts[0].progress["resumed"], "inexact": False}]


class Here(Immediate):
    """An executor that runs the stage process in this process."""

    def submit(self, function: Any, folders: list[str], interpreter: Interpreter) -> Future:
        future: Future = Future()
        program.run_together(folders)
        future.set_result(None)
        return future


@pytest.fixture(autouse=True)
def program_of_a_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.PROGRAMS, "in turns", in_turns)


def solver(seed: int) -> Any:
    made = tiny.solver(seed)
    made.snapshot = 20
    return made


def cohort(first: Stage | None = None, seed: int = 2) -> Stage:
    given = (Weights(first, layers=("hidden",)),) if first else ()
    return Stage("cohort", (Part("one", tiny.net(), solver(1), given), Part("other", tiny.net(), solver(seed), drop=("fc",))), "in turns")


def test_each_part_has_its_folder_its_weights_in_and_its_weights_out() -> None:
    first = Stage.solve("first", tiny.net(), tiny.solver())
    last = Stage.solve("last", tiny.net(), tiny.solver(lr=0.0), weights_in=(Weights(cohort(first), part="other"),))
    plan, runner, _ = run([last], Here())
    assert not runner.failures and [task.stage.title for task in plan.tasks.values()] == ["first", "cohort", "last"]
    task = plan.task(cohort(first))
    assert {path.name for path in task.folder.iterdir()} == {"key.json", "lock", "log.txt", "one", "other", "result.json", "stage.json"}
    init, trained = read_weights(task.folder / "one/init.caffemodel"), dict(read_weights(plan.task(first).weights))
    assert [name for name, _ in init] == ["hidden"] and np.array_equal(init[0][1][0], trained["hidden"][0])
    assert not (task.folder / "other/init.caffemodel").exists()
    one, other = (dict(read_weights(task.weights_of(part))) for part in task.stage.parts)
    assert sorted(one) == ["fc", "hidden"] and sorted(other) == ["hidden"]
    assert not np.array_equal(one["hidden"][0], other["hidden"][0])
    given = dict(read_weights(plan.task(last).folder / "init.caffemodel"))
    assert sorted(given) == ["hidden"] and np.array_equal(given["hidden"][0], other["hidden"][0])
    kept = task.predictions()
    assert task.result()["outputs"]["accuracy"] == pytest.approx(np.mean(kept["scores"].argmax(1) == kept["labels"]))


def test_parts_go_on_together_from_their_last_snapshots_and_end_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_of(task: Any) -> list[bytes]:
        return [task.weights_of(part).read_bytes() for part in task.stage.parts]
    plan, _, _ = run([cohort()], Here())
    task = plan.task(cohort())
    whole = bytes_of(task)
    task.folder.rename("whole")
    monkeypatch.setitem(program.PROGRAMS, "in turns", lambda members: in_turns(members, stop=50))
    with pytest.raises(Killed):
        run([cohort()], Here())
    assert not (task.folder / "result.json").exists() and task.progress()["iteration"] == 40
    (task.folder / "other/snapshot_iter_40.solverstate").write_bytes(b"")
    monkeypatch.setitem(program.PROGRAMS, "in turns", in_turns)
    run([cohort()], Here())
    assert task.result()["resumed"] == 1 and bytes_of(task) == whole


def test_a_part_that_is_damaged_is_mended() -> None:
    plan, _, _ = run([cohort()], Here())
    task, told = plan.task(cohort()), []
    weights, net = task.weights_of(task.stage.part("other")), task.folder / "one/net.prototxt"
    before = weights.read_bytes(), net.read_bytes()
    weights.write_bytes(b"")
    net.unlink()
    mend(Plan([cohort()], numerics()), told.append)
    assert (weights.read_bytes(), net.read_bytes()) == before
    assert [sentence.partition("; ")[2] for sentence in told] == ["it is written again", "it is written again from the final snapshot"]


def test_every_part_decides_the_key() -> None:
    keys = Keys(numerics())
    assert keys.key(cohort()) == keys.key(cohort()) != keys.key(cohort(seed=3))
    parts = keys.parts(cohort())
    assert parts["one.solver.random_seed"] == 1 and parts["other.solver.random_seed"] == 2 and parts["program"] == "in turns"
    assert keys.kind(cohort()) != keys.kind(cohort(seed=3))
