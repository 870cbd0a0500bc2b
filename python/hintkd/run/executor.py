"""Where stages run: an executor with concurrent.futures' interface, and the processes behind it.

`run_folders` is what an executor is given: it hands a stage folder, or those of a group, to a stage process that the calling thread
keeps for many stages, because starting one costs seconds.  A thread pool of `jobs` threads is therefore all that a local executor is,
and a dask.distributed client whose workers see the same workspace can take its place.  The stage processes die with the process that
started them.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hintkd.errors import ProcessDied, StageFailed, UserError

ANSWER = 10_000                             # characters of an interpreter's answer that are read


@dataclass(frozen=True)
class Interpreter:
    """A Python that has a caffe, and where its stage processes run.

    python       path of the interpreter; for torchcaffe the present one
    workspace    the folder that the paths in prototxts are relative to
    folders      where else Python layers are imported from
    """
    python: str
    workspace: str
    threads: int = 1
    folders: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.python == sys.executable

    def environment(self) -> dict[str, str]:
        """Waiting threads that sleep, a fixed number of threads, and hintkd on the path, of a foreign Python without its neighbours."""
        package = Path(__file__).resolve().parents[1]
        if self.is_ours:
            ours = str(package.parent)
        else:
            ours = os.path.join(self.workspace, "runs", "path")
            link_alone(package, Path(ours))
        count = str(self.threads)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count)
        path = os.pathsep.join(filter(None, [ours, *self.folders, os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, **threads, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}

    def require_caffe(self) -> str:
        """The version of the caffe that this interpreter imports.  Raises UserError if it cannot."""
        code = "from hintkd.backend import engine; print(engine('caffe'))"
        try:
            with TemporaryFile("w+") as errors, subprocess.Popen(
                    [self.python, "-c", code], cwd=self.workspace, env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=errors, text=True) as process:
                assert process.stdout
                said = process.stdout.read(ANSWER)
                if len(said) == ANSWER:                      # whatever this is, it goes on talking
                    process.kill()
                process.wait()
                errors.seek(0)
                complaints = errors.read(ANSWER).strip().splitlines()
        except OSError as error:
            raise UserError(f"--caffe-python {self.python}: {error.strerror}") from None
        if process.returncode or not said.strip():
            why = without_kind(complaints[-1]) if complaints else "it does not say why"
            raise UserError(f"--caffe-python {self.python} cannot import caffe: {why}")
        return said.strip().splitlines()[-1]


def without_kind(line: str) -> str:
    """The last line of a traceback without the name of Python's exception."""
    return re.sub(r"^[\w.]+(?:Error|Exception|Interrupt): ", "", line)


def link_alone(package: Path, folder: Path) -> None:
    """A folder that has nothing but a link to the package: a foreign Python must not find this one's numpy."""
    folder.mkdir(parents=True, exist_ok=True)
    link, part = folder / package.name, folder / f"{package.name}.{os.getpid()}.{threading.get_ident()}"
    if not link.exists() or link.resolve() != package:
        part.symlink_to(package, target_is_directory=True)
        part.replace(link)


class ExecutorLost(UserError):
    """Whatever runs the stages is gone, and no stage can be run any more."""


class StageProcess:
    """One that waits for folders."""

    def __init__(self, interpreter: Interpreter):
        self.interpreter = interpreter
        self.process = subprocess.Popen(
            [interpreter.python, "-m", "hintkd.stage.program", "--serve", str(os.getpid())], cwd=interpreter.workspace, text=True,
            env=interpreter.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def run(self, folders: Sequence[str]) -> list[str]:
        """Run a stage folder, or a group's; a sentence for each damaged file that it found.

        Raises StageFailed with its sentence, and ProcessDied if the process dies over it.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(folders) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ProcessDied(self._last_words(folders[0]))
        answer = json.loads(line)
        if answer["error"]:
            raise StageFailed("; ".join([*answer["told"], answer["error"]]))
        return answer["told"]

    def _last_words(self, folder: str) -> str:
        """Why a process ended without an answer: a failed CHECK of Caffe says so in the log, a killed one nothing."""
        _, errors = self.process.communicate()
        try:
            log = Path(self.interpreter.workspace, folder, "log.txt").read_text(errors="replace").splitlines()
        except OSError:
            log = []
        fatal = [line for line in log if line[:1] == "F" and "] " in line]
        words = fatal[-1].split("] ", 1)[1] if fatal else without_kind((errors.strip().splitlines() or ["no reason was given"])[-1])
        see = f"; see {folder}/log.txt" if log else ""
        return f"its process ended with status {self.process.returncode} ({words}{see})"

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Stop at once; a stage that is running goes on from its last snapshot next time."""
        self.process.kill()
        self.process.wait()


class StageProcesses:
    """The stage processes of an executor's threads, one each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[StageProcess] = []
        self._closed = False

    def start(self, interpreter: Interpreter) -> StageProcess:
        with self._lock:
            if self._closed:
                raise StageFailed("it was stopped before it began")
            self._all = [process for process in self._all if process.is_alive] + [StageProcess(interpreter)]
            return self._all[-1]

    def end(self) -> None:
        """End them all; none starts afterwards."""
        with self._lock:
            self._closed = True
        self.end_in(None)

    def end_in(self, workspace: str | None) -> None:
        """End those of one workspace, or all."""
        with self._lock:
            for process in self._all:
                if workspace in (None, process.interpreter.workspace):
                    process.end()


_thread = threading.local()                                  # .processes: whose thread this is; .process: its stage process
_of_others = StageProcesses()                                # for threads of executors that are not LocalExecutor


def run_folders(folders: Sequence[str], interpreter: Interpreter) -> list[str]:
    """Run a stage folder, or a group's, relative to the workspace, in this thread's stage process; what is damaged.  Raises StageFailed."""
    process: StageProcess | None = getattr(_thread, "process", None)
    if process is not None and (process.interpreter != interpreter or not process.is_alive):
        process.end()
        process = None
    if process is None:
        process = _thread.process = getattr(_thread, "processes", _of_others).start(interpreter)
    return process.run(folders)


def end_processes(workspace: str) -> None:
    """End the stage processes of a workspace that threads of no LocalExecutor have in this process."""
    _of_others.end_in(workspace)


class LocalExecutor(ThreadPoolExecutor):
    """`jobs` stages side by side on this machine; leaving its `with` block ends their processes."""

    def __init__(self, jobs: int):
        self.slots = jobs
        self.processes = StageProcesses()
        super().__init__(max_workers=jobs, thread_name_prefix="stage", initializer=self._adopt)

    def _adopt(self) -> None:
        _thread.processes = self.processes

    def __exit__(self, *exception: Any) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        self.processes.end()
        self.shutdown(wait=True)
