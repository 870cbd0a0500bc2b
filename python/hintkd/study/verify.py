"""Whether what is committed is true: every kept net is tested again on the data that are prepared here, and compared with its record.

Also checked are the digests of the weights and, with every record read, the fingerprint of the data.  Nothing is trained, and nothing
that is kept is changed.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column
from rich.table import Table as Grid

from hintkd.backend import read_net as read_prototxt
from hintkd.errors import StageFailed, UserError
from hintkd.files import read_sealed, write_file, write_json
from hintkd.metrics import metric_of, with_counted
from hintkd.run.committed import WEIGHTS, Net, read_nets
from hintkd.run.executor import run_folders
from hintkd.run.folders import predictions_of
from hintkd.run.keys import DATA_PATHS, data_fingerprint, flatten
from hintkd.run.progress import counted, warn
from hintkd.study import probabilities
from hintkd.study.record import predictions
from hintkd.study.reproduce import Resources

LOOSE_STEPS = 5                             # thousandths between the class probabilities of one net on two machines
TOLERANCE = 0.01                            # points between the accuracies of one net on two machines: an image in 10,000


@dataclass(frozen=True)
class Outcome:
    """What became of one net: its result here in percent, None if it was not tested, and what differs from its record, if anything."""
    net: Net
    value: float | None
    verdict: str
    differs: str = ""


def verify(console: Console, used: Resources, table: str | None = None) -> bool:
    """Test the kept nets, or those of one table, and print what was found; whether all is as recorded.

    Raises UserError if there are no such nets, and for data that are missing.
    """
    nets, damaged = read_nets(table)
    if not nets and not damaged:
        others = sorted({net.folder for net in read_nets()[0]})
        known = f"; there are those of {', '.join(others)}" if others else ": full schedules leave theirs there"
        raise UserError(f"{WEIGHTS} has no nets{f' of {table}' if table else ''}{known}")
    usable = sorted((net for net in nets if net.complaint is None), key=lambda net: -net.weights.stat().st_size)       # the longest first
    with console.status("reading the data"):
        findings = [*damaged.values(), *differing_data(usable)]
    outcomes = [Outcome(net, None, "not tested", net.complaint) for net in nets if net.complaint]
    with test_folders(usable, used) as folders, used.executor() as executor:
        futures: dict[Future[list[str]], tuple[Net, Path]] = {}
        for net, folder in zip(usable, folders, strict=True):
            interpreter = replace(used.interpreter, threads=net.content["provenance"]["threads"])
            futures[executor.submit(run_folders, [str(folder)], interpreter)] = net, folder
        for future in track(as_completed(futures), "testing", len(futures), console=console, transient=True,
                            disable=not console.is_terminal):
            outcomes.append(outcome(*futures[future], future))
    outcomes.sort(key=lambda each: each.net.record)
    console.print(overview(outcomes))
    findings += [f"{each.net.name}: {each.differs}" for each in outcomes if each.differs]
    for sentence in findings:
        warn(console, sentence, "differs")
    console.print(f"{sum(not each.differs for each in outcomes)} of {counted(len(nets), 'net')} as recorded", highlight=False)
    return not findings


def differing_data(nets: Sequence[Net]) -> list[str]:
    """A sentence for each data set here that is not what the nets were trained and tested with; all its records are read.

    Raises UserError for data that are missing.
    """
    here: dict[str, str] = {}
    found: dict[str, str] = {}
    for net in nets:
        recorded = set(net.content["provenance"]["data_fingerprint"].values())
        for path in data_of(net):
            if path not in here:
                here[path] = whole_fingerprint(path)
            if here[path] not in recorded:
                found.setdefault(path, f"{path} is not what {net.name} was trained and tested with: its fingerprint is {here[path]}, "
                                       f"those that were recorded are {', '.join(sorted(recorded))}")
    return list(found.values())


def data_of(net: Net) -> list[str]:
    """The LMDB and the mean file that a net is tested with."""
    return [value for name, value in flatten(read_prototxt(net.prototxt), "net") if name.rsplit(".", 1)[1] in DATA_PATHS]


def whole_fingerprint(path: str) -> str:
    """As run.keys.data_fingerprint, which believes a dataset.json: here of the records themselves.  Raises UserError if there are none."""
    from data_prep.check import read_dataset
    folder = Path(path).parent
    if not Path(path).exists():
        raise UserError(f"{path} is missing: prepare the data set first, with `hintkd prepare {folder.name}`")
    if not (folder / "dataset.json").is_file():
        return data_fingerprint(path)
    return f"{read_dataset(folder).fingerprint}/{Path(path).name}"


@contextmanager
def test_folders(nets: Sequence[Net], used: Resources) -> Iterator[list[Path]]:
    """Stage folders that test these nets, for as long as they are needed."""
    root = Path("runs") / f"verify-{os.getpid()}"
    try:
        folders = [root / str(index) for index in range(len(nets))]
        for net, folder in zip(nets, folders, strict=True):
            write_test(folder, net, used)
        yield folders
    finally:
        shutil.rmtree(root, ignore_errors=True)


def write_test(folder: Path, net: Net, used: Resources) -> None:
    """A stage folder in which the stage process tests a net: its outputs in result.json, its class scores in predictions.npz."""
    numerics, content = used.numerics, net.content
    write_file(folder / "net.prototxt", net.prototxt.read_text())
    write_json(folder / "stage.json", {
        "program": "test", "title": net.name, "key": net.keys[-1], "group": [net.keys[-1]], "backend": numerics.backend,
        "device": numerics.device, "device_id": used.device_id, "threads": content["provenance"]["threads"], "precision": "fp32",
        "weights": str(net.weights), "test_iter": content["weights"]["test_iter"],
        "predictions": predictions_of(read_prototxt(net.prototxt))})


def outcome(net: Net, folder: Path, tested: Future[list[str]]) -> Outcome:
    """Compare a net's test with its record: equal where the same versions ran on the same kind of processor, else within TOLERANCE."""
    error = tested.exception()
    if isinstance(error, StageFailed):
        return Outcome(net, None, "not tested", str(error).partition(" (see ")[0])       # its log does not stay
    if error:
        raise error
    result, last, name = read_sealed(folder / "result.json"), net.content["last"], net.content["metric"]
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        kept = dict(arrays)
    found, value = with_counted(result["outputs"], name, lambda: predictions(kept)), metric_of(name).value
    exactly, differs = same_numerics(net.content["provenance"], result["environment"]), ""
    if exactly and found != last:
        differs = f"its outputs are {found}, {last} are recorded, on the same engine and kind of processor"
    elif round(abs(value(found[name]) - value(last[name])), 6) > TOLERANCE:
        differs = f"its {name} differs by more than {TOLERANCE} points"
    else:
        differs = differing_probabilities(net, folder, kept, 0 if exactly else LOOSE_STEPS)
    return Outcome(net, value(found[name]), "differs" if differs else "the same" if exactly else f"within {TOLERANCE} points", differs)


def differing_probabilities(net: Net, folder: Path, tested: Mapping[str, np.ndarray], steps: int) -> str:
    """What is wrong with the kept class probabilities of a net, of which ensembles are made, if they are off by more than `steps`."""
    if not net.probabilities.is_file():
        return f"{net.probabilities} is missing"
    probabilities.keep(folder / "probabilities.npz", tested["scores"], tested["labels"])
    (kept, labels), (here, true) = probabilities.read(net.probabilities), probabilities.read(folder / "probabilities.npz")
    if kept.shape != here.shape or (labels != true).any() or np.rint(probabilities.STEPS * abs(kept - here)).max() > steps:
        return f"{net.probabilities} does not hold its class probabilities"
    return ""


def same_numerics(recorded: dict[str, Any], here: dict[str, str]) -> bool:
    """Whether the same bits are to be expected."""
    return all(recorded.get(name) == value for name, value in here.items() if name != "python")


def overview(outcomes: Sequence[Outcome]) -> Grid:
    """The nets, what was recorded of them and what was found, for people."""
    grid = Grid("net", Column("recorded, %", justify="right"), Column("here, %", justify="right"), "", box=None, pad_edge=False)
    for each in outcomes:
        name = each.net.content["metric"]
        here = "" if each.value is None else f"{each.value:.2f}"
        grid.add_row(each.net.name, f"{metric_of(name).value(each.net.content['last'][name]):.2f}", here, each.verdict)
    return grid
