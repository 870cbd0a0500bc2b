"""What `hintkd list` shows: tables, methods, data sets, networks and options, a line each."""
from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from hintkd.errors import UserError
from hintkd.experiment import DATASETS, SCHEDULES, Options, ResNet
from hintkd.methods.choices import OPEN_OPTIONS
from hintkd.methods.hint_2019 import METHODS
from hintkd.study.table import find_table, near, table_names

Lines = Iterator[tuple[str, str]]


def tables() -> Lines:
    """For `hintkd reproduce`."""
    for name in table_names():
        table = find_table(name)
        yield name, table.about or table.title


def methods() -> Lines:
    """For the rows of a table, and for `hintkd generate --method`."""
    for name, method in METHODS.items():
        yield name, first_sentence(method.__doc__)


def datasets() -> Lines:
    """For `hintkd prepare`."""
    for name in SCHEDULES:
        data = DATASETS[name]
        yield name, (f"{data.classes} classes, {data.channels}x{data.size}x{data.size}, {data.train_size:,} training and "
                     f"{data.test_size:,} test images, {data.batch} in a batch")


def networks() -> Lines:
    """For a table's teacher and student."""
    yield "resnet", first_sentence(ResNet.__doc__)


def options() -> Lines:
    """What papers leave open; flags of `hintkd reproduce` and `hintkd generate`."""
    default = Options().as_dict()
    for option in OPEN_OPTIONS:
        value = default[option.name]
        yield option.name, f"{option.meaning} (default {f'{value:.6g}' if isinstance(value, float) else value})"


LISTS = {"tables": tables, "methods": methods, "datasets": datasets, "networks": networks, "options": options}


def show(console: Console, what: str | None = None) -> None:
    """Print one of LISTS, or all.  Raises UserError on another."""
    if what is not None and what not in LISTS:
        raise UserError(f"there is no list of {what!r}; {near(what, list(LISTS))}")
    for name in LISTS if what is None else [what]:
        console.print(Text(f"{name}: {first_sentence(LISTS[name].__doc__)}", style="bold"), soft_wrap=True)
        entries = list(LISTS[name]())
        width = max(len(entry) for entry, _ in entries)
        for entry, line in entries:
            console.print(Text(f"  {entry:<{width}}  {line}"), soft_wrap=True)


def first_sentence(text: str | None) -> str:
    """Of a docstring, on one line."""
    return " ".join((text or "").split("\n\n")[0].split())
