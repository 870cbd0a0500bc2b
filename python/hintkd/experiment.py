"""What is to be trained: data set, network, teacher, schedule and options of one net of one row of a table, as plain frozen data.

An Experiment says nothing of stages or prototxts: methods/ turns it into stages, nets/ into nets.  What a network, an option or a method
is in particular is said by whoever brings it, nets/ and the papers' modules in methods/; here is what all of them have in common.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from hintkd.errors import UserError
from hintkd.seeds import role_seed

if TYPE_CHECKING:
    from hintkd.backend import caffe_pb2


def _one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{owner}: {name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


# ---------------------------------------------------------------------------------------------------------------- data sets

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
    std_value: tuple[float, ...] = ()      # standard deviation per channel, in the same order
    border: int = 0                        # pixels that padded training records have around the image

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


_CIFAR: dict[str, Any] = {"channels": 3, "size": 32, "batch": 128, "train_size": 50_000, "crop": True, "border": 4, "mirror": True}
_DIGITS: dict[str, Any] = {"classes": 10, "channels": 1, "size": 8, "batch": 32, "test_batch": 250, "test_iter": 4, "crop": True,
                           "border": 1, "scale": 1 / 16, "mean_value": (4.88,), "std_value": (6.02,)}

DATASETS: dict[str, Dataset] = {
    # MNIST is neither augmented nor centred; its scale is Options.mnist_scale.
    "mnist": _dataset("mnist", mean=False, classes=10, channels=1, size=28, batch=64, train_size=60_000),
    "cifar10": _dataset("cifar10", classes=10, mean_value=(125.3, 123.0, 113.9), **_CIFAR),
    "cifar100": _dataset("cifar100", classes=100, mean_value=(129.3, 124.1, 112.4), **_CIFAR),
    "cifar100-zoo": _dataset("cifar100", classes=100, mean_value=(129.31, 124.11, 112.40), std_value=(68.21, 65.41, 70.41),
                             **{**_CIFAR, "batch": 64}),
    "digits": _dataset("digits", train_size=200, **_DIGITS),
    "digits-teacher": _dataset("digits", training="teacher", train_size=797, **_DIGITS),   # the same test set and means
}


# ------------------------------------------------------------------------------------------------- what papers bring along

@dataclass(frozen=True)
class Taps:
    """The blobs of a network that hints, branches, exits and losses are attached to, bottom up.

    modules    the end of every module: a residual module, or what a network is built of instead
    stages     the ends of its stages, between which images shrink and channels grow, as the next stage reads them
    preacts    what the last ReLU of each stage is given; () unless the network was written so that they can be read
    pooled     the features after the global pooling
    logits     the class scores
    stem       the blob below the first stage; "" where a network has none of its own
    """
    modules: tuple[str, ...]
    stages: tuple[str, ...]
    preacts: tuple[str, ...]
    pooled: str
    logits: str
    stem: str = ""


class Network(Protocol):
    """A network in words: frozen data that knows its title, such as "resnet26", and how it is written; nets/ has them by name."""

    @property
    def title(self) -> str: ...

    def write(self, net: caffe_pb2.NetParameter, bottom: str, classes: int, options: Options, *, prefix: str = "", begin: int = 0,
              preacts: bool = False) -> Taps:
        """Add its layers to a net, from the blob `bottom` to class scores.

        prefix     of the names of all its layers and blobs
        begin      the first stage that is written, counted from 0: above 0 `bottom` takes the place of the end of the stage below
        preacts    whether what the stages' last ReLUs are given can be tapped; the values are the same
        """
        ...


class Method(Protocol):
    """How an experiment is trained; methods/method.py has it."""

    @property
    def name(self) -> str: ...
    @property
    def is_shared(self) -> bool: ...


def option(default: Any, *allowed: object, paper: str = "", meaning: str = "",
           matters: Callable[[Experiment], bool] = lambda x: True) -> Any:
    """A field of Options or of a subclass.

    allowed    its possible values; none where its type says enough
    paper      what the paper says about it, and meaning: what the values mean; for the report, which lists options that have these
    matters    whether it can change an experiment's results
    """
    return field(default=default, metadata={"allowed": allowed, "paper": paper, "meaning": meaning, "matters": matters})


@dataclass(frozen=True)
class Options:
    """What papers leave open about data and nets.  A paper's module adds its own in a subclass, with defaults and what the paper says.

    Every record holds all of them; one that came later has its default in the records from before.
    """
    shortcut: str = option("A", "A", "B")          # A: parameter-free (He et al.'s CIFAR nets); B: 1x1 projection (most Caffe ports)
    mirror: bool = option(True, False, True)       # where the data set allows it
    mean: str = option("file", "file", "values", "none")       # per pixel; per channel; none.  A data set without means has none
    order: str = option("stored", "stored", "shuffled")         # of the training records: the same in each epoch, or drawn for each
    last_batch: str = option("wrapped", "wrapped", "kept")     # of an epoch: goes on with the next one, or has what is left
    std: str = option("none", "none", "values")    # per channel, by which images are divided
    padding: str = option("zeros", "zeros", "reflect")         # around the training images of a padded data set
    bn_fraction: float = option(0.999)             # BatchNorm's moving_average_fraction at scale 1
    mnist_scale: float = option(1 / 255)           # what an MNIST pixel is multiplied by
    teacher_statistics: str = option("stored", "stored", "batch")      # of BatchNorm in a teacher while it teaches

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata.get("allowed"):
                _one_of("options", each.name, getattr(self, each.name), each.metadata["allowed"])
        if not 0 < self.bn_fraction < 1:
            raise UserError(f"options: bn_fraction is {self.bn_fraction}; it must lie between 0 and 1")

    def as_dict(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def open_points(cls) -> list[Field[Any]]:
        """The options that a paper was found to leave open; their metadata say what it says and what the values mean."""
        return [each for each in fields(cls) if each.metadata.get("paper")]


def counted(default: int | tuple[int, ...], about: str) -> Any:
    """A field of a Schedule that counts iterations; `about` says of what, for the report."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Schedule:
    """Iterations and rates.  `steps` are the fractions of a stage after which its rate falls to a tenth.

    A paper's module adds those of its own stages in a subclass.
    """
    iterations: int = counted(64_000, "plain training and the last stage")
    teacher_iterations: int = counted(64_000, "teacher")
    steps: tuple[float, ...] = (0.5, 0.75)
    base_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def counts(self) -> dict[str, Any]:
        """All that counts iterations, by name: numbers, or tuples of numbers."""
        return {each.name: getattr(self, each.name) for each in fields(self) if "about" in each.metadata}

    def sentence(self) -> str:
        """The counts in words."""
        def shown(count: Any) -> str:
            return " + ".join(map(shown, count)) if isinstance(count, tuple) else f"{count:,}"
        return ", ".join(f"{each.metadata['about']} {shown(getattr(self, each.name))}" for each in fields(self) if "about" in each.metadata)

    def scaled(self, scale: float) -> Self:
        """Every stage shortened (or lengthened) in proportion, at least one iteration each; rates and their steps keep their shape."""
        def times(count: Any) -> Any:
            return tuple(map(times, count)) if isinstance(count, tuple) else max(1, round(count * scale))
        return replace(self, **{name: times(count) for name, count in self.counts().items()})


# --------------------------------------------------------------------------------------------------------------- experiments

@dataclass(frozen=True)
class Trained:
    """A trained teacher from elsewhere: its weights, and its net as a prototxt or, where there is none, as a known network."""
    caffemodel: Path
    prototxt: Path | None = None
    network: Network | None = None


@dataclass(frozen=True)
class Experiment:
    """One net of one row of a table.  `schedule` is the full one; `scale` shortens it.

    The teacher is an experiment, too: the one whose student teaches in this one.  So any method's result can be a teacher, and can have had
    one.
    """
    method: Method
    dataset: Dataset
    student: Network
    teacher: Experiment | Trained | None = None
    net: int = 1                                           # 1, 2, 3: which of the students that differ in their seed
    table: str = "table"
    row: str = ""                                          # its name in the table, where that is not the method's
    schedule: Schedule = field(default_factory=Schedule)
    options: Options = field(default_factory=Options)
    tau: float = 3.0
    lambda_: float = 5.0
    lambda_schedule: str = "fixed"                         # over Stage 2: fixed, or to lambda_end: linear, or by steps where the rate drops
    lambda_end: float = 1.0
    test_loss: bool = False                                # Stage 2 is also tested under its own loss, for which TEST holds the teacher
    regressor: bool = False                                # a convolution on a guided layer that is narrower than its hint
    hint_pairs: tuple[tuple[str, str], ...] = ()           # (hint, guided) layers by hand, bottom up; () for the paper's
    seed: int = 1                                          # of the run
    table_seed: int = 0                                    # of the table, so that two tables' runs of one method differ
    repeat: int = 1                                        # which complete replication
    scale: float = 1.0
    generation: int = 0                                    # 0: what is measured; 1: its teacher; 2: the teacher's teacher ...
    pupil: Network | None = None                           # of a teacher: the network that it is to teach

    def __post_init__(self) -> None:
        _one_of(self.table, "lambda_schedule", self.lambda_schedule, ("fixed", "linear", "step"))
        other = self.teacher.dataset if isinstance(self.teacher, Experiment) else self.dataset
        if (other.classes, other.shape) != (self.dataset.classes, self.dataset.shape):
            raise UserError(f"{self.table}: the teacher's data set {other.name} has other classes or images than {self.dataset.name}")
        if self.scale <= 0:
            raise UserError(f"{self.table}: scale is {self.scale}; it must be above 0")
        if self.net < 1:
            raise UserError(f"{self.table}: net is {self.net}; nets are counted from 1")
        assert self.net_seed                               # raises where seed, repeat or net are out of range

    @property
    def name(self) -> str:
        """Of the row: results lie under it."""
        return self.row or self.method.name

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
    def scaled_options(self) -> Options:
        """The options that nets are written with."""
        return replace(self.options, bn_fraction=self.bn_fraction)

    @property
    def shared_seed(self) -> int:
        """Of what the nets and methods of a table share, such as Stage 1, so that they stay paired."""
        return role_seed("stage1", self.seed, self.table_seed, self.repeat, self.generation)

    @property
    def net_seed(self) -> int:
        """Of what is a net's own: plain training, Stage 2, SL-ResNet's pretraining; the same for every method.  Tables share teachers."""
        if self.generation:
            return role_seed("teacher", self.seed, repeat=self.repeat, net=self.generation - 1)
        return role_seed("net", self.seed, self.table_seed, self.repeat, self.net)
