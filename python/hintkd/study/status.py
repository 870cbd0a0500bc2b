"""What has been done of what was asked for, and why a finished stage would run again.

Each saved request is planned anew, with today's code, data and versions.  A stage whose key is no longer the one it was finished
under is explained by the parts of the two keys that differ.
"""
from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from hintkd.errors import Damaged, UserError
from hintkd.files import fault, read_json, read_sealed
from hintkd.run.earlier import read_key, translated
from hintkd.run.keys import differences
from hintkd.run.progress import counted, warn
from hintkd.run.runner import STAGES, Plan, Task
from hintkd.stage.program import FAILURE
from hintkd.study.reproduce import REQUESTS, Request, labels, load_request, stage_name

SHOWN = 4                                   # differences that are listed


@dataclass(frozen=True)
class State:
    """Of one stage: finished, damaged, running, failed, begun, waiting or changed, and what there is to say of it."""
    name: str
    state: str
    detail: str = ""


def requests(table: str | None = None) -> list[Path]:
    """The saved requests, or those of one table.  Raises UserError if there are none."""
    paths = [path for path in sorted(REQUESTS.glob("*.json")) if table is None or path.stem == table or path.stem.startswith(f"{table}-")]
    if not paths:
        what = f"{table} was not" if table else "nothing was"
        raise UserError(f"{what} asked for in {Path.cwd()}: start with `hintkd reproduce {table or 'TABLE'}`")
    return paths


def show(console: Console, table: str | None = None) -> None:
    """Print the state of every stage of the saved requests, or of those of one table.  Raises UserError if there are none."""
    for path in requests(table):
        try:
            request, found = look(path)
        except Damaged as damage:
            warn(console, str(damage))
            continue
        finished = sum(state.state == "finished" for state in found)
        console.print(f"{request.name}: {finished} of {counted(len(found), 'stage')} finished", highlight=False)
        grid = Grid("stage", "state", "", box=None, pad_edge=False)
        for state in found:
            grid.add_row(state.name, state.state, escape(state.detail))
        console.print(grid)


def data(table: str | None = None) -> list[dict[str, Any]]:
    """The same as JSON has it; a damaged request has what is wrong with it in the place of its stages."""
    found: list[dict[str, Any]] = []
    for path in requests(table):
        try:
            request, states = look(path)
        except Damaged as damage:
            found.append({"name": path.stem, "damaged": str(damage)})
        else:
            found.append({"name": request.name, "stages": [asdict(state) for state in states]})
    return found


def look(path: Path) -> tuple[Request, list[State]]:
    """The request that was saved here, and the state of each of its stages."""
    request, used, known = load_request(path)
    runs = request.runs()
    plan = Plan([stage for run in runs for stage in run.stages], used.setting)
    before = {plan.keys.key(stage): known.get(stage_name(run, i)) for run in runs for i, stage in enumerate(run.stages)}
    return request, list(states(plan, labels(runs, plan), before))


def states(plan: Plan, named: dict[str, str], before: dict[str, str | None]) -> Iterator[State]:
    """The state of every task; `before` has the keys that they had when they were asked for, by the keys they have now."""
    for task in plan.tasks.values():
        name, old = named[task.key], before.get(task.key)
        if is_running(task):
            yield State(name, "running", at(task))
        elif damage := what_is_damaged(task):
            yield State(name, "damaged", damage)
        elif task.is_finished:
            yield State(name, "finished")
        elif (failure := task.folder / FAILURE).exists():
            yield State(name, "failed", why(failure))
        elif at(task):
            yield State(name, "begun", at(task))
        elif old and old != task.key and (changed := what_changed(plan, task, old)):
            yield State(name, "changed", changed)
        else:
            yield State(name, "waiting")


def is_running(task: Task) -> bool:
    """Whether a process holds the folder's lock."""
    with suppress(FileNotFoundError), (task.folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def what_is_damaged(task: Task) -> str:
    """What `hintkd reproduce` would mend of a finished stage, as far as it is seen without reading all; "" if nothing."""
    if (task.folder / "result.json").exists():
        try:
            task.result()
        except Damaged as damage:
            return str(damage)
    return ""


def why(failure: Path) -> str:
    """The sentence of a failed stage."""
    try:
        return str(read_json(failure))
    except (OSError, ValueError, RecursionError):
        return f"{failure} {fault(failure)}"


def at(task: Task) -> str:
    """How far a task is by its last snapshot; "" if it has not begun."""
    with suppress(Damaged):
        return f"{read_sealed(task.folder / 'progress.json', 'iteration')['iteration']:,} of {task.iterations:,} iterations"
    return ""


def what_changed(plan: Plan, task: Task, old: str) -> str:
    """Why a stage that was finished under another key would run again; "" if it was not finished."""
    folder = STAGES / f"{task.stage.title}-{old[:12]}"
    known = read_key(folder)
    if known is None or not (folder / "result.json").exists():
        return ""
    found = differences(translated(known[1]), plan.keys.parts(task.stage))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"was finished, and would run again, because of {'; '.join(found[:SHOWN])}{more}"
