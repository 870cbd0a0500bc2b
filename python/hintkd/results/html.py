"""Published against measured as one page, results/report.html: it needs no network and no script, and every number leads to its evidence.

What the page says is gathered here, from the same functions as report.md; how it looks is the business of page.html.j2 and page.css, and
its figures are svg.py's.  The same records give the same bytes.
"""
from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from hintkd.files import write_file
from hintkd.results.history import Retired, read_history
from hintkd.results.measured import Group, Judgement, Record, read_groups
from hintkd.results.pictures import pictures
from hintkd.results.report import (
    MEASURED,
    OLD_NUMERIC,
    PERCENT,
    READING,
    asked,
    claim_digits,
    deviation,
    ensembles_in_words,
    gain_cells,
    heading,
    is_reproduced,
    judgements,
    missing_nets,
    networks,
    options_used,
    papers_of,
    published_gain,
    schedule,
    stems,
    verdict_text,
    words,
)
from hintkd.results.standing import OF_VERDICT, Mark, Standing, standing
from hintkd.results.verdicts import overall, spread
from hintkd.study.names import DEMO
from hintkd.study.table import find_table, table_names

PAGE = Path("results/report.html")
MINUS = "\N{MINUS SIGN}"


# -------------------------------------------------------------------------------------------------------------- what the page says

@dataclass(frozen=True)
class Value:
    """One net's number, with what was published for it and where its evidence lies, as seen from the page."""
    text: str
    record: str
    weights: str | None
    published: str = ""


@dataclass(frozen=True)
class Line:
    """One method in a table of values; of several replications each has a line, and their mean one of its own."""
    method: str
    label: str
    anchor: str
    nets: list[Value | None]
    mean: str = ""
    deviation: str = ""
    published: str = ""
    difference: str = ""
    mark: Mark | None = None


@dataclass(frozen=True)
class ClaimLine:
    """A claim and the paper's words for it, by how much its better side is better in print and here, and the verdict."""
    text: str
    words: str
    anchor: str
    published: str
    gain: str
    interval: str
    n: str
    mark: Mark
    remark: str


@dataclass(frozen=True)
class Evidence:
    """Where one net's number comes from."""
    name: str
    anchor: str
    last: str
    best: str
    iterations: str
    seconds: str
    circumstances: str
    commit: str
    record: str
    weights: str | None
    sha256: str


@dataclass(frozen=True)
class Section:
    """One group of records."""
    anchor: str
    heading: str
    standing: Standing
    about: str
    facts: list[str]
    unit: str
    is_full: bool
    compared: bool                                           # net by net
    nets: int
    lines: list[Line]
    remarks: list[str]
    claims: list[tuple[str, list[ClaimLine]]]
    figures: list[tuple[str, str]]
    evidence: list[Evidence]
    shared: str                                              # circumstances of all its nets; "" where they differ


@dataclass
class Paper:
    """Everything of one paper: what it is called, the DOI if one is known, its sections."""
    name: str
    doi: str | None
    sections: list[Section] = field(default_factory=list)


def papers(groups: Sequence[Group], root: Path, drawn: bool) -> list[Paper]:
    """Everything that was measured, by paper, in the order of the groups; `root` is the workspace, in which files may lie."""
    found: dict[str, Paper] = {}
    for stem, group in zip(stems(groups), groups, strict=True):
        name = re.sub(r", (table|figure) \S+$", "", group.table.source)
        doi = re.search(r",? doi (10\.\S+)", name)
        paper = found.setdefault(name, Paper(name.replace(doi[0], "") if doi else name, doi[1] if doi else None))
        paper.sections.append(section(stem, group, groups, root, drawn))
    return list(found.values())


def section(stem: str, group: Group, groups: Sequence[Group], root: Path, drawn: bool) -> Section:
    table, conditions = group.table, group.conditions
    options = [f"{name} {conditions[name]} (default {value})" for name, value in table.default_options().items()
               if conditions.get(name, str(value)) != str(value) and table.matters(name)]
    found = [evidence(record, group, f"{stem}-{name}" if index == 0 else "", root)
             for name in table.names for index, record in enumerate(group.of(name))]
    circumstances = {each.circumstances for each in found}
    return Section(
        anchor=stem, heading=heading(group), standing=standing(group, groups), about=table.about,
        facts=[networks(table), schedule(group),
               f"Seed {conditions['seed']}, {conditions['device']}, {conditions['precision']}, {conditions['engine']}"
               + (f" on {conditions['backend']}" if conditions["backend"] not in conditions["engine"] else "") + ".",
               f"Options: {', '.join(options) if options else 'all as by default'}."],
        unit=table.metric, is_full=group.is_full,
        compared=group.is_full and any(table.published(name, column) for name in table.names for column in table.columns or [""]),
        nets=count_nets(group), lines=[line for name in table.names for column in table.columns or [""]
                                       for line in lines(group, name, column, stem, root)],
        remarks=list(remarks(group)),
        claims=[(asked(kind, group), [claim_line(each, group, stem) for each in judged])
                for kind, judged in judgements(group, groups).items()],
        figures=list(figures(stem, group)) if drawn else [], evidence=found,
        shared=circumstances.pop() if len(circumstances) == 1 else "")


def remarks(group: Group) -> Iterator[str]:
    """What there is to say of a table beside its numbers, a sentence each."""
    if group.old_numeric:
        yield OLD_NUMERIC.format(group.old_numeric)
    absent = missing_nets(group)
    if absent:
        yield f"Not measured: {', '.join(absent)}."
    if group.ensembles:
        yield ensembles_in_words(group)
    yield from (f"Departs from the paper: {text}" for text in group.table.departures)
    yield from group.table.notes


def count_nets(group: Group) -> int:
    """Columns for the nets: those of the table, or more if more were trained."""
    return max([group.table.nets, *(record.net for record in group.records)])


def lines(group: Group, name: str, column: str, stem: str, root: Path) -> Iterator[Line]:
    """The lines of a row, or of one of its columns; one that says what was published where nothing was measured."""
    table, count = group.table, count_nets(group)
    digits, published = table.measure.digits, table.published_mean(name, column)
    all_values = group.values(name, column=column)
    total, verdict, anchor = overall(all_values), is_reproduced(group, name, column), f"{stem}-{name}"
    printed = "" if published is None else f"{published:.{digits}f}"
    difference = "" if total is None or verdict is None or published is None else signed(total.mean - published, digits)
    mark = None if verdict is None else Mark("good", "reproduced") if verdict else Mark("bad", "not reproduced")
    mean, spread_of_nets = "" if total is None else f"{total.mean:.{digits}f}", deviation(total, digits)
    by_net = {record.cell: record for record in group.of(name)}
    title = name if not column or column == next(iter(table.columns)) else ""

    def nets(repeat: int) -> list[Value | None]:
        return [value(by_net.get((repeat, net)), group, root, name, column, net) for net in range(1, count + 1)]
    if len(group.repeats) == 1 or total is None:
        yield Line(title, column, anchor, nets(group.repeats[0]), mean, spread_of_nets, printed, difference, mark)
        return
    yield Line(title, ", ".join(filter(None, [column, "over replications"])), anchor, [None] * count, mean, spread_of_nets, printed,
               difference, mark)
    for repeat in group.repeats:
        own = spread([net_value for (r, _), net_value in all_values.items() if r == repeat])
        if own:
            yield Line("", f"replication {repeat}", anchor, nets(repeat), f"{own.mean:.{digits}f}", deviation(own, digits))


def value(record: Record | None, group: Group, root: Path, name: str, column: str, net: int) -> Value | None:
    """A net's cell; None where there is none.  What was published for a net is told beside it if it can be compared."""
    measured = None if record is None else group.value(record, column=column)
    if record is None or measured is None:
        return None
    published = group.table.published(name, column)
    printed = f"{published[net - 1]:.2f}" if group.is_full and net <= len(published) else ""
    return Value(f"{measured:.2f}", record_file(record, group), weights_file(record, root), printed)


def evidence(record: Record, group: Group, anchor: str, root: Path) -> Evidence:
    """Of one net; the first of a method has an anchor."""
    p, last = record.provenance, record.stages[-1]
    threads = f"{p.threads} thread{'s' * (p.threads > 1)}" if p.threads and not p.gpu else None
    together = f"{last.together} together" if last.together > 1 else None
    inexact = "continued inexactly" if any(stage.inexact for stage in record.stages) else None
    repeat = f"replication {record.repeat}, " if record.repeat > 1 else ""
    circumstances = [p.gpu or p.cpu or p.machine, threads, p.precision, together, inexact, f"torch {p.torch or 'none'}",
                     p.engine or p.backend]
    last_value, best_value = ("" if found is None else f"{found:.2f}" for found in (group.value(record), group.value(record, "best")))
    return Evidence(
        name=f"{record.name}, {repeat}net {record.net}", anchor=anchor, last=last_value, best=best_value,
        iterations=" + ".join(f"{number:,}" for number in record.iterations),
        seconds=f"{record.wall_s:,.0f}", circumstances=", ".join(filter(None, circumstances)),
        commit="not known" if p.commit is None else f"{p.commit[:7]}{' with changes' if p.dirty else ''}",
        record=record_file(record, group), weights=weights_file(record, root), sha256=record.weights.sha256 if record.weights else "")


def record_file(record: Record, group: Group) -> str:
    """The record's path, as seen from the page."""
    repeat = [f"repeat{record.repeat}"] if record.repeat > 1 else []
    return "/".join([MEASURED.name, group.name, *repeat, record.name, f"net{record.net}.json"])


def weights_file(record: Record, root: Path) -> str | None:
    """The path of the record's weights, as seen from the page; None if they are not kept, or not here."""
    if record.weights is None or not (root / record.weights.file).is_file():
        return None
    return str(Path(record.weights.file).relative_to(PAGE.parent))


def claim_line(each: Judgement, group: Group, stem: str) -> ClaimLine:
    """A claim of a table; its numbers lead to the evidence of the side that is one of the table's own rows, the left one first."""
    digits, printed = claim_digits(each.claim, group.table), published_gain(each.claim, group.table)
    gain, interval, n = (text.replace("-", MINUS) for text in gain_cells(each, digits))
    side = next((side for side in (each.claim.left, each.claim.right) if side.table is None and group.of(side.method)), None)
    return ClaimLine(
        text=each.claim.text, words=words(each.claim), anchor=f"{stem}-{side.method}" if side else stem, gain=gain, interval=interval, n=n,
        published="" if printed is None else signed(printed, digits), remark="; ".join(filter(None, [each.reason, each.caution])),
        mark=Mark(OF_VERDICT[each.verdict] if group.is_full else "none", verdict_text(each, group)))


def signed(number: float, digits: int) -> str:
    """With its sign, if it is not 0 when it is rounded, and a minus as wide as a plus."""
    text = f"{number:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


# --------------------------------------------------------------------------------------------------------------------- figures

def figures(stem: str, group: Group) -> Iterator[tuple[str, str]]:
    """A group's figures: their captions and their SVG elements."""
    from markupsafe import Markup

    from hintkd.results import svg
    from hintkd.results.figures import SMOOTH

    found, title, metric = pictures(group), heading(group), group.table.metric
    unit = f"test {metric} ({group.table.measure.unit})"
    over = "lines: mean of a row's nets; bands: from the lowest to the highest of them"
    if found.bars:
        yield "Every net of every method", Markup(svg.dots(f"{stem}-nets", f"{title}: every net", found.bars, found.lines, unit))
    if found.metric:
        yield f"During the last stage, test {metric}; {over}", Markup(svg.curves(
            f"{stem}-tests", f"{title}: test {metric} during the last stage", found.metric, found.lines, unit, found.window))
        name, smoothed = found.loss_label or "training loss", "" if found.loss_label else f", running median of {SMOOTH}"
        yield f"During the last stage, {name}{smoothed}; {over}", Markup(svg.curves(
            f"{stem}-losses", f"{title}: {name} during the last stage", found.loss, found.lines, name, found.window,
            smooth=found.loss_label is None))
    if found.hints:
        yield "During Stage 1, hint losses in units of the largest first value at the same hint layer", Markup(svg.hint_losses(
            f"{stem}-hints", f"{title}: hint losses of Stage 1", found.hints, found.lines))


# -------------------------------------------------------------------------------------------------------------------- the page

def write_page(root: Path = Path()) -> Path | None:
    """Render all that was measured in a workspace; the page's path, None without jinja2.  Without matplotlib it has no figures.

    Raises UserError for a damaged record.
    """
    if importlib.util.find_spec("jinja2") is None:
        return None
    drawn = importlib.util.find_spec("matplotlib") is not None
    write_file(root / PAGE, render(read_groups(root / MEASURED), read_history(root / MEASURED), root, drawn))
    return root / PAGE


def render(groups: Sequence[Group], history: Sequence[Retired], root: Path, drawn: bool) -> str:
    """The page; `drawn` asks for its figures."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("hintkd.results")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    page.filters["inline"] = lambda text: Markup(_marked_up(text))
    known = {group.table.name for group in groups}
    return page.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8")).render(
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")), papers=papers(groups, root, drawn), drawn=drawn,
        unmeasured=[find_table(name).title for name in table_names() if name not in known and not name.startswith(DEMO)], percent=PERCENT,
        reading=[paragraph.replace("\n", " ") for paragraph in READING.strip().split("\n\n")],
        options=[line for known in papers_of(groups) for line in options_used(known, groups)],
        choices=[choice for known in papers_of(groups) for choice in known.choices], history=history)


def _marked_up(text: str) -> str:
    """Markdown's `code` and *emphasis* as HTML."""
    return re.sub(r"\*(\S[^*]*)\*", r"<em>\1</em>", re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False)))
