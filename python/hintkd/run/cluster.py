"""Stages on a dask.distributed cluster: an executor like LocalExecutor whose threads are those of workers on many machines.

A worker needs this package and the workspace, under the same path, on a file system whose locks work between machines.  A stage whose
worker dies is run by another one, from its last snapshot.  What is lost with the scheduler is the order of things only: the same command
goes on from what the folders hold.
"""
from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hintkd.backend import engine, how_to_get
from hintkd.errors import ProcessDied, StageFailed, UserError
from hintkd.run.executor import ExecutorLost, Interpreter, end_processes, run_folders

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 30                              # how long a scheduler may take to answer, seconds


class Cluster:
    """The workers of the scheduler at `address`, at most `jobs` stages at a time (None: as many as the workers have threads).

    Its `with` block ends by ending the stage processes of this workspace on all workers.
    Raises UserError where dask.distributed is not installed, nobody answers, or no worker is there.
    """

    def __init__(self, address: str, jobs: int | None = None):
        try:
            from distributed import Client
        except ImportError:
            raise UserError(f"--scheduler needs dask.distributed: {how_to_get('cluster')}") from None
        self.address, self.jobs, self.workspace = address, jobs, os.getcwd()
        try:
            self.client: Client = Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(f"--scheduler {address}: no dask scheduler answers there ({first_line(error)}); start one with "
                            "`dask scheduler` and give the address that it prints") from None
        if not self.threads:
            self.client.close()
            raise UserError(f"--scheduler {address}: the scheduler has no workers; start some with `dask worker {address} --nthreads 1`")

    @property
    def threads(self) -> int:
        """Of all workers that are there now."""
        return sum(self.client.nthreads().values())

    @property
    def slots(self) -> int:
        """How many stages run side by side, now; workers come and go."""
        return max(1, min(self.threads, self.jobs or self.threads))

    def submit(self, function: Callable[..., Any], folders: Sequence[str], interpreter: Interpreter) -> Future[Any]:
        """As an Executor's; `function` is run_folders.  Raises ExecutorLost when the scheduler is gone."""
        assert function is run_folders
        if self.client.status != "running":
            raise self._lost()
        ours = engine("torchcaffe") if interpreter.is_ours else None
        there = self.client.submit(run_on_worker, folders, interpreter, ours, pure=False)
        here: Future[Any] = Future()
        here.set_running_or_notify_cancel()
        there.add_done_callback(lambda future: self._pass_on(future, here))
        return here

    def _pass_on(self, there: Any, here: Future[Any]) -> None:
        """What became of a task, to the future that the runner waits for."""
        from distributed import KilledWorker
        error = self._lost() if there.status in ("cancelled", "lost") else there.exception()
        if isinstance(error, KilledWorker):
            count = error.allowed_failures + 1
            error = ProcessDied(f"{'a worker' if count == 1 else f'{count} workers'} died over it, the last one at "
                                f"{error.last_worker.address}; see what it printed")
        if error is None:
            told: list[str] = []
            with suppress(Exception):          # the stage is finished, whatever becomes of what its worker has to tell
                told = there.result()
            here.set_result(told)
        else:
            here.set_exception(error)

    def _lost(self) -> ExecutorLost:
        return ExecutorLost(f"--scheduler {self.address}: the scheduler is gone; start it and its workers again, and the same command "
                            "goes on from the last snapshots")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: Any) -> None:
        with suppress(OSError, ValueError, RuntimeError):      # whatever a scheduler that is gone makes of it
            if self.client.status == "running":
                self.client.run(end_processes, self.workspace)
        self.client.close(timeout=CONNECT_S)


def run_on_worker(folders: Sequence[str], interpreter: Interpreter, ours: str | None) -> list[str]:
    """What a worker does: run a stage folder, or a group's; a sentence for each damaged file that it found.

    ours    the engine that the worker must have, which then runs the folders in its own Python; None for another caffe's interpreter
    Raises StageFailed if the worker has another engine or does not see the folders.
    """
    host = socket.gethostname()
    if ours is not None:
        if engine("torchcaffe") != ours:
            raise StageFailed(f"the worker on {host} has {engine('torchcaffe')} and this machine {ours}: install the same version on both")
        interpreter = replace(interpreter, python=sys.executable)
    missing = [folder for folder in folders if not os.path.exists(os.path.join(interpreter.workspace, folder, "stage.json"))]
    if missing:
        raise StageFailed(f"the worker on {host} does not see {missing[0]} in {interpreter.workspace}: it needs the workspace, under the "
                          "same path")
    return run_folders(folders, interpreter)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason was given"])[0]
