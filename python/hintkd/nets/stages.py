"""The nets of every kind of stage as NetParameters: data layers, networks, losses.

Weight decay acts on everything that learns, BatchNorm's Scale and biases included, as Caffe does where nothing else is written.
Networks are written by modules of their own (resnet.py), trained ones put inside others by surgery.py; which nets make up a method is
said in methods/.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hintkd.backend import caffe_pb2, read_net
from hintkd.errors import UserError
from hintkd.experiment import Dataset, Experiment, Options, ResNet
from hintkd.nets import surgery
from hintkd.nets.resnet import FROZEN, add_resnet

KD_LOSS = "kd_loss"
REGRESSOR = "regressor"


@dataclass(frozen=True)
class Pair:
    """A hint layer of the teacher and the guided layer of the student that is to become like it.

    `suffix` distinguishes the pairs of a method: the loss is the net output "hint{suffix}_loss".
    """
    hint: str
    guided: str
    suffix: str = ""


def _net(name: str) -> caffe_pb2.NetParameter:
    return caffe_pb2.NetParameter(name=name)


# -- layers ------------------------------------------------------------------------------------------------------------------
def add_data(net: caffe_pb2.NetParameter, dataset: Dataset, options: Options, labels: bool = True,
             phases: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Data layers "data".  A padded training record is cropped at random and mirrored; test records come as they are."""
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


def add_label_loss(net: caffe_pb2.NetParameter, train: bool) -> None:
    """Softmax loss, in both phases or in TEST alone, and TEST's accuracy."""
    net.layer.add(name="loss", type="SoftmaxWithLoss", bottom=["fc", "label"], top=["loss"], propagate_down=[True, False],
                  include=[] if train else [{"phase": "TEST"}])
    net.layer.add(name="accuracy", type="Accuracy", bottom=["fc", "label"], top=["accuracy"], include=[{"phase": "TEST"}])


def add_python_loss(net: caffe_pb2.NetParameter, name: str, module: str, layer: str, bottoms: Sequence[str], weight: float = 1,
                    param_str: str = "", counts: bool = False, in_test: bool = False) -> None:
    """A loss of hintkd.layers, with a gradient into its first bottom only, in the TRAIN phase or, `in_test`, in both.

    counts    it has a blob of its own
    """
    net.layer.add(name=name, type="Python", bottom=bottoms, top=[name], loss_weight=[weight], param=[FROZEN] * counts,
                  propagate_down=[True] + [False] * (len(bottoms) - 1), include=surgery.train_alone(in_test),
                  python_param={"module": f"hintkd.layers.{module}", "layer": layer, **({"param_str": param_str} if param_str else {})})


# -- the nets of the stages ----------------------------------------------------------------------------------------------------
def plain_net(x: Experiment, resnet: ResNet, dataset: Dataset, modules: int | None = None,
              frozen_modules: int = 0) -> caffe_pb2.NetParameter:
    """Trained on the labels alone: a teacher, an original student, a step of SL-ResNet."""
    net = _net(resnet.title if modules is None else f"{resnet.title}-modules{modules}")
    add_data(net, dataset, x.options)
    add_resnet(net, resnet, dataset.classes, x.options, x.bn_fraction, modules, frozen_modules)
    add_label_loss(net, train=True)
    return net


def teacher_net(x: Experiment) -> caffe_pb2.NetParameter:
    """The teacher as it stands alone, from "data" to its class scores, or a user's own as it is.  Raises UserError without a teacher."""
    if x.external_teacher and x.external_teacher.prototxt:
        return read_net(x.external_teacher.prototxt)
    if x.teacher is None:
        raise UserError(f"{x.table}: method {x.method} needs a teacher; name its depth or give its prototxt and caffemodel")
    net = _net(x.teacher.title)
    add_resnet(net, x.teacher, x.dataset.classes, x.options, x.bn_fraction)
    return net


def kd_net(x: Experiment, iterations: int) -> caffe_pb2.NetParameter:
    """Stage 2: the whole student under equation 2, beside the teacher; TEST holds the student alone, with x.test_loss both and the loss.

    A lambda schedule runs over `iterations`.  Raises UserError where the teacher's classes are not the data set's.
    """
    teacher = teacher_net(x)
    scores = surgery.logits(teacher)
    net = _net(f"{x.student.title}-kd-{teacher.name}")
    add_data(net, x.dataset, x.options)
    net.layer.extend(surgery.teacher_layers(teacher, [scores], in_test=x.test_loss))
    found = surgery.shapes(net.layer, x.dataset.shape).get(surgery.TEACHER + scores)
    if found is not None and prod(found) != x.dataset.classes:
        raise UserError(f"the teacher '{teacher.name}' scores {prod(found)} classes and data set {x.dataset.name} has {x.dataset.classes}")
    add_resnet(net, x.student, x.dataset.classes, x.options, x.bn_fraction)
    add_python_loss(net, KD_LOSS, "softened_cross_entropy", "SoftenedCrossEntropy", ["fc", surgery.TEACHER + scores, "label"],
                    param_str=json.dumps(_kd_parameters(x, iterations)), counts=x.lambda_schedule != "fixed", in_test=x.test_loss)
    add_label_loss(net, train=False)
    return net


def _kd_parameters(x: Experiment, iterations: int) -> dict[str, object]:
    p: dict[str, object] = {"tau": x.tau, "lambda": x.lambda_}
    if x.options.label_tau == "tau":
        p["label_tau"] = x.tau
    if x.options.tau_squared:
        p["tau_squared"] = True
    if x.lambda_schedule == "linear":
        p |= {"schedule": "linear", "end": x.lambda_end, "iterations": iterations}
    if x.lambda_schedule == "step":
        p |= {"schedule": "step", "end": x.lambda_end, "steps": [round(f * iterations) for f in x.schedule.steps]}
    return p


def hint_net(x: Experiment, pairs: Sequence[Pair]) -> caffe_pb2.NetParameter:
    """Stage 1: the student up to its highest guided layer, the teacher up to its highest hint layer, and a hint loss for each pair.

    The loss weights are a_i / P for P pairs with all a_i = 1 (equation 7; 1 for a single pair, equations 1 and 3 to 6).  There is no TEST
    phase, since the teacher is in TRAIN only.
    Raises UserError where a pair's shapes differ and no regressor can match them.
    """
    teacher, student = teacher_net(x), _net(x.student.title)
    add_resnet(student, x.student, x.dataset.classes, x.options, x.bn_fraction)
    hints = [surgery.blob_of(teacher.layer, pair.hint) for pair in pairs]
    guided = [surgery.blob_of(student.layer, pair.guided) for pair in pairs]
    net = _net(f"{x.student.title}-hint-{teacher.name}")
    add_data(net, x.dataset, x.options, labels=False, phases=["TRAIN"])
    net.layer.extend(surgery.teacher_layers(teacher, hints))
    net.layer.extend(surgery.cut(student.layer, guided))
    known = surgery.shapes(net.layer, x.dataset.shape)
    for pair, hint, blob in zip(pairs, hints, guided, strict=True):
        source, target = known.get(blob), known.get(surgery.TEACHER + hint)
        if source is None or target is None:
            raise UserError(f"hintkd cannot tell the shape of {'guided' if source is None else 'hint'} layer "
                            f"'{pair.guided if source is None else pair.hint}'; name another layer")
        if source != target:
            blob = _add_regressor(net, x, pair, blob, source, target)
        add_python_loss(net, f"hint{pair.suffix}_loss", "hint_loss", "HintLoss", [blob, surgery.TEACHER + hint], weight=1 / len(pairs))
    return net


def _add_regressor(net: caffe_pb2.NetParameter, x: Experiment, pair: Pair, blob: str, source: tuple[int, ...],
                   target: tuple[int, ...]) -> str:
    """A convolution from the guided layer to the hint's channel count, Gaussian, without bias."""
    def text(shape: tuple[int, ...]) -> str:
        return "x".join(map(str, shape))
    if not x.regressor or source[1:] != target[1:]:
        advice = "a regressor changes channels only: name layers of one size" if x.regressor else "use a regressor or name other layers"
        raise UserError(f"{x.method}: guided layer '{pair.guided}' is {text(source)} and hint layer '{pair.hint}' is {text(target)}; "
                        + advice)
    name, kernel = REGRESSOR + pair.suffix, x.options.regressor_kernel
    net.layer.add(name=name, type="Convolution", bottom=[blob], top=[name],
                  convolution_param={"num_output": target[0], "kernel_size": [kernel], "pad": [kernel // 2], "bias_term": False,
                                     "weight_filler": {"type": "gaussian", "std": x.options.regressor_std}})
    return name
