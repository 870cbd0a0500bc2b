"""Each published method as a function from an experiment to its stages, in order; the last one trains the student that is measured.

A stage names the stages it starts from, the teacher's among them, so the lists here hold only what is the method's own.  Unless said
otherwise: Bae et al. 2019, ETRI Journal, doi 10.4218/etrij.2018-0152.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Experiment, ResNet
from hintkd.methods.stage import Stage, Weights
from hintkd.nets import stages as nets
from hintkd.nets import surgery
from hintkd.nets.resnet import module_name
from hintkd.nets.stages import Pair


# -- solvers -----------------------------------------------------------------------------------------------------------------
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


# -- stages ------------------------------------------------------------------------------------------------------------------
def teacher_stage(x: Experiment) -> Stage:
    """The teacher, trained on the labels; one for all methods and nets of a table."""
    if x.teacher is None:
        raise UserError(f"{x.table}: there is no teacher to train; name its depth")
    dataset = x.teacher_dataset or x.dataset
    return Stage("teacher", nets.plain_net(x, x.teacher, dataset),
                 solver(x, x.scaled_schedule.teacher_iterations, x.teacher_seed, x.schedule.base_lr))


def teacher_weights(x: Experiment) -> Weights:
    """The trained teacher's layers under "teacher/": of the table's own teacher, or of a file."""
    return Weights(x.external_teacher.caffemodel if x.external_teacher else teacher_stage(x), prefix=surgery.TEACHER)


def label_stage(x: Experiment, title: str, init: Stage | None = None) -> Stage:
    """The whole student, trained on the labels."""
    return Stage(title, nets.plain_net(x, x.student, x.dataset), solver(x, x.scaled_schedule.iterations, x.net_seed, x.schedule.base_lr),
                 weights_in=_from(init))


def kd_stage(x: Experiment, init: Stage | None = None, iterations: int | None = None) -> Stage:
    """Stage 2: equation 2 over all of the student's weights; those that `init` did not train are drawn anew."""
    iterations = iterations or x.scaled_schedule.iterations
    return Stage("kd", nets.kd_net(x, iterations), solver(x, iterations, x.net_seed, x.schedule.base_lr),
                 weights_in=(teacher_weights(x), *_from(init)), drop=(surgery.TEACHER, nets.KD_LOSS))


def hint_stage(x: Experiment, title: str, pairs: list[Pair], iterations: int, init: Stage | None = None) -> Stage:
    """Stage 1 or a step of it, the same for all nets of a table; a regressor is left behind."""
    return Stage(title, nets.hint_net(x, pairs),
                 solver(x, iterations, x.stage1_seed, x.schedule.hint_lr, falling=False, tested=False),
                 weights_in=(teacher_weights(x), *_from(init)), drop=(surgery.TEACHER, nets.REGRESSOR))


def sl_stages(x: Experiment) -> list[Stage]:
    """Supervised layer-wise pretraining: residual modules are added one at a time, each step with a pooling and fc of its own.

    The fc is left behind at the next step; the last step's, which is the student's own, goes on into fine-tuning.
    """
    modules, stages = 3 * x.student.n, list[Stage]()
    for step in range(1, modules + 1):
        frozen = step - 1 if x.options.sl_modules == "frozen" else 0
        stages.append(Stage(f"sl{step}", nets.plain_net(x, x.student, x.dataset, modules=step, frozen_modules=frozen),
                            solver(x, x.scaled_schedule.sl_iterations, x.net_seed, x.schedule.base_lr, falling=False),
                            weights_in=_from(stages[-1] if stages else None), drop=("fc",) if step < modules else ()))
    return stages


def _from(stage: Stage | None) -> tuple[Weights, ...]:
    return (Weights(stage),) if stage else ()


# -- pairs -------------------------------------------------------------------------------------------------------------------
def stack_ends(x: Experiment) -> list[Pair]:
    """(H1, G1), (H2, G2), (H3, G3): the ends of the three stacks, after the last ReLU; or the pairs named by hand, bottom up."""
    if x.hint_pairs:
        return [Pair(hint, guided, str(i)) for i, (hint, guided) in enumerate(x.hint_pairs, start=1)]
    return [Pair(_end_of(_teacher(x), g * _teacher(x).n), _end_of(x.student, g * x.student.n), str(g)) for g in (1, 2, 3)]


def middle(x: Experiment) -> Pair:
    """The end of residual module ceil(3n / 2) of 3n in both nets."""
    return _by_hand(x) or Pair(*(_end_of(net, ceil(3 * net.n / 2)) for net in (_teacher(x), x.student)))


def conv_part(x: Experiment) -> Pair:
    """Everything except the fully connected layer, before or after the global pooling."""
    if x.options.plus_tap == "after":
        return _by_hand(x) or Pair("global_avg_pool", "global_avg_pool")
    return _by_hand(x) or Pair(*(_end_of(net, 3 * net.n) for net in (_teacher(x), x.student)))


def _by_hand(x: Experiment) -> Pair | None:
    if len(x.hint_pairs) > 1:
        raise UserError(f"{x.table}: {x.method} compares one pair of layers, and {len(x.hint_pairs)} were named")
    return Pair(*x.hint_pairs[0]) if x.hint_pairs else None


def _teacher(x: Experiment) -> ResNet:
    if x.teacher is None or (x.external_teacher and x.external_teacher.prototxt):
        raise UserError(f"{x.table}: {x.method} does not know the hint layers of this teacher; name the pairs of hint and guided layers")
    return x.teacher


def _end_of(resnet: ResNet, module: int) -> str:
    return module_name(resnet, module) + "_relu"


# -- methods -----------------------------------------------------------------------------------------------------------------
def original(x: Experiment) -> list[Stage]:
    """No teacher: plain softmax cross-entropy."""
    return [label_stage(replace(x, table_seed=0), "original")]          # like the teacher, the same in every table


def kd(x: Experiment) -> list[Stage]:
    """KD without hint: equation 2 from random weights."""
    return [kd_stage(x)]


def kd_equal_iterations(x: Experiment) -> list[Stage]:
    """Not in the paper, a control: KD for as many iterations as Stage 1 and Stage 2 together."""
    return [kd_stage(x, iterations=x.scaled_schedule.hint_iterations + x.scaled_schedule.iterations)]


def hint_kd(x: Experiment) -> list[Stage]:
    """Original hint training on the middle pair (equation 1), then KD."""
    hint = hint_stage(x, "hint", [middle(x)], x.scaled_schedule.hint_iterations)
    return [hint, kd_stage(x, init=hint)]


def hint_kd_plus(x: Experiment) -> list[Stage]:
    """Hint training of the whole convolutional part at once, then KD."""
    hint = hint_stage(x, "hint", [conv_part(x)], x.scaled_schedule.hint_iterations)
    return [hint, kd_stage(x, init=hint)]


def layerwise_hint(x: Experiment) -> list[Stage]:
    """Pair by pair, bottom up, then KD (section 2.2, equations 3 to 6 and 2)."""
    pairs, counts = stack_ends(x), x.scaled_schedule.layerwise_iterations
    if len(pairs) != len(counts):
        raise UserError(f"{x.table}: {len(pairs)} pairs of layers but {len(counts)} layerwise_iterations; give one for each pair")
    stages: list[Stage] = []
    for pair, iterations in zip(pairs, counts, strict=True):
        stages.append(hint_stage(x, f"hint{pair.suffix}", [pair], iterations, init=stages[-1] if stages else None))
    return [*stages, kd_stage(x, init=stages[-1])]


def concurrent_hint(x: Experiment) -> list[Stage]:
    """All pairs at once (equation 7), then KD."""
    hint = hint_stage(x, "hint", stack_ends(x), x.scaled_schedule.hint_iterations)
    return [hint, kd_stage(x, init=hint)]


def sl_resnet(x: Experiment) -> list[Stage]:
    """Supervised layer-wise pretraining after Roy et al., then plain fine-tuning."""
    steps = sl_stages(x)
    return [*steps, label_stage(x, "finetune", init=steps[-1])]


def sl_resnet_kd(x: Experiment) -> list[Stage]:
    """The same pretraining, then KD."""
    steps = sl_stages(x)
    return [*steps, kd_stage(x, init=steps[-1])]


METHODS: dict[str, Callable[[Experiment], list[Stage]]] = {
    "original": original,
    "kd": kd,
    "kd-equal-iterations": kd_equal_iterations,
    "hint-kd": hint_kd,
    "hint-kd-plus": hint_kd_plus,
    "layerwise-hint": layerwise_hint,
    "concurrent-hint": concurrent_hint,
    "sl-resnet": sl_resnet,
    "sl-resnet-kd": sl_resnet_kd,
}


def stages_of(x: Experiment) -> list[Stage]:
    """The stages of an experiment, the last one's student or, for method "teacher", the teacher being what is measured.

    Raises UserError on a method that does not exist, and on networks that do not fit together.
    """
    if x.method == "teacher":
        return [teacher_stage(x)]
    if x.method not in METHODS:
        raise UserError(f"{x.table}: there is no method '{x.method}'; there are {', '.join(METHODS)}")
    return METHODS[x.method](x)
