"""What `hintkd list` shows: tables, demos, methods, data sets, networks and options, a line each."""
from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from hintkd.errors import UserError
from hintkd.experiment import DATASETS
from hintkd.methods.papers import PAPERS, paper
from hintkd.nets.networks import NETWORKS
from hintkd.study.fields import near
from hintkd.study.names import DEMO, demo_names
from hintkd.study.table import find_table, table_names

Lines = Iterator[tuple[str, str]]


def tables() -> Lines:
    """For `hintkd reproduce`."""
    for name in table_names():
        table = find_table(name)
        yield name, table.about or table.title


def demos() -> Lines:
    """For `hintkd demo`; without a name it is the first paper's, table demo."""
    for name in demo_names():
        table = find_table(f"{DEMO}-{name}")
        yield name, table.about or table.title


def methods() -> Lines:
    """For the rows of a table."""
    seen = set()
    for known in map(paper, PAPERS):
        for name, method in known.methods.items():
            if (name, method.about) not in seen:
                yield _of_paper(name, known.name), method.about
            seen.add((name, method.about))


def _of_paper(name: str, where: str) -> str:
    """What a table calls so with `paper: ...`; it need not say that for the first paper."""
    return name if where == PAPERS[0] else f"{name} ({where})"


def datasets() -> Lines:
    """For `hintkd prepare`."""
    for name, data in DATASETS.items():
        if data.name != name:                                # another part of the same set
            continue
        yield name, (f"{data.classes} classes, {data.channels}x{data.size}x{data.size}, {data.train_size:,} training and "
                     f"{data.test_size:,} test images, {data.batch} in a batch")


def networks() -> Lines:
    """For a table's teacher and student."""
    for name, network in NETWORKS.items():
        yield name, first_sentence(network.__doc__)


def options() -> Lines:
    """What papers leave open; for `--set`, and for a table's or a row's settings."""
    seen = set()
    for known in map(paper, PAPERS):
        for point in known.options.open_points():
            value = f"{point.default:.6g}" if isinstance(point.default, float) else point.default
            line = f"{point.metadata['meaning']} (default {value})"
            if (point.name, line) not in seen:
                yield _of_paper(point.name, known.name), line
            seen.add((point.name, line))


LISTS = {"tables": tables, "demos": demos, "methods": methods, "datasets": datasets, "networks": networks, "options": options}


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
