"""Stages on a dask cluster of this machine's own: progress, failures, resume, a worker that dies, a scheduler that is lost."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from hintkd import cli
from hintkd.errors import UserError
from hintkd.methods.stage import Stage
from hintkd.run.cluster import Cluster
from hintkd.run.estimate import estimate
from hintkd.run.executor import ExecutorLost, Interpreter, LocalExecutor
from hintkd.run.plan import Plan, Task
from hintkd.run.runner import Runner
from running import Watcher, chain, interpreter, numerics, run

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow
PYTHON = Path(cli.__file__).parents[1]


class Machines:
    """A scheduler and its workers, each a process."""

    def __init__(self, folder: Path, workers: int, **environment: str):
        self.environment = {**os.environ, "PYTHONPATH": str(PYTHON), "OMP_WAIT_POLICY": "passive",
                            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "60s", **environment}
        self.file = folder / f"scheduler-{time.time_ns()}.json"
        self.scheduler = self.start("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
        while not self.file.exists():
            assert self.scheduler.poll() is None
            time.sleep(0.05)
        self.workers = [self.start("worker", "--nthreads", "1", "--no-dashboard", "--death-timeout", "60", "--local-directory", str(folder))
                        for _ in range(workers)]
        self.address = json.loads(self.file.read_text())["address"]
        from distributed import Client
        with Client(self.address, set_as_default=False) as client:
            if workers:
                client.wait_for_workers(workers)

    def start(self, kind: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "dask", kind, "--scheduler-file", str(self.file), *arguments], env=self.environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.terminate()
        for process in [*self.workers, self.scheduler]:
            process.wait()


@contextmanager
def machines(folder: Path, workers: int, **environment: str) -> Iterator[Machines]:
    made = Machines(folder, workers, **environment)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A cluster of two workers for tests that leave it as it is."""
    with machines(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


def long(iterations: int = 5_000) -> Stage:
    """A stage that takes long enough to be interrupted."""
    made = tiny.solver(iterations=iterations, tested=False)
    made.snapshot, made.display = 200, 200
    return Stage.solve("long", tiny.net(tested=False), made)


class Acting(Watcher):
    """Does something once, when a task has written its first snapshot."""

    def __init__(self, task: Task, act: Any):
        super().__init__()
        self.task, self.act = task, act

    def tick(self) -> None:
        if self.act and (self.task.folder / "progress.json").exists() and list(self.task.folder.glob("*.solverstate")):
            self.act()
            self.act = None


def in_one_go(stage: Stage, executor: LocalExecutor) -> bytes:
    """The weights of the stage when nothing happens."""
    plan, runner, _ = run([stage], executor)
    task = plan.task(stage)
    assert not runner.failures
    weights = task.weights.read_bytes()
    task.folder.rename(task.folder.with_name("in-one-go"))
    return weights


def test_a_cluster_runs_a_plan_and_progress_is_seen(workspace: Path, two: Machines) -> None:
    stages = tiny.stages()
    with Cluster(two.address) as cluster:
        assert cluster.slots == 2
        cost = estimate(Plan(stages, numerics()), cluster, interpreter())
        assert cost.jobs == 2 and cost.total_s > 0
        plan, watcher = Plan(stages, numerics()), Watcher()
        runner = Runner(cluster, interpreter(), watcher)
        runner.run(plan)
    assert not runner.failures and all(task.is_finished for task in plan.tasks.values())
    assert watcher.events[:2] == [("begin", "3"), ("started", "first")]
    assert "Iteration 60, loss" in (plan.task(stages[0]).folder / "log.txt").read_text()


def test_a_stage_that_fails_stops_only_what_starts_from_it(workspace: Path, two: Machines) -> None:
    bad = Stage.solve("bad", tiny.net(), tiny.solver(lr=1e30))
    (other,) = chain("other", seed=2)
    with Cluster(two.address, jobs=1) as cluster:
        assert cluster.slots == 1
        plan = Plan([bad, other], numerics())
        runner = Runner(cluster, interpreter(), Watcher())
        runner.run(plan)
    assert plan.task(other).is_finished and "diverged" in runner.failures[plan.task(bad).key]


def test_a_stage_whose_worker_is_killed_ends_with_the_same_bytes(workspace: Path, two: Machines, executor: LocalExecutor) -> None:
    stage = long()
    expected = in_one_go(stage, executor)
    with Cluster(two.address) as cluster:
        plan = Plan([stage], numerics())

        def kill() -> None:
            busy = [worker for worker, keys in cluster.client.processing().items() if keys]
            pids = cluster.client.run(os.getpid, workers=busy)
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
        runner = Runner(cluster, interpreter(), Acting(plan.task(stage), kill))
        runner.run(plan)
        cluster.client.wait_for_workers(2)
    assert not runner.failures and plan.task(stage).result()["resumed"]
    assert plan.task(stage).weights.read_bytes() == expected


def test_a_stage_that_kills_its_workers_is_told(workspace: Path, tmp_path: Path) -> None:
    stage = long()
    with machines(tmp_path, 1, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as made, Cluster(made.address) as cluster:
        plan = Plan([stage], numerics())

        def kill() -> None:
            for pid in cluster.client.run(os.getpid).values():
                os.kill(pid, signal.SIGKILL)
        runner = Runner(cluster, interpreter(), Acting(plan.task(stage), kill))
        runner.run(plan)
    assert "a worker died over it" in runner.failures[plan.task(stage).key]


def test_a_lost_scheduler_ends_the_run_and_another_one_goes_on(workspace: Path, tmp_path: Path, executor: LocalExecutor) -> None:
    stage = long()
    expected = in_one_go(stage, executor)
    plan = Plan([stage], numerics())
    with machines(tmp_path, 1) as made, Cluster(made.address) as cluster, pytest.raises(ExecutorLost, match="the scheduler is gone"):
        Runner(cluster, interpreter(), Acting(plan.task(stage), made.scheduler.kill)).run(plan)
    assert not plan.task(stage).is_finished
    with machines(tmp_path, 1) as made, Cluster(made.address) as cluster:
        Runner(cluster, interpreter(), Watcher()).run(plan)      # resumes, or waits for a worker that still has it
    assert plan.task(stage).weights.read_bytes() == expected


def test_leaving_ends_the_stages_on_the_workers(workspace: Path, two: Machines) -> None:
    stage = long(1_000_000)
    plan = Plan([stage], numerics())

    def stop() -> None:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Cluster(two.address) as cluster:
        Runner(cluster, interpreter(), Acting(plan.task(stage), stop)).run(plan)
    log, size = plan.task(stage).folder / "log.txt", -1
    deadline = 600
    while size != log.stat().st_size and deadline:
        size, deadline = log.stat().st_size, deadline - 1
        time.sleep(0.5)
    assert deadline, "the stage goes on"


def test_a_worker_that_does_not_see_the_workspace_says_so(workspace: Path, two: Machines) -> None:
    stages = chain("a")
    plan = Plan(stages, numerics())
    with Cluster(two.address) as cluster:
        runner = Runner(cluster, Interpreter(sys.executable, "/nowhere"), Watcher())
        runner.run(plan)
    assert "does not see runs/stages/a-" in runner.failures[plan.task(stages[0]).key]


def test_an_address_where_nobody_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hintkd.run.cluster.CONNECT_S", 1)
    with pytest.raises(UserError, match="--scheduler tcp://127.0.0.1:9: no dask scheduler answers there"):
        Cluster("tcp://127.0.0.1:9")
    with pytest.raises(UserError, match="--scheduler nonsense://x: no dask scheduler answers there"):
        Cluster("nonsense://x")


def test_a_scheduler_without_workers_is_told(tmp_path: Path) -> None:
    with machines(tmp_path, 0) as made, pytest.raises(UserError, match="has no workers; start some with `dask worker"):
        Cluster(made.address)


def test_without_dask_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"--scheduler needs dask.distributed: .+ -m pip install '(distributed>=|hintkd\[cluster\])"):
        Cluster("tcp://127.0.0.1:9")
