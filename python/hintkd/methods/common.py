"""What the methods of several papers are made of, solvers with the rates of a schedule, and the two that every paper's table has."""
from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Experiment, Options, Schedule
from hintkd.methods.method import Line, method, teacher_stages
from hintkd.methods.stage import Stage, Weights
from hintkd.nets import stages as nets

Own = TypeVar("Own", bound=Options)
Run = TypeVar("Run", bound=Schedule)


def options_of(x: Experiment, kind: type[Own], paper: str) -> Own:
    """The experiment's options, which must be the paper's.  Raises UserError where they are another's."""
    if not isinstance(x.options, kind):
        raise UserError(f"{x.table}: {x.name} needs the options of paper {paper}; name that paper in the table")
    return x.options


def schedule_of(x: Experiment, kind: type[Run], paper: str) -> Run:
    """The schedule that is run, which must be the paper's.  Raises UserError where it is another's."""
    if not isinstance(x.schedule, kind):
        raise UserError(f"{x.table}: {x.name} needs the schedule of paper {paper}; name that paper in the table")
    return x.schedule.scaled(x.scale)


def solver(x: Experiment, iterations: int, seed: int, lr: float, falling: bool = True,
           tested: bool = True) -> caffe_pb2.SolverParameter:
    """SGD with momentum: the rate falls to a tenth at the schedule's steps, or stays.  Everything but `net` and `snapshot_prefix`.

    A curve has 100 points of training and up to 40 of the test set: as many tests as look at a fifth of all images at most, but one.
    """
    s = caffe_pb2.SolverParameter(
        type="SGD", base_lr=lr, momentum=x.schedule.momentum, weight_decay=x.schedule.weight_decay, max_iter=iterations, random_seed=seed,
        display=max(1, iterations // 100), snapshot=max(200, iterations // 40), snapshot_format="BINARYPROTO")
    s.average_loss = s.display
    if falling:
        s.lr_policy, s.gamma = "multistep", 0.1
        s.stepvalue.extend(round(fraction * iterations) for fraction in x.schedule.steps)
    else:
        s.lr_policy = "fixed"
    if tested:
        tests = min(40, max(1, iterations * x.dataset.batch // (4 * x.dataset.test_size)))
        s.test_iter.append(x.dataset.test_iter)
        s.test_interval = -(-iterations // tests)
        s.test_initialization = False
    return s


def label_stage(x: Experiment, title: str, init: Stage | None = None) -> Stage:
    """The whole network, trained on the labels."""
    return Stage.solve(title, nets.plain_net(x), solver(x, x.scaled_schedule.iterations, x.net_seed, x.schedule.base_lr),
                       weights_in=weights_of(init))


def weights_of(stage: Stage | None) -> tuple[Weights, ...]:
    """All that a stage has trained, or nothing."""
    return (Weights(stage),) if stage else ()


@method(line=Line("#777777", "--"), is_shared=True)
def teacher(x: Experiment) -> list[Stage]:
    """The teacher itself, as it is trained."""
    return teacher_stages(x)


@method(needs_teacher=False, line=Line("#000000", ":"))
def original(x: Experiment) -> list[Stage]:
    """No teacher: plain softmax cross-entropy."""
    return [label_stage(replace(x, table_seed=0), "teacher" if x.generation else "original")]     # the same in every table
