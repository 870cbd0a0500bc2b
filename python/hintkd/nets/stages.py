"""The nets of every kind of stage as NetParameters: data layers, networks, losses.

Weight decay acts on everything that learns, BatchNorm's Scale and biases included, as Caffe does where nothing else is written.
Networks are written by modules of their own (networks.py), trained ones put inside others by surgery.py; which nets make up a method is
said in methods/.  What a loss is attached to is a tap of a network, and its name is not spelled out here.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hintkd.backend import caffe_pb2, read_net
from hintkd.errors import UserError
from hintkd.experiment import Dataset, Experiment, Options, Taps
from hintkd.nets import records, surgery
from hintkd.nets.resnet import FROZEN, ResNet

KD_LOSS = "kd_loss"
REGRESSOR = "regressor"


@dataclass(frozen=True)
class Pair:
    """A hint layer of the teacher and the guided layer of the student that is to become like it: taps, or names of layers by hand.

    `suffix` distinguishes the pairs of a method: the loss is the net output "hint{suffix}_loss".
    """
    hint: str
    guided: str
    suffix: str = ""


def _net(name: str) -> caffe_pb2.NetParameter:
    return caffe_pb2.NetParameter(name=name)


# -- layers ------------------------------------------------------------------------------------------------------------------
def add_data(net: caffe_pb2.NetParameter, dataset: Dataset, options: Options, labels: bool = True,
             phases: Sequence[str] = ("TRAIN", "TEST"), views: int = 1, positions: bool = False) -> None:
    """Data layers "data".  A padded training record is cropped at random and mirrored; test records come as they are.

    views        4 for each training image in four rotations, positions: a third top "position"; for what else they take see records.py
    """
    if records.are_needed(options) or views > 1 or positions:
        for phase in phases:
            records.add_records(net, dataset, options, phase, ["data", "label", "position"][:1 + labels + (positions and phase == "TRAIN")],
                                views if phase == "TRAIN" else 1)
        return
    if options.mean == "values" and dataset.train_mean and not dataset.mean_value:
        raise UserError(f"data set {dataset.name}: mean: values needs its mean_value, one number per channel")
    for phase in phases:
        train = phase == "TRAIN"
        scale = options.mnist_scale if dataset.name == "mnist" else dataset.scale
        transform: dict[str, Any] = {"scale": scale} if scale != 1 else {}
        if train and dataset.crop:
            transform["crop_size"] = dataset.size
        if train and dataset.mirror and options.mirror:
            transform["mirror"] = True
        if options.mean == "values":
            transform["mean_value"] = dataset.mean_value
        elif options.mean == "file" and dataset.train_mean:
            transform["mean_file"] = dataset.train_mean if train else dataset.test_mean
        net.layer.add(name="data", type="Data", top=["data", "label"] if labels else ["data"], include=[{"phase": phase}],
                      transform_param=transform,
                      data_param={"source": dataset.train_lmdb if train else dataset.test_lmdb, "backend": "LMDB",
                                  "batch_size": dataset.batch if train else dataset.test_batch})


def add_label_loss(net: caffe_pb2.NetParameter, scores: str, train: bool, weight: float = 1) -> None:
    """Softmax loss of class scores, in both phases or in TEST alone, and TEST's accuracy."""
    net.layer.add(name="loss", type="SoftmaxWithLoss", bottom=[scores, "label"], top=["loss"], propagate_down=[True, False],
                  include=[] if train else [{"phase": "TEST"}], **({} if weight == 1 else {"loss_weight": [weight]}))
    net.layer.add(name="accuracy", type="Accuracy", bottom=[scores, "label"], top=["accuracy"], include=[{"phase": "TEST"}])


def add_python_loss(net: caffe_pb2.NetParameter, name: str, module: str, layer: str, bottoms: Sequence[str], weight: float = 1,
                    param_str: str = "", counts: bool = False, in_test: bool = False) -> None:
    """A loss of a Python module, with a gradient into its first bottom only, in the TRAIN phase or, `in_test`, in both.

    counts    it has a blob of its own
    """
    net.layer.add(name=name, type="Python", bottom=bottoms, top=[name], loss_weight=[weight], param=[FROZEN] * counts,
                  propagate_down=[True] + [False] * (len(bottoms) - 1), include=surgery.train_alone(in_test),
                  python_param={"module": module, "layer": layer, **({"param_str": param_str} if param_str else {})})


# -- the nets of the stages ----------------------------------------------------------------------------------------------------
def plain_net(x: Experiment) -> caffe_pb2.NetParameter:
    """Trained on the labels alone: a teacher, an original student."""
    net = _net(x.student.title)
    add_data(net, x.dataset, x.options)
    add_label_loss(net, x.student.write(net, "data", x.dataset.classes, x.scaled_options).logits, train=True)
    return net


def partial_net(x: Experiment, resnet: ResNet, modules: int, frozen_modules: int = 0) -> caffe_pb2.NetParameter:
    """A step of SL-ResNet: the residual modules up to this one with pooling and fc, on the labels; `frozen_modules` do not learn."""
    net = _net(f"{resnet.title}-modules{modules}")
    add_data(net, x.dataset, x.options)
    taps = resnet.write(net, "data", x.dataset.classes, x.scaled_options, modules=modules, frozen_modules=frozen_modules)
    add_label_loss(net, taps.logits, train=True)
    return net


def teacher_net(x: Experiment, preacts: bool = False) -> tuple[caffe_pb2.NetParameter, Taps | None]:
    """The teacher as it stands alone, from "data" to its class scores, or a user's own as it is, which has no taps.

    preacts    whether its preacts can be tapped
    Raises UserError without a teacher.
    """
    teacher = x.teacher
    if isinstance(teacher, Experiment):
        network, options = teacher.student, teacher.scaled_options
    elif teacher and teacher.prototxt:
        return read_net(teacher.prototxt), None
    elif teacher and teacher.network:
        network, options = teacher.network, x.scaled_options
    else:
        raise UserError(f"{x.table}: {x.name} needs a teacher; name its depth or give its prototxt and caffemodel")
    net = _net(network.title)
    return net, network.write(net, "data", x.dataset.classes, options, preacts=preacts)


def student_taps(x: Experiment) -> Taps:
    """The taps of the student as every stage writes it."""
    return x.student.write(_net(""), "data", x.dataset.classes, x.scaled_options)


def kd_net(x: Experiment, iterations: int, label_tau: float = 1, tau_squared: bool = False) -> caffe_pb2.NetParameter:
    """Stage 2: the whole student under equation 2, beside the teacher; TEST holds the student alone, with x.test_loss both and the loss.

    iterations     over which a lambda schedule runs
    label_tau      temperature of the label term; tau_squared: whether the KD term is multiplied by tau^2
    Raises UserError where the teacher's classes are not the data set's.
    """
    teacher, taps = teacher_net(x)
    scores = taps.logits if taps else surgery.logits(teacher)
    net = _net(f"{x.student.title}-kd-{teacher.name}")
    add_data(net, x.dataset, x.options)
    net.layer.extend(surgery.teacher_layers(teacher, [scores], x.options.teacher_statistics, in_test=x.test_loss))
    found = surgery.shapes(net.layer, x.dataset.shape).get(surgery.TEACHER + scores)
    if found is not None and prod(found) != x.dataset.classes:
        raise UserError(f"the teacher '{teacher.name}' scores {prod(found)} classes and data set {x.dataset.name} has {x.dataset.classes}")
    own = x.student.write(net, "data", x.dataset.classes, x.scaled_options).logits
    add_python_loss(net, KD_LOSS, "hintkd.layers.softened_cross_entropy", "SoftenedCrossEntropy", [own, surgery.TEACHER + scores, "label"],
                    param_str=json.dumps(_kd_parameters(x, iterations, label_tau, tau_squared)), counts=x.lambda_schedule != "fixed",
                    in_test=x.test_loss)
    add_label_loss(net, own, train=False)
    return net


def _kd_parameters(x: Experiment, iterations: int, label_tau: float, tau_squared: bool) -> dict[str, object]:
    p: dict[str, object] = {"tau": x.tau, "lambda": x.lambda_}
    if label_tau != 1:
        p["label_tau"] = label_tau
    if tau_squared:
        p["tau_squared"] = True
    if x.lambda_schedule == "linear":
        p |= {"schedule": "linear", "end": x.lambda_end, "iterations": iterations}
    if x.lambda_schedule == "step":
        p |= {"schedule": "step", "end": x.lambda_end, "steps": [round(f * iterations) for f in x.schedule.steps]}
    return p


def hint_net(x: Experiment, pairs: Sequence[Pair], kernel: int = 1, std: float = 0.01) -> caffe_pb2.NetParameter:
    """Stage 1: the student up to its highest guided layer, the teacher up to its highest hint layer, and a hint loss for each pair.

    The loss weights are a_i / P for P pairs with all a_i = 1 (equation 7; 1 for a single pair, equations 1 and 3 to 6).  There is no TEST
    phase, since the teacher is in TRAIN only.  `kernel` is the side of a regressor in pixels, `std` that of its first weights.
    Raises UserError where a pair's shapes differ and no regressor can match them.
    """
    teacher, student = teacher_net(x)[0], _net(x.student.title)
    x.student.write(student, "data", x.dataset.classes, x.scaled_options)
    hints = [surgery.blob_of(teacher.layer, pair.hint) for pair in pairs]
    guided = [surgery.blob_of(student.layer, pair.guided) for pair in pairs]
    net = _net(f"{x.student.title}-hint-{teacher.name}")
    add_data(net, x.dataset, x.options, labels=False, phases=["TRAIN"])
    net.layer.extend(surgery.teacher_layers(teacher, hints, x.options.teacher_statistics))
    net.layer.extend(surgery.cut(student.layer, guided))
    known = surgery.shapes(net.layer, x.dataset.shape)
    for pair, hint, blob in zip(pairs, hints, guided, strict=True):
        source, target = known.get(blob), known.get(surgery.TEACHER + hint)
        if source is None or target is None:
            raise UserError(f"hintkd cannot tell the shape of {'guided' if source is None else 'hint'} layer "
                            f"'{pair.guided if source is None else pair.hint}'; name another layer")
        if source != target:
            blob = _add_regressor(net, x, pair, blob, source, target, kernel, std)
        add_python_loss(net, f"hint{pair.suffix}_loss", "hintkd.layers.hint_loss", "HintLoss", [blob, surgery.TEACHER + hint],
                        weight=1 / len(pairs))
    return net


def _add_regressor(net: caffe_pb2.NetParameter, x: Experiment, pair: Pair, blob: str, source: tuple[int, ...], target: tuple[int, ...],
                   kernel: int, std: float) -> str:
    """A convolution from the guided layer to the hint's channel count, Gaussian, without bias."""
    def text(shape: tuple[int, ...]) -> str:
        return "x".join(map(str, shape))
    if not x.regressor or source[1:] != target[1:]:
        advice = "a regressor changes channels only: name layers of one size" if x.regressor else "use a regressor or name other layers"
        raise UserError(f"{x.name}: guided layer '{pair.guided}' is {text(source)} and hint layer '{pair.hint}' is {text(target)}; "
                        + advice)
    name = REGRESSOR + pair.suffix
    net.layer.add(name=name, type="Convolution", bottom=[blob], top=[name],
                  convolution_param={"num_output": target[0], "kernel_size": [kernel], "pad": [kernel // 2], "bias_term": False,
                                     "weight_filler": {"type": "gaussian", "std": std}})
    return name
