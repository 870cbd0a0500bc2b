"""Processes that train together: started, watched, told what to do, and ended together.

What each process does is the caller's function; how their solvers combine is parallel.py's business.  A process that fails ends all,
with one sentence; when the starting process ends, however it does, so do the others.
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from torchcaffe import glog, settings
from torchcaffe.errors import CaffeError, PeerLost, sentence
from torchcaffe.train.parallel import NCCL

GRACE = 5                                               # seconds in which those that lost a process may end by themselves
Work = Callable[..., None]                              # work(uid, orders, *arguments)


class Group:
    """`count` processes that call work(uid, orders, *arguments) as solvers 0, 1, ...; `orders` is for obey().

    work and the arguments are pickled.  Solvers on a CPU share its threads evenly, unless OMP_NUM_THREADS is set.  All but the root
    log errors only.  Leaving the `with` block ends what still runs.
    """

    def __init__(self, count: int, work: Work, *arguments: Any):
        spawn, uid = multiprocessing.get_context("spawn"), NCCL.new_uid()
        pipes = [spawn.Pipe() for _ in range(count)]
        self.ends = [ours for ours, _ in pipes]
        self.processes = [spawn.Process(target=_member, args=(rank, count, uid, theirs, work, arguments), daemon=True)
                          for rank, (_, theirs) in enumerate(pipes)]
        with _deaf():                                   # which is inherited: only the starting process hears signals
            for process, (_, theirs) in zip(self.processes, pipes, strict=True):
                process.start()
                theirs.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def request(self, action: str) -> None:
        """Tell the root to "stop" or to take a "snapshot", from which all others learn it."""
        if self.processes[0].is_alive():
            self.ends[0].send(action)

    def wait(self) -> None:
        """Return when all have ended well.  Raises CaffeError with the cause when one has not."""
        running = list(self.processes)
        while running and not any(process.exitcode for process in self.processes):
            wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
        if not any(process.exitcode for process in self.processes):
            return
        deadline = time.monotonic() + GRACE
        for process in running:
            process.join(max(0, deadline - time.monotonic()))
        told = [self._last_words(rank) for rank in range(len(self.processes))]
        causes = [words for words, follows in filter(None, told) if not follows] or [words for words, _ in filter(None, told)]
        raise CaffeError(causes[0])

    def _last_words(self, rank: int) -> tuple[str, bool] | None:
        """Why a process failed, and whether only because another had; None if it ended well or still runs."""
        process = self.processes[rank]
        if not process.exitcode:
            return None
        try:
            words, follows = self.ends[rank].recv()
            return words, follows
        except (EOFError, OSError):
            how = f"was ended by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else "failed as it says above"
            return (f"solver {rank} of {len(self.processes)} (process {process.pid}) {how}, so the others were ended, too; resume all from "
                    "the last snapshot with --snapshot"), False


@contextmanager
def _deaf() -> Iterator[None]:
    """Within the block SIGINT and SIGHUP have no effect."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey(orders: Connection, request: Callable[[str], None]) -> None:
    """Pass on what the starting process wants, from now on, and end when it ends."""
    def listen() -> None:
        try:
            while True:
                request(orders.recv())
        except (EOFError, OSError):
            os._exit(1)
    threading.Thread(target=listen, daemon=True).start()


def _member(rank: int, count: int, uid: str, orders: Connection, work: Work, arguments: tuple[Any, ...]) -> None:
    settings.set_solver_count(count)
    settings.set_solver_rank(rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        with glog.silent() if rank else nullcontext():
            work(uid, orders, *arguments)
    except (Exception, SystemExit) as error:
        words = sentence(error)
        if words is None:
            raise
        orders.send((words, isinstance(error, PeerLost)))
        sys.exit(2)
