"""Published against measured: results/report.md with its figures.

What was measured and which claims hold comes from measured.py, what was published from study/table.py, pictures from figures.py.  The same
records give the same bytes: nothing here says when it was rendered.
"""
from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hintkd.files import write_file
from hintkd.methods.papers import PAPERS, Paper, paper
from hintkd.metrics import METRICS
from hintkd.results.history import Retired, read_history
from hintkd.results.measured import Group, Judgement, Record, read_groups
from hintkd.results.pictures import pictures
from hintkd.results.verdicts import CONFIDENCE, Spread, Verdict, overall, spread
from hintkd.study.claims import Claim, Operand
from hintkd.study.rows import ORIGINAL, Learner
from hintkd.study.table import Table, find_table, table_names

MEASURED, REPORT, FIGURES = Path("results/measured"), Path("results/report.md"), Path("results/figures")
COLOURS: dict[Verdict, str] = {"holds": "green", "does not hold": "red", "within noise": "yellow", "not judged": "dim"}
SHARED = ("Nets of one run share their teacher and Stage 1, so their spread understates the noise; `--repeats` runs complete replications, "
          "over which a verdict is then taken.")
PERCENT = f"{100 * CONFIDENCE:.0f} %"
OLD_NUMERIC = ("Measured by numeric {} of the engine, whose numeric is another today: measured again, these values would differ, if in "
               "the last digits alone.")
ASKED = {"claims": "What is claimed", "orders": "What the printed numbers imply beside that",
         "controls": "Comparisons of ours (not in the paper)"}
READING = f"""\
Values are percent of the test set after the last iteration, measured from the saved weights; "best test" is the best of the tests on
the way.  An error is 100 minus the accuracy.  Published means are those of the nets, where these were printed, because the printed
averages are truncated.  A mean of the full schedule counts as reproduced within {METRICS["accuracy"].close} points of accuracy or
{METRICS["error"].close} points of error.  Runs of another scale are not comparable with published values, and no difference is shown for
them.

A claim `A > B` says that A is better: a higher accuracy, a lower error, a lower loss, fewer iterations to a value, which count to the
first test on the way that has it, and to the end where none has.  What a paper says in words is told with its place, what its printed
numbers imply beside that is judged apart.  A claim is judged on the paired differences between nets of the same number,
which share their seed: it *holds* where the {PERCENT} interval of their mean (Student's t with n - 1 degrees of freedom) lies above 0,
*does not hold* where it lies below, and is *within noise* otherwise.  At a shortened schedule a verdict says what was found at that
schedule; it is no verdict on the paper's claim, and is counted apart.

{SHARED}
"""


# ---------------------------------------------------------------------------------------------------------------- the document

def write_report(root: Path = Path()) -> Path:
    """Render all that was measured in a workspace; the report's path.  Without matplotlib there are no figures, and it says so.

    Raises UserError for a damaged record.
    """
    groups = read_groups(root / MEASURED)
    can_draw = importlib.util.find_spec("matplotlib") is not None
    drawn = {stem: _draw(group, stem, root) for stem, group in zip(stems(groups), groups, strict=True)} if can_draw else None
    write_file(root / REPORT, render(groups, drawn, read_history(root / MEASURED)))
    return root / REPORT


def render(groups: Sequence[Group], drawn: Mapping[str, Sequence[tuple[str, str]]] | None, history: Sequence[Retired] = ()) -> str:
    """The report as Markdown; `drawn` are (caption, path relative to the report) by group, None where nothing can be drawn."""
    parts = ["# Published against measured\n"]
    if not groups:
        parts.append("Nothing was measured yet: `hintkd reproduce table3 --scale 0.05` makes a beginning.\n")
    else:
        parts += [READING, _overview(groups)]
    missing = [name for name in table_names() if name not in {group.table.name for group in groups}]
    if groups and missing:
        parts.append(f"Not measured: {', '.join(missing)}.\n")
    if drawn is None:
        parts.append("There are no figures, because matplotlib is not installed: `pip install 'hintkd[report]'`.\n")
    for stem, group in zip(stems(groups), groups, strict=True):
        shown = (drawn or {}).get(stem, [])
        parts += [*_section(group, groups), *(f"![{caption}]({path})\n" for caption, path in shown), _evidence(group)]
    if history:
        parts += ["## History\n", "Measured once, and taken back:\n", _history(history)]
    for known in papers_of(groups):
        parts += [f"## What the paper leaves open{f': {known.source}' if known.name != PAPERS[0] else ''}\n",
                  "Options, with what was used:\n", _options(known, groups), "Choices:\n",
                  _markdown(["point", "in the paper", "here"], *(list(choice) for choice in known.choices))]
    return "\n".join(parts)


def papers_of(groups: Sequence[Group]) -> list[Paper]:
    """The papers whose open points are told: the first that is known, and those of what was measured."""
    return [paper(name) for name in dict.fromkeys([PAPERS[0], *(group.table.paper for group in groups)])]


def _history(history: Sequence[Retired]) -> str:
    return _markdown(["taken back", "records", "why"], *([str(entry.retired), entry.records, entry.why] for entry in history))


def stems(groups: Sequence[Group]) -> list[str]:
    """A name for each group: its folder's, numbered where a folder's records do not belong together."""
    seen: Counter[str] = Counter()
    stems = []
    for group in groups:
        seen[group.name] += 1
        stems.append(group.name + (f"-{seen[group.name]}" if seen[group.name] > 1 else ""))
    return stems


def heading(group: Group) -> str:
    """The table, what was changed in it, its scale, the engine's numeric if it is an old one, and what else sets the group apart."""
    changed = "" if group.table.name in table_names() else f" ({group.table.name})"
    numeric = [f"measured by numeric {group.old_numeric}"] if group.old_numeric else []
    told = {"scale", *["engine"] * bool(numeric)}
    apart = [f"{name.replace('_', ' ')} {group.conditions.get(name, 'not recorded')}" for name in group.apart if name not in told]
    return ", ".join([group.table.title + changed, *([] if group.is_full else [f"scale {group.scale:g}"]), *numeric, *apart])


def _overview(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        means = [is_reproduced(group, name, column) for name in group.table.names for column in group.table.columns or [""]]
        known = [each for each in means if each is not None]
        counts = Counter[Verdict](judgement.verdict for judgement in judgements(group, groups).get("claims", []))
        tally = ", ".join(f"{verdict}: {counts[verdict]}" for verdict in COLOURS if counts[verdict])
        rows.append([heading(group), f"{group.scale:g}", group.conditions["device"], f"{len(group.records)} of {expected_nets(group)}",
                     f"{sum(known)} of {len(known)}" if known else "not comparable" if not group.is_full else "none published",
                     *((tally, "") if group.is_full else ("", tally))])
    return _markdown(["table", "scale", "device", "nets measured", "means reproduced", "claims", "the same at a shortened schedule"], *rows)


def expected_nets(group: Group) -> int:
    return len(group.repeats) * sum(map(group.table.nets_of, group.table.names))


def is_reproduced(group: Group, name: str, column: str = "") -> bool | None:
    """None where a published mean or a full-schedule one is missing."""
    found, published = overall(group.values(name, column=column)), group.table.published_mean(name, column)
    return group.table.measure.reproduces(found.mean, published) if found and published is not None and group.is_full else None


# ------------------------------------------------------------------------------------------------------------------- sections

def _section(group: Group, groups: Sequence[Group]) -> Iterator[str]:
    """One group: what was run, its values, its claims."""
    table, conditions = group.table, group.conditions
    yield f"## {heading(group)}\n"
    yield f"{table.about}.  Source: {table.source}.\n" if table.about else f"Source: {table.source}.\n"
    yield f"{networks(table)}  {schedule(group)}\n"
    if group.old_numeric:
        yield f"**{OLD_NUMERIC.format(group.old_numeric)}**\n"
    if not group.is_full:
        yield (f"**Scale {group.scale:g}: every schedule is {group.scale:g} times its length, so that these values are not comparable "
               "with published ones.**\n")
    options = [f"{name} {conditions[name]} (default {value})" for name, value in table.default_options().items()
               if conditions.get(name, str(value)) != str(value) and table.matters(name)]
    yield (f"Seed {conditions['seed']}, {conditions['device']}, {conditions['precision']}, {conditions['engine']}"
           + (f" on {conditions['backend']}" if conditions["backend"] not in conditions["engine"] else "")
           + f".  Options: {', '.join(options) if options else 'all as by default'}.\n")
    if table.departures:
        yield "Departs from the paper:\n"
        yield "".join(f"- {text}\n" for text in table.departures)
    yield values_table(group)
    absent = missing_nets(group)
    if absent:
        yield f"Not measured: {', '.join(absent)}.\n"
    if group.ensembles:
        yield f"{ensembles_in_words(group)}\n"
    for kind, found in judgements(group, groups).items():
        yield f"{asked(kind, group)}:\n"
        yield _claims(found, group)
    if table.notes:
        yield "".join(f"- {text}\n" for text in table.notes)


def networks(table: Table) -> str:
    """The two networks, and by how much the depth falls where both have one."""
    def name(learner: Learner, role: str) -> str:
        return learner.network(role).title
    student, teacher = name(table.student, "student"), table.teacher
    if teacher is None:
        return f"Student {student}, without a teacher."
    if teacher.weights is not None:
        return f"Teacher {teacher.weights}, student {student}."
    regressor = ", with a regressor" if table.regressor else ""
    trained = f", trained by {teacher.method}" if teacher.method != ORIGINAL else ""
    depths = [getattr(learner.network("network"), "depth", 0) for learner in (teacher, table.student)]
    fall = f": depth falls by {100 * (1 - depths[1] / depths[0]):.0f} %" if all(depths) else ""
    return f"Teacher {name(teacher, 'teacher')}{trained}, student {student}{regressor}{fall}."


def schedule(group: Group) -> str:
    """The iterations of every kind of stage, as they were run."""
    return f"Iterations: {group.table.iterations(group.scale)}; tau {group.table.tau:g}, lambda {group.table.lambda_:g}."


def missing_nets(group: Group) -> list[str]:
    """The nets that the table has and the group has not, in words."""
    found = []
    for repeat in group.repeats:
        of = f" of replication {repeat}" if len(group.repeats) > 1 else ""
        for name in group.table.names:
            wanted = list(range(1, group.table.nets_of(name) + 1))
            missing = [net for net in wanted if (repeat, net) not in group.values(name)]
            if missing == wanted:
                found.append(name + of)
            elif missing:
                found.append(f"{name} net {', '.join(map(str, missing))}{of}")
    return found


def ensembles_in_words(group: Group) -> str:
    """What the nets of each row are together, in a sentence that says which nets."""
    metric, table = group.table.measure, group.table
    nets = ", ".join(map(str, range(1, table.nets)))
    values = [f"{name} " + " and ".join(f"{metric.value(value):.2f}" + (f" (replication {repeat})" if len(group.repeats) > 1 else "")
                                        for repeat, value in group.ensembles[name].items())
              for name in table.names if name in group.ensembles]
    return (f"Nets {nets} and {table.nets} of a row together, by the mean of their class probabilities ({metric.name}, {metric.unit}): "
            f"{', '.join(values)}.")


def values_table(group: Group) -> str:
    """Per row what was published and measured, their difference, and the best: a column per net, their mean and standard deviation.

    A row with several numbers has all of this for each.
    """
    table = group.table
    nets = max([table.nets, *(record.net for record in group.records)])
    head = ["row", *["column"] * bool(table.columns), f"{table.metric}, {table.measure.unit}", "scale",
            *(f"net {net}" for net in range(1, nets + 1)), "mean", "standard deviation"]
    return _markdown(head, *([cells[0], *[column] * bool(table.columns), *cells[1:]] for name in table.names
                             for column in table.columns or [""] for cells in _rows(group, name, column, nets)))


def _rows(group: Group, name: str, column: str, nets: int) -> Iterator[list[str]]:
    table, scale, digits = group.table, f"{group.scale:g}", group.table.measure.digits
    printed, mean = table.published(name, column), table.published_mean(name, column)
    title = [name, ""]
    if mean is not None:
        cells = [f"{value:.2f}" for value in printed] or [f"{mean:.2f}"] * table.is_shared(name)
        yield [name, "published", "1", *_filled(cells, nets), f"{mean:.{digits}f}", deviation(spread(printed), digits)]
        title = ["", ""]
    values, best = group.values(name, column=column), group.values(name, "best", column)
    for repeat in group.repeats:
        label = f", replication {repeat}" if len(group.repeats) > 1 else ""
        for which, of in (("measured", values), ("best test", best)):
            mine = {net: value for (r, net), value in of.items() if r == repeat}
            found = spread(list(mine.values()))
            if found is None:
                continue
            yield [title[0], which + label, scale, *(f"{mine[net]:.2f}" if net in mine else "" for net in range(1, nets + 1)),
                   f"{found.mean:.{digits}f}", deviation(found, digits)]
            title = ["", ""]
    total, verdict = overall(values), is_reproduced(group, name, column)
    if total is None and mean is None:
        yield [name, "not measured", *_filled([], nets), "", "", ""]
    if total is not None and len(group.repeats) > 1:
        yield ["", "measured, over replications", scale, *_filled([], nets), f"{total.mean:.{digits}f}", deviation(total, digits)]
    if total is not None and verdict is not None and mean is not None:
        pairs = [(values.get((1, net)), value) for net, value in enumerate(printed, start=1)] if len(group.repeats) == 1 else []
        cells = [f"{mine - value:+.2f}" if mine is not None else "" for mine, value in pairs]
        yield ["", "difference", scale, *_filled(cells, nets), f"{total.mean - mean:+.{digits}f}",
               "reproduced" if verdict else "not reproduced"]


def _filled(cells: Sequence[str], count: int) -> list[str]:
    return [*cells, *[""] * (count - len(cells))]


def deviation(found: Spread | None, digits: int) -> str:
    return "" if found is None or found.deviation is None else f"{found.deviation:.{digits}f}"


# --------------------------------------------------------------------------------------------------------------------- claims

def judgements(group: Group, groups: Sequence[Group]) -> dict[str, list[Judgement]]:
    """What the paper says, what its numbers imply beside that, and our comparisons with the control, judged; by the field of the table."""
    table = group.table
    return {name: [group.judge(claim, groups) for claim in claims]
            for name, claims in (("claims", table.claims), ("orders", table.orders), ("controls", table.controls)) if claims}


def asked(kind: str, group: Group) -> str:
    """The heading of some judgements, which says where they are no verdicts on the paper."""
    return ASKED[kind] + ("" if group.is_full else f", tried at scale {group.scale:g}")


def _claims(found: Sequence[Judgement], group: Group) -> str:
    table, said = group.table, ["in the paper"] * any(each.claim.words for each in found)
    rows = []
    for each in found:
        digits, published = claim_digits(each.claim, table), published_gain(each.claim, table)
        printed = "" if published is None else f"{published:+.{digits}f}"
        because = "; ".join(filter(None, [each.reason, each.caution]))
        rows.append([f"`{each.claim.text}`", *[words(each.claim) for _ in said], printed, *gain_cells(each, digits),
                     f"**{verdict_text(each, group)}**" + (f": {because}" if because else "")])
    return _markdown(["claim", *said, "gain in the paper", "gain here", f"{PERCENT} interval", "n", "verdict"], *rows)


def verdict_text(judgement: Judgement, group: Group) -> str:
    """The verdict, at a shortened schedule with its scale."""
    return judgement.verdict + ("" if group.is_full or judgement.verdict == "not judged" else f" at scale {group.scale:g}")


def gain_cells(judgement: Judgement, digits: int) -> tuple[str, str, str]:
    """The gain, the interval of its mean, and how many samples that was taken on."""
    gain = judgement.gain
    if gain is None:
        return "", "", ""
    interval = "" if gain.interval is None else "{:+.{d}f} to {:+.{d}f}".format(*gain.interval, d=digits)
    return f"{gain.mean:+.{digits}f}", interval, str(gain.n)


def claim_digits(claim: Claim, table: Table) -> int:
    return table.measure.digits if not claim.measure else 3 if claim.aim is None else 0


def words(claim: Claim) -> str:
    return claim.words + (f" ({claim.section})" if claim.section else "")


def published_gain(claim: Claim, table: Table) -> float | None:
    """By how much the better side of a claim is better in print, in points; None where a value was not printed."""
    if claim.measure and not claim.column:
        return None

    def printed(operand: Operand) -> float | None:
        source = find_table(operand.table) if operand.table else table
        values = source.published(operand.method, claim.column)
        return table.measure.best(*values) if operand.best and values else source.published_mean(operand.method, claim.column)
    left, right = printed(claim.left), printed(claim.right)
    if left is None or right is None:
        return None
    return table.measure.gain(left, right) * (1 if claim.better else -1)


# ------------------------------------------------------------------------------------------------------------------- evidence

def evidence(record: Record, group: Group) -> str:
    """One line that says where a result comes from."""
    p, metric = record.provenance, group.table.measure
    repeat = f"repeat{record.repeat}/" if record.repeat > 1 else ""
    unit = metric.unit if metric.more_is_better else f"{metric.unit} {metric.name}"
    last, best = (group.value(record, which) for which in ("last", "best"))
    threads = f"{p.threads} thread{'s' * (p.threads > 1)}" if p.threads and not p.gpu else None
    where = ", ".join(filter(None, [p.machine, p.gpu or p.cpu, threads]))
    commit = "commit not known" if p.commit is None else f"commit {p.commit[:7]}{' with changes' if p.dirty else ''}"
    inexact = ", continued inexactly" if any(stage.inexact for stage in record.stages) else ""
    together = f", {record.stages[-1].together} trained together" if record.stages[-1].together > 1 else ""
    iterations = " + ".join(f"{count:,}" for count in record.iterations)
    values = ("no value" if last is None else f"{last:.2f} {unit} last") + ("" if best is None else f" ({best:.2f} {unit} best)")
    return (f"{group.name}/{repeat}{record.name}/net{record.net}  {values}  {iterations} iterations, scale {record.scale:g}, "
            f"{p.precision}, seed {record.seed}, {where}, {record.wall_s:,.0f} s{together}, torch {p.torch or 'none'}, {commit}{inexact}")


def _evidence(group: Group) -> str:
    order = group.table.names
    records = sorted(group.records, key=lambda r: (order.index(r.name) if r.name in order else len(order), r.name, r.cell))
    return "".join(["Evidence:\n\n", *(f"    {evidence(record, group)}\n" for record in records)])


def _options(known: Paper, groups: Sequence[Group]) -> str:
    return _markdown(["option", "in the paper", "values", "default", "used here"], *map(list, options_used(known, groups)))


def options_used(known: Paper, groups: Sequence[Group]) -> Iterator[tuple[str, str, str, str, str]]:
    """Of each option that a paper leaves open: its name, what the paper says, what the values mean, the default, and what was used."""
    for point in known.options.open_points():
        used = sorted({shown(group.records[0].options.get(point.name, point.default)) for group in groups
                       if group.table.paper == known.name and group.table.matters(point.name)})
        yield point.name, point.metadata["paper"], point.metadata["meaning"], shown(point.default), ", ".join(used)


def shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _markdown(*rows: Sequence[str]) -> str:
    """Rows of cells, the first of them the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


# -------------------------------------------------------------------------------------------------------------------- figures

def _draw(group: Group, stem: str, root: Path) -> list[tuple[str, str]]:
    """Draw the group's figures; their captions, and their paths relative to the report."""
    from hintkd.results import figures

    table, found, made = group.table, pictures(group), list[tuple[str, str]]()
    title = f"{heading(group)}: {table.about}" if table.about else heading(group)
    label = f"test {table.metric} ({table.measure.unit})"

    def path(kind: str) -> Path:
        made.append((f"{heading(group)}, {kind.replace('-', ' ')}", f"{FIGURES.name}/{stem}-{kind}.png"))
        return root / FIGURES / f"{stem}-{kind}.png"

    if found.bars:
        students = [bar for bar in found.bars if not table.is_shared(bar.row)]
        figures.draw_bars(path("bars"), title, students, found.lines, label, found.teacher, table.axis if group.is_full else None)
    if found.metric:
        figures.draw_curves(path("curves"), title, found.metric, found.loss, found.lines, label, found.loss_label, found.window)
    if found.hints:
        axis = table.axis if group.is_full and table.draw == ("hint-losses",) else None
        figures.draw_hint_losses(path("hint-losses"), title, found.hints, found.lines, axis)
    return made
