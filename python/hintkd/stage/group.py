"""Stages while they are trained, one alone or a group side by side: their folders, logs and snapshots, and where they go on.

Batched arithmetic rounds differently, so a group goes on only as the group that it was begun as, and all from one iteration.  What is
damaged of the files it would go on from is told and passed over: for the snapshot before, or for the start.  What is done with the
solvers is program.py's business.
"""
from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from hintkd.errors import Damaged, StageFailed
from hintkd.files import fault, is_whole, read_sealed, sha256_of, write_sealed
from hintkd.layers import draws

KEPT = 2                                    # snapshots that stay while a stage runs: one may turn out to be unusable
INPUTS = ("net.prototxt", "solver.prototxt", "stage.json", "key.json", "init.caffemodel")     # what a folder has before its stage begins
PROGRESS = ("environment", "started", "iteration", "resumed", "inexact", "wall_s")           # what progress.json holds at least


class Member:
    """A stage that is trained: its folder, what stage.json says, its log, its solver and what is known of its past.

    tell    takes a sentence for whoever asked for the stage
    """

    def __init__(self, folder: str, stage: dict[str, Any], log: TextIO, tell: Callable[[str], None]):
        self.folder, self.stage, self.log, self.tell = folder, stage, log, tell
        self.solver: Any = None
        self.progress: dict[str, Any] = {}
        self.damages: list[str] = []        # what is wrong with the files that it would go on from
        self.clock = time.time()            # when it would have begun if it had never been interrupted

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def parts(self) -> list[Member]:
        """Of a stage of several parts one for each, in a folder of its own; they say what they say in the stage's log.

        `begin` lets them go on from one iteration, as it does the stages of a group.
        """
        return [Member(self.path(name), {**self.stage, **told}, self.log, self.tell) for name, told in self.stage["parts"].items()]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What Python prints meanwhile goes to this stage's log."""
        with redirect_stdout(self.log), redirect_stderr(self.log):
            yield

    def say(self, text: str) -> None:
        """A line of our own in Caffe's log, with glog's prefix."""
        micros = int(time.time() % 1 * 1e6)
        print(f"I{time.strftime('%m%d %H:%M:%S')}.{micros:06d} {os.getpid():5d} program.py:1] {text}", file=self.log, flush=True)

    def note(self, **progress: Any) -> None:
        """Keep what is known of the stage's past, with this added, and digests of what it needs to go on."""
        self.log.flush()
        with open(self.log.name, "rb") as log:
            text = log.read()
        said = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        files = [path for state in snapshots(self.folder) for path in glob.glob(glob.escape(state[:-len("solverstate")]) + "*")]
        self.progress.update(progress, wall_s=time.time() - self.clock, log=said,
                             snapshots={os.path.basename(path): sha256_of(path) for path in files})
        write_sealed(self.path("progress.json"), self.progress)

    def build(self, caffe: Any, exact: bool = True) -> None:
        """A new solver; on torchcaffe it runs whole iterations, asks a teacher once and, if `exact`, goes on byte for byte."""
        if not hasattr(caffe, "ENGINE"):
            with open(self.path("solver.prototxt"), encoding="utf-8") as file:
                draws.seed_others(next((int(line.split(":")[1]) for line in file if line.startswith("random_seed:")), 0))
        with self.turn():
            self.solver = caffe.get_solver(self.path("solver.prototxt"))
        if hasattr(caffe, "ENGINE"):
            self.solver.fast, self.solver.exact, self.solver.remember = True, exact, self.stage.get("remember")

    def start(self, caffe: Any, found: dict[str, str]) -> None:
        """Begin at iteration 0, from init.caffemodel where there is one."""
        for state in snapshots(self.folder):
            drop(state)
        self.progress = {}
        self.note(environment=found, started=now(), iteration=0, resumed=0, inexact=False, group=self.stage["group"], inputs=self.inputs())
        self.build(caffe)
        init, digest = self.path("init.caffemodel"), self.stage.get("init")
        if digest and not is_whole(init, digest):
            raise StageFailed(f"{init} {fault(init)}; give the same command again, which writes it again")
        if os.path.exists(init):
            self.solver.net.copy_from(init)

    def inputs(self) -> dict[str, str]:
        """Digests of what the folder had before its stage began."""
        return {name: sha256_of(self.path(name)) for name in INPUTS if os.path.exists(self.path(name))}

    def iterations(self) -> set[int]:
        """Of the snapshots whose files are as they were written, as far as that is known; what is wrong with the others is noted."""
        known, found = self.progress.get("snapshots", {}), set()
        for state in snapshots(self.folder):
            stem = os.path.basename(state)[:-len("solverstate")]
            wrong = [name for name, digest in known.items() if name.startswith(stem) and not is_whole(self.path(name), digest)]
            self.damages += [f"{self.path(name)} {fault(self.path(name))}" for name in wrong]
            if not wrong:
                found.add(iteration_of(state))
        gone = [name for name in known if name.endswith(".solverstate") and not os.path.exists(self.path(name))
                and iteration_of(name) > max(found, default=-1)]           # older ones may have been pruned
        self.damages += [f"{self.path(name)} is missing" for name in gone]
        return found

    def mend_log(self) -> None:
        """Begin the log anew if what it said at the last snapshot is not there any more."""
        known = self.progress.get("log")
        if known:
            with open(self.log.name, "rb") as log:
                text = log.read(known["bytes"])
            if hashlib.sha256(text).hexdigest() != known["sha256"]:
                self.tell(f"{self.log.name} does not say any more what it said up to the last snapshot; it is begun anew, without "
                          "the curves so far")
                self.log.flush()
                self.log.truncate(0)

    def restore(self, caffe: Any, iteration: int, exact: bool) -> bool:
        """Go on from a snapshot; whether it can be used."""
        state = snapshot(self.folder, iteration, "solverstate")
        self.build(caffe, exact)
        try:
            with self.turn():
                self.solver.restore(state)
        except caffe.CaffeError as error:
            self.say(f"Cannot go on from {state}: {error}")
            self.damages.append(str(error))
            return False
        self.solver.exact = True
        return True


def begin(caffe: Any, members: list[Member], found: dict[str, str]) -> None:
    """Give each member its solver, at the iteration where all go on.

    torchcaffe continues from the newest iteration at which each has a snapshot whose sidecar fits, byte for byte; where there is none, or
    they were not begun as this group, and on a real Caffe, all start from their init.caffemodel.  Raises StageFailed if they were
    begun by other versions or on another kind of processor, which would change the last bits; where stage.json allows that, they go on
    as Caffe does, with their data at row 0.  Raises it, too, if one cannot start again because it is finished.
    """
    at = _go_on(caffe, members, found) if hasattr(caffe, "ENGINE") else None
    for member in members:
        for damage in dict.fromkeys(member.damages):
            member.tell(f"{damage}; the stage " + ("starts again" if at is None else f"goes on from iteration {at}"))
    if at is not None:
        return
    finished = [member.folder for member in members if os.path.exists(member.path("result.json"))]
    if finished:
        raise StageFailed(f"{finished[0]} was finished meanwhile, but not in this group: give the same command again, without it")
    for member in members:
        member.start(caffe, found)


def _go_on(caffe: Any, members: list[Member], found: dict[str, str]) -> int | None:
    """Restore all of the group from one iteration; which one, None if there is none."""
    if not all(snapshots(member.folder) or os.path.exists(member.path("progress.json")) for member in members):
        return None
    for member in members:
        try:
            member.progress = read_sealed(member.path("progress.json"), *PROGRESS)
        except Damaged as damage:
            member.damages.append(str(damage))
    if any(member.damages for member in members):
        return None
    iterations = set.intersection(*(member.iterations() for member in members))
    if not iterations or any(member.progress.get("group", [member.stage["key"]]) != member.stage["group"] for member in members):
        return None
    changes = [_changes(member.progress["environment"], found) for member in members]
    for member, changed in zip(members, changes):
        if changed and not member.stage["inexact"]:
            raise StageFailed(f"{member.folder} was begun with other numerics ({', '.join(changed)}), so that it could not end with the "
                              "same bytes: delete the folder to start the stage again, or give --inexact to go on all the same")
    inexact = any(changes)
    for iteration in sorted(iterations, reverse=True):
        if all(member.restore(caffe, iteration, exact=not inexact) for member in members):
            for member in members:
                member.mend_log()
                member.clock -= member.progress["wall_s"]
                member.note(environment=found, resumed=member.progress["resumed"] + 1, inexact=member.progress["inexact"] or inexact,
                            inputs=member.inputs())
            return iteration
    return None


def _changes(before: dict[str, str], found: dict[str, str]) -> list[str]:
    """What decides the last bits and is not as it was, in words."""
    return [f"{name} {before.get(name)} -> {value}" for name, value in sorted(found.items())
            if name != "python" and before.get(name) != value]


# --------------------------------------------------------------------------------------------------------------- snapshots

def snapshot(folder: str, iteration: int | str, kind: str) -> str:
    """The file that Caffe writes for a snapshot; kind is caffemodel or solverstate."""
    return os.path.join(folder, f"snapshot_iter_{iteration}.{kind}")


def snapshots(folder: str) -> list[str]:
    """The solver states in the folder, newest first."""
    return sorted(glob.glob(snapshot(glob.escape(folder), "*", "solverstate")), key=iteration_of, reverse=True)


def iteration_of(path: str) -> int:
    """The iteration in a snapshot's name."""
    found = re.search(r"_iter_(\d+)\.", path)
    assert found, path
    return int(found[1])


def prune(folder: str, keep: int) -> None:
    """Delete all snapshots but the newest `keep`."""
    for state in snapshots(folder)[keep:]:
        drop(state)


def drop(state: str) -> None:
    """Delete a snapshot: first its state, without which the other files mean nothing."""
    os.remove(state)
    for path in glob.glob(glob.escape(state[:-len("solverstate")]) + "*"):
        remove(path)


def remove(path: str) -> None:
    """Delete a file if it is there."""
    with suppress(FileNotFoundError):
        os.remove(path)


def now() -> str:
    """The time as in 2024-05-17T12:30:00+0000."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime())
