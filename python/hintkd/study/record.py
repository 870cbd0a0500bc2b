"""The evidence of one trained net: a JSON file with all its results, curves and the circumstances they were measured in.

A record is written when the last stage of its experiment is finished, from what the stage folders hold, or from another record that
knows the same stage.  A full schedule's weights are kept beside it, small enough to be committed.  What the numbers mean beside
published ones is the report's business.
"""
from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hintkd.backend import caffe_pb2
from hintkd.errors import Damaged
from hintkd.experiment import Experiment, Network, Trained
from hintkd.files import is_whole, read_sealed, sha256_of, write_sealed, written
from hintkd.methods.stage import Stage
from hintkd.metrics import METRICS, Labels, Scores, with_counted
from hintkd.nets.networks import NETWORKS
from hintkd.run.committed import MEASURED, WEIGHTS, read_net
from hintkd.run.folders import publish_weights, whole_weights
from hintkd.run.keys import DATA_PATHS, Parts
from hintkd.run.plan import Plan, Task
from hintkd.stage.log import Curve, parse
from hintkd.study import probabilities

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """One row's net as it is run: the experiment, its method's stages and which repetition of the table it belongs to.

    name      of the folders that its results go to: the table, and what departs from it
    metric    of the table
    """
    name: str
    experiment: Experiment
    stages: tuple[Stage, ...]
    repeat: int = 1
    metric: str = "accuracy"

    @property
    def place(self) -> Path:
        """Where its files lie inside results/measured and runs/weights."""
        x = self.experiment
        repeat = [f"repeat{self.repeat}"] if self.repeat > 1 else []
        return Path(self.name, *repeat, x.name, f"net{x.net}")

    @property
    def record(self) -> Path:
        return MEASURED / self.place.with_name(self.place.name + ".json")

    @property
    def probabilities(self) -> Path:
        """Of the class probabilities on the test set, beside the record."""
        return self.record.with_suffix(".npz")

    @property
    def weights(self) -> Path:
        """Of the readable weights, without .caffemodel and .prototxt."""
        return Path("runs/weights") / self.place


    @property
    def kept_weights(self) -> Path | None:
        """The same of those that are kept with the record: a full schedule's."""
        return WEIGHTS / self.place if self.experiment.scale == 1 else None


def is_done(run: Run, plan: Plan) -> bool:
    """Whether the weights of the last stage are there, and all that a record has to say."""
    tasks = [plan.task(stage) for stage in run.stages]
    return tasks[-1].is_finished and all(task.was_run or task.recorded for task in tasks)


def write(run: Run, plan: Plan, tell: Callable[[str], None]) -> None:
    """Write the record of a run that is done, its class probabilities and the readable weights; what stands there already and is whole
    stays.

    `tell` gets a sentence for each file that was there before and is missing or damaged now.
    """
    tasks = [plan.task(stage) for stage in run.stages]
    if not tasks[-1].was_run and is_committed(run, plan):
        return
    published, known, damage = run.weights.with_name(run.weights.name + ".caffemodel").exists(), None, ""
    try:
        known = read_sealed(run.record, "schema", "stages")
    except Damaged as error:
        damage = str(error) if published or run.record.exists() else ""
    wrong = publish_weights(tasks[-1], run.weights) + keep_probabilities(run, tasks[-1])
    if run.kept_weights:
        wrong += publish_weights(tasks[-1], run.kept_weights)
    kept = kept_entry(run, tasks[-1])
    is_new = known is None or not fits(known, tasks, plan) or known.get("weights") != kept
    for each in [damage] * bool(damage) + ([] if is_new else wrong):
        tell(f"{each}; it is written again")
    if is_new:
        write_sealed(run.record, record(run, tasks, plan, kept))


def is_committed(run: Run, plan: Plan) -> bool:
    """Whether record and weights lie there as they were kept, by today's keys."""
    with suppress(Damaged):
        net = read_net(run.record)
        return net is not None and net.complaint is None and list(net.keys) == list(map(plan.keys.today, run.stages))
    return False


def fits(known: dict[str, Any], tasks: list[Task], plan: Plan) -> bool:
    """Whether a record that stands there is what these tasks give.

    Where weights are kept with it, it names its stages as other workspaces do, by today's keys.
    """
    if known["schema"] != SCHEMA or len(known["stages"]) != len(tasks):
        return False
    for stage, task in zip(known["stages"], tasks, strict=True):
        names = {plan.keys.today(task.stage)} | (set() if known.get("weights") else {task.key})
        last = task.result()["outputs"] if task.was_run or not task.recorded else task.recorded.stage["last"]
        if stage.get("key") not in names or stage.get("last") != last:
            return False
    return True


def keep_probabilities(run: Run, task: Task) -> list[str]:
    """Keep the class probabilities of the run's last stage: from its folder, or as they lie beside the record that knows it.

    Returns what is wrong with the file that was there.
    """
    if task.was_run or not task.recorded:
        return probabilities.keep(run.probabilities, **task.predictions())
    if task.recorded.probabilities.exists() and not run.probabilities.exists():
        run.probabilities.parent.mkdir(parents=True, exist_ok=True)
        with written(run.probabilities) as part:
            part.write_bytes(task.recorded.probabilities.read_bytes())
    return []


def kept_entry(run: Run, task: Task) -> dict[str, Any] | None:
    """What a record says of the weights that are kept with it; None if none are."""
    if run.kept_weights is None:
        return None
    weights, net = (run.kept_weights.with_name(run.kept_weights.name + suffix) for suffix in (".caffemodel", ".prototxt"))
    return {"file": str(weights), "sha256": sha256_of(weights), "prototxt_sha256": sha256_of(net),
            "test_iter": sum(task.stage.solver.test_iter)}


def record(run: Run, tasks: list[Task], plan: Plan, kept: dict[str, Any] | None) -> dict[str, Any]:
    """The record's content; rates are fractions from 0 to 1, as Caffe prints them.  `kept` is what kept_entry says."""
    x = run.experiment
    stages = [{**stage_record(task), "key": plan.keys.today(task.stage)} for task in tasks]
    last, metric = stages[-1], METRICS[run.metric]
    recorded = None if tasks[-1].was_run else tasks[-1].recorded
    numbers = recorded.numbers if recorded else with_counted(last["last"], metric.output, lambda: predictions(tasks[-1].predictions()))
    last["weights"] = f"{run.weights}.caffemodel"
    return {
        "schema": SCHEMA, "table": x.table, "row": x.name, "method": x.method.name, "net": x.net, "repeat": run.repeat, "scale": x.scale,
        "seed": x.seed, "options": x.options.as_dict(), "choices": fixed(x), "metric": metric.output,
        "last": numbers, "best": {name: best(name, [*last["test"].get(name, []), (last["iterations"], value)])
                                  for name, value in last["last"].items()},
        "iterations": [stage["iterations"] for stage in stages], "wall_s": sum(stage["wall_s"] for stage in stages),
        "stages": stages, "provenance": provenance(plan, tasks), "weights": kept, "scaled_from": x.schedule.counts(),
    }


def stage_record(task: Task) -> dict[str, Any]:
    """What a finished stage's log and result say, or another record; without the log that belongs to the result there are no curves."""
    if task.recorded and not task.was_run:
        return task.recorded.stage
    result = task.result()
    path, digests = task.folder / "log.txt", result.get("digests")
    log = parse(path.read_text(errors="replace") if digests is None or is_whole(path, digests.get(path.name, "")) else "")
    return {"title": task.stage.title, "key": task.key, "iterations": result["iterations"], "wall_s": result["wall_s"],
            "random_seed": task.stage.solver.random_seed, "resumed": result["resumed"], "inexact": result["inexact"],
            "together": result.get("together", 1), "lr": changes(log.lr), "loss": log.loss, "train": log.train, "test": log.test,
            "hints": hint_layers(task.stage.net), "last": result["outputs"], "weights": str(task.weights),
            "weights_sha256": sha256_of(whole_weights(task))}


def hint_layers(net: caffe_pb2.NetParameter) -> dict[str, str]:
    """Per hint loss of a net the blob of the teacher that it is the distance from."""
    return {layer.top[0]: layer.bottom[1] for layer in net.layer if layer.python_param.layer == "HintLoss"}


def changes(curve: Curve) -> Curve:
    """The points of a curve of steps where its value is another than before."""
    return [point for before, point in zip([(0, None), *curve], curve, strict=False) if point[1] != before[1]]


def best(name: str, curve: Curve) -> dict[str, Any]:
    """The lowest point of a loss, the highest of anything else; the first of equals."""
    iteration, value = (min if "loss" in name else max)(curve, key=lambda point: point[1])
    return {"value": value, "iteration": iteration}


def fixed(x: Experiment) -> dict[str, Any]:
    """What the experiment fixes beside its options."""
    taught = x.teacher if isinstance(x.teacher, Experiment) else None
    file = x.teacher if isinstance(x.teacher, Trained) else None
    teacher = taught.student if taught else file.network if file else None
    return {"dataset": x.dataset.name, "batch": x.dataset.batch, "teacher": teacher and described(teacher), "student": described(x.student),
            "teacher_dataset": taught.dataset.name if taught and taught.dataset != x.dataset else None,
            **({"teacher_method": taught.method.name} if taught and taught.method.name != "original" else {}),
            "external_teacher": file and str(file.caffemodel), "tau": x.tau, "lambda": x.lambda_, "lambda_schedule": x.lambda_schedule,
            "regressor": x.regressor, "hint_pairs": [list(pair) for pair in x.hint_pairs], "bn_fraction_of_run": x.bn_fraction,
            "schedule": dataclasses.asdict(x.scaled_schedule)}


def described(network: Network) -> dict[str, Any]:
    """A network as tables have it: the name of its kind, left out where it is a table's default, and its fields."""
    name = next(name for name, kind in NETWORKS.items() if kind is type(network))
    fields = {field: list(value) if isinstance(value, tuple) else value for field, value in vars(network).items()}
    return fields if name == "resnet" else {"net": name, **fields}


def predictions(kept: Mapping[str, np.ndarray]) -> tuple[Scores, Labels]:
    """The class scores and labels that a test kept, as metrics take them."""
    scores, labels = kept["scores"], kept["labels"]
    return scores.reshape(len(scores), -1).astype(np.float64), labels.reshape(-1).astype(int)


def provenance(plan: Plan, tasks: list[Task]) -> dict[str, Any]:
    """Where, when and with what the stages were run."""
    numerics, parts = plan.numerics, [plan.keys.parts(task.stage) for task in tasks]
    if tasks[-1].recorded and not tasks[-1].was_run:
        return {**tasks[-1].recorded.provenance, "data_fingerprint": fingerprints(parts)}
    result = tasks[-1].result()
    found = {name: result["environment"].get(name) for name in ("python", "torch", "numpy", "engine", "instructions", "gpu")}
    return {**result["machine"], **found, "threads": numerics.threads, "device": numerics.device, "precision": numerics.precision,
            "together": numerics.together, "backend": numerics.backend, **commit(),
            "started": min(task.result()["started"] for task in tasks if task.was_run), "finished": result["finished"],
            "data_fingerprint": fingerprints(parts)}


def fingerprints(parts: list[Parts]) -> dict[str, str]:
    """Of all data that the stages read, by the layer and field that names them."""
    return {name.removeprefix("net."): value.removeprefix("data ") for stage in parts for name, value in stage.items()
            if name.startswith("net.") and name.rsplit(".", 1)[1] in DATA_PATHS}


def commit() -> dict[str, Any]:
    """The commit of this code and whether its sources differ from it; None where it is not a git checkout."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False,
                                  env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "study/record.py") is None:          # installed somewhere inside another project's checkout
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "..", "../../results/paper"))}
