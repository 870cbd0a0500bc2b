"""The runner with its executors: order, shared and finished stages, weights in and out, failures, and a runner that is killed."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
import torchcaffe
from hintkd.backend import read_net, read_weights, write_weights
from hintkd.errors import UserError
from hintkd.methods.stage import Stage, Weights
from hintkd.run import estimate as estimate_module
from hintkd.run.estimate import Cost, clear, estimate, makespan, net_digest
from hintkd.run.executor import Interpreter, LocalExecutor, StageProcess
from hintkd.run.folders import publish_weights
from hintkd.run.mend import held
from hintkd.run.plan import Plan, ranks
from hintkd.run.runner import Runner
from running import Immediate, Watcher, chain, interpreter, numerics, run, wait_for, weights_of
from torchcaffe.proto import prototxt

pytestmark = pytest.mark.usefixtures("workspace")
HERE = Path(__file__).parent
PYTHON = Path(estimate_module.__file__).parents[2]


def test_sources_run_first_and_the_longest_chain_goes_first() -> None:
    executor = Immediate()
    run([*chain("short", seed=2), *chain("a", "b", "c")], executor, slots=1)
    assert executor.order == ["a", "b", "short", "c"] or executor.order == ["a", "b", "c", "short"]
    assert executor.order.index("a") < executor.order.index("short")


def test_equal_stages_run_once_and_finished_ones_not_again() -> None:
    executor = Immediate()
    plan, _, _ = run([*chain("a", "b"), *chain("a", "b")], executor)
    assert executor.order == ["a", "b"] and len(plan.tasks) == 2
    _, _, watcher = run(chain("a", "b", "c"), executor)
    assert executor.order == ["a", "b", "c"] and watcher.events[0] == ("begin", "1")


def test_a_failed_stage_stops_only_what_starts_from_it() -> None:
    plan, runner, watcher = run([*chain("a", "bad", "c", "d"), *chain("other", seed=2)], Immediate(failing="bad"))
    titles = {plan.tasks[key].stage.title: why for key, why in runner.failures.items()}
    assert titles == {"bad": "it diverged", "c": "it needs bad, which failed", "d": "it needs bad, which failed"}
    assert ("finished", "other") in watcher.events and ("finished", "a") in watcher.events
    assert not (plan.task(chain("a", "bad")[1]).folder / "result.json").exists()


def test_an_error_that_is_nobodys_fault_is_not_swallowed() -> None:
    class Broken(Immediate):
        def submit(self, *arguments: Any) -> Future:
            future: Future = Future()
            future.set_exception(ZeroDivisionError())
            return future
    with pytest.raises(ZeroDivisionError):
        run(chain("a"), Broken())


def test_a_folder_says_all_that_a_caffe_needs() -> None:
    plan, _, _ = run(chain("a"), Immediate())
    (task,) = plan.tasks.values()
    solver = prototxt.read_solver(task.folder / "solver.prototxt")
    assert solver.net == str(task.folder / "net.prototxt") and solver.snapshot_prefix == str(task.folder / "snapshot")
    assert read_net(solver.net) == tiny.net()
    assert json.loads((task.folder / "key.json").read_text())["key"] == task.key
    assert task.folder.name == f"a-{task.key[:12]}"


def test_weights_go_in_by_layer_and_under_new_names_and_come_out_without_what_is_dropped(executor: LocalExecutor) -> None:
    first = Stage.solve("first", tiny.net(), tiny.solver())
    second = Stage.solve("second", tiny.net(prefix="old/"), tiny.solver(lr=0.0), drop=("old/", "fc"),
                   weights_in=(Weights(first, layers=("hidden",)), Weights(first, prefix="old/", layers=("hidden",))))
    plan, runner, _ = run([first, second], executor)
    assert not runner.failures
    trained, init = weights_of(plan.task(first)), dict(read_weights(plan.task(second).folder / "init.caffemodel"))
    assert sorted(init) == ["hidden", "old/hidden"]
    assert all(np.array_equal(init[name][0], trained["hidden"][0]) for name in init)
    result = plan.task(second).result()
    kept = dict(read_weights(plan.task(second).folder / result["weights"]))
    assert sorted(kept) == ["fc", "hidden", "old/hidden"] and sorted(weights_of(plan.task(second))) == ["hidden"]
    assert np.array_equal(kept["hidden"][0], trained["hidden"][0])                # the rate was 0
    assert not np.array_equal(kept["fc"][0], trained["fc"][0])                    # drawn anew


def test_later_weights_win_and_files_are_sources_too(workspace: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        write_weights(workspace / f"{name}.caffemodel", [("hidden", [np.full((16, 36), value, np.float32), np.zeros(16, np.float32)])])
    stage = Stage.solve("x", tiny.net(), tiny.solver(), weights_in=(Weights(Path("a.caffemodel")), Weights(Path("b.caffemodel"))))
    plan, _, _ = run([stage], Immediate())
    assert (dict(read_weights(plan.task(stage).folder / "init.caffemodel"))["hidden"][0] == 2).all()


@pytest.mark.parametrize(("weights", "missing"), [({"layers": ("nowhere",)}, "nowhere"), ({"prefix": "old/"}, "hidden")])
def test_a_source_without_a_layer_that_is_needed_is_refused(workspace: Path, weights: dict, missing: str) -> None:
    write_weights(workspace / "t.caffemodel", [("conv1", [np.zeros(3, np.float32)])])
    stage = Stage.solve("x", tiny.net(prefix="old/"), tiny.solver(), weights_in=(Weights(Path("t.caffemodel"), **weights),))
    _, runner, _ = run([stage], Immediate())
    (why,) = runner.failures.values()
    assert why == f"t.caffemodel has no weights for layer {missing}, which x needs: give a file that fits the net"


def test_published_weights_run_without_what_only_training_needs(executor: LocalExecutor, workspace: Path) -> None:
    stage = Stage.solve("x", tiny.net(), tiny.solver())
    plan, _, _ = run([stage], executor)
    publish_weights(plan.task(stage), workspace / "out/net1")
    net = torchcaffe.Net("out/net1.prototxt", torchcaffe.TEST, weights="out/net1.caffemodel")
    accuracy = np.mean([float(net.forward()["accuracy"]) for _ in range(tiny.TEST // 10)])
    assert accuracy == pytest.approx(plan.task(stage).result()["outputs"]["accuracy"])


def test_the_stage_process_answers_for_the_failing_stage_and_lives_on(executor: LocalExecutor) -> None:
    bad = Stage.solve("bad", tiny.net(scale=1.0), tiny.solver(lr=1e30))
    good = [Stage.solve("good", tiny.net(), tiny.solver(seed)) for seed in (1, 2)]
    plan, runner, _ = run([bad, *good], executor, slots=1)
    assert list(runner.failures) == [plan.task(bad).key] and "diverged at iteration" in runner.failures[plan.task(bad).key]
    assert all(plan.task(stage).is_finished for stage in good)


def test_a_killed_stage_process_fails_its_stage_alone_and_is_replaced() -> None:
    long, short = Stage.solve("long", tiny.net(), tiny.solver(iterations=100_000)), Stage.solve("short", tiny.net(), tiny.solver())
    with LocalExecutor(1) as pool:
        class Killing(Watcher):
            def tick(self) -> None:
                log = plan.task(long).folder / "log.txt"
                if log.exists() and "Iteration 100 " in log.read_text() and ("failed", "long") not in self.events:
                    pool.processes._all[0].process.kill()
        plan, watcher = Plan([long, short], numerics()), Killing()
        runner = Runner(pool, interpreter(), watcher)
        runner.run(plan)
    assert "its process ended with status -9" in runner.failures[plan.task(long).key]
    assert plan.task(short).is_finished


def test_leaving_the_executor_ends_running_stages_at_once() -> None:
    stage = Stage.solve("long", tiny.net(), tiny.solver(iterations=1_000_000))

    class Impatient(Watcher):
        def tick(self) -> None:
            if (plan.task(stage).folder / "log.txt").exists():
                raise KeyboardInterrupt
    plan = Plan([stage], numerics())
    with pytest.raises(KeyboardInterrupt), LocalExecutor(1) as pool:
        Runner(pool, interpreter(), Impatient()).run(plan)
    assert pool.processes._all[0].process.returncode == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------------------ another caffe

@pytest.fixture
def other_python(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter of its own name that imports the stand-in for a real Caffe."""
    script = workspace / "python-with-caffe"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(HERE / "fake_caffe"))
    return str(script)


def test_another_caffe_runs_the_same_folders(other_python: str) -> None:
    there = Interpreter(other_python, str(Path.cwd()))
    assert there.require_caffe() == "caffe 1.0.0-fake"
    first, *second = tiny.stages()
    plan = Plan([first, *second], numerics(backend="caffe", engine=there.require_caffe()))
    with LocalExecutor(2) as pool:
        cost = estimate(plan, pool, there)
        runner = Runner(pool, there, Watcher())
        runner.run(plan)
    assert not runner.failures and set(cost.seconds) == set(plan.tasks)
    result, step = plan.task(first).result(), first.solver.base_lr / 1000
    assert result["environment"]["engine"] == "caffe 1.0.0-fake" and "torch" not in result["environment"]
    assert weights_of(plan.task(first))["fc"][0] == pytest.approx(60 * step)
    assert weights_of(plan.task(second[0]))["hidden"][0] == pytest.approx(120 * step)
    assert result["outputs"] == pytest.approx({"accuracy": 0.5, "loss": 60 * step})
    assert "Optimization Done" in (plan.task(first).folder / "log.txt").read_text()


def test_another_caffe_starts_a_killed_stage_again(other_python: str) -> None:
    (stage,) = chain("a")
    plan = Plan([stage], numerics(backend="caffe", engine="caffe 1.0.0-fake"))
    folder = plan.task(stage).folder
    folder.mkdir(parents=True)
    (folder / "snapshot_iter_20.solverstate").write_bytes(b"")
    (folder / "snapshot_iter_20.caffemodel").write_bytes(b"")
    with LocalExecutor(1) as pool:
        Runner(pool, Interpreter(other_python, str(Path.cwd())), Watcher()).run(plan)
    assert weights_of(plan.task(stage))["fc"][0] == pytest.approx(60 * stage.solver.base_lr / 1000)


def test_a_failed_check_of_another_caffe_is_told_with_its_words(other_python: str) -> None:
    stage = Stage.solve("a", tiny.net(), tiny.solver(lr=-1.0))
    plan = Plan([stage], numerics(backend="caffe", engine="caffe 1.0.0-fake"))
    with LocalExecutor(1) as pool:
        runner = Runner(pool, Interpreter(other_python, str(Path.cwd())), Watcher())
        runner.run(plan)
    (why,) = runner.failures.values()
    assert "status -6 (Check failed: base_lr >= 0 (-1 vs. 0) The rate must not be negative" in why and "log.txt" in why


def test_an_interpreter_without_caffe_is_refused(workspace: Path, other_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(UserError, match=r"--caffe-python .*python-with-caffe cannot import caffe: .*No module named 'caffe'"):
        Interpreter(other_python, str(workspace)).require_caffe()
    with pytest.raises(UserError, match=r"--caffe-python nowhere/python: No such file"):
        Interpreter("nowhere/python", str(workspace)).require_caffe()


# ----------------------------------------------------------------------------------------------------------------- estimates

def test_an_estimate_measures_each_distinct_net_that_is_not_finished(executor: LocalExecutor) -> None:
    stages = [*tiny.stages(), Stage.solve("wide", tiny.net(hidden=64), tiny.solver(iterations=600))]
    plan = Plan(stages, numerics())
    cost = estimate(plan, executor, interpreter())
    assert set(cost.seconds) == set(plan.tasks) and min(cost.seconds.values()) > 0 and cost.is_whole
    assert not list(Path("runs").glob("estimate-*/"))
    run(stages[:1], executor)
    assert plan.task(stages[0]).key not in estimate(plan, executor, interpreter()).seconds


def test_an_estimate_counts_iterations_tests_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage.solve("short", tiny.net(), tiny.solver()), Stage.solve("long", tiny.net(), tiny.solver(iterations=600))]
    plan = Plan(stages, numerics())
    costs = {net_digest(plan.task(stage)): Cost(0.5, 3.0, 1_000) for stage in stages}
    monkeypatch.setattr(estimate_module, "measure", lambda *arguments: costs)
    (folder := plan.task(stages[-1]).folder).mkdir(parents=True)
    (folder / "progress.json").write_text('{"iteration": 450}')
    cost = estimate(plan, SimpleNamespace(slots=2), interpreter())
    assert [cost.of(plan.task(stage)) for stage in stages] == [60 * 0.5 + 4 * 3, (600 * 0.5 + 31 * 3) / 4]


def test_a_worker_that_is_killed_in_the_estimate_is_replaced_and_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run_process, told, kills = StageProcess.run, list[str](), 1

    def killed(process: StageProcess, folders: list[str]) -> list[str]:
        nonlocal kills
        if kills:
            kills -= 1
            process.process.kill()
        return run_process(process, folders)
    monkeypatch.setattr(StageProcess, "run", killed)
    plan = Plan([Stage.solve("x", tiny.net(), tiny.solver())], numerics())
    with LocalExecutor(1) as pool:
        assert estimate(plan, pool, interpreter(), tell=told.append).is_whole and not told
        kills = 2
        assert estimate(plan, pool, interpreter(), tell=told.append).seconds == {}
    assert told == ["x cannot be measured: its process ended with status -9 (no reason was given); the run goes on without its time"]


def test_what_a_killed_estimate_left_is_cleaned_away_and_a_living_ones_is_not() -> None:
    for name in ("estimate-1", "estimate-2"):
        Path("runs", name, "x").mkdir(parents=True)
        Path("runs", name, "lock").touch()
    with held(Path("runs/estimate-2")):
        clear()
        assert [path.name for path in Path("runs").glob("estimate-*")] == ["estimate-2"]


def test_a_net_that_cannot_be_built_is_told_before_anything_runs(executor: LocalExecutor) -> None:
    net = tiny.net()
    net.layer[2].bottom[0] = "nothing"
    plan = Plan([Stage.solve("x", net, tiny.solver())], numerics())
    with pytest.raises(UserError, match="nothing") as refused:
        estimate(plan, executor, interpreter())
    assert "runs/estimate-log.txt" in str(refused.value) and Path("runs/estimate-log.txt").exists()
    assert not list(Path("runs").glob("estimate-*/"))


def test_a_disk_that_is_too_small_is_told_before_anything_runs(executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="of disk in .* where 0.0 GB are free: make room"):
        estimate(Plan(chain("a"), numerics()), executor, interpreter())


@pytest.mark.parametrize(("jobs", "total"), [(1, 70.0), (2, 40.0), (3, 30.0), (9, 30.0)])
def test_the_plan_is_played_through_on_so_many_jobs(jobs: int, total: float) -> None:
    plan = Plan([*chain("a", "b", "c"), *(Stage.solve("x", tiny.net(), tiny.solver(seed)) for seed in (6, 7, 8, 9))], numerics())
    assert makespan(plan, dict.fromkeys(plan.tasks, 10.0), jobs) == total
    assert max(ranks(plan, lambda task: 10.0).values()) == 30.0


# --------------------------------------------------------------------------------------------------------------------- killed

SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
import tiny
from hintkd.backend import engine
from hintkd.run.executor import Interpreter, LocalExecutor
from hintkd.run.keys import Numerics
from hintkd.run.plan import Plan
from hintkd.run.runner import Runner
from hintkd.methods.stage import Stage, Weights
from test_runner import Watcher
first = Stage.solve("first", tiny.net(), tiny.solver(iterations=200))
second = Stage.solve("second", tiny.net(), tiny.solver(2, iterations=6000), weights_in=(Weights(first, layers=("hidden",)),))
with LocalExecutor(2) as pool:
    Runner(pool, Interpreter(sys.executable, os.getcwd()), Watcher()).run(Plan([second], Numerics("torchcaffe", engine("torchcaffe"))))
"""


def start_runner(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        tiny.write_data(folder)
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(path=[str(HERE), str(PYTHON)])], cwd=folder)


def stage_processes(folder: Path) -> list[int]:
    """The processes whose current directory is this workspace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_runner_killed_in_stage_2_leaves_no_process_and_resumes_to_the_same_bytes(workspace: Path) -> None:
    whole, other = workspace / "whole", workspace / "other"
    assert start_runner(whole).wait() == 0
    draw, kills = random.Random(3), 0
    while kills < 3:
        process = start_runner(other)
        while not list(other.glob("runs/stages/second-*/log.txt")) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.3, 2.0))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        wait_for(lambda: stage_processes(other) == [], "the end of the stage processes")
    assert kills
    assert start_runner(other).wait() == 0
    (a,), (b,) = (list(folder.glob("runs/stages/second-*")) for folder in (whole, other))
    assert a.name == b.name
    for name in ("weights.caffemodel", "snapshot_iter_6000.caffemodel"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
