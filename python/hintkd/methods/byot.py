"""Zhang, Song, Gao, Chen, Bao, Ma 2019: be your own teacher, deep supervision beside it, and what the paper leaves open.

A network is cut into sections; each but the last has a branch with a classifier of its own at its end, which learns from the labels, from
the scores of the deepest classifier and from its features, in one stage and from random weights.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Experiment, counted, option
from hintkd.experiment import Options as BaseOptions
from hintkd.experiment import Schedule as BaseSchedule
from hintkd.methods.common import options_of, solver
from hintkd.methods.method import Choice, Line, method
from hintkd.methods.stage import Stage
from hintkd.nets.adapters import linear
from hintkd.nets.exits import BRANCHES, Exit, add_exits
from hintkd.nets.stages import add_data
from hintkd.nets.surgery import shapes

SOURCE = "Zhang, Song, Gao, Chen, Bao, Ma 2019, ICCV, arXiv 1905.08094"
ADAPTED = "adapted"                         # before the names of layers that are left behind
LEAST = 1e-12                               # under the root of a distance, whose gradient is finite at 0 then


# -- what is open, and how long it takes ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options(BaseOptions):
    """What the paper leaves open."""
    mean: str = option(
        "values", "file", "values", "none", paper="not printed; both code bases take means per channel",
        meaning="file: per pixel; values: per channel; none", matters=lambda x: bool(x.dataset.train_mean))
    bn_fraction: float = option(
        0.9, paper="not printed; both code bases have torch's momentum of 0.1",
        meaning="BatchNorm's moving_average_fraction f; a run of scale s < 1 uses 1 - (1 - f) / s, but at least 0.9")
    sections: int = option(
        4, paper="\"according to its depth and original structure\"; four in its tables",
        meaning="how many: they end with the stages where these are as many, else after equal parts of the modules")
    branch: str = option(
        "bottleneck", *BRANCHES, paper="\"bottleneck\" is all that is printed",
        meaning="bottleneck: 1x1, one convolution for all the shrinking, 1x1; separable: a separable convolution for each halving")
    alpha: float = option(
        0.1, paper="a hyper-parameter whose value is not printed",
        meaning="the part of the deepest classifier's scores in what a shallow one learns, from 0 to 1",
        matters=lambda x: x.method.name == "byot")
    tau_squared: bool = option(
        True, False, True, paper="not printed", meaning="whether the term of the scores is multiplied by tau squared",
        matters=lambda x: x.method.name == "byot")
    deepest_alpha: bool = option(
        False, False, True, paper="the deepest classifier has the label loss only; one code base multiplies that by 1 - alpha, too",
        meaning="whether the deepest classifier's label loss has the factor 1 - alpha", matters=lambda x: x.method.name == "byot")
    detached: bool = option(
        True, False, True, paper="\"supervision from the deepest classifier\" and no word on gradients; both code bases stop them",
        meaning="whether no gradient of the shallow classifiers' terms enters the deepest one's scores and features",
        matters=lambda x: x.method.name == "byot")
    feature: str = option(
        "pooled", "pooled", "map", paper="\"feature maps\"; both code bases compare what is pooled",
        meaning="what the hint compares: features after the global pooling, or the maps before it",
        matters=lambda x: x.method.name == "byot")
    hint: str = option(
        "sum", "sum", "mean", "distance", paper="a squared norm; not printed whether of a batch or of an image",
        meaning="sum: squared differences, added over the batch; mean: over images; distance: the root of the sum",
        matters=lambda x: x.method.name == "byot")
    hinted: str = option(
        "all", "all", "all-but-last", paper="each shallow classifier; one code base leaves the last one below the deepest out",
        meaning="which shallow classifiers have a hint", matters=lambda x: x.method.name == "byot")
    adapted: bool = option(
        False, False, True, paper="no such layer; one code base has it", matters=lambda x: x.method.name == "byot",
        meaning="whether a fully connected layer, left behind after training, stands between a branch's pooled features and the hint")
    ensemble: str = option(
        "scores", "scores", "probabilities", paper="not printed what is averaged; one code base averages scores",
        meaning="what the classifiers' mean is taken of")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"options: alpha is {self.alpha}; it must lie from 0 to 1")
        if self.sections < 2:
            raise UserError(f"options: sections is {self.sections}; there are at least 2")
        if self.adapted and self.feature == "map":
            raise UserError("options: adapted needs feature: pooled, for its layer is fully connected")


@dataclass(frozen=True)
class Schedule(BaseSchedule):
    """200 epochs of CIFAR in batches of 128."""
    iterations: int = counted(78_125, "training")
    teacher_iterations: int = counted(78_125, "teacher")
    steps: tuple[float, ...] = (0.375, 0.65, 0.9)
    weight_decay: float = 5e-4


SCHEDULES = {"digits": Schedule(iterations=600, teacher_iterations=600)}         # not from the paper

PRESETS: dict[str, dict[str, Any]] = {
    # github.com/luanyunteng/pytorch-be-your-own-teacher, commit 8f052ad: 200 epochs, the rate falls after 75, 130 and 180
    "independent": {
        "tau": 3.0, "tau_squared": True, "alpha": 0.1, "deepest_alpha": True, "lambda": 1e-6, "hint": "sum", "hinted": "all",
        "adapted": False, "feature": "pooled", "branch": "bottleneck", "detached": True, "base_lr": 0.1, "weight_decay": 5e-4,
        "iterations": 78_125, "steps": [0.375, 0.65, 0.9]},
    # github.com/ArchipLab-LinfengZhang/pytorch-self-distillation-final, commit eda2f2b: 250 epochs, the rate falls after 83, 166 and 240;
    # of a later paper, whose attention before the branches, AutoAugment and Cutout are not here
    "authors": {
        "tau": 3.0, "tau_squared": False, "alpha": 0.3, "deepest_alpha": False, "lambda": 0.03, "hint": "distance",
        "hinted": "all-but-last", "adapted": True, "feature": "pooled", "branch": "separable", "detached": True, "base_lr": 0.1,
        "weight_decay": 5e-4, "iterations": 97_656, "steps": [0.332, 0.664, 0.96]},
}


def options(x: Experiment) -> Options:
    """The experiment's options.  Raises UserError where they are another paper's."""
    return options_of(x, Options, "byot")


# -- the net ---------------------------------------------------------------------------------------------------------------------
def exits_net(x: Experiment, alpha: float, lambda_: float) -> caffe_pb2.NetParameter:
    """The student with its exits, their losses in TRAIN, the accuracy of each and of their mean in TEST.

    The k-th exit's accuracy is the output "accuracy_<k>", the deepest one's "accuracy", that of the mean "accuracy_ensemble".
    """
    o, net = options(x), caffe_pb2.NetParameter(name=f"{x.student.title}-exits")
    add_data(net, x.dataset, x.options)
    taps = x.student.write(net, "data", x.dataset.classes, x.scaled_options)
    *shallow, deepest = add_exits(net, taps, x.dataset.shape, x.dataset.classes, o.sections, o.branch, x.bn_fraction)
    _add_labels(net, deepest, "", 1 - alpha if o.deepest_alpha else 1)
    for number, each in enumerate(shallow, start=1):
        _add_labels(net, each, f"_{number}", 1 - alpha)
        if alpha:
            _add_scores(net, x, each, deepest, number, alpha)
        if lambda_ and (o.hinted == "all" or each is not shallow[-1]):
            _add_hint(net, x, each, deepest, number, lambda_)
    _add_ensemble(net, [*shallow, deepest], o.ensemble)
    return net


def _only(phase: str) -> list[dict[str, str]]:
    return [{"phase": phase}]


def _add_labels(net: caffe_pb2.NetParameter, each: Exit, suffix: str, weight: float) -> None:
    """Cross-entropy with the labels in both phases, and TEST's accuracy."""
    net.layer.add(name="loss" + suffix, type="SoftmaxWithLoss", bottom=[each.scores, "label"], top=["loss" + suffix], loss_weight=[weight],
                  propagate_down=[True, False])
    _add_accuracy(net, "accuracy" + suffix, each.scores)


def _add_accuracy(net: caffe_pb2.NetParameter, name: str, scores: str) -> None:
    net.layer.add(name=name, type="Accuracy", bottom=[scores, "label"], top=[name], include=_only("TEST"))


def _add_scores(net: caffe_pb2.NetParameter, x: Experiment, each: Exit, deepest: Exit, number: int, alpha: float) -> None:
    """The divergence of a shallow classifier's softened scores from the deepest one's; the layer itself multiplies by tau squared."""
    o, name = options(x), f"exit{number}_kl"
    told = {"tau": x.tau, **({} if o.detached else {"detached": False})}
    net.layer.add(name=name, type="Python", bottom=[each.scores, deepest.scores], top=[name], include=_only("TRAIN"),
                  loss_weight=[alpha if o.tau_squared else alpha / x.tau ** 2], propagate_down=[True, not o.detached],
                  python_param={"module": "hintkd.layers.kl_divergence", "layer": "KLDivergence", "param_str": json.dumps(told)})


def _add_hint(net: caffe_pb2.NetParameter, x: Experiment, each: Exit, deepest: Exit, number: int, lambda_: float) -> None:
    """The squared distance of a branch's features from the deepest ones.  Caffe's EuclideanLoss is their sum over the batch / (2 batch)."""
    o, name = options(x), f"exit{number}_hint"
    own, aim = (each.map, deepest.map) if o.feature == "map" else (each.pooled, deepest.pooled)
    if o.adapted:
        width = shapes(net.layer, x.dataset.shape)[deepest.pooled][0]
        own = linear(net, f"{ADAPTED}{number}", own, width, width)
        net.layer[-1].include.add(phase=caffe_pb2.TRAIN)
    twice = 2 * x.dataset.batch
    is_root = o.hint == "distance"
    net.layer.add(name=name, type="EuclideanLoss", bottom=[own, aim], top=[name], include=_only("TRAIN"),
                  loss_weight=[0 if is_root else lambda_ * (twice if o.hint == "sum" else 2)], propagate_down=[True, not o.detached])
    if is_root:
        net.layer.add(name=name + "_root", type="Power", bottom=[name], top=[name + "_root"], include=_only("TRAIN"), loss_weight=[lambda_],
                      power_param={"power": 0.5, "scale": twice, "shift": LEAST})


def _add_ensemble(net: caffe_pb2.NetParameter, exits: Sequence[Exit], kind: str) -> None:
    """TEST's accuracy of the mean of all classifiers."""
    blobs = [each.scores for each in exits]
    if kind == "probabilities":
        for blob in blobs:
            net.layer.add(name=blob + "_softmax", type="Softmax", bottom=[blob], top=[blob + "_softmax"], include=_only("TEST"))
        blobs = [blob + "_softmax" for blob in blobs]
    net.layer.add(name="ensemble", type="Eltwise", bottom=blobs, top=["ensemble"], include=_only("TEST"),
                  eltwise_param={"coeff": [1 / len(blobs)] * len(blobs)})
    _add_accuracy(net, "accuracy_ensemble", "ensemble")


def _stage(x: Experiment, title: str, alpha: float, lambda_: float) -> list[Stage]:
    return [Stage.solve(title, exits_net(x, alpha, lambda_), solver(x, x.scaled_schedule.iterations, x.net_seed, x.schedule.base_lr),
                        drop=(ADAPTED,))]


# -- methods -----------------------------------------------------------------------------------------------------------------
@method(needs_teacher=False, line=Line("#D55E00"))
def byot(x: Experiment) -> list[Stage]:
    """A network's exits learn from its deepest one: CE there, (1 - alpha) CE + alpha tau^2 KL(p_C, p_i) + lambda |f_i - f_C|^2 below."""
    return _stage(x, "byot", options(x).alpha, x.lambda_)


@method(needs_teacher=False, line=Line("#0072B2", "--"))
def deep_supervision(x: Experiment) -> list[Stage]:
    """The control: the same exits, and CE with the labels alone at each of them (alpha = lambda = 0)."""
    return _stage(x, "deep-supervision", 0, 0)


# -- points with one answer ----------------------------------------------------------------------------------------------------
CHOICES = (
    Choice("WideResNet20-8, 44-8 and 28-12",
           "depths that 6n + 4 does not give, and four classifiers each",
           "four stacks of n blocks, depth 8n + 4, of 16k, 32k, 64k and 128k channels; read as 6n + 2 they would be wide ResNets of three "
           "stacks and depths 22 and 46 by the usual count"),
    Choice("ResNeXt29-8 and PyramidNet101-240",
           "four classifiers of networks of three stages",
           "ResNeXt-29 8x64d and the PyramidNet of depth 9n + 2, n = 11, cut after equal parts of their blocks"),
    Choice("VGG19",
           "not said how it is cut",
           "blocks of convolutions 1 + 2, 3, 4 and 5; five blocks, pooled after the first three"),
    Choice("branches of networks that are activated before their convolutions",
           "not said whether a branch begins with BatchNorm and ReLU",
           "at the raw sums that the next block reads; the deepest features are those behind the last BatchNorm and ReLU"),
    Choice("features that the hint compares",
           "a known code base masks where neither of two features is positive",
           "no mask: both end in ReLUs, so that where neither is positive they agree"),
    Choice("biases below BatchNorm in a branch",
           "not said; a known code base has them",
           "none: BatchNorm takes them away"),
    Choice("soft targets",
           "the Kullback-Leibler divergence; both code bases have the cross-entropy",
           "the divergence: with the deepest classifier detached both have the same gradient"),
    Choice("data",
           "\"simple data augmentation\"",
           "padded by 4, cropped at random and mirrored; a mean is subtracted, and nothing is divided by a deviation"),
    Choice("what is published",
           "not said whether of the last or the best iteration, nor of how many nets",
           "the last one, measured from the saved weights, of three nets; the best tested one stands beside it"),
)
