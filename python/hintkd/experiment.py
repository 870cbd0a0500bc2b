"""What is to be trained: data set, networks, schedule and options of one row and one net of a table, as plain frozen data.

An Experiment says nothing of stages or prototxts: methods/ turns it into stages, nets/ into nets.  Where a paper leaves a
point open, Options names it and gives the default; the report lists them.
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hintkd.errors import UserError
from hintkd.seeds import role_seed


def _one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{owner}: {name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Dataset:
    """A labelled image set in two LMDBs, and how its images enter a net.

    Paths are relative to the workspace; "" means that there is no mean file.  A mean file has the size of its records, so
    padded training records and test records have one each.
    """
    name: str
    classes: int
    channels: int
    size: int                              # side of the image that a net sees, pixels
    batch: int                             # training images per iteration
    train_lmdb: str
    test_lmdb: str
    train_mean: str = ""
    test_mean: str = ""
    test_batch: int = 100
    test_iter: int = 100                   # test_batch * test_iter is the whole test set
    train_size: int = 0                    # training images
    crop: bool = False                     # the training records are padded: take a random size x size part
    mirror: bool = False                   # left and right may be exchanged (if the options say so too)
    scale: float = 1.0                     # multiplies a pixel after its mean was subtracted
    mean_value: tuple[float, ...] = ()     # mean per channel, in the channel order of the records

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image as a net sees it: channels, height, width."""
        return self.channels, self.size, self.size

    @property
    def test_size(self) -> int:
        """Images in the test set."""
        return self.test_batch * self.test_iter


def _dataset(name: str, *, training: str = "train", mean: bool = True, **facts: Any) -> Dataset:
    folder = f"data/{name}"
    train_mean, test_mean = (f"{folder}/{part}_mean.binaryproto" if mean else "" for part in ("train", "test"))
    return Dataset(name=name, train_lmdb=f"{folder}/{training}_lmdb", test_lmdb=f"{folder}/test_lmdb", train_mean=train_mean,
                   test_mean=test_mean, **facts)


_CIFAR: dict[str, Any] = {"channels": 3, "size": 32, "batch": 128, "train_size": 50_000, "crop": True, "mirror": True}
_DIGITS: dict[str, Any] = {"classes": 10, "channels": 1, "size": 8, "batch": 32, "test_batch": 250, "test_iter": 4, "crop": True,
                           "scale": 1 / 16}

DATASETS: dict[str, Dataset] = {
    # MNIST is neither augmented nor centred; its scale is Options.mnist_scale.
    "mnist": _dataset("mnist", mean=False, classes=10, channels=1, size=28, batch=64, train_size=60_000),
    "cifar10": _dataset("cifar10", classes=10, mean_value=(125.3, 123.0, 113.9), **_CIFAR),
    "cifar100": _dataset("cifar100", classes=100, mean_value=(129.3, 124.1, 112.4), **_CIFAR),
    "digits": _dataset("digits", train_size=200, **_DIGITS),
    "digits-teacher": _dataset("digits", training="teacher", train_size=797, **_DIGITS),   # the same test set and means
}


@dataclass(frozen=True)
class ResNet:
    """He et al.'s CIFAR network of depth 6n + 2: three stacks of n residual modules, with `widths` channels each."""
    depth: int
    widths: tuple[int, int, int] = (16, 32, 64)

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise UserError(f"a ResNet of depth {self.depth} does not exist; depths are 6n + 2: 8, 14, 20, 26, 32, ...")
        if len(self.widths) != 3 or min(self.widths) < 1 or sorted(self.widths) != list(self.widths):
            raise UserError(f"widths {self.widths} do not make a ResNet: give three channel counts that do not fall")

    @property
    def n(self) -> int:
        """Residual modules per stack."""
        return (self.depth - 2) // 6

    @property
    def title(self) -> str:
        """"resnet26", or "resnet26-64-128-256" where the widths are not 16, 32, 64."""
        return "-".join([f"resnet{self.depth}", *(str(w) for w in self.widths if self.widths != (16, 32, 64))])


@dataclass(frozen=True)
class Schedule:
    """Iterations and rates of every kind of stage.  `steps` are the fractions of a stage after which its rate falls to a tenth."""
    iterations: int = 64_000                                          # plain training and Stage 2
    teacher_iterations: int = 64_000
    steps: tuple[float, ...] = (0.5, 0.75)
    base_lr: float = 0.1
    hint_lr: float = 1e-4                                             # Stage 1, constant
    hint_iterations: int = 25_000                                     # Stage 1 with one pair, and concurrent
    layerwise_iterations: tuple[int, ...] = (3_000, 7_000, 15_000)    # Stage 1, one per pair
    sl_iterations: int = 12_000                                       # SL-ResNet, per residual module added; rate base_lr
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def scaled(self, scale: float) -> Schedule:
        """Every stage shortened (or lengthened) in proportion, at least one iteration each; rates and their steps keep their shape."""
        def times(count: int) -> int:
            return max(1, round(count * scale))
        return replace(self, iterations=times(self.iterations), teacher_iterations=times(self.teacher_iterations),
                       hint_iterations=times(self.hint_iterations), sl_iterations=times(self.sl_iterations),
                       layerwise_iterations=tuple(map(times, self.layerwise_iterations)))


SCHEDULES: dict[str, Schedule] = {
    "cifar10": Schedule(),
    "cifar100": Schedule(hint_iterations=35_000, layerwise_iterations=(5_000, 15_000, 15_000)),
    "mnist": Schedule(iterations=36_000, teacher_iterations=36_000, sl_iterations=8_000),
    # Not from a paper: the hint rate is 1e-4 times 16, for 16 times fewer pixels than 32x32.
    "digits": Schedule(iterations=600, teacher_iterations=1_200, hint_lr=1.6e-3, hint_iterations=900,
                       layerwise_iterations=(108, 252, 540), sl_iterations=120),
}


@dataclass(frozen=True)
class Options:
    """What the papers leave open.  Every record holds all of them."""
    shortcut: str = "A"                # A: parameter-free (He et al.'s CIFAR nets); B: 1x1 projection (most Caffe ports)
    mirror: bool = True                # where the data set allows it
    mean: str = "file"                 # file: per pixel; values: per channel; none.  A data set without means has none
    label_tau: int | str = 1           # temperature of the label term of the KD loss: 1, or "tau" for the KD term's
    tau_squared: bool = False          # multiply the KD term by tau^2
    plus_tap: str = "before"           # Hint-KD+ compares before or after the global pooling
    sl_modules: str = "trainable"      # SL-ResNet's earlier modules while a new one is trained: trainable or frozen
    regressor_kernel: int = 1          # side of the regressor's kernel, pixels: 1 or 3
    regressor_std: float = 0.01        # of the regressor's Gaussian initialisation
    bn_fraction: float = 0.999         # BatchNorm's moving_average_fraction at scale 1
    mnist_scale: float = 1 / 255       # what an MNIST pixel is multiplied by

    def __post_init__(self) -> None:
        for name, allowed in {"shortcut": ("A", "B"), "mean": ("file", "values", "none"), "label_tau": (1, "tau"), "mirror": (False, True),
                              "plus_tap": ("before", "after"), "sl_modules": ("trainable", "frozen"), "regressor_kernel": (1, 3)}.items():
            _one_of("options", name, getattr(self, name), allowed)
        if not 0 < self.bn_fraction < 1:
            raise UserError(f"options: bn_fraction is {self.bn_fraction}; it must lie between 0 and 1")

    def as_dict(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class ExternalTeacher:
    """A trained teacher from elsewhere: its weights, and its net unless that is the ResNet of the experiment."""
    caffemodel: Path
    prototxt: Path | None = None


@dataclass(frozen=True)
class Experiment:
    """One net of one row of a table.  `schedule` is the full one; `scale` shortens it."""
    method: str
    dataset: Dataset
    student: ResNet
    teacher: ResNet | None = None
    net: int = 1                                           # 1, 2, 3: which of the students that differ in their seed
    table: str = "table"
    schedule: Schedule = field(default_factory=Schedule)
    options: Options = field(default_factory=Options)
    tau: float = 3.0
    lambda_: float = 5.0
    lambda_schedule: str = "fixed"                         # over Stage 2: fixed, or to lambda_end: linear, or by steps where the rate drops
    lambda_end: float = 1.0
    test_loss: bool = False                                # Stage 2 is also tested under its own loss, for which TEST holds the teacher
    regressor: bool = False                                # a convolution on a guided layer that is narrower than its hint
    hint_pairs: tuple[tuple[str, str], ...] = ()           # (hint, guided) layers by hand, bottom up; () for the paper's
    teacher_dataset: Dataset | None = None                 # what the teacher is trained on, if not `dataset`
    external_teacher: ExternalTeacher | None = None
    seed: int = 1                                          # of the run
    table_seed: int = 0                                    # of the table, so that two tables' runs of one method differ
    repeat: int = 1                                        # which complete replication
    scale: float = 1.0

    def __post_init__(self) -> None:
        _one_of(self.table, "lambda_schedule", self.lambda_schedule, ("fixed", "linear", "step"))
        other = self.teacher_dataset
        if other and (other.classes, other.shape) != (self.dataset.classes, self.dataset.shape):
            raise UserError(f"{self.table}: the teacher's data set {other.name} has other classes or images than {self.dataset.name}")
        if self.scale <= 0:
            raise UserError(f"{self.table}: scale is {self.scale}; it must be above 0")
        if self.net < 1:
            raise UserError(f"{self.table}: net is {self.net}; nets are counted from 1")
        assert self.net_seed                               # raises where seed, repeat or net are out of range

    @property
    def scaled_schedule(self) -> Schedule:
        """The schedule that is run."""
        return self.schedule.scaled(self.scale)

    @property
    def bn_fraction(self) -> float:
        """moving_average_fraction f of the run: a run scaled by s < 1 averages over fewer iterations, 1 - (1 - f) / s, at least 0.9."""
        f = self.options.bn_fraction
        return f if self.scale >= 1 else max(min(f, 0.9), 1 - (1 - f) / self.scale)

    @property
    def teacher_seed(self) -> int:
        """Of the teacher, which tables share."""
        return role_seed("teacher", self.seed, repeat=self.repeat)

    @property
    def stage1_seed(self) -> int:
        """Of Stage 1, which the nets and methods of a table share, so that they stay paired."""
        return role_seed("stage1", self.seed, self.table_seed, self.repeat)

    @property
    def net_seed(self) -> int:
        """Of what is a net's own: plain training, Stage 2, SL-ResNet's pretraining.  The same for every method."""
        return role_seed("net", self.seed, self.table_seed, self.repeat, self.net)
