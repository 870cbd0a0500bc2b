"""What has been done of what was asked for, and why a finished stage would run again.

Each saved request is planned anew, with today's code, data and versions, and so is each table whose nets lie in results/weights, as they
were trained.  A stage whose key is no longer the one it was finished under is explained by the parts of the two keys that differ.
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

from hintkd import backend
from hintkd.errors import Damaged, UserError
from hintkd.files import fault, read_json
from hintkd.metrics import METRICS
from hintkd.run.committed import MEASURED, WEIGHTS, Committed, Net, read_nets
from hintkd.run.earlier import read_key, translated
from hintkd.run.keys import Numerics, differences
from hintkd.run.plan import STAGES, Plan, Task
from hintkd.run.progress import counted, warn
from hintkd.stage.program import FAILURE
from hintkd.study.reproduce import REQUESTS, Request, labels, load_request, stage_name
from hintkd.study.table import find_table, load_table

SHOWN = 4                                   # differences that are listed


@dataclass(frozen=True)
class State:
    """Of one stage: finished, damaged, running, failed, begun, waiting or changed, and what there is to say of it."""
    name: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """What there is to say of a request: the state of each stage and what is wrong beside them; `damaged` or `missing` in their place."""
    name: str
    states: tuple[State, ...] = ()
    remarks: tuple[str, ...] = ()
    damaged: str = ""
    missing: str = ""


def answers(table: str | None = None) -> list[Answer]:
    """Of the saved requests and of the tables whose nets are kept, or of one table.

    Raises UserError if there are none, and if a request's data are missing.
    """
    def is_meant(name: str) -> bool:
        return table is None or name == table or name.startswith(f"{table}-")
    paths = [path for path in sorted(REQUESTS.glob("*.json")) if is_meant(path.stem)]
    kept: dict[str, list[Net]] = {}
    for net in read_nets()[0]:
        if is_meant(net.folder) and not (REQUESTS / f"{net.folder}.json").exists():
            kept.setdefault(net.folder, []).append(net)
    if not paths and not kept:
        what = f"{table} was not" if table else "nothing was"
        raise UserError(f"{what} asked for in {Path.cwd()}: start with `hintkd reproduce {table or 'TABLE'}`")
    return [*map(of_request, paths), *(of_kept(name, nets) for name, nets in kept.items())]


def of_request(path: Path) -> Answer:
    """The answer to the request that was saved here."""
    try:
        request, used, known = load_request(path)
        return look(request, used.numerics, known)
    except Damaged as damage:
        return Answer(path.stem, damaged=str(damage))


def of_kept(name: str, nets: list[Net]) -> Answer:
    """The answer to the request that these nets, of one folder, were trained for, with what they were trained with but on today's engine.

    Where their data are not prepared it only says that they are there.
    """
    content = nets[0].content
    provenance = content["provenance"]
    own = MEASURED / name / "table.yaml"
    try:
        request = Request(load_table(own) if own.is_file() else find_table(content["table"]), seed=content["seed"],
                          repeats=max(net.content["repeat"] for net in nets))
        engine = backend.engine("torchcaffe") if provenance["backend"] == "torchcaffe" else provenance["engine"]
        return look(request, Numerics(engine=engine, **{part: provenance[part] for part in (
            "backend", "device", "threads", "precision", "together")}), {})
    except UserError as error:
        return Answer(name, missing=f"{name}: {counted(len(nets), 'net')} in {WEIGHTS}, but {error}")


def show(console: Console, table: str | None = None) -> None:
    """Print the answers."""
    for answer in answers(table):
        if answer.damaged or answer.missing:
            warn(console, answer.damaged or answer.missing)
            continue
        finished = sum(state.state == "finished" for state in answer.states)
        console.print(f"{answer.name}: {finished} of {counted(len(answer.states), 'stage')} finished", highlight=False)
        grid = Grid("stage", "state", "", box=None, pad_edge=False)
        for state in answer.states:
            grid.add_row(state.name, state.state, escape(state.detail))
        console.print(grid)
        for sentence in answer.remarks:
            warn(console, sentence)


def data(table: str | None = None) -> list[dict[str, Any]]:
    """The same as JSON has it; a request that cannot be looked at has what is wrong with it in the place of its stages."""
    found: list[dict[str, Any]] = []
    for answer in answers(table):
        told = {"damaged": answer.damaged, "missing": answer.missing, "remarks": list(answer.remarks)}
        stages = {} if answer.damaged or answer.missing else {"stages": [asdict(state) for state in answer.states]}
        found.append({"name": answer.name, **stages, **{name: text for name, text in told.items() if text}})
    return found


def look(request: Request, numerics: Numerics, known: dict[str, str]) -> Answer:
    """The answer to a request; `known` are the keys that its stages had when they were asked for, by `stage_name`."""
    if request.table.missing:
        return Answer(request.name, tuple(without_methods(known, request.table.missing)), ())
    runs, committed = request.runs(), Committed(METRICS[request.table.metric].output)
    plan = Plan([stage for run in runs for stage in run.stages], numerics, committed)
    before = {plan.keys.key(stage): known.get(stage_name(run, i)) for run in runs for i, stage in enumerate(run.stages)}
    remarks = committed.remarks(request.name, numerics, plan.names(), plan.names(plan.unfinished()))
    return Answer(request.name, tuple(states(plan, labels(runs, plan), before)), tuple(remarks))


def without_methods(known: dict[str, str], missing: str) -> Iterator[State]:
    """The state of the stages of a request whose methods are gone, by the keys that they had when they were asked for."""
    for name, key in known.items():
        finished = any((folder / "result.json").exists() for folder in STAGES.glob(f"*-{key[:12]}"))
        yield State(name, "finished" if finished else "waiting", "" if finished else f"{missing} is gone")


def states(plan: Plan, named: dict[str, str], before: dict[str, str | None]) -> Iterator[State]:
    """The state of every task; `before` has the keys that they had when they were asked for, by the keys they have now."""
    todo = {task.key for task in plan.unfinished()}
    for task in plan.tasks.values():
        name, old = named[task.key], before.get(task.key)
        if is_running(task):
            yield State(name, "running", at(task))
        elif damage := what_is_damaged(task):
            yield State(name, "damaged", damage)
        elif task.key not in todo:
            yield State(name, "finished", "" if task.was_run else f"in {WEIGHTS}" if task.is_finished else "recorded, weights not kept")
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
        return f"{task.progress('iteration')['iteration']:,} of {task.iterations:,} iterations"
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
