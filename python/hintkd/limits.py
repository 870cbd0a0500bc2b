"""Which numbers make sense, by the name of a table's field, and the sentence for those that do not.

A table's content is looked at as it was read, before a schema turns `yes` into 1 and "3" into 3; flags that change a table come here with
it, other flags one by one.  Which fields there are, and what they mean, is the schema's business.
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hintkd.errors import UserError
from hintkd.seeds import NETS, REPEATS, SEEDS, TABLE_SEEDS


@dataclass(frozen=True)
class Range:
    """The numbers from low to high; `above` and `below` leave the ends out."""
    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.above and self.below:
            return f"{kind} between {self.low:,} and {self.high:,}, which are left out"
        if self.below:
            return f"{kind} from {self.low:,} to below {self.high:,}"
        return f"{kind} above {self.low:,} and up to {self.high:,}" if self.above else f"{kind} from {self.low:,} to {self.high:,}"

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return (value > self.low if self.above else value >= self.low) and (value < self.high if self.below else value <= self.high)


COUNT, POSITIVE, RATE = Range(1, 10_000_000, whole=True), Range(0, 1_000, above=True), Range(0, 1_000_000, above=True)
NUMBERS = {
    # networks and methods
    "depth": Range(1, 1_202, whole=True), "widths": Range(1, 4_096, whole=True), "width": Range(1, 4_096, whole=True),
    "widening": Range(1, 4_096, whole=True), "cardinality": Range(1, 1_024, whole=True), "alpha": Range(0, 1),
    "sections": Range(2, 100, whole=True), "tau": POSITIVE, "lambda": Range(0, 1_000_000),
    "lambda_": Range(0, 1_000_000), "lambda_end": Range(0, 1_000_000), "nets": Range(1, NETS - 1, whole=True),
    "seed": Range(0, TABLE_SEEDS - 1, whole=True), "regressor_std": POSITIVE, "mnist_scale": POSITIVE,
    "bn_fraction": Range(0, 1, above=True, below=True), "crd_negatives": COUNT, "crd_width": Range(1, 4_096, whole=True),
    # schedules; whatever is called ..._iterations is a COUNT
    "iterations": COUNT, "steps": Range(0, 1, above=True, below=True), "base_lr": RATE, "hint_lr": RATE,
    "momentum": Range(0, 1, below=True), "weight_decay": Range(0, 1),
    # data sets
    "classes": Range(1, 1_000_000, whole=True), "channels": Range(1, 1_024, whole=True), "size": Range(1, 4_096, whole=True),
    "batch": Range(1, 65_536, whole=True), "test_batch": Range(1, 65_536, whole=True), "test_iter": COUNT,
    "train_size": Range(0, 1_000_000_000, whole=True), "scale": POSITIVE, "mean_value": Range(-1_000, 1_000),
    "std_value": Range(0, 1_000, above=True), "border": Range(0, 1_024, whole=True),
    "published": Range(0, 100), "average": Range(0, 100),
    # figures
    "axis": Range(-1_000_000, 1_000_000), "window": Range(0, 10_000_000, whole=True),
}
ONE_OF: dict[str, tuple[object, ...]] = {"label_tau": (1, "tau"), "regressor_kernel": (1, 3)}
SWITCHES = ("crop", "mirror", "regressor", "tau_squared", "deepest_alpha", "detached", "adapted")     # on or off, and no number
TEXTS = ("about", "notes", "departures", "text")             # text that may have several lines
RISING = ("steps", "axis", "window")                         # lists whose values rise

SCALE, SEED, SHUFFLE = Range(0.0001, 100), Range(0, SEEDS - 1, whole=True), Range(0, 2**32 - 1, whole=True)     # of --scale and --seed
REPEAT, NET, JOBS, TOGETHER, BATCH = (Range(1, high, whole=True) for high in (REPEATS, NETS - 1, 256, 64, 4_096))


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


def require(what: str, value: object, allowed: Range) -> None:
    """Raise UserError naming `what`, a flag as a rule, unless the value is in the range."""
    if value not in allowed:
        raise UserError(f"{what} {shown(value)}: give {allowed}")


def require_all(content: Any, where: str) -> None:
    """Look at all of a table's content.  Raises UserError naming `where` and the first field with a value that makes no sense."""
    try:
        _require(content, where, "", set())
    except RecursionError:
        raise UserError(f"{where}: lists within lists within lists; a table needs three of them") from None


def _require(value: Any, where: str, place: str, seen: set[int]) -> None:
    if not isinstance(value, (dict, list, tuple)):
        why = _wrong(_name(place), value)
        if why:
            raise UserError(f"{where}: {place}: {shown(value)} {why}" if place else f"{where}: {shown(value)} {why}")
        return
    if id(value) in seen:                                    # what is there twice is looked at once
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where}: {place or 'the table'} has the field {shown(key)}; names of fields are words")
            _require(inner, where, f"{place}.{shown(key)}".lstrip("."), seen)
        return
    for index, inner in enumerate(value):
        _require(inner, where, f"{place}[{index}]", seen)
    if place.endswith(RISING) and all(isinstance(each, (int, float)) for each in value) and any(b <= a for a, b in pairwise(value)):
        raise UserError(f"{where}: {place}: {shown(value)} does not rise; give the values in order, each once")


def _name(place: str) -> str:
    """The field's name: iterations of rows[2].schedule.iterations, steps of schedule.steps[1]."""
    return place.rsplit(".", 1)[-1].split("[")[0]


def _wrong(name: str, value: object) -> str:
    """What is wrong with a field's value; "" if nothing is seen."""
    allowed = COUNT if name.endswith("_iterations") else NUMBERS.get(name)
    if value is None or isinstance(value, Path):
        return ""
    if name in SWITCHES:
        return "" if isinstance(value, bool) else "is neither true nor false"
    if name in ONE_OF:
        known = any(value == each and type(value) is type(each) for each in ONE_OF[name])
        return "" if known else f"will not do; choose one of {', '.join(map(str, ONE_OF[name]))}"
    if allowed is not None:
        return "" if value in allowed else f"will not do; give {allowed}"
    if isinstance(value, (int, float)):
        return "" if abs(value) <= 1e15 else "is no number that means anything here"
    if not isinstance(value, str):
        return "is neither text nor a number"
    odd = r"[\0-\x08\x0b-\x1f\x7f]" if name in TEXTS else r"[\0-\x1f\x7f]"
    return "holds characters that cannot be printed on a line" if re.search(odd, value) else ""


def shown(value: object) -> str:
    """A value for a sentence, not at any length."""
    if isinstance(value, int) and abs(value) > 1e60:
        return f"(a number of {value.bit_length():,} bits)"
    text = value if isinstance(value, str) else repr(value)
    text = repr(text)[1:-1] if not text.isprintable() else text
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"
