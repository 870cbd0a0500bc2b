"""A student's net with its frozen teacher in it and losses between them: what the nets of the zoo's methods are written with.

A method looks at the taps of both, with their shapes, and writes adapters and losses into `losses`; `net` puts the whole together.  Which
losses these are is the business of methods/.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Experiment, Taps
from hintkd.nets import adapters, stages, surgery


class Feature(NamedTuple):
    """A blob and its shape per image, (C, H, W); of class scores (C, 1, 1)."""
    blob: str
    shape: adapters.Shape


class Side(NamedTuple):
    """The features of a student or a teacher, as Taps has them."""
    stages: tuple[Feature, ...]
    preacts: tuple[Feature, ...]
    pooled: Feature
    logits: Feature


class Distilled:
    """A net in the making: the experiment's student and teacher, and what is between them.

    student, teacher    their features; the teacher's blobs are those inside the student's net
    views, positions    4 for training images in four rotations; whether the blob "position" has the images' places among the records
    losses              where a method adds layers that are there in training alone (with x.test_loss, in tests, too)
    Raises UserError where the teacher's features are not known.
    """

    def __init__(self, x: Experiment, preacts: bool = False, views: int = 1, positions: bool = False):
        if x.test_loss and (views > 1 or positions):
            raise UserError(f"{x.table}: {x.name} has no loss on the test set, whose images have "
                            f"{'one view' if views > 1 else 'no rows in a bank'}; leave test_loss away")
        self.x, self.losses = x, caffe_pb2.NetParameter()
        self._views, self._positions = views, positions
        self._teacher, taught = stages.teacher_net(x, preacts)
        if taught is None:
            raise UserError(f"{x.table}: {x.name} does not know the features of this teacher; give its network instead of a prototxt")
        self._student = caffe_pb2.NetParameter(name=x.student.title)
        own = x.student.write(self._student, "data", x.dataset.classes, x.scaled_options, preacts=preacts)
        self.teacher = self._side(self._teacher, taught, surgery.TEACHER)
        self.student = self._side(self._student, own)

    def _side(self, net: caffe_pb2.NetParameter, taps: Taps, prefix: str = "") -> Side:
        known = surgery.shapes(net.layer, self.x.dataset.shape)

        def features(blobs: Sequence[str]) -> tuple[Feature, ...]:
            shapes = [(*known[blob], 1, 1) for blob in blobs]
            return tuple(Feature(prefix + blob, (shape[0], shape[1], shape[2])) for blob, shape in zip(blobs, shapes, strict=True))
        return Side(features(taps.stages), features(taps.preacts), *features([taps.pooled, taps.logits]))

    # -- what methods are written with ---------------------------------------------------------------------------------------
    def pairs(self, preacts: bool = False) -> Iterator[tuple[int, Feature, Feature]]:
        """Number, student's and teacher's feature at the end of each stage.  Raises UserError where one has more stages."""
        mine, other = (side.preacts if preacts else side.stages for side in (self.student, self.teacher))
        if len(mine) != len(other):
            raise UserError(f"{self.x.table}: {self.x.name} compares stage by stage, and {self._student.name} has {len(mine)} stages where "
                            f"{self._teacher.name} has {len(other)}")
        yield from ((i, s, t) for i, (s, t) in enumerate(zip(mine, other, strict=True)))

    def same_size(self, name: str, student: Feature, teacher: Feature) -> tuple[Feature, Feature]:
        """Both maps, the larger one averaged to the smaller one's size."""
        size = min(student.shape[1], teacher.shape[1])
        return (Feature(adapters.pooled(self.losses, f"{name}_student", student.blob, student.shape, size),
                        (student.shape[0], size, size)),
                Feature(adapters.pooled(self.losses, f"{name}_teacher", teacher.blob, teacher.shape, size),
                        (teacher.shape[0], size, size)))

    def distance(self, name: str, blob: str, teacher: Feature, weight: float) -> None:
        """The mean squared difference to a teacher's feature of the same shape, which Caffe's EuclideanLoss has as half a sum."""
        self.losses.layer.add(name=name, type="EuclideanLoss", bottom=[blob, teacher.blob], top=[name],
                              loss_weight=[2 * weight / prod(teacher.shape)], propagate_down=[True, False])

    def loss(self, name: str, module: str, layer: str, bottoms: Sequence[str], weight: float, blobs: int = 0, learns: bool = False,
             towards: int = 1, shared: Sequence[str] = (), **parameters: Any) -> None:
        """A loss of hintkd.layers; parameters are its param_str's, the rest is adapters.python_loss's."""
        adapters.python_loss(self.losses, name, module, layer, bottoms, weight, json.dumps(parameters) if parameters else "", blobs, learns,
                             towards, shared)

    def soften(self, weight: float) -> None:
        """The divergence of the softened class scores, at the experiment's tau, if it has a weight.

        Raises UserError where the teacher's classes are not the data set's.
        """
        if not weight:
            return
        mine, other = self.student.logits, self.teacher.logits
        if mine.shape != other.shape:
            raise UserError(f"the teacher '{self._teacher.name}' scores {other.shape[0]} classes and data set {self.x.dataset.name} has "
                            f"{mine.shape[0]}")
        self.loss(stages.KD_LOSS, "kl_divergence", "KLDivergence", [mine.blob, other.blob], weight, tau=float(self.x.tau))

    def norm_of(self, teacher: Feature) -> list[str]:
        """The names of gamma and beta of the BatchNorm that a preact of the teacher comes from: of a sum the block's, not the shortcut's.

        Raises UserError where it comes from none.
        """
        blob, layers = teacher.blob.removeprefix(surgery.TEACHER), self._teacher.layer
        addends = [bottom for layer in layers if layer.type == "Eltwise" and blob in layer.top for bottom in layer.bottom]
        scales = [layer for source in addends or [blob] for layer in layers
                  if layer.type == "Scale" and source in layer.top and not source.endswith("_proj")]
        if not scales:
            raise UserError(f"{self.x.table}: {self.x.name} needs the BatchNorm before the last ReLU of each stage, and {teacher.blob} of "
                            f"{self._teacher.name} comes from none")
        scale = scales[0]
        if not scale.param:
            for name in ("gamma", "beta"):
                scale.param.add(name=f"{scale.name}_{name}")
        return [surgery.TEACHER + spec.name for spec in scale.param]

    def run_twice(self) -> None:
        """Have the student's preacts made where nothing else asks for them, too, since BatchNorms that are tapped move twice then."""
        apart = {layer.name for layer in surgery.cut(self._student.layer, [self.student.logits.blob])}
        tapped = {layer.top[0] for layer in self._student.layer if layer.name not in apart}
        self.run([feature for feature in self.student.preacts if feature.blob in tapped])

    def run(self, features: Sequence[Feature]) -> None:
        """Have features made that no loss needs."""
        for feature in features:
            self.losses.layer.add(name=f"{feature.blob}_silence", type="Silence", bottom=[feature.blob])

    def hold_above(self) -> None:
        """A BatchNorm of the student's between the end of the last stage and its preact stays what it begins as, with mean 0, variance 1.

        Caffe's has a variance of 0 until it has seen a batch, so a factor stands in its place; its Scale does not learn.
        """
        trunk = {layer.name for layer in surgery.cut(self._student.layer, [feature.blob for feature in self.student.stages])}
        for layer in surgery.cut(self._student.layer, [self.student.preacts[-1].blob]):
            if layer.name in trunk:
                continue
            if layer.type == "BatchNorm":
                scale = (1 + layer.batch_norm_param.eps) ** -0.5
                layer.type, layer.power_param.scale = "Power", scale
                layer.ClearField("batch_norm_param")
                layer.ClearField("param")
            for spec in layer.param:
                spec.lr_mult, spec.decay_mult = 0, 0

    # -- the whole -----------------------------------------------------------------------------------------------------------
    def net(self, name: str, label_weight: float = 1, statistics: str | None = None) -> caffe_pb2.NetParameter:
        """Data, the teacher up to what is used of it, the student, the losses, and the labels' loss with this weight.

        Where a loss reads the labels itself, theirs is there in tests alone.

        label_weight    0 leaves out the labels, the tests, and of the student what the losses do not need
        statistics      of BatchNorm in the teacher; None for the options' own
        """
        asked = list(dict.fromkeys(bottom for layer in self.losses.layer for bottom in layer.bottom))
        made = caffe_pb2.NetParameter(name=f"{self._student.name}-{name}-{self._teacher.name}")
        stages.add_data(made, self.x.dataset, self.x.options, labels=bool(label_weight), phases=["TRAIN", "TEST"][:1 + bool(label_weight)],
                        views=self._views, positions=self._positions)
        made.layer.extend(surgery.teacher_layers(
            self._teacher, [blob.removeprefix(surgery.TEACHER) for blob in asked if blob.startswith(surgery.TEACHER)],
            statistics or self.x.options.teacher_statistics, in_test=self.x.test_loss))
        made.layer.extend(self._student_layers(asked, whole=bool(label_weight)))
        made.layer.extend(self._in_training(self.losses.layer))
        if label_weight:
            stages.add_label_loss(made, self.student.logits.blob, train="label" not in asked, weight=label_weight)
        return made

    def _student_layers(self, asked: Sequence[str], whole: bool) -> list[caffe_pb2.LayerParameter]:
        """What scores and losses need of the student; what losses alone need is there with them."""
        own = {top for layer in self._student.layer for top in layer.top}
        needed = surgery.cut(self._student.layer, [*own.intersection(asked), *[self.student.logits.blob] * whole])
        tested = {layer.name for layer in surgery.cut(self._student.layer, [self.student.logits.blob])} if whole else set()
        return [layer if layer.name in tested else self._in_training([layer])[0] for layer in needed]

    def _in_training(self, layers: Sequence[caffe_pb2.LayerParameter]) -> list[caffe_pb2.LayerParameter]:
        for layer in layers:
            layer.include.extend(surgery.train_alone(self.x.test_loss))
        return list(layers)

    @property
    def left_behind(self) -> tuple[str, ...]:
        """What the student's weights are without: beginnings of names of layers, as Part.drop has them."""
        return surgery.TEACHER, *(layer.name for layer in self.losses.layer)
