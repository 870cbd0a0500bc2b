"""Step cases: a method's stages as the table would make them, two iterations of each on the case's images, and all tensors after them."""
from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import losses
import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.experiment import DATASETS, Experiment, Options
from hintkd.methods.papers import paper
from hintkd.methods.stage import Stage
from hintkd.nets.surgery import TEACHER
from hintkd.nets.titles import network
from networks import Place, norm_places, places, tracked, weights_by_rule
from torchcaffe.settings import number_type

Arrays = dict[str, np.ndarray]
METHODS = {"hint": "fitnet", "attention": "at", "similarity": "sp", "abound": "ab", "factor": "ft"}       # by other names than here
# Tensors of auxiliary modules: module, beginning of the name, and the layer here; a BatchNorm by its blob.
AUXILIARY = (
    ("regressor", r"(?:conv|bn)", r"regressor"),
    ("vid", r"(\d)\.log_scale", r"vid\1_loss"), ("vid", r"(\d)\.regressor\.0", r"vid\1_regressor0"),
    ("vid", r"(\d)\.regressor\.2", r"vid\1_regressor1"), ("vid", r"(\d)\.regressor\.4", r"vid\1_regressor2"),
    ("connector", r"connectors\.(\d)\.(?:conv|bn)", r"connector\1"), ("connectors", r"(\d)\.[01]", r"connector\1"),
    ("paraphraser", r"(en|de)coder\.0", r"paraphraser_\1coder0"), ("paraphraser", r"(en|de)coder\.3", r"paraphraser_\1coder1"),
    ("paraphraser", r"(en|de)coder\.6", r"paraphraser_\1coder2"),
    ("translator", r"encoder\.[01]", r"translator0"), ("translator", r"encoder\.[34]", r"translator1"),
    ("translator", r"encoder\.[67]", r"translator2"),
    ("embed_s", r"linear", r"crd_student"), ("embed_t", r"linear", r"crd_teacher"),
    ("student", r"proj_head\.0", r"student_head0"), ("student", r"proj_head\.2", r"student_head1"),
    ("teacher", r"proj_head\.0", r"teacher_head0"), ("teacher", r"proj_head\.2", r"teacher_head1"))


def knows(case: dict[str, Any]) -> bool:
    return METHODS.get(case["distill"], case["distill"]) in paper("zoo").methods


class Module:
    """A module of a case: its tensors, and where each is in a net."""

    def __init__(self, name: str, told: dict[str, Any], dtype: torch.dtype, title: str = ""):
        self.name = name
        known = [not tensor[0].endswith("num_batches_tracked") for tensor in told["tensors"]]
        values = weights_by_rule(told["tensors"], told["seed"], told["gain"])
        self.names = [tensor[0] for tensor in tracked(told["tensors"])]
        self.values = [value.astype(np.float64) for value, wanted in zip(values, known, strict=True) if wanted]
        prefix = TEACHER if name == "teacher" else ""
        network_of = network_places(title, dtype) if title else []
        self.places = [[Place(prefix + place.layer, *place[1:]) for place in each] for each in network_of]
        self.places += [[auxiliary(name, tensor, self.names)] for tensor in self.names[len(self.places):]]

    def place(self, index: int, net: Any) -> Place | None:
        """Where a tensor is in this net, if it is there."""
        return next((place for place in self.places[index] if place.layer in net.params), None)

    def give(self, net: Any) -> None:
        """Set what the net has of it."""
        for index, value in enumerate(self.values):
            place = self.place(index, net)
            if place is not None:
                place.set(net, value.reshape(place.blob(net).data.shape))
        self._fold(net)

    def _fold(self, net: Any) -> None:
        """The last BatchNorm of a wide ResNet in AB's first stage, which stays in eval mode: into the Scale that stands for it there."""
        held = self.held(net)
        if held:
            gamma, beta, mean, variance = (self.values[index] for index in held)
            root = np.sqrt(1 + 1e-5)                         # by which the Power layer before it divides
            scale, shift = net.params["bn1_tap_scale"]
            scale.data[...], shift.data[...] = gamma * root / np.sqrt(variance + 1e-5), beta - gamma * mean / np.sqrt(variance + 1e-5)

    def held(self, net: Any) -> list[int]:
        """The tensors of a BatchNorm of which the net has the Scale alone."""
        if self.name != "student" or "bn1_tap_scale" not in net.params or "bn1_tap_bn" in net.params:
            return []
        start = self.names.index("bn1.weight")
        return list(range(start, start + 4))

    def take(self, net: Any) -> None:
        """Read what the net has of it."""
        held = self.held(net)
        for index, value in enumerate(self.values):
            place = self.place(index, net)
            if place is not None and index not in held:
                self.values[index] = place.get(net).reshape(value.shape)

    def table(self) -> np.ndarray:
        """A row for each tensor: sum, norm, the first four elements."""
        rows = []
        for value in self.values:
            flat = value.reshape(-1)
            rows.append([flat.sum(), np.linalg.norm(flat), *np.concatenate([flat, np.zeros(4)])[:4]])
        return np.array(rows)


def network_places(title: str, dtype: torch.dtype) -> list[list[Place]]:
    """Where the tensors of a network are: each with its name where preacts are tapped beside the usual one."""
    both = []
    for preacts in (False, True):
        param = caffe_pb2.NetParameter(name=title)
        param.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": [1, 3, 32, 32]}]})
        network(title).write(param, "data", 100, Options(), preacts=preacts)
        both.append(places(built(param, dtype)))
    return [list(each) for each in zip(*both, strict=True)]


def auxiliary(module: str, tensor: str, names: list[str]) -> Place:
    """Where a tensor of an auxiliary module is."""
    for owner, pattern, layer in AUXILIARY:
        owned, kind = tensor.rpartition(".")[::2] if not tensor.endswith("log_scale") else (tensor, "log_scale")
        found = re.fullmatch(pattern, owned)
        if module == owner and found:
            blob = found.expand(layer)
            if f"{owned}.running_mean" in names:
                return norm_places(blob)[("weight", "bias", "running_mean", "running_var").index(kind)]
            return Place(blob, int(kind == "bias"))
    raise ValueError(f"{module}: {tensor} has no place")


def built(param: caffe_pb2.NetParameter, dtype: torch.dtype) -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file, number_type(dtype):
        file.write(write_text(param))
        file.flush()
        return caffe.Net(file.name, caffe.TRAIN)


def experiment(case: dict[str, Any]) -> Experiment:
    """The experiment of which the case does two iterations."""
    zoo, told = paper("zoo"), case["optimizer"]
    student, teacher = (network(f"wrn_{case[side]}" if case["distill"] == "oh" else case[side]) for side in ("student", "teacher"))
    weights = {name: case[name] for name in ("gamma", "alpha", "beta") if case.get(name)}
    if case["distill"] == "crd":
        weights["crd_width"] = case["hyper"]["feat_dim"]
    schedule = replace(zoo.schedule(), base_lr=told["lr"], light_lr=told["lr"], momentum=told["momentum"],
                       weight_decay=told["weight_decay"], nesterov=told["nesterov"],
                       paraphraser_lr=case.get("stage1", told)["lr"])
    shared: dict[str, Any] = {"dataset": DATASETS["cifar100-zoo"], "schedule": schedule, "options": zoo.options(**weights), "tau": 4.0}
    taught_by = Experiment(zoo.methods["original"], student=teacher, generation=1, pupil=student, **shared)
    return Experiment(zoo.methods[METHODS.get(case["distill"], case["distill"])], student=student, teacher=taught_by, **shared)


def with_indices(stage: Stage, hyper: dict[str, Any]) -> Stage:
    """CRD's stage with a loss that is given its indices instead of drawing them."""
    net = caffe_pb2.NetParameter()
    net.CopyFrom(stage.net)
    (loss,) = (layer for layer in net.layer if layer.name == "crd_loss")
    loss.python_param.param_str = json.dumps({"samples": hyper["n"], "temperature": hyper["nce_t"], "momentum": hyper["nce_m"]})
    del loss.param[3:]
    return Stage.solve(stage.title, net, stage.solver)


def contrastive_state(net: Any) -> Arrays:
    """CRD's banks and normalisers."""
    blobs = net.params["crd_loss"]
    return {name: np.array(blob.data, np.float64) for name, blob in zip(("memory_v1", "memory_v2", "Z"), blobs, strict=True)}


def self_supervised_parts(net: Any) -> list[float]:
    """SSKD's four losses without their weights, of the net's last pass."""
    (node,) = (node for node in net.graph.nodes if node.layer.name == "sskd_loss")
    user, names = node.layer.user, ("ce", "kd", "tf", "ss")
    kept, found = dict(user.p), []
    for one in names:
        user.p.update({name: float(name == one) for name in names})
        node.layer.forward_numpy()
        found.append(float(net.blobs["sskd_loss"].data.sum()))
    user.p.update(kept)
    return found


def kept_rows(net: Any, ratio: float) -> np.ndarray:
    """The rows of rotated views that count in SSKD's last loss."""
    cosines = losses.view_cosines(np.array(net.blobs["teacher_head1"].data, np.float64))
    return np.flatnonzero(losses.kept(cosines, np.repeat(np.arange(cosines.shape[1]), 3), ratio))


class Exact:
    """A solver's settings with their numbers as they are written: a message has 0.01 as the float32 next to it, 2e-8 away."""

    def __init__(self, param: caffe_pb2.SolverParameter):
        self._param = param

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._param, name)
        return float(str(np.float32(value))) if isinstance(value, float) else value


class Run:
    """A stage's solver with inputs in place of its data."""

    def __init__(self, stage: Stage, inputs: Arrays, modules: dict[str, Module], dtype: torch.dtype, fast: bool):
        param = caffe_pb2.NetParameter(name=stage.net.name)
        for layer in stage.net.layer:
            if any(rule.phase == caffe.TEST for rule in layer.include):
                continue
            if layer.bottom:
                param.layer.add().CopyFrom(layer)
                continue
            for top in layer.top:
                shape = inputs[top].shape[1:]
                param.layer.add(name=f"input_{top}", type="Input", top=[top], input_param={"shape": [{"dim": shape}]})
        solver = caffe_pb2.SolverParameter()
        solver.CopyFrom(stage.solver)
        for field in ("test_iter", "test_interval", "snapshot", "display", "average_loss"):
            solver.ClearField(field)
        with tempfile.TemporaryDirectory() as folder, number_type(dtype):
            (Path(folder) / "net.prototxt").write_text(write_text(param))
            solver.net = str(Path(folder) / "net.prototxt")
            solver.snapshot_prefix = str(Path(folder) / "snapshot")
            (Path(folder) / "solver.prototxt").write_text(write_text(solver))
            self.solver = caffe.get_solver(str(Path(folder) / "solver.prototxt"))
        self.solver.param = self.solver.updater.param = Exact(self.solver.param)
        self.solver.fast = fast
        if self.solver.layer_by_layer == fast:
            raise ValueError(f"{stage.title} does not run as a whole iteration")
        self.inputs, self.modules, self.dtype = inputs, modules, dtype
        for module in modules.values():
            module.give(self.solver.net)

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration on its inputs; every loss with its weight, before the update."""
        net = self.solver.net
        for top, values in self.inputs.items():
            if top in net.blobs:
                net.blobs[top].data[...] = values[iteration]
        with number_type(self.dtype):
            self.solver.step(1)
        losses = {name: float(net.blobs[name].data.sum()) * weight for node in net.graph.nodes
                  for name, weight in zip(node.top_names, node.loss_weights, strict=True) if weight}
        for module in self.modules.values():
            module.take(net)
        return losses


def results(case: dict[str, Any], arrays: Arrays, dtype: torch.dtype, fast: bool = False) -> Arrays:
    """What the project computes for a case, under the case's keys."""
    titles = {side: f"wrn_{case[side]}" if case["distill"] == "oh" else case[side] for side in ("student", "teacher")}
    modules = {name: Module(name, told, dtype, titles.get(name, "")) for name, told in case["weights"].items()}
    *before, last = experiment(case).method(experiment(case))
    images = arrays["in/images"]
    inputs = {"data": images.reshape(len(images), -1, *images.shape[-3:]), "label": arrays["in/labels"]}
    if case["distill"] == "crd":
        last = with_indices(last, case["hyper"])
        inputs["position"] = np.stack([arrays[f"in/contrast_idx@{iteration}"] for iteration in range(case["iterations"])])
    found: Arrays = {}
    for stage in before if "stage1" in case else []:
        run = Run(stage, inputs, modules, dtype, fast)
        found["stage1/losses"] = np.array([sum(run.step(0).values()) for _ in range(case["stage1"]["iterations"])])
        found |= {f"stage1/{name}": module.table() for name, module in modules.items()}
    run, totals = Run(last, inputs, modules, dtype, fast), []
    net = run.solver.net
    for bank in range(2) if case["distill"] == "crd" else ():
        net.params["crd_loss"][bank].data[...] = arrays[f"state/memory_v{bank + 1}"]
    for iteration in range(case["iterations"]):
        parts = run.step(iteration)
        total, now = sum(parts.values()), f"after{iteration + 1}"
        found |= {f"{now}/{name}": module.table() for name, module in modules.items()}
        if case["distill"] == "crd":
            found |= {f"{now}/{name}": array for name, array in contrastive_state(net).items()}
        if case["distill"] == "sskd":
            totals.append([total, *self_supervised_parts(net)])
            found[f"out/kept_ss@{iteration}"] = kept_rows(net, case["hyper"]["ratio_ss"])
        else:
            totals.append([total, parts["loss"], total - parts["loss"]] if case["distill"] == "oh" else [total])
    found["out/losses"] = np.array(totals) if len(totals[0]) > 1 else np.array(totals)[:, 0]
    return found
