"""A trained net with several classifiers: how good each is, what it costs, and what it saves to leave at the first one that is sure.

Every classifier is looked at as a net of its own, cut out of the whole: what it needs and no more, which is also what is exported.  What
costs are: multiplications with an addition in convolutions and fully connected layers, and measured time, each for one image.
"""
from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from hintkd.backend import caffe_pb2, count_records, load_caffe, read_net, read_weights, user_errors, write_text, write_weights
from hintkd.errors import UserError
from hintkd.files import new_folder, write_file
from hintkd.metrics import Labels, Scores, top_k
from hintkd.nets.surgery import cut

CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ROUNDS = 25                                 # in which every net is timed once; the fastest counts, which other processes disturbed least
PAUSE = 0.003                               # seconds before a pass: who has waited is not interrupted so soon
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Cost:
    """Of one image: multiplications with an addition, and milliseconds."""
    multiply_adds: float
    ms: float


@dataclass(frozen=True)
class Exit:
    """A classifier: the blob of its scores, its accuracy (0 to 1), what it costs alone, and together with all that are asked before it."""
    name: str
    scores: str
    accuracy: float
    alone: Cost
    in_turn: Cost


@dataclass(frozen=True)
class Early:
    """Every image leaves at the first exit that gives its class a probability of `confidence` at least, or at the last one.

    shares    of the images, by exit
    """
    confidence: float
    accuracy: float
    cost: Cost
    shares: dict[str, float]


@dataclass(frozen=True)
class Found:
    """All that is known of a net's exits; `ensemble` is the mean of them, where the net has one.

    shape     of an image: channels, height, width
    images    of the test set; batch: how many were timed at once, on so many threads
    """
    weights: str
    shape: tuple[int, ...]
    images: int
    batch: int
    threads: int
    exits: tuple[Exit, ...]
    ensemble: Exit | None
    early: tuple[Early, ...]


@dataclass(frozen=True)
class Classifier:
    """One that a net's Accuracy looks at: the blob of its scores, and whether that is a mean of others."""
    scores: str
    is_mean: bool


class Trained:
    """A net and its weights, as `hintkd reproduce` leaves them; `classifiers` are in the order in which they are asked."""

    def __init__(self, weights: Path, prototxt: Path | None = None):
        """Raises UserError where one of the files is missing or is none, and where the net has a single classifier."""
        self.weights, self.prototxt = weights, prototxt or weights.with_suffix(".prototxt")
        for file in (self.weights, self.prototxt):
            if not file.is_file():
                raise UserError(f"{file}: there is no such file; name a .caffemodel that lies beside its net, as in runs/weights")
        self.values = dict(read_weights(self.weights))
        self.layers = [layer for layer in read_net(self.prototxt).layer
                       if not layer.include or any(rule.phase == caffe_pb2.TEST for rule in layer.include)]
        self.classifiers, self.labels = self._classifiers()
        self.data = next((layer for layer in self.layers if layer.type == "Data"), caffe_pb2.LayerParameter())
        if not self.data.top:
            raise UserError(f"{self.prototxt}: the net has no Data layer to be tested with")
        if sum(not each.is_mean for each in self.classifiers) < 2:
            raise UserError(f"{self.prototxt}: the net has one classifier and no other exit; nets of byot and deep-supervision have some")

    def _classifiers(self) -> tuple[list[Classifier], str]:
        """Those that an Accuracy compares with the labels, bottom up, and the labels' blob.

        The first Accuracy of a net is that of its own end, so its classifier comes last.
        """
        makers = {top: layer.type for layer in self.layers for top in layer.top if top not in layer.bottom}
        tested = [layer for layer in self.layers if layer.type == "Accuracy"]
        found = [Classifier(layer.bottom[0], makers.get(layer.bottom[0]) != "InnerProduct") for layer in tested]
        return [*found[1:], *found[:1]], tested[0].bottom[1] if tested else ""

    def cut(self, scores: Sequence[str], shape: Sequence[int]) -> caffe_pb2.NetParameter:
        """What these scores need, from an input of `shape` on."""
        net = caffe_pb2.NetParameter(name=self.prototxt.stem)
        net.layer.add(name="data", type="Input", top=self.data.top[:1], input_param={"shape": [{"dim": shape}]})
        net.layer.extend(layer for layer in cut(self.layers, scores) if layer.type != "Data")
        return net


# ----------------------------------------------------------------------------------------------------------------- measuring

def exits_of(trained: Trained, confidences: Sequence[float] = CONFIDENCES, batch: int = 1, threads: int = 1) -> Found:
    """Test all classifiers on the net's own test set, and time them with `batch` images at once on the CPU.

    Raises UserError for data that are missing.
    """
    caffe = load_caffe("torchcaffe")
    caffe.set_mode_cpu()
    caffe.set_threads(threads)
    scores, labels, shape = tested(caffe, trained)
    ordered = [each.scores for each in trained.classifiers if not each.is_mean]
    turns = [tuple(ordered[:k]) for k in range(1, len(ordered) + 1)]
    cuts = {names: trained.cut(names, (batch, *shape)) for names in [*turns, *((each.scores,) for each in trained.classifiers)]}
    nets = {names: built(caffe, param, trained) for names, param in cuts.items()}
    work = {names: multiply_adds(param, nets[names]) for names, param in cuts.items()}
    cost = {names: Cost(work[names], 1000 * seconds / batch) for names, seconds in timed(nets).items()}

    def found(title: str, name: str, in_turn: tuple[str, ...]) -> Exit:
        return Exit(title, name, top_k(scores[name], labels, 1), cost[name,], cost[in_turn])
    exits = tuple(found(f"{k}/{len(turns)}", names[-1], names) for k, names in enumerate(turns, start=1))
    mean = next((found(ENSEMBLE, each.scores, (each.scores,)) for each in trained.classifiers if each.is_mean), None)
    early = tuple(leaving(confidence, [scores[name] for name in ordered], labels, exits) for confidence in confidences)
    return Found(str(trained.weights), shape, len(labels), batch, threads, exits, mean, early)


def tested(caffe: Any, trained: Trained) -> tuple[dict[str, Scores], Labels, tuple[int, ...]]:
    """The scores of every classifier on the whole test set, the labels, and the shape of an image."""
    source, size = trained.data.data_param.source, trained.data.data_param.batch_size
    if not Path(source).exists():
        raise UserError(f"{source} is missing: give the command in the folder where the net was trained, or prepare the data set first")
    count = count_records(source)
    with user_errors():
        net = caffe.Net(str(trained.prototxt), str(trained.weights), caffe.TEST)
    kept: dict[str, list[np.ndarray]] = {each.scores: [] for each in trained.classifiers}
    labels: list[np.ndarray] = []
    for _ in range(-(-count // size)):
        net.forward()
        for name, batches in kept.items():
            batches.append(np.array(net.blobs[name].data, np.float64).reshape(size, -1))
        labels.append(np.array(net.blobs[trained.labels].data).reshape(-1).astype(int))
    return ({name: np.concatenate(batches)[:count] for name, batches in kept.items()}, np.concatenate(labels)[:count],
            tuple(net.blobs[trained.data.top[0]].data.shape[1:]))


def built(caffe: Any, param: caffe_pb2.NetParameter, trained: Trained) -> Any:
    """The net with its part of the weights."""
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file, user_errors():
        file.write(write_text(param))
        file.flush()
        return caffe.Net(file.name, str(trained.weights), caffe.TEST)


def multiply_adds(param: caffe_pb2.NetParameter, net: Any) -> int:
    """Of one image, in convolutions and fully connected layers; what is done pixel by pixel is not counted."""
    return sum(net.params[layer.name][0].data.size * prod(net.blobs[layer.top[0]].data.shape[2:]) for layer in param.layer
               if layer.type in ("Convolution", "InnerProduct"))


def timed(nets: Mapping[Any, Any], rounds: int = ROUNDS) -> dict[Any, float]:
    """Seconds of a pass of each net, the fastest of rounds in which all take turns, behind one that is not counted."""
    taken: dict[Any, list[float]] = {name: [] for name in nets}
    for _ in range(1 + rounds):
        for name, net in nets.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            net.forward()
            taken[name].append(time.perf_counter() - start)
    return {name: min(seconds[1:]) for name, seconds in taken.items()}


def leaving(confidence: float, scores: Sequence[Scores], labels: Labels, exits: Sequence[Exit]) -> Early:
    """What becomes of the images when each leaves at the first exit that is sure."""
    sure = np.array([sureness(each) >= confidence for each in scores[:-1]] + [np.ones(len(labels), bool)])
    at = sure.argmax(axis=0)                                 # the first
    said = np.array([each.argmax(axis=1) for each in scores])[at, np.arange(len(labels))]
    shares = [float(np.mean(at == index)) for index in range(len(exits))]
    spent = Cost(*(sum(share * cost for share, cost in zip(shares, costs, strict=True))
                   for costs in ([each.in_turn.multiply_adds for each in exits], [each.in_turn.ms for each in exits])))
    return Early(confidence, float(np.mean(said == labels)), spent, {each.name: share for each, share in zip(exits, shares, strict=True)})


def sureness(scores: Scores) -> np.ndarray:
    """The probability of each image's most probable class."""
    return np.asarray(1 / np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1))


# ------------------------------------------------------------------------------------------------------- exporting and showing

def export(trained: Trained, found: Found, folder: Path) -> list[Path]:
    """Write every exit as a net of its own into a folder, exit<k>.prototxt and exit<k>.caffemodel, from one image to probabilities."""
    files = []
    with new_folder(folder):
        for number, each in enumerate(found.exits, start=1):
            net = trained.cut([each.scores], (1, *found.shape))
            net.layer.add(name="prob", type="Softmax", bottom=[each.scores], top=["prob"])
            files += [folder / f"exit{number}.prototxt", folder / f"exit{number}.caffemodel"]
            write_file(files[-2], write_text(net))
            write_weights(files[-1], [(layer.name, trained.values[layer.name]) for layer in net.layer if layer.name in trained.values])
    return files


def as_data(found: Found) -> dict[str, Any]:
    """For other programs."""
    return asdict(found)


def show(console: Console, found: Found) -> None:
    """For people."""
    def cells(cost: Cost) -> tuple[str, str]:
        return f"{cost.multiply_adds / 1e6:,.2f}", f"{cost.ms:.3f}"

    def grid(*heads: str) -> Grid:
        return Grid(heads[0], *(Column(head, justify="right") for head in heads[1:]), box=None, pad_edge=False)

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, soft_wrap=True)
    shown = grid("exit", "accuracy, %", "10^6", "ms", "in turn, 10^6", "ms")
    for each in (*found.exits, *([found.ensemble] if found.ensemble else [])):
        shown.add_row(each.name, f"{100 * each.accuracy:.2f}", *cells(each.alone), *cells(each.in_turn))
    console.print(shown)
    say(f"10^6: multiply-adds of one image; ms: its time, {found.batch} at once on {found.threads} thread{'s' * (found.threads > 1)}; "
        f"in turn: with every exit before it\n")
    shown = grid("sure from", "accuracy, %", "10^6", "ms", *(f"{each.name}, %" for each in found.exits))
    for early in found.early:
        shown.add_row(f"{early.confidence:g}", f"{100 * early.accuracy:.2f}", *cells(early.cost),
                      *(f"{100 * share:.1f}" for share in early.shares.values()))
    console.print(shown)
    say(f"each of {found.images:,} test images leaves at the first exit that gives a class so much probability, or at the last; "
        "on the right the share that leaves at each")
