"""Nets that need not be trained again: the records in results/measured, and the weights in results/weights that they name.

A record of a full schedule holds the keys of its stages and the digest of its last stage's weights.  So a fresh copy of the repository
knows these stages as finished: the last by its weights, those before it by what the record says of them, which is enough as long as
nothing else starts from them.  Writing records is the business of study/record.py.
"""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hintkd.errors import Damaged
from hintkd.files import fault, is_whole, read_sealed
from hintkd.run.keys import Numerics

MEASURED, WEIGHTS = Path("results/measured"), Path("results/weights")        # relative to the workspace, which is the current directory


@dataclass(frozen=True)
class Net:
    """A record whose weights are kept.

    record     its file
    weights    the caffemodel
    digests    of the caffemodel and of the prototxt in which it is tested, as recorded
    keys       of its stages; the weights are the last one's
    content    of the record
    """
    record: Path
    weights: Path
    digests: tuple[str, str]
    keys: tuple[str, ...]
    content: dict[str, Any]

    @property
    def folder(self) -> str:
        """The folder of results/measured where the record lies: the table, and what was changed in it."""
        return folder_of(self.record)

    @property
    def name(self) -> str:
        """Table, method and net, as its files are called."""
        return str(self.record.relative_to(MEASURED).with_suffix(""))

    @property
    def prototxt(self) -> Path:
        return self.weights.with_suffix(".prototxt")

    @property
    def probabilities(self) -> Path:
        """What it says of each image of the test set."""
        return self.record.with_suffix(".npz")

    @cached_property
    def complaint(self) -> str | None:
        """Why its weights cannot be used, as a phrase; None if they and their prototxt are those of the record."""
        for file, digest in zip((self.weights, self.prototxt), self.digests, strict=True):
            if not is_whole(file, digest):
                return f"{file}, which {self.record} names, {fault(file)}"
        return None


@dataclass(frozen=True)
class Recorded:
    """A stage as a record tells of it.

    stage            its part of the record
    numbers          all that the record's net was tested for
    provenance       of the record
    weights          its weights out, None where only what was measured is kept
    probabilities    of the record's net, its last stage, on the test set
    """
    stage: dict[str, Any]
    numbers: dict[str, float]
    provenance: dict[str, Any]
    weights: Path | None
    probabilities: Path


class Committed:
    """The kept nets of a workspace, and their stages by key; a record that cannot be read counts as none.

    number    what a table wants to know of its nets: a record that does not say it spares no training
    """

    def __init__(self, number: str = "accuracy") -> None:
        self.nets, self._damaged = read_nets()
        self._by_key: dict[str, list[Net]] = {}
        for net in [net for net in self.nets if number in net.content["last"]]:
            for key in net.keys:
                self._by_key.setdefault(key, []).append(net)

    def find(self, key: str) -> Recorded | None:
        """The stage of this key, with its weights if some net has them; None if no net with usable weights came through it."""
        found = [net for net in self._by_key.get(key, []) if net.complaint is None]
        if not found:
            return None
        net = next((net for net in found if net.keys[-1] == key), found[0])
        return Recorded(net.content["stages"][net.keys.index(key)], net.content["last"], net.content["provenance"],
                        net.weights if net.keys[-1] == key else None, net.probabilities)

    def remarks(self, folder: str, numerics: Numerics, known: Collection[str], missing: Collection[str]) -> list[str]:
        """What there is to say of nets that do not spare a plan its work, a sentence each.

        folder            of results/measured, for the plan's own nets
        known, missing    the keys of all stages of the plan, and of those that are to be run
        """
        wrong = [net.complaint for net in self.nets if net.keys[-1] in missing and net.complaint]
        wrong += [damage for record, damage in self._damaged.items() if missing and folder_of(record) == folder]
        wrong = [f"{damage}: the net counts as not trained" for damage in wrong]
        nets = [net for net in self.nets if net.folder == folder]
        if nets and missing and not any(net.keys[-1] in known for net in nets):
            provenance = nets[0].content["provenance"]
            other = [f"{part} {provenance.get(part)}" for part, value in numerics.parts().items() if provenance.get(part) != value]
            how = f"with {', '.join(other)}" if other else "from other data or prototxts, or with other layers"
            wrong.append(f"the nets of {folder} in {WEIGHTS} are not the ones asked for: they were trained {how}")
        return wrong


def folder_of(record: Path) -> str:
    """The folder of results/measured in which a record lies."""
    return record.relative_to(MEASURED).parts[0]


def read_nets(folder: str | None = None) -> tuple[list[Net], dict[Path, str]]:
    """Every net whose weights are kept, or those of one folder of results/measured, and what is wrong with records that are damaged."""
    nets, damaged = [], {}
    for record in sorted(MEASURED.glob("*/**/net*.json")):
        if folder in (None, folder_of(record)):
            try:
                net = read_net(record)
            except Damaged as damage:
                damaged[record] = str(damage)
            else:
                nets += [net] if net else []
    return nets, damaged


def read_net(record: Path) -> Net | None:
    """The net of a record, None if its weights are not kept.  Raises Damaged if the file is."""
    content = read_sealed(record, "last", "stages", "provenance")
    weights = content.get("weights")
    try:
        keys = tuple(stage["key"] for stage in content["stages"])
        return Net(record, Path(weights["file"]), (weights["sha256"], weights["prototxt_sha256"]), keys, content) if weights else None
    except (KeyError, TypeError):
        raise Damaged(f"{record} {fault(record)}") from None
