"""What stages left behind, looked at before it is used again: each file that is missing, empty or not what was written is told of, and
made again from what is whole; where nothing is, the stage is taken up again.

A finished stage's result.json holds the digests that files are compared with, an unfinished one's progress.json.  Snapshots that a stage
goes on from are the stage process's business, data that of digests.py.
"""
from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hintkd.errors import Damaged, UserError
from hintkd.files import fault, is_whole, read_sealed, sha256_of, write_sealed
from hintkd.run.committed import WEIGHTS
from hintkd.run.folders import final_snapshots, keep_weights, stage_json, write_folder
from hintkd.run.plan import STAGES, Plan, Task
from hintkd.stage.group import INPUTS
from hintkd.stage.program import digests

AGAIN = "the stage is taken up again"
SPARED = f"the stage's weights in {WEIGHTS} serve instead"
UNNEEDED = "nothing needs it any more"


@dataclass(frozen=True)
class Cure:
    """Of a damaged file: what is wrong with it, what is done about it in words and in fact; `act` raises UserError where that cannot be."""
    damage: str
    then: str
    act: Callable[[], None]


def mend(plan: Plan, tell: Callable[[str], None], repair: bool = True) -> None:
    """Tell what is damaged of what the plan's stages left, sources first, and mend it; without `repair` all stays as it is.

    Stages that another process runs are left alone.
    """
    ours = {task.folder for task in plan.tasks.values()}
    for path in sorted(STAGES.glob("*/key.json")):
        if path.parent not in ours:                          # it may have been one of ours, under an earlier definition of its key
            try:
                read_sealed(path, "key", "parts")
            except Damaged as error:
                tell(f"{error}; nothing else says what was trained there, so it is not used")
    for task in plan.tasks.values():
        with held(task.folder) as mine:
            if mine and repair:
                adopt(task, tell)
            for cure in cures(task, plan) if mine else ():
                try:
                    if repair:
                        cure.act()
                    tell(f"{cure.damage}; {cure.then}")
                except UserError:                            # what it would be made of is not there, either
                    tell(f"{cure.damage}; {UNNEEDED}")


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether the folder is there and no other process has it; none gets it before the block ends."""
    try:
        lock = (folder / "lock").open("a")
    except OSError:
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def damages(task: Task) -> list[str]:
    """The names of the files in a finished task's folder that are not as they were written.  Raises Damaged if its result is."""
    known = task.result().get("digests", {})
    return [name for name, digest in known.items() if not is_whole(task.folder / name, digest)]


def cures(task: Task, plan: Plan) -> list[Cure]:
    """What is damaged of a task's files, each with its cure, to be applied in this order."""
    try:
        result = task.result()
    except Damaged as damage:
        if (task.folder / "result.json").exists() or any(task.weights_of(part).exists() for part in task.stage.parts):
            return [Cure(str(damage), again(task), partial(take_up_again, task))]
        return [_cure(task, name, "it is written again", lambda: None) for name in changed_inputs(task)]
    wrong, lost = damages(task), set[str]()
    for name, final in final_snapshots(task).items():
        predictions, weights = (str(Path(name, file)) for file in ("predictions.npz", task.weights.name))
        has_final = final in result.get("digests", {}) and final not in wrong
        if predictions in wrong or (not has_final and (weights in wrong or not (task.folder / weights).exists())):
            lost.update((predictions, final, weights))
    if lost:
        return [_cure(task, name, again(task), partial(take_up_again, task)) for name in wrong if name in lost]
    found = []
    for name in wrong:
        if Path(name).name == task.weights.name:
            found.append(_cure(task, name, "it is written again from the final snapshot", partial(keep_weights, task)))
        elif Path(name).name in INPUTS:
            found.append(_cure(task, name, "it is written again", partial(write_again, name, task, plan)))
        elif name == "log.txt":
            found.append(_cure(task, name, "records that are made from now on have no curves of this stage", partial(forget, name, task)))
        else:
            found.append(_cure(task, name, UNNEEDED, partial(forget, name, task)))
    return found


def _cure(task: Task, name: str, then: str, act: Callable[[], None]) -> Cure:
    return Cure(f"{task.folder / name} {fault(task.folder / name)}", then, act)


def again(task: Task) -> str:
    """What becomes of a stage that is finished no more, in words."""
    return SPARED if task.recorded and task.recorded.weights else AGAIN


def take_up_again(task: Task) -> None:
    """Let a finished stage be unfinished: it goes on from its last snapshot, or starts again."""
    (task.folder / "result.json").unlink(missing_ok=True)


def changed_inputs(task: Task) -> list[str]:
    """The files that an unfinished task began with and that are not as they were; the runner writes them all again."""
    with suppress(Damaged):
        known = task.progress().get("inputs", {})
        return [name for name, digest in known.items() if not is_whole(task.part_folder() / name, digest)]
    return []


def write_again(name: str, task: Task, plan: Plan) -> None:
    """Write an input of a finished task again, with all others.

    Raises UserError, and forgets it, where the weights that it is made of are not there.
    """
    result, group = task.result(), task.begun_in or [task.key]
    try:
        write_folder(task, plan, stage_json(task, group, plan.numerics), result["digests"])
    except UserError:
        forget(name, task)
        raise
    inputs = [str(Path(folder, each)) for folder in {"", *(part.name for part in task.stage.parts)} for each in INPUTS]
    again = {each: sha256_of(task.folder / each) for each in inputs if (task.folder / each).exists()}
    write_sealed(task.folder / "result.json", {**result, "digests": {**result["digests"], **again}})


def forget(name: str, task: Task) -> None:
    """Delete what is left of a file, and let the result not name it any more."""
    (task.folder / name).unlink(missing_ok=True)
    result = task.result()
    kept = {each: digest for each, digest in result["digests"].items() if each != name}
    write_sealed(task.folder / "result.json", {**result, "digests": kept})


def adopt(task: Task, tell: Callable[[str], None]) -> None:
    """Give a result from before there were digests its own, once its weights out are those of its final snapshot."""
    try:
        if "digests" in task.result():
            return
    except Damaged:
        return
    before = sha256_of(task.weights) if task.weights.exists() else None
    try:
        keep_weights(task)
        if (task.part_folder() / "predictions.npz").exists():
            task.predictions()
    except UserError as damage:
        tell(f"{damage}; {again(task)}")
        take_up_again(task)
        return
    write_sealed(task.folder / "result.json", {**task.result(), "digests": digests(str(task.folder))})
    if before not in (None, sha256_of(task.weights)):
        tell(f"{task.weights} was damaged; it is written again from the final snapshot")
