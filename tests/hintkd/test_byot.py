"""Self distillation: its nets against the method written by hand in float64, where gradients stop, and the presets."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Experiment, Taps
from hintkd.methods.byot import Options, Schedule, exits_net
from hintkd.methods.papers import paper
from hintkd.nets.basic_resnet import BasicResNet, DeepResNet
from hintkd.nets.exits import section_ends
from hintkd.nets.networks import NETWORKS
from hintkd.nets.pyramidnet import PyramidNet
from hintkd.nets.resnet import ResNet
from hintkd.nets.resnext import ResNeXt
from hintkd.nets.vgg import VGG
from hintkd.nets.wide_resnet import WideResNet
from hintkd.results.report import published_gain
from hintkd.run.folders import test_net as published_net
from hintkd.study.table import Table, find_table, load_table
from torchcaffe.alias import installed
from torchcaffe.settings import number_type, shapes_only

BATCH, CLASSES, SECTIONS = 6, 10, 3
Parameters = dict[str, list[torch.Tensor]]


def experiment(method: str = "byot", *, student: Any = None, dataset: str = "digits", lambda_: float = 0.02, **options: Any) -> Experiment:
    options = {"mean": "file", "sections": SECTIONS, **options}
    return Experiment(paper("byot").methods[method], replace(DATASETS[dataset], batch=BATCH), student or BasicResNet(8), lambda_=lambda_,
                      schedule=Schedule(), options=Options(**options))


def with_inputs(net: caffe_pb2.NetParameter, x: Experiment) -> caffe_pb2.NetParameter:
    """The net with images and labels that a test gives, in place of records."""
    made = caffe_pb2.NetParameter(name=net.name)
    made.layer.add(name="data", type="Input", top=["data", "label"],
                   input_param={"shape": [{"dim": [BATCH, *x.dataset.shape]}, {"dim": [BATCH]}]})
    made.layer.extend(layer for layer in net.layer if layer.type != "Data")
    return made


@contextmanager
def solver_of(x: Experiment, folder: Path, lr: float = 0.05) -> Iterator[Any]:
    """A solver in float64 that trains the method's net."""
    (folder / "net.prototxt").write_text(write_text(with_inputs(x.method(x)[0].net, x)))
    solver = caffe_pb2.SolverParameter(net=str(folder / "net.prototxt"), type="SGD", base_lr=lr, lr_policy="fixed", momentum=0.9,
                                       weight_decay=5e-4, max_iter=10, random_seed=3)
    (folder / "solver.prototxt").write_text(write_text(solver))
    with number_type(torch.float64):
        yield caffe.SGDSolver(str(folder / "solver.prototxt"))


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(5)
    return [(draw.standard_normal((BATCH, 1, 8, 8)), draw.integers(0, CLASSES, BATCH)) for _ in range(count)]


# ----------------------------------------------------------------------------------------------------------- written by hand

class ByHand:
    """ResNet-8 of basic blocks with two exits, its losses and SGD with momentum, on tensors of float64."""

    def __init__(self, net: Any, x: Experiment):
        self.x, self.o = x, x.options
        assert isinstance(self.o, Options)
        self.parameters: Parameters = {
            name: [torch.tensor(np.array(blob.data), requires_grad=True) for blob in blobs]
            for name, blobs in net.params.items() if not name.endswith("_bn")}
        self.velocity = {name: [torch.zeros_like(each) for each in blobs] for name, blobs in self.parameters.items()}

    def conv(self, name: str, data: torch.Tensor, stride: int = 1, pad: int | None = None, groups: int = 1) -> torch.Tensor:
        (weight,) = self.parameters[name]
        return F.conv2d(data, weight, stride=stride, padding=weight.shape[-1] // 2 if pad is None else pad, groups=groups)

    def conv_norm(self, name: str, data: torch.Tensor, stride: int = 1, pad: int | None = None) -> torch.Tensor:
        return F.batch_norm(self.conv(name, data, stride, pad), None, None, *self.parameters[name + "_scale"], training=True)

    def linear(self, name: str, data: torch.Tensor) -> torch.Tensor:
        return F.linear(data, *self.parameters[name])

    def branch(self, number: int, data: torch.Tensor) -> torch.Tensor:
        name, factor = f"exit{number}_", data.shape[-1] // 2
        if self.o.branch == "bottleneck":
            data = F.relu(self.conv_norm(name + "conv1", data))
            data = F.relu(self.conv_norm(name + "conv2", data, factor, 0))
            return F.relu(self.conv_norm(name + "conv3", data))
        step = 1
        while data.shape[-1] > 2:
            each = f"{name}step{step}_"
            data = self.conv(each + "deep1", data, 2, groups=data.shape[1])
            data = F.relu(self.conv_norm(each + "conv1", data))
            data = self.conv(each + "deep2", data, groups=data.shape[1])
            data, step = F.relu(self.conv_norm(each + "conv2", data)), step + 1
        return data

    def exits(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(map, pooled, scores) of both branches and of the end."""
        data, found = F.relu(self.conv_norm("conv1", images)), []
        for group in range(3):
            name, stride = f"layer{group + 1}_0", 2 if group else 1
            inner = F.relu(self.conv_norm(name + "_conv1", data, stride))
            data = F.relu(self.conv_norm(name + "_conv2", inner) + (self.conv_norm(name + "_proj", data, stride) if group else data))
            features = self.branch(group + 1, data) if group < 2 else data
            pooled = features.mean((2, 3))
            found.append((features, pooled, self.linear(f"exit{group + 1}_fc" if group < 2 else "fc", pooled)))
        return found

    def losses(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum, and each term as Caffe's layers show it."""
        o, x = self.o, self.x
        *shallow, (last_map, last_pooled, last_scores) = self.exits(images)
        if o.detached:
            last_map, last_pooled = last_map.detach(), last_pooled.detach()
        target = last_scores.detach() if o.detached else last_scores
        alpha, lambda_ = (o.alpha, x.lambda_) if x.method.name == "byot" else (0.0, 0.0)
        shown = {"loss": F.cross_entropy(last_scores, labels)}
        total = shown["loss"] * (1 - alpha if o.deepest_alpha else 1)
        for k, (features, pooled, scores) in enumerate(shallow, start=1):
            shown[f"loss_{k}"] = F.cross_entropy(scores, labels)
            total = total + (1 - alpha) * shown[f"loss_{k}"]
            if alpha:
                p, q = F.softmax(target / x.tau, 1), F.log_softmax(scores / x.tau, 1)
                divergence = (p * (p.log() - q)).sum() / BATCH
                shown[f"exit{k}_kl"] = x.tau ** 2 * divergence
                total = total + alpha * divergence * (x.tau ** 2 if o.tau_squared else 1)
            if lambda_ and (o.hinted == "all" or k < len(shallow)):
                own = self.linear(f"adapted{k}", pooled) if o.adapted else pooled
                squared = ((features - last_map) if o.feature == "map" else (own - last_pooled)).square().sum()
                shown[f"exit{k}_hint{'_root' if o.hint == 'distance' else ''}"] = (
                    squared.sqrt() if o.hint == "distance" else squared / (2 * BATCH))
                total = total + lambda_ * {"sum": squared, "mean": squared / BATCH, "distance": squared.sqrt()}[o.hint]
        return total, shown

    def step(self, images: np.ndarray, labels: np.ndarray, lr: float) -> tuple[dict[str, float], dict[str, list[np.ndarray]]]:
        """One iteration of Caffe's SGD; the losses before it and the gradients without weight decay."""
        total, shown = self.losses(torch.from_numpy(images), torch.from_numpy(labels))
        names = [(name, i) for name, blobs in self.parameters.items() for i in range(len(blobs))]
        found = torch.autograd.grad(total, [self.parameters[name][i] for name, i in names])
        gradients: dict[str, list[np.ndarray]] = {}
        with torch.no_grad():
            for (name, i), gradient in zip(names, found, strict=True):
                gradients.setdefault(name, []).append(gradient.numpy().copy())
                velocity, parameter = self.velocity[name][i], self.parameters[name][i]
                velocity.mul_(0.9).add_(lr * (gradient + 5e-4 * parameter))
                parameter.sub_(velocity)
        return {name: float(value.detach()) for name, value in shown.items()}, gradients


CASES: list[dict[str, Any]] = [
    {}, {"method": "deep-supervision"},
    {"deepest_alpha": True, "hint": "mean", "feature": "map"},
    {"alpha": 0.3, "tau_squared": False, "branch": "separable", "hint": "distance", "hinted": "all-but-last", "adapted": True},
    {"detached": False, "alpha": 0.4}, {"detached": False, "feature": "map", "hint": "distance"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())) or "default")
def test_two_iterations_are_those_of_the_method_written_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    x = experiment(**case)
    with solver_of(x, tmp_path) as solver:
        own = ByHand(solver.net, x)
        for images, labels in batches(2):
            solver.net.blobs["data"].data[...], solver.net.blobs["label"].data[...] = images, labels
            solver.net.forward()
            shown = {name: float(solver.net.blobs[name].data.reshape(-1)[0]) for name in solver.net.outputs}
            for blobs in solver.net.params.values():
                for blob in blobs:
                    blob.diff[...] = 0
            solver.net.backward()
            diffs = {name: [np.array(blob.diff) for blob in solver.net.params[name]] for name in own.parameters}
            losses, gradients = own.step(images, labels, 0.05)
            assert shown == pytest.approx(losses, rel=1e-7)
            for name, expected in gradients.items():
                for got, wanted in zip(diffs[name], expected, strict=True):
                    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7 * max(1, np.abs(wanted).max())), name
            solver.step(1)
            for name, blobs in own.parameters.items():
                for blob, parameter in zip(solver.net.params[name], blobs, strict=True):
                    assert np.array(blob.data) == pytest.approx(parameter.detach().numpy(), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: "-".join(map(str, case.values())) or "default")
def test_whole_iterations_give_the_same_weights(case: dict[str, Any], tmp_path: Path) -> None:
    """The stage process runs iterations as one function of tensors."""
    x = experiment(**case)
    with solver_of(x, tmp_path) as solver:
        own = ByHand(solver.net, x)
        solver.fast = True
        for images, labels in batches(2):
            solver.net.blobs["data"].data[...], solver.net.blobs["label"].data[...] = images, labels
            solver.step(1)
            own.step(images, labels, 0.05)
        for name, blobs in own.parameters.items():
            for blob, parameter in zip(solver.net.params[name], blobs, strict=True):
                assert np.array(blob.data) == pytest.approx(parameter.detach().numpy(), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("detached", [True, False])
def test_the_numpy_form_that_a_real_caffe_runs_sends_the_same_gradients(detached: bool, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with installed():
        from hintkd.layers.kl_divergence import KLDivergence
        from hintkd.layers.pair_loss import PairLoss
    for kind in (KLDivergence, PairLoss):
        monkeypatch.delattr(kind, "forward_torch")
    x = experiment(detached=detached, alpha=0.4)
    with solver_of(x, tmp_path) as solver:
        own, (images, labels) = ByHand(solver.net, x), batches(1)[0]
        solver.net.blobs["data"].data[...], solver.net.blobs["label"].data[...] = images, labels
        solver.net.forward()
        solver.net.backward()
        _, gradients = own.step(images, labels, 0.05)
        for name, expected in gradients.items():
            for blob, wanted in zip(solver.net.params[name], expected, strict=True):
                assert np.array(blob.diff) == pytest.approx(wanted, rel=1e-5, abs=1e-7 * max(1, np.abs(wanted).max())), name


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize(("layer", "index"), [("fc", 0), ("layer3_0_conv2", 0), ("layer3_0_conv1_scale", 1)])
def test_what_is_above_the_last_branch_learns_from_its_own_labels_alone(layer: str, index: int, detached: bool, tmp_path: Path) -> None:
    """Finite differences: of the deepest label loss where gradients stop, of the sum of all losses where they do not."""
    x = experiment(detached=detached, alpha=0.5, lambda_=0.05)
    with solver_of(x, tmp_path) as solver:
        net = solver.net
        images, labels = batches(1)[0]
        net.blobs["data"].data[...], net.blobs["label"].data[...] = images, labels
        weights = {output: weight_of(x, output) for output in net.outputs}

        def differences(outputs: list[str], at: int, h: float = 1e-5) -> float:
            data = net.params[layer][index].data
            before, place, sides = np.array(data), np.unravel_index(at, data.shape), []
            for step in (h, -h):
                data[...] = before
                data[place] += step
                net.forward()
                sides.append(sum(weights[output] * float(net.blobs[output].data.reshape(-1)[0]) for output in outputs))
            data[...] = before
            return (sides[0] - sides[1]) / (2 * h)

        net.forward()
        net.backward()
        gradient = np.array(net.params[layer][index].diff).reshape(-1)
        for at in np.argsort(-np.abs(gradient))[:4]:
            alone, all_ = differences(["loss"], int(at)), differences(list(net.outputs), int(at))
            assert gradient[at] == pytest.approx(alone if detached else all_, rel=1e-5)
            assert alone != pytest.approx(all_, rel=1e-3)                # the other terms do depend on it


def weight_of(x: Experiment, output: str) -> float:
    """The loss weight that the net gives an output in writing."""
    return next(float(layer.loss_weight[0]) for layer in x.method(x)[0].net.layer if output in layer.top)


# --------------------------------------------------------------------------------------------------------- nets and sections

@pytest.mark.parametrize(("stages", "modules", "sections", "ends"), [
    (4, 8, 4, ["s0", "s1", "s2"]), (3, 9, 3, ["s0", "s1"]), (3, 9, 4, ["m2", "m4", "m6"]), (3, 33, 4, ["m8", "m16", "m24"]),
    (3, 3, 2, ["m1"])])
def test_sections_end_with_the_stages_or_after_equal_parts(stages: int, modules: int, sections: int, ends: list[str]) -> None:
    taps = Taps(tuple(f"m{i}" for i in range(modules)), tuple(f"s{i}" for i in range(stages)), (), "pooled", "scores")
    assert list(section_ends(taps, sections)) == ends


def test_more_sections_than_modules_are_told() -> None:
    with pytest.raises(UserError, match="4 sections cannot be cut from 3 modules"):
        exits_net(experiment(sections=4), 0.1, 0)


NETS = {"VGG19": VGG(19), "ResNet18": DeepResNet(18), "ResNet50": DeepResNet(50), "ResNet101": DeepResNet(101),
        "ResNet152": DeepResNet(152), "ResNeXt29-8": ResNeXt(29, 8, 64), "WideResNet20-8": WideResNet(20, 8, 4),
        "WideResNet44-8": WideResNet(44, 8, 4), "WideResNet28-12": WideResNet(28, 12, 4), "PyramidNet101-240": PyramidNet(101, 240)}


@pytest.mark.parametrize("title", NETS)
@pytest.mark.parametrize("branch", ["bottleneck", "separable"])
def test_the_papers_networks_have_four_exits_of_one_shape(title: str, branch: str, tmp_path: Path) -> None:
    x = experiment(student=NETS[title], dataset="cifar100", sections=4, mean="values", branch=branch)
    (tmp_path / "net.prototxt").write_text(write_text(with_inputs(exits_net(x, 0.1, 1e-6), x)))
    with shapes_only():
        net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    maps = {tuple(net.blobs[f"exit{k}_global_avg_pool"].shape) for k in (1, 2, 3)}
    assert maps == {tuple(net.blobs["global_avg_pool"].shape)}
    assert [tuple(net.blobs[name].shape) for name in ("exit1_fc", "exit2_fc", "exit3_fc", "fc")] == [(BATCH, 100)] * 4
    assert {"loss", "loss_1", "loss_3", "exit1_kl", "exit3_kl", "exit1_hint", "exit3_hint"} <= set(net.outputs)


def test_every_known_network_can_have_exits_or_says_why_not() -> None:
    made = {"resnet": ResNet(20), "basic-resnet": BasicResNet(20), "wrn": WideResNet(16, 2), "vgg": VGG(8)}
    assert made.keys() <= NETWORKS.keys()
    for student in made.values():
        assert exits_net(experiment(student=student, dataset="cifar100", sections=4, mean="values"), 0.1, 1e-6)


def test_what_is_published_has_all_exits_and_nothing_of_training() -> None:
    (stage,) = (x := experiment(adapted=True, hint="distance")).method(x)
    layers = {layer.name: layer.type for layer in published_net(stage).layer}
    assert {"exit1_fc", "exit2_fc", "fc", "ensemble", "accuracy_1", "accuracy_ensemble"} <= layers.keys()
    assert not {"Python", "EuclideanLoss", "Power"} & set(layers.values()) and not any(name.startswith("adapted") for name in layers)
    assert not stage.keeps("adapted1") and stage.keeps("exit1_fc")


def test_the_mean_of_all_classifiers_is_of_scores_or_of_probabilities() -> None:
    for kind, softmaxes in (("scores", 0), ("probabilities", 3)):
        net = exits_net(experiment(ensemble=kind), 0.1, 0)
        assert [layer.type for layer in net.layer].count("Softmax") == softmaxes
        (ensemble,) = (layer for layer in net.layer if layer.name == "ensemble")
        assert list(ensemble.eltwise_param.coeff) == pytest.approx([1 / 3] * 3)


# ----------------------------------------------------------------------------------------------------------- options and presets

TABLE = """title: t
source: s
paper: byot
dataset: cifar100
student: {net: deep-resnet, depth: 18, published: 77.09}
lambda: 1.0e-6
columns: {1/4: accuracy_1, 2/4: accuracy_2, 3/4: accuracy_3, 4/4: accuracy, ensemble: accuracy_ensemble}
rows:
  - {method: byot, published: {1/4: 67.85, ensemble: 79.67}}
  - {name: theirs, method: byot, set: {preset: authors, alpha: 0.4}}
"""


def table(tmp_path: Path, text: str = TABLE) -> Table:
    (tmp_path / "own.yaml").write_text(text)
    return load_table(tmp_path / "own.yaml")


def test_a_preset_sets_all_that_a_code_base_has_and_a_row_has_the_last_word(tmp_path: Path) -> None:
    x = table(tmp_path).experiment("theirs")
    o = x.options
    assert isinstance(o, Options)
    assert (o.alpha, o.hint, o.branch, o.adapted, o.tau_squared) == (0.4, "distance", "separable", True, False)
    assert (x.lambda_, x.tau, x.schedule.iterations, x.schedule.steps) == (0.03, 3.0, 97_656, (0.332, 0.664, 0.96))
    assert table(tmp_path).set_by_rows >= {"alpha", "hint", "lambda", "schedule"}


def test_a_preset_for_the_whole_table_names_it_and_keeps_the_published_values(tmp_path: Path) -> None:
    made = table(tmp_path).changed({"preset": "independent"})
    o = made.experiment("byot").options
    assert made.name == "own-preset-independent" and isinstance(o, Options) and o.deepest_alpha
    assert made.published("byot", "1/4") == (67.85,)
    assert table(tmp_path).changed({"preset": "authors", "alpha": 0.2}).name == "own-preset-authors-alpha-0.2"


@pytest.mark.parametrize(("given", "said"), [
    ({"preset": "author"}, "preset: 'author' is none of the paper's; did you mean 'authors'"),
    ({"alpha": 1.5}, "from 0 to 1"), ({"sections": 1}, "at least 2|from 2 to"), ({"adapted": True, "feature": "map"}, "adapted needs"),
    ({"branch": "wide"}, "must be one of 'bottleneck', 'separable'")])
def test_what_does_not_fit_is_told(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        table(tmp_path).changed(given)


def test_a_paper_without_presets_says_so(tmp_path: Path) -> None:
    text = "title: t\nsource: s\ndataset: cifar10\nstudent: {depth: 8}\nteacher: {depth: 14}\nrows:\n  - {method: kd}\n"
    with pytest.raises(UserError, match="preset: 'authors' is none of the paper's; it has none"):
        table(tmp_path, text).changed({"preset": "authors"})


# ---------------------------------------------------------------------------------------------------------------- the paper's table

def test_the_papers_table_has_its_ten_networks_and_supports_what_it_claims() -> None:
    found = find_table("byot")
    own = {row.title: found.experiment(row.title).student for row in found.rows if row.method == "byot"}
    assert list(own.values()) == list(NETS.values())
    for title, student in own.items():
        assert found.experiment(f"{title}-supervised").student == student and len(found.row(title).columns) == 5
    gains = {claim.text: published_gain(claim, found) for claim in (*found.claims, *found.orders)}
    printed = {text: gain for text, gain in gains.items() if gain is not None}
    assert len(printed) == 20 and min(printed.values()) > 0
    ensemble, deepest = ([gain for text, gain in printed.items() if ("column" in text) == of_deepest] for of_deepest in (False, True))
    assert np.mean(ensemble) == pytest.approx(2.65, abs=0.005) and np.mean(deepest) == pytest.approx(1.96, abs=0.005)
    assert (min(ensemble), max(ensemble)) == pytest.approx((0.61, 4.07))


def test_the_papers_rows_follow_the_default_schedule() -> None:
    assert {x.schedule for x in find_table("byot").experiments()} == {Schedule()}
    assert {(x.tau, x.lambda_) for x in find_table("byot").experiments()} == {(3.0, 1e-6)}


def test_the_demo_has_every_method_and_is_short() -> None:
    found = find_table("demo-byot")
    methods = {x.method.name for x in found.experiments()}
    assert methods == {"original", "deep-supervision", "byot"} and found.experiment("byot-authors").options.as_dict()["adapted"]
    assert max(x.schedule.iterations for x in found.experiments()) <= 600
    for x in found.experiments(nets=[1]):
        assert x.method(x)
