"""What the methods of the CIFAR-100 zoo share: the options in which its code bases differ, the protocol, and stages with a teacher.

The protocol is that of Tian, Krishnan, Isola 2020 (RepDistiller): SGD, 64 images an iteration, 240 epochs, the rate falling to a tenth
after 150, 180 and 210 of them.  Which losses make a method stands in zoo.py.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Experiment, counted, option
from hintkd.experiment import Options as BaseOptions
from hintkd.experiment import Schedule as BaseSchedule
from hintkd.methods.common import solver, weights_of
from hintkd.methods.method import teacher_weights
from hintkd.methods.stage import Stage
from hintkd.nets.distilled import Distilled
from hintkd.nets.mobilenet import MobileNetV2
from hintkd.nets.shufflenet import ShuffleV1, ShuffleV2

LIGHT = (MobileNetV2, ShuffleV1, ShuffleV2)                  # students that are trained at the smaller rate
EPOCH = 782                                                  # iterations: 50,000 images by 64, the last batch short


@dataclass(frozen=True)
class Options(BaseOptions):
    """Where the zoo's sources differ, with RepDistiller's choice as the default."""
    mean: str = option("values", "file", "values", "none", paper="per channel, and a standard deviation per channel",
                       meaning="file: per pixel; values: per channel; none", matters=lambda x: bool(x.dataset.train_mean))
    bn_fraction: float = option(0.9, paper="torch's momentum of 0.1", meaning="BatchNorm's moving_average_fraction f; a run of scale s < 1 "
                                                                             "uses 1 - (1 - f) / s, but at least 0.9")
    gamma: float | None = option(None, paper="1; 0.1 for KD", meaning="weight of the labels' cross-entropy; none for the method's own")
    alpha: float | None = option(None, paper="0 in CRD's tables, 1 in rows \"+ KD\" and, it seems, in SSKD's; 0.9 for KD itself",
                                 meaning="weight of the softened scores' divergence; none for the method's own")
    beta: float | None = option(None, paper="one for all pairs, tuned on one of them", meaning="weight of the method's own loss; none for "
                                                                                               "RepDistiller's")


@dataclass(frozen=True)
class Schedule(BaseSchedule):
    """240 epochs, of which AB's and FT's first stages have 30 more of their own."""
    iterations: int = counted(240 * EPOCH, "plain training and the last stage")
    teacher_iterations: int = counted(240 * EPOCH, "teacher")
    first_iterations: int = counted(30 * EPOCH, "first stage of AB and FT")      # at a constant rate
    steps: tuple[float, ...] = (150 / 240, 180 / 240, 210 / 240)
    base_lr: float = 0.05
    light_lr: float = 0.01                                    # of MobileNetV2, ShuffleV1 and ShuffleV2 in the student's place
    weight_decay: float = 5e-4


SCHEDULES = {
    "cifar100": Schedule(),
    # Not from the papers: what the embedded digits need.
    "digits": Schedule(iterations=600, teacher_iterations=1_200, first_iterations=150),
}


def options(x: Experiment) -> Options:
    """The experiment's options.  Raises UserError where they are another paper's."""
    if not isinstance(x.options, Options):
        raise UserError(f"{x.table}: {x.name} needs the options of paper zoo; name that paper in the table")
    return x.options


def schedule(x: Experiment) -> Schedule:
    """The schedule that is run.  Raises UserError where it is another paper's."""
    if not isinstance(x.schedule, Schedule):
        raise UserError(f"{x.table}: {x.name} needs the schedule of paper zoo; name that paper in the table")
    return x.schedule.scaled(x.scale)


def rate(x: Experiment) -> float:
    """The rate that the student begins with."""
    return schedule(x).light_lr if isinstance(x.student, LIGHT) else x.schedule.base_lr


def at_own_rate(x: Experiment) -> Experiment:
    """The experiment with the student's rate as the schedule's."""
    return replace(x, schedule=replace(x.schedule, base_lr=rate(x)))


def weighed(given: float | None, own: float) -> float:
    """The weight that the options give, or the method's own."""
    return own if given is None else given


def distilled_stage(x: Experiment, d: Distilled, title: str, init: Stage | None = None, gamma: float = 1, alpha: float = 0,
                    statistics: str | None = None) -> Stage:
    """The whole student by the protocol: gamma * labels + alpha * softened scores + the losses in `d`, whose adapters learn, too.

    gamma, alpha    the method's own weights, where the options give no others
    """
    d.soften(weighed(options(x).alpha, alpha))
    net = d.net(title, label_weight=weighed(options(x).gamma, gamma), statistics=statistics)
    return Stage.solve(title, net, solver(x, schedule(x).iterations, x.net_seed, rate(x)), (teacher_weights(x), *weights_of(init)),
                       d.left_behind)


def first_stage(x: Experiment, net: caffe_pb2.NetParameter, title: str, lr: float, drop: tuple[str, ...]) -> Stage:
    """What comes before: at a constant rate, the same for all nets of a table."""
    return Stage.solve(title, net, solver(x, schedule(x).first_iterations, x.shared_seed, lr, falling=False, tested=False),
                       (teacher_weights(x),), drop)
