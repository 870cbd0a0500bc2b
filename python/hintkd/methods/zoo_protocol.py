"""What the methods of the CIFAR-100 zoo share: the options in which its code bases differ, the protocol, and stages with a teacher.

The protocol is that of Tian, Krishnan, Isola 2020 (RepDistiller): SGD, 64 images an iteration, 240 epochs, the rate falling to a tenth
after 150, 180 and 210 of them.  Which losses make a method stands in zoo.py.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from hintkd.backend import caffe_pb2
from hintkd.experiment import Experiment, counted, option
from hintkd.experiment import Options as BaseOptions
from hintkd.experiment import Schedule as BaseSchedule
from hintkd.methods.common import options_of, schedule_of, solver, weights_of
from hintkd.methods.method import teacher_weights
from hintkd.methods.stage import Stage
from hintkd.nets.distilled import Distilled
from hintkd.nets.mobilenet import MobileNetV2
from hintkd.nets.shufflenet import ShuffleV1, ShuffleV2
from hintkd.nets.stages import plain_net
from hintkd.nets.surgery import TEACHER

LIGHT = (MobileNetV2, ShuffleV1, ShuffleV2)                  # students that are trained at the smaller rate
EPOCH = 782                                                  # iterations: 50,000 images by 64, the last batch short


@dataclass(frozen=True)
class Options(BaseOptions):
    """Where the zoo's sources differ, with RepDistiller's choice as the default."""
    mean: str = option("values", "file", "values", "none", paper="per channel, and a standard deviation per channel",
                       meaning="file: per pixel; values: per channel; none", matters=lambda x: bool(x.dataset.train_mean))
    std: str = option("values", "none", "values", paper="one per channel", meaning="values: images are divided by one per channel; none")
    order: str = option("shuffled", "stored", "shuffled", paper="reshuffled in each epoch",
                        meaning="of the training images: drawn for each epoch, or that of the records")
    last_batch: str = option("kept", "wrapped", "kept", paper="of 16 images, kept: 782 iterations an epoch",
                             meaning="kept: of what is left of an epoch; wrapped: goes on with the next one, as Caffe's")
    padding: str = option("zeros", "zeros", "reflect", paper="black pixels; reflected ones in the overhaul's code",
                          meaning="what is around training images", matters=lambda x: x.dataset.crop)
    bn_fraction: float = option(0.9, paper="torch's momentum of 0.1", meaning="BatchNorm's moving_average_fraction f; a run of scale s < 1 "
                                                                             "uses 1 - (1 - f) / s, but at least 0.9")
    gamma: float | None = option(None, paper="1; 0.1 for KD", meaning="weight of the labels' cross-entropy; none for the method's own")
    alpha: float | None = option(None, paper="0 in CRD's tables, 1 in rows \"+ KD\" and, it seems, in SSKD's; 0.9 for KD itself",
                                 meaning="weight of the softened scores' divergence; none for the method's own")
    beta: float | None = option(None, paper="one for all pairs, tuned on one of them", meaning="weight of the method's own loss; none for "
                                                                                               "RepDistiller's")
    crd_negatives: int = option(16_384, paper="16384", meaning="records that CRD tells each image from, half of a smaller training set's",
                                matters=lambda x: x.method.name in ("crd", "crd-kd"))
    crd_width: int = option(128, paper="128", meaning="of CRD's embeddings", matters=lambda x: x.method.name in ("crd", "crd-kd"))
    fitnet_stages: str = option("one", "one", "two", paper="two, hint training and then KD; RepDistiller has one",
                                meaning="one: the regressor's loss beside the labels'; two: before KD",
                                matters=lambda x: x.method.name == "fitnet")
    vid_variances: str = option("learned", "learned", "fixed", paper="learned; mdistiller never trains them", meaning="learned or fixed",
                                matters=lambda x: x.method.name == "vid")
    ab_statistics: str = option("stored", "stored", "batch", paper="stored in RepDistiller, batch in the authors' code",
                                meaning="of BatchNorm in AB's teacher", matters=lambda x: x.method.name == "ab")
    oh_statistics: str = option("batch", "stored", "batch", paper="batch in the authors' code, on purpose",
                                meaning="of BatchNorm in OH's teacher", matters=lambda x: x.method.name == "oh")


@dataclass(frozen=True)
class Schedule(BaseSchedule):
    """240 epochs, of which AB's and FT's first stages have 30 more of their own."""
    iterations: int = counted(240 * EPOCH, "plain training and the last stage")
    teacher_iterations: int = counted(240 * EPOCH, "teacher")
    first_iterations: int = counted(30 * EPOCH, "first stage of AB and FT")      # at a constant rate
    head_iterations: int = counted(60 * EPOCH, "SSKD's head of the teacher")     # the rate falls after a half and three quarters
    steps: tuple[float, ...] = (150 / 240, 180 / 240, 210 / 240)
    base_lr: float = 0.05
    light_lr: float = 0.01                                    # of MobileNetV2, ShuffleV1 and ShuffleV2 in the student's place
    paraphraser_lr: float = 0.01                              # of FT's first stage, for a student of the ResNets' or wide ResNets' kind
    weight_decay: float = 5e-4
    nesterov: bool = False                                    # its momentum; the overhaul's authors have it


SCHEDULES = {
    "cifar100": Schedule(),
    # Not from the papers: what the embedded digits need.
    "digits": Schedule(iterations=400, teacher_iterations=1_200, first_iterations=100, head_iterations=100),
}


def options(x: Experiment) -> Options:
    """The experiment's options.  Raises UserError where they are another paper's."""
    return options_of(x, Options, "zoo")


def schedule(x: Experiment) -> Schedule:
    """The schedule that is run.  Raises UserError where it is another paper's."""
    return schedule_of(x, Schedule, "zoo")


def rate(x: Experiment) -> float:
    """The rate that the student begins with."""
    return schedule(x).light_lr if isinstance(x.student, LIGHT) else x.schedule.base_lr


def protocol(x: Experiment, iterations: int, lr: float, whole: bool = True) -> caffe_pb2.SolverParameter:
    """A stage's solver; `whole`: the rate falls and there are tests, as in the last stage of all."""
    made = solver(x, iterations, x.net_seed, lr, falling=whole, tested=whole)
    if schedule(x).nesterov:
        made.type = "Nesterov"
    return made


def weighed(given: float | None, own: float) -> float:
    """The weight that the options give, or the method's own."""
    return own if given is None else given


def label_stage(x: Experiment) -> Stage:
    """The whole network on the labels alone; the same in every table."""
    x = replace(x, table_seed=0)
    return Stage.solve("teacher" if x.generation else "original", plain_net(x), protocol(x, schedule(x).iterations, rate(x)))


def distilled_stage(x: Experiment, d: Distilled, title: str, init: Stage | None = None, gamma: float = 1, alpha: float = 0,
                    statistics: str | None = None) -> Stage:
    """The whole student: gamma * labels + alpha * softened scores + the losses in `d`, whose adapters learn, too.

    init            whose weights it starts from, beside the teacher's
    gamma, alpha    the method's own weights, where the options give no others
    statistics      of BatchNorm in the teacher; None for the options' own
    """
    d.soften(weighed(options(x).alpha, alpha))
    net = d.net(title, weighed(options(x).gamma, gamma), statistics)
    taught = any(layer.name.startswith(TEACHER) for layer in net.layer)
    return Stage.solve(title, net, protocol(x, schedule(x).iterations, rate(x)),
                       (*[teacher_weights(x)] * taught, *weights_of(init)), d.left_behind)


def first_stage(x: Experiment, d: Distilled, title: str, lr: float, drop: tuple[str, ...], statistics: str | None = None) -> Stage:
    """What comes before: the losses in `d` alone, at a constant rate."""
    return Stage.solve(title, d.net(title, 0, statistics), protocol(x, schedule(x).first_iterations, lr, whole=False),
                       (teacher_weights(x),), drop)
