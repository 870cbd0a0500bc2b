"""Bae, Yim, Kim, Pyo, Kim 2019: layer-wise hint training, what it is compared with, and what the paper leaves open.

A stage names the stages it starts from, the teacher's among them, so the lists here hold only what is the method's own.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hintkd.errors import UserError
from hintkd.experiment import Experiment, Taps, Trained, counted, option
from hintkd.experiment import Options as BaseOptions
from hintkd.experiment import Schedule as BaseSchedule
from hintkd.methods.common import label_stage, options_of, schedule_of, solver, weights_of
from hintkd.methods.method import Choice, Line, method, teacher_weights
from hintkd.methods.stage import Stage
from hintkd.nets import stages as nets
from hintkd.nets import surgery
from hintkd.nets.resnet import ResNet
from hintkd.nets.stages import Pair

SOURCE = "Bae, Yim, Kim, Pyo, Kim 2019, ETRI Journal, doi 10.4218/etrij.2018-0152"


# -- what is open, and how long everything takes --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options(BaseOptions):
    """What the paper leaves open, and what it says."""
    shortcut: str = option(
        "A", "A", "B", paper="not printed; the networks are those of He et al.",
        meaning="A: without parameters, as in He et al.'s CIFAR networks; B: a 1x1 projection, as in most Caffe ports")
    mirror: bool = option(
        True, False, True, paper="\"the data preprocessing technique of\" He et al., who mirror",
        meaning="whether CIFAR images are mirrored at random", matters=lambda x: x.dataset.mirror)
    mean: str = option(
        "file", "file", "values", "none", paper="the same; He et al. subtract a mean per pixel",
        meaning="file: per pixel; values: per channel; none", matters=lambda x: bool(x.dataset.train_mean))
    bn_fraction: float = option(
        0.999, paper="not printed; 0.999 is Caffe's default",
        meaning="BatchNorm's moving_average_fraction f; a run of scale s < 1 uses 1 - (1 - f) / s, but at least 0.9")
    mnist_scale: float = option(
        1 / 255, paper="not printed", meaning="what an MNIST pixel, 0 to 255, is multiplied by",
        matters=lambda x: x.dataset.name == "mnist")
    teacher_statistics: str = option(
        "stored", "stored", "batch", paper="not printed",
        meaning="what BatchNorm takes in the frozen teacher while it teaches: its stored statistics, or those of each batch")
    label_tau: int | str = option(
        1, 1, "tau", paper="equation 2 writes one P_S, softened by tau, for both terms; in Hinton et al. the label term is not softened",
        meaning="temperature of the label term: 1, or tau")
    tau_squared: bool = option(
        False, False, True, paper="no factor is printed; but figure 4's losses, 27.6 to 29.0, are above what equation 2 can give, and tau "
                                  "squared would fit",
        meaning="whether the KD term is multiplied by tau squared")
    plus_tap: str = option(
        "before", "before", "after", paper="Hint-KD+ trains everything \"except the fully connected layer\"",
        meaning="whether it compares before or after the global pooling", matters=lambda x: x.method.name == "hint-kd-plus")
    sl_modules: str = option(
        "trainable", "trainable", "frozen", paper="not said whether SL-ResNet's earlier modules go on learning",
        meaning="trainable or frozen while a module is added", matters=lambda x: x.method.name in ("sl-resnet", "sl-resnet-kd"))
    regressor_kernel: int = option(
        1, 1, 3, paper="\"convolutional\" is all that is printed", meaning="side of the regressor's kernel in pixels: 1 or 3",
        matters=lambda x: x.regressor)
    regressor_std: float = option(
        0.01, paper="\"Gaussian\" is all that is printed", meaning="standard deviation of the regressor's first weights",
        matters=lambda x: x.regressor)


@dataclass(frozen=True)
class Schedule(BaseSchedule):
    """Those of Stage 1 and of SL-ResNet's pretraining beside those of plain training and Stage 2."""
    iterations: int = counted(64_000, "plain training and Stage 2")
    hint_lr: float = 1e-4                                             # Stage 1, constant
    hint_iterations: int = counted(25_000, "Stage 1 at once")      # with one pair, and concurrent
    layerwise_iterations: tuple[int, ...] = counted((3_000, 7_000, 15_000), "pair by pair")
    sl_iterations: int = counted(12_000, "SL-ResNet per module")   # at the rate base_lr


SCHEDULES = {
    "cifar10": Schedule(),
    "cifar100": Schedule(hint_iterations=35_000, layerwise_iterations=(5_000, 15_000, 15_000)),
    "mnist": Schedule(iterations=36_000, teacher_iterations=36_000, sl_iterations=8_000),
    # Not from the paper: the hint rate is 1e-4 times 16, for 16 times fewer pixels than 32x32.
    "digits": Schedule(iterations=600, teacher_iterations=1_200, hint_lr=1.6e-3, hint_iterations=900,
                       layerwise_iterations=(108, 252, 540), sl_iterations=120),
}


def options(x: Experiment) -> Options:
    """The experiment's options.  Raises UserError where they are another paper's."""
    return options_of(x, Options, "hint_2019")


def schedule(x: Experiment) -> Schedule:
    """The schedule that is run.  Raises UserError where it is another paper's."""
    return schedule_of(x, Schedule, "hint_2019")


# -- stages ------------------------------------------------------------------------------------------------------------------
def kd_stage(x: Experiment, init: Stage | None = None, iterations: int | None = None) -> Stage:
    """Stage 2: equation 2 over all of the student's weights; those that `init` did not train are drawn anew."""
    iterations, o = iterations or x.scaled_schedule.iterations, options(x)
    net = nets.kd_net(x, iterations, x.tau if o.label_tau == "tau" else 1, o.tau_squared)
    return Stage.solve("kd", net, solver(x, iterations, x.net_seed, x.schedule.base_lr),
                       weights_in=(teacher_weights(x), *weights_of(init)), drop=(surgery.TEACHER, nets.KD_LOSS))


def hint_stage(x: Experiment, title: str, pairs: list[Pair], iterations: int, init: Stage | None = None) -> Stage:
    """Stage 1 or a step of it, the same for all nets of a table; a regressor is left behind."""
    net = nets.hint_net(x, pairs, options(x).regressor_kernel, options(x).regressor_std)
    return Stage.solve(title, net, solver(x, iterations, x.shared_seed, schedule(x).hint_lr, falling=False, tested=False),
                       weights_in=(teacher_weights(x), *weights_of(init)), drop=(surgery.TEACHER, nets.REGRESSOR))


def sl_stages(x: Experiment) -> list[Stage]:
    """Supervised layer-wise pretraining: residual modules are added one at a time, each step with a pooling and fc of its own.

    The scores' layer is left behind at the next step; the last step's, which is the student's own, goes on into fine-tuning.
    """
    if not isinstance(x.student, ResNet):
        raise UserError(f"{x.table}: {x.name} adds residual modules one at a time, which {x.student.title} does not have")
    modules, scores, stages = 3 * x.student.n, nets.student_taps(x).logits, list[Stage]()
    for step in range(1, modules + 1):
        frozen = step - 1 if options(x).sl_modules == "frozen" else 0
        stages.append(Stage.solve(f"sl{step}", nets.partial_net(x, x.student, step, frozen),
                                  solver(x, schedule(x).sl_iterations, x.net_seed, x.schedule.base_lr, falling=False),
                                  weights_in=weights_of(stages[-1] if stages else None), drop=(scores,) if step < modules else ()))
    return stages


# -- pairs -------------------------------------------------------------------------------------------------------------------
def stack_ends(x: Experiment) -> list[Pair]:
    """(H1, G1), (H2, G2), (H3, G3): the ends of the three stacks, after the last ReLU; or the pairs named by hand, bottom up."""
    if x.hint_pairs:
        return [Pair(hint, guided, str(i)) for i, (hint, guided) in enumerate(x.hint_pairs, start=1)]
    hints, guided = (taps.stages for taps in _taps(x))
    if len(hints) != len(guided):
        raise UserError(f"{x.table}: the teacher has {len(hints)} stages and the student {len(guided)}; name the pairs of hint and guided "
                        "layers")
    return [Pair(hint, guide, str(i)) for i, (hint, guide) in enumerate(zip(hints, guided, strict=True), start=1)]


def middle(x: Experiment) -> Pair:
    """The end of residual module ceil(3n / 2) of 3n in both nets."""
    return _by_hand(x) or Pair(*(taps.modules[ceil(len(taps.modules) / 2) - 1] for taps in _taps(x)))


def conv_part(x: Experiment) -> Pair:
    """Everything except the fully connected layer, before or after the global pooling."""
    if options(x).plus_tap == "after":
        return _by_hand(x) or Pair(*(taps.pooled for taps in _taps(x)))
    return _by_hand(x) or Pair(*(taps.stages[-1] for taps in _taps(x)))


def _by_hand(x: Experiment) -> Pair | None:
    if len(x.hint_pairs) > 1:
        raise UserError(f"{x.table}: {x.name} compares one pair of layers, and {len(x.hint_pairs)} were named")
    return Pair(*x.hint_pairs[0]) if x.hint_pairs else None


def _taps(x: Experiment) -> tuple[Taps, Taps]:
    """The teacher's and the student's."""
    if isinstance(x.teacher, Trained) and x.teacher.prototxt:
        raise UserError(f"{x.table}: {x.name} does not know the hint layers of this teacher; name the pairs of hint and guided layers")
    taps = nets.teacher_net(x)[1]
    assert taps is not None
    return taps, nets.student_taps(x)


# -- methods -----------------------------------------------------------------------------------------------------------------
@method(line=Line("#E69F00"))
def kd(x: Experiment) -> list[Stage]:
    """KD without hint: equation 2 from random weights."""
    return [kd_stage(x)]


@method(line=Line("#E69F00", "--"))
def kd_equal_iterations(x: Experiment) -> list[Stage]:
    """Not in the paper, a control: KD for as many iterations as Stage 1 and Stage 2 together."""
    return [kd_stage(x, iterations=schedule(x).hint_iterations + schedule(x).iterations)]


@method(line=Line("#0072B2", hints="-."))
def hint_kd(x: Experiment) -> list[Stage]:
    """Original hint training on the middle pair (equation 1), then KD."""
    hint = hint_stage(x, "hint", [middle(x)], schedule(x).hint_iterations)
    return [hint, kd_stage(x, init=hint)]


@method(line=Line("#56B4E9", hints=":"))
def hint_kd_plus(x: Experiment) -> list[Stage]:
    """Hint training of the whole convolutional part at once, then KD."""
    hint = hint_stage(x, "hint", [conv_part(x)], schedule(x).hint_iterations)
    return [hint, kd_stage(x, init=hint)]


@method(line=Line("#D55E00"))
def layerwise_hint(x: Experiment) -> list[Stage]:
    """Pair by pair, bottom up, then KD (section 2.2, equations 3 to 6 and 2)."""
    pairs, counts = stack_ends(x), schedule(x).layerwise_iterations
    if len(pairs) != len(counts):
        raise UserError(f"{x.table}: {len(pairs)} pairs of layers but {len(counts)} layerwise_iterations; give one for each pair")
    stages: list[Stage] = []
    for pair, iterations in zip(pairs, counts, strict=True):
        stages.append(hint_stage(x, f"hint{pair.suffix}", [pair], iterations, init=stages[-1] if stages else None))
    return [*stages, kd_stage(x, init=stages[-1])]


@method(line=Line("#CC79A7", hints="--"))
def concurrent_hint(x: Experiment) -> list[Stage]:
    """All pairs at once (equation 7), then KD."""
    hint = hint_stage(x, "hint", stack_ends(x), schedule(x).hint_iterations)
    return [hint, kd_stage(x, init=hint)]


@method(needs_teacher=False, line=Line("#009E73", "--"))
def sl_resnet(x: Experiment) -> list[Stage]:
    """Supervised layer-wise pretraining after Roy et al., then plain fine-tuning."""
    steps = sl_stages(x)
    return [*steps, label_stage(x, "finetune", init=steps[-1])]


@method(line=Line("#009E73"))
def sl_resnet_kd(x: Experiment) -> list[Stage]:
    """The same pretraining, then KD."""
    steps = sl_stages(x)
    return [*steps, kd_stage(x, init=steps[-1])]


# -- points with one answer ----------------------------------------------------------------------------------------------------
CHOICES = (
    Choice("residual modules",
           "\"2n residual modules\" per stack once, against its own depth 6n + 2",
           "n modules per stack; 8, 14, 20, 26, 32 layers are n = 1 to 5"),
    Choice("hint and guided layers",
           "\"three pairs of hint/guided layers, whose feature map dimensions changed\"",
           "the ends of the three stacks of both networks, after the last ReLU"),
    Choice("the middle layer of the original hint training",
           "\"middle layer\"",
           "the end of residual module ceil(3n / 2) of 3n, after its ReLU"),
    Choice("what is published",
           "not said whether of the last or the best iteration",
           "the last one, measured from the saved weights; the best tested one stands beside it"),
    Choice("averages",
           "truncated (91.157 is printed as 91.15)",
           "recomputed from the three nets where these are printed"),
    Choice("seeds",
           "not printed",
           "the teacher, Stage 1 and net k have a seed each, made from the run's seed, the table's, the replication, the role and k, "
           "so that no two roles begin with the same weights; Stage 1 and net k have the same for every method of a table"),
    Choice("what distinguishes the nets",
           "the weights that took no part in Stage 1; for SL-ResNet nothing is said",
           "these and the draws of the augmentation; SL-ResNet's nets have a pretraining each; the original student has three nets, "
           "the teacher one"),
    Choice("images per iteration for MNIST students",
           "64, printed for the teacher",
           "64"),
    Choice("rate of Stage 1",
           "1e-4",
           "1e-4, constant"),
    Choice("momentum and weight decay of Stage 1",
           "not printed",
           "0.9 and 1e-4, as elsewhere; weight decay acts on all that learns"),
    Choice("solver state between steps",
           "not printed",
           "begins anew: each step is a solver run"),
    Choice("scale of the hint loss",
           "equation 1, a squared norm",
           "Caffe's: a sum over the features divided by 2 x batch"),
    Choice("a_i of equation 7",
           "\"all equal\"",
           "1, so that each pair's loss has the weight 1/3"),
    Choice("lambda",
           "5, never said to decay; 3 for SL-ResNet with KD on MNIST",
           "so, and constant"),
    Choice("regressor",
           "Gaussian initialisation, no bias",
           "one per pair, on the guided layer's output, at the student's rate, dropped after Stage 1"),
    Choice("SL-ResNet's steps",
           "12,000 iterations (MNIST 8,000) at a base rate of 0.1",
           "at the constant rate 0.1; each step has a pooling and a fully connected layer of its own"),
    Choice("SL-ResNet's last fully connected layer",
           "that of a step is dropped at the next; not said what becomes of the last one",
           "it goes on into Stage 2, since it stands where the student's own stands"),
    Choice("SL-ResNet's fine-tuning on MNIST",
           "36,000 iterations, once 64,000",
           "36,000"),
    Choice("the teacher of table 6's comparison without regressor",
           "its accuracy is printed nowhere",
           "14 layers of 64, 128 and 256 filters, as in figure 10"),
    Choice("\"averaging the predictions of three trained students\" (figure 5)",
           "their mean accuracy or their ensemble",
           "both: the mean accuracy in every row, and the ensemble of the nets beside it"),
    Choice("normalisation of figure 9",
           "not defined",
           "all losses of a pair are divided by the same number, the largest with which one of the table's methods begins there"),
    Choice("validation",
           "no split is mentioned",
           "none: the last iteration counts, whatever the test set says on the way"),
)
