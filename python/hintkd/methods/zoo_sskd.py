"""Self-supervised knowledge distillation: the zoo's method in which teacher and student tell which rotated image is which upright one."""
from __future__ import annotations

import json
from dataclasses import replace
from math import prod

from hintkd.experiment import Experiment
from hintkd.methods.common import solver
from hintkd.methods.method import Line, method, teacher_weights
from hintkd.methods.stage import Stage, Weights
from hintkd.methods.zoo_protocol import options, protocol, rate, schedule, weighed
from hintkd.nets import adapters, surgery
from hintkd.nets.distilled import Distilled

VIEWS = 4                                                    # upright, and turned by one, two and three quarters
HEAD = "teacher_head"


@method(line=Line("#0072B2", "-."))
def sskd(x: Experiment) -> list[Stage]:
    """In four rotations, after a head h of the teacher's was trained to match them: 0.1 CE + 0.9 KD upright + 2.7 KD rotated + 10 KL of
    c = cosines of h(rotated) and h(upright), where the teacher's are right or nearly (Xu et al. 2020)."""
    head = head_stage(x)
    return [head, _student_stage(x, head)]


def head_stage(x: Experiment) -> Stage:
    """The projection head of the frozen teacher, the same for all nets of a table."""
    d = Distilled(x, views=VIEWS)
    head = adapters.projection_head(d.losses, HEAD, d.teacher.pooled.blob, prod(d.teacher.pooled.shape))
    d.loss("matching_loss", "self_supervision", "ViewMatching", [head], 1)
    falling = replace(x, schedule=replace(x.schedule, steps=(0.5, 0.75)))
    trained = solver(falling, schedule(x).head_iterations, x.shared_seed, x.schedule.base_lr, tested=False)
    return Stage.solve("head", d.net("head", 0), trained, (teacher_weights(x),), (surgery.TEACHER,))


def _student_stage(x: Experiment, head: Stage) -> Stage:
    """The student with a head of its own, which is left behind, and all four losses as one."""
    d = Distilled(x, views=VIEWS)
    other = adapters.projection_head(d.losses, HEAD, d.teacher.pooled.blob, prod(d.teacher.pooled.shape))
    surgery.freeze(d.losses.layer)
    mine = adapters.projection_head(d.losses, "student_head", d.student.pooled.blob, prod(d.student.pooled.shape))
    beta = weighed(options(x).beta, 1)
    told = {"ce": weighed(options(x).gamma, 0.1), "kd": weighed(options(x).alpha, 0.9), "tf": 2.7 * beta, "ss": 10.0 * beta,
            "kd_tau": float(x.tau), "tf_tau": float(x.tau)}
    d.losses.layer.add(name="sskd_loss", type="Python", top=["sskd_loss"], loss_weight=[1],
                       bottom=[d.student.logits.blob, d.teacher.logits.blob, mine, other, "label"],
                       propagate_down=[True, False, True, False, False], python_param={
                           "module": "hintkd.layers.self_supervision", "layer": "SelfSupervisedLoss", "param_str": json.dumps(told)})
    return Stage.solve("sskd", d.net("sskd"), protocol(x, schedule(x).iterations, rate(x)), (teacher_weights(x), Weights(head)),
                       d.left_behind)
