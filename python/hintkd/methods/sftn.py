"""Park, Cha, Jeong, Kim, Han 2021: a teacher that is trained beside its student's upper parts, from which any method then distils.

A row says both phases: `set: {teacher.method: student-friendly}` is the first, the row's method, any of the zoo's, the second.
"""
from __future__ import annotations

import json
from dataclasses import dataclass

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Experiment, Network, option
from hintkd.methods import zoo
from hintkd.methods.common import options_of, weights_of
from hintkd.methods.method import Choice, Line, method
from hintkd.methods.stage import Stage
from hintkd.methods.zoo_protocol import label_stage, protocol, rate, schedule
from hintkd.nets import stages as nets
from hintkd.nets.branches import BRANCH, TRANSFORMS, add_branches
from hintkd.nets.titles import network

SOURCE = "Park, Cha, Jeong, Kim, Han 2021, NeurIPS, arXiv 2102.07650"
BASED_ON = "zoo"                                             # the methods of phase 2, and the protocol of both
Schedule, SCHEDULES = zoo.Schedule, zoo.SCHEDULES


def _is_friendly(x: Experiment) -> bool:
    """Whether phase 1 is in an experiment."""
    return "student-friendly" in (x.method.name, x.teacher.method.name if isinstance(x.teacher, Experiment) else "")


# -- what is open --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options(zoo.Options):
    """What is open or varied of phase 1, beside the zoo's."""
    branches: tuple[str, ...] = option(
        (), paper="branches of the student that is to be taught; one table has students that phase 1 did not see",
        meaning="the networks whose upper parts branch off, by their titles; none: the row's student", matters=_is_friendly)
    start: str = option(
        "random", "random", "teacher", paper="both are tried",
        meaning="what phase 1 begins with: random weights or those of a teacher that the labels alone have trained", matters=_is_friendly)
    lambda_teacher: float = option(1.0, paper="not at hand", meaning="weight of the teacher's own label loss", matters=_is_friendly)
    lambda_kl: float = option(3.0, paper="not at hand", meaning="weight of a branch's divergence from the teacher", matters=_is_friendly)
    lambda_ce: float = option(1.0, paper="not at hand", meaning="weight of a branch's label loss", matters=_is_friendly)
    branch_tau: float = option(1.0, paper="not at hand", meaning="temperature of the divergence, which is not multiplied by its square",
                               matters=_is_friendly)
    branch_loss: str = option(
        "sum", "sum", "mean", paper="not at hand", meaning="whether the branches' losses are added or averaged", matters=_is_friendly)
    branch_gradient: str = option(
        "branch", "branch", "both", paper="one loss of teacher and branches; whether it moves the teacher's scores is not at hand",
        meaning="where the divergence's gradient goes: into the branch's scores alone, and below them the teacher's features; or into the "
                "teacher's scores, too",
        matters=_is_friendly)
    transform: str = option(
        "conv-bn-relu", *TRANSFORMS, paper="a transform that matches dimensions",
        meaning="what stands below a branch: a convolution with BatchNorm and ReLU; without ReLU; with both, but only where-needed",
        matters=_is_friendly)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.branches:
            network(name)
        if self.branch_tau <= 0 or min(self.lambda_teacher, self.lambda_kl, self.lambda_ce) < 0:
            raise UserError("options: branch_tau must be above 0, and lambda_teacher, lambda_kl and lambda_ce not below")


def options(x: Experiment) -> Options:
    """The experiment's options.  Raises UserError where they are another paper's."""
    return options_of(x, Options, "sftn")


# -- phase 1 -------------------------------------------------------------------------------------------------------------------
def students_of(x: Experiment) -> list[Network]:
    """Whose branches a teacher is trained with.  Raises UserError where nobody is to be taught."""
    if options(x).branches:
        return [network(name) for name in options(x).branches]
    if x.pupil is None:
        raise UserError(f"{x.table}: {x.name} trains a teacher for a student; make it the teacher's method, or name branches")
    return [x.pupil]


def friendly_net(x: Experiment) -> caffe_pb2.NetParameter:
    """Phase 1: lambda_teacher CE(T) + sum over branches i of lambda_kl KL(p_T || p_i) + lambda_ce CE(i); TEST holds the teacher alone.

    p are the scores softened by branch_tau.  Losses are called "<branch>/kl" and "<branch>/loss".
    """
    o, students = options(x), students_of(x)
    net = caffe_pb2.NetParameter(name=f"{x.student.title}-for-{'-'.join(student.title for student in students)}")
    nets.add_data(net, x.dataset, x.options)
    taps = x.student.write(net, "data", x.dataset.classes, x.scaled_options)
    nets.add_label_loss(net, taps.logits, train=True, weight=o.lambda_teacher)
    branches = [branch for student in students
                for branch in add_branches(net, taps, student, x.dataset.shape, x.dataset.classes, x.scaled_options, o.transform)]
    share = 1 / len(branches) if o.branch_loss == "mean" else 1.0
    told = {"tau": o.branch_tau, **({"detached": False} if o.branch_gradient == "both" else {})}
    for branch in branches:
        net.layer.add(name=f"{branch.name}/loss", type="SoftmaxWithLoss", bottom=[branch.scores, "label"], top=[f"{branch.name}/loss"],
                      loss_weight=[o.lambda_ce * share], propagate_down=[True, False], include=[{"phase": "TRAIN"}])
        net.layer.add(name=f"{branch.name}/kl", type="Python", bottom=[branch.scores, taps.logits], top=[f"{branch.name}/kl"],
                      loss_weight=[o.lambda_kl * share / o.branch_tau ** 2], include=[{"phase": "TRAIN"}],
                      propagate_down=[True, o.branch_gradient == "both"],
                      python_param={"module": "hintkd.layers.kl_divergence", "layer": "KLDivergence", "param_str": json.dumps(told)})
    return net


@method(needs_teacher=False, line=Line("#009E73", "--"))
def student_friendly(x: Experiment) -> list[Stage]:
    """Phase 1, of a teacher: beside its student's branches, which are left behind."""
    before = label_stage(x) if options(x).start == "teacher" else None
    stage = Stage.solve("student-friendly", friendly_net(x), protocol(x, schedule(x).iterations, rate(x)), weights_of(before), (BRANCH,))
    return [before, stage] if before else [stage]


# -- points with one answer ----------------------------------------------------------------------------------------------------
CHOICES = (
    Choice("where networks are cut",
           "teacher and student in blocks of equal number",
           "at the ends of their stages, as every method of the zoo takes features; a branch for each stage but the last"),
    Choice("what the branches share",
           "not at hand",
           "nothing but the teacher below them: each has a transform and a student's upper part of its own, drawn anew"),
    Choice("schedule of phase 1",
           "not at hand",
           "that of the plain teacher, also where it begins with one that is trained"),
    Choice("the students of phase 2",
           "trained anew",
           "they begin as those of a plain teacher do, from random weights; nothing of the branches goes on"),
    Choice("the plain teacher",
           "trained on the labels alone",
           "by the same protocol and from the same seed"),
)
