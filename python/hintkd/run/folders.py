"""What lies in a stage's folder: what its program is given, and what comes out of it.

A folder is all that a caffe needs.  A stage of several parts has one for each within its own.  Which stage runs when is the runner's
business, what is damaged mend.py's.
"""
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hintkd.backend import caffe_pb2, read_weights, write_text, write_weights
from hintkd.errors import Damaged, UserError
from hintkd.files import fault, is_whole, read_sealed, sha256_of, write_file, write_json, write_sealed, written
from hintkd.methods.stage import Part, Stage
from hintkd.run.keys import Numerics
from hintkd.run.plan import Plan, Task

REMEMBERED = Path("runs/remembered")        # what teachers have said, which no result depends on: it may be deleted at any time


def stage_json(task: Task, group: list[str], numerics: Numerics, device_id: int = 0, inexact: bool = False) -> dict[str, Any]:
    """What the stage process is told beside the prototxts; `group` has the keys of all that train together, the task's own among them."""
    parts = {part.name: {"iterations": part.solver.max_iter, "snapshot": part.solver.snapshot, "test_iter": sum(part.solver.test_iter),
                         "predictions": predictions_of(part.net)} for part in task.stage.parts}
    return {"schema": 1, "title": task.stage.title, "key": task.key, "group": group, "program": task.stage.program,
            "backend": numerics.backend, "device": numerics.device, "device_id": device_id, "threads": numerics.threads,
            "precision": numerics.precision, "remember": str(REMEMBERED), "inexact": inexact, **parts.get("", {"parts": parts})}


def write_folder(task: Task, plan: Plan, told: dict[str, Any], digests: Mapping[str, str] | None = None) -> None:
    """All that the stage process needs, also for `caffe train --solver=FOLDER/solver.prototxt --weights=FOLDER/init.caffemodel`.

    told       its stage.json, to which the digests of the weights in are added
    digests    of files in the folder; those of the weights in are looked up here, or else in the stage.json that is there
    Writing it again changes nothing, so that it may be written while another process runs the stage.
    """
    write_sealed(task.folder / "key.json", {"key": task.key, "parts": plan.keys.parts(task.stage)})
    for part in task.stage.parts:
        folder = task.part_folder(part)
        solver = caffe_pb2.SolverParameter()
        solver.CopyFrom(part.solver)
        solver.net, solver.snapshot_prefix = str(folder / "net.prototxt"), str(folder / "snapshot")
        solver.solver_mode = solver.GPU if told["device"] == "gpu" else solver.CPU
        solver.device_id = told["device_id"]
        write_file(folder / "net.prototxt", write_text(part.net))
        write_file(folder / "solver.prototxt", write_text(solver))
        told_of(part, told)["init"] = write_init(task, part, plan, digests or {}) if part.weights_in else None
    write_json(task.folder / "stage.json", told)


def told_of(part: Part, told: dict[str, Any]) -> dict[str, Any]:
    """What of a stage.json is about one part."""
    own: dict[str, Any] = told["parts"][part.name] if part.name else told
    return own


def write_init(task: Task, part: Part, plan: Plan, digests: Mapping[str, str]) -> str:
    """Write the weights in, unless they are there as they were written; their digest."""
    init = task.part_folder(part) / "init.caffemodel"
    known = digests.get(str(init.relative_to(task.folder)))
    with suppress(Damaged):
        known = known or told_of(part, read_sealed(task.folder / "stage.json")).get("init")
    if known and is_whole(init, known):
        return known
    write_weights(init, compose(task, part, plan).items())
    return sha256_of(init)


def compose(task: Task, part: Part, plan: Plan) -> dict[str, list[np.ndarray]]:
    """The weights a part starts from: layer -> blobs, chosen and renamed as its weights_in say.

    Raises UserError where a source lacks a layer that is asked for, or that the net has under the source's prefix with its parameters
    fixed in writing: it would keep random weights, as in Caffe, and never learn.
    """
    layers: dict[str, list[np.ndarray]] = {}
    for weights in part.weights_in:
        path = whole_weights(plan.task(weights.source), weights.part) if isinstance(weights.source, Stage) else weights.source
        found = {name: blobs for name, blobs in read_weights(path) if weights.layers is None or name in weights.layers}
        fixed = [layer.name.removeprefix(weights.prefix) for layer in part.net.layer
                 if weights.prefix and layer.name.startswith(weights.prefix) and layer.param]
        missing = sorted({*(weights.layers or ()), *fixed} - set(found))
        if missing:
            raise UserError(f"{path} has no weights for layer {missing[0]}, which {task.stage.title} needs: give a file that fits the net")
        layers.update((weights.prefix + name, blobs) for name, blobs in found.items())
    return layers


def final_snapshots(task: Task) -> dict[str, str]:
    """Per part its final snapshot, relative to the task's folder.  Raises Damaged if the result is."""
    weights = task.result()["weights"]
    return {part.name: str(Path(part.name, weights[part.name] if part.name else weights)) for part in task.stage.parts}


def keep_weights(task: Task) -> None:
    """Write the weights out: the final snapshots without what the stage leaves behind; the result holds their digests.

    Raises Damaged if a final snapshot is.
    """
    result = task.result()
    digests = dict(result.get("digests", {}))
    for part, name in zip(task.stage.parts, final_snapshots(task).values(), strict=True):
        final, weights = task.folder / name, task.weights_of(part)
        if name in digests and not is_whole(final, digests[name]):
            raise Damaged(f"{final} {fault(final)}")
        write_weights(weights, [(layer, blobs) for layer, blobs in read_weights(final) if part.keeps(layer)])
        digests[str(weights.relative_to(task.folder))] = sha256_of(weights)
    if digests != result.get("digests"):
        write_sealed(task.folder / "result.json", {**result, "digests": digests})


def whole_weights(task: Task, part: str = "") -> Path:
    """Where a finished task's weights out are, of a part or the first.  Raises Damaged if they are not what was written."""
    if not task.was_run and task.recorded and task.recorded.weights:
        return task.recorded.weights
    path = task.weights_of(task.stage.part(part))
    known = task.result().get("digests", {}).get(str(path.relative_to(task.folder)))
    if not path.exists() or (known and not is_whole(path, known)):
        raise Damaged(f"{path} {fault(path)}; give the same command again, which mends it")
    return path


def predictions_of(net: caffe_pb2.NetParameter) -> dict[str, str]:
    """The blobs that a net's accuracy compares, class scores and labels; none for a net without one."""
    accuracy = next((layer for layer in net.layer if layer.type == "Accuracy"), None)
    return {"scores": accuracy.bottom[0], "labels": accuracy.bottom[1]} if accuracy else {}


def test_net(stage: Stage) -> caffe_pb2.NetParameter:
    """The student or teacher of a stage as it is tested: without the layers of training alone, those the stage leaves behind, and rules."""
    net = caffe_pb2.NetParameter()
    net.CopyFrom(stage.net)
    del net.layer[:]
    for layer in stage.net.layer:
        if stage.keeps(layer.name) and (not layer.include or any(rule.phase == caffe_pb2.TEST for rule in layer.include)):
            kept = net.layer.add()
            kept.CopyFrom(layer)
            del kept.include[:]
    return net


def publish_weights(task: Task, path: Path) -> list[str]:
    """Copy the weights out to PATH.caffemodel, and the net they are tested in to PATH.prototxt, where that is not what lies there.

    Returns what was wrong with files that were there.
    """
    weights, net = (path.with_name(path.name + suffix) for suffix in (".caffemodel", ".prototxt"))
    source, text, found = whole_weights(task), write_text(test_net(task.stage)), []
    if not is_whole(weights, sha256_of(source)):
        found.append(f"{weights} {fault(weights)}")
        weights.parent.mkdir(parents=True, exist_ok=True)
        with written(weights) as part:
            part.write_bytes(source.read_bytes())
    if not is_whole(net, hashlib.sha256(text.encode()).hexdigest()):
        found.append(f"{net} {fault(net)}")
        write_file(net, text)
    return found
