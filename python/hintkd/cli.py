"""The command line: `hintkd demo | exits | generate | list | prepare | reproduce | status | report | verify`.

Turns flags into calls, and errors into one sentence with exit status 2.  Most imports stand inside the commands: torch takes seconds,
and `hintkd --help` should not.
"""
from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")          # before torch: its waiting threads would spin and slow all others

import typer
from rich.console import Console
from rich.progress import track

from hintkd import limits
from hintkd.errors import UserError
from hintkd.experiment import DATASETS

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Hint-based knowledge transfer as it was published, trained again and compared.")
console = Console()
T = TypeVar("T")
INTERRUPTED, TERMINATED = 130, 143                           # exit status after Ctrl-C and SIGTERM, as a shell has it

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what is wrong.")]
Jobs = Annotated[int | None, typer.Option(help="Stages side by side; default: as many as the cores allow.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", show_default=False, help=(
    "Another value for all rows that do not set it themselves: lambda=3, an option such as shortcut=B, a field of the schedule such as "
    "base_lr=0.05, student.depth=8, teacher.widths=[32,64,128], teacher.weights=FILE with teacher.prototxt=FILE; may be given again."))]
Rows = Annotated[str | None, typer.Option("--rows", "--methods", help="Only these rows, with commas between them.", show_default=False)]
Nets = Annotated[str | None, typer.Option(help="Only these, such as 1,2.", show_default=False)]


def assignments(given: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE ... as a mapping, values read as YAML has them.  Raises UserError on what is none, and on files that cannot be read."""
    from hintkd.study.yaml_file import parse_yaml
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {limits.shown(text)}: write NAME=VALUE, such as --set lambda=3")
        found[name.strip()] = parse_yaml(value, f"--set {limits.shown(text)}")
    limits.require_all(found, "--set")
    require_files(found)
    return found


def require_files(given: Mapping[str, Any]) -> None:
    """Raise UserError where a teacher's files are not there or not what they should be."""
    from hintkd.backend import read_net, read_weights
    for name, read in (("teacher.weights", read_weights), ("teacher.prototxt", read_net)):
        if given.get(name) is not None:
            if not Path(str(given[name])).is_file():
                raise UserError(f"--set {name}={limits.shown(given[name])}: there is no such file")
            read(str(given[name]))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """1,2,3 as numbers, each once.  Raises UserError naming the flag."""
    if not re.fullmatch("-?[0-9]{1,30}(,-?[0-9]{1,30})*", text):
        raise UserError(f"{flag} {limits.shown(text)}: give whole numbers with commas between them, such as 1,2,3")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def fractions(flag: str, text: str) -> tuple[float, ...]:
    """0.5,0.9 as numbers from 0 to 1, in order, each once.  Raises UserError naming the flag."""
    found = [float(part) for part in text.split(",") if re.fullmatch(r"0*1(\.0*)?|0*\.\d{1,12}|0+\.?", part)]
    if len(found) != text.count(",") + 1:
        raise UserError(f"{flag} {limits.shown(text)}: give numbers from 0 to 1 with commas between them, such as 0.5,0.9")
    return tuple(sorted(set(found)))


def names(flag: str, text: str) -> tuple[str, ...]:
    """a,b,c as names, each once.  Raises UserError naming the flag."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(found):
        raise UserError(f"{flag} {limits.shown(text)}: give names with commas between them")
    return found


def bar(items: Iterable[T], description: str, total: int | None, /) -> Iterable[T]:
    """rich's progress bar, as data_prep asks for it."""
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)


def show_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"hintkd {metadata.version('hintkd')}")
        except metadata.PackageNotFoundError:
            print("hintkd of a checkout that is not installed")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Say which, and stop.")] = False,
) -> None:
    """What stands before a command; its option has a callback."""


def complete_table(incomplete: str) -> list[str]:
    from hintkd.study.names import table_names
    return [name for name in table_names() if name.startswith(incomplete)]


def complete_dataset(incomplete: str) -> list[str]:
    return [name for name in dict.fromkeys(known.name for known in DATASETS.values()) if name.startswith(incomplete)]


def complete_demo(incomplete: str) -> list[str]:
    from hintkd.study.names import demo_names
    return [name for name in demo_names() if name.startswith(incomplete)]


@app.command()
def demo(
    name: Annotated[str | None, typer.Argument(help="One of `hintkd list demos`; default: layer-wise hints and their rivals.",
                                               show_default=False, autocompletion=complete_demo)] = None,
    workspace: Annotated[Path, typer.Option(help="The folder that gets its data, runs and results.")] = Path("demo"),
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """A paper's methods in small, on scikit-learn's handwritten digits: minutes, and seconds when it was run before."""
    from hintkd.study.demo import demo as run
    from hintkd.study.demo import demo_table
    console.quiet = quiet
    here, table = Path.cwd(), demo_table(name)
    finish(run(table, workspace, console, jobs), table, here)


@app.command()
def generate(
    table: Annotated[str | None, typer.Argument(help="One of `hintkd list tables`, or a YAML file of one's own; default: the pair that "
                                                     "--student and --teacher name.", show_default=False,
                                                autocompletion=complete_table)] = None,
    student: Annotated[str | None, typer.Option(help="A network by its title, such as wrn_16_2, resnet8x4 or ShuffleV1.",
                                                show_default=False)] = None,
    teacher: Annotated[str | None, typer.Option(help="Likewise.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="How the student is trained: one of the zoo's methods.", show_default=False)] = None,
    changes: Set = None,
    rows: Rows = None,
    nets: Nets = None,
    out: Annotated[Path, typer.Option(help="The folder that gets prototxt/ and solvers/.")] = Path(),
    quiet: Quiet = False,
) -> None:
    """Write the prototxts of a table's stages, which any Caffe trains: nets into prototxt/, solvers into solvers/."""
    from hintkd.methods.generate import generate_all as write
    from hintkd.run.progress import counted
    from hintkd.study.pair import pair_table
    from hintkd.study.table import find_table
    console.quiet = quiet
    if table is not None and not (student or teacher or method):
        found = find_table(table).changed(assignments(changes))
    elif table is None and student and method:
        found, rows = pair_table(student, teacher, method).changed(assignments(changes)), method
    else:
        raise UserError("generate: name a table, or instead of it --student, --method and, where that needs one, --teacher")
    experiments = found.experiments(rows=None if rows is None else names("--rows", rows),
                                    nets=None if nets is None else numbers("--nets", nets))
    files = write([x for x in experiments if not x.method.is_shared], out)
    console.print(f"{counted(len(files), 'prototxt')} in {out / 'prototxt'} and {out / 'solvers'}", markup=False, highlight=False,
                  soft_wrap=True)


@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="mnist, cifar10, cifar100 or digits.", autocompletion=complete_dataset)],
    source: Annotated[Path | None, typer.Option("--from", help="A folder with the publisher's files; default: download them.",
                                                show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="The folder that gets a folder of the data set's name.")] = Path("data"),
    seed: Annotated[int, typer.Option(help="Of the one shuffle of the training images.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Write a data set as LMDBs and mean files, from the publisher's files, which are checked."""
    from data_prep import prepare as write
    console.quiet = quiet
    write(dataset, out, source, seed, progress=bar, say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="One of `hintkd list tables`, or a YAML file of one's own.",
                                         autocompletion=complete_table)],
    changes: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the stages and what they will take, and stop.")] = False,
    scale: Annotated[float, typer.Option(help="Shorten every schedule in proportion.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="Complete replications, each with a teacher of its own.")] = 1,
    rows: Rows = None,
    nets: Nets = None,
    data: Annotated[Path | None, typer.Option(help="A folder with train_lmdb, test_lmdb and mean files that takes the data set's place.",
                                              show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, gpu or gpu:N; default: a GPU where there is one.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the table; its teacher, Stage 1 and nets have seeds that follow from it.")] = 1,
    jobs: Jobs = None,
    threads: Annotated[int, typer.Option(help="Of each stage; results are byte-equal for equal numbers only.")] = 1,
    precision: Annotated[str, typer.Option(help="Of products in training: fp32, tf32 (on a GPU) or bf16; the final test is in "
                                                "fp32.")] = "fp32",
    together: Annotated[int, typer.Option(help="Train up to so many nets of one kind side by side, their teacher once for all; whether "
                                               "that is faster than --jobs is not measured yet.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="The address of a dask scheduler whose workers run the stages.",
                                                  show_default=False)] = None,
    backend: Annotated[str, typer.Option(help="torchcaffe, or caffe for an installed one.")] = "torchcaffe",
    caffe_python: Annotated[str | None, typer.Option(help="For --backend caffe: a Python that can import it.", show_default=False)] = None,
    inexact: Annotated[bool, typer.Option("--inexact", help="Go on with stages that were begun with other versions or on another "
                                                            "processor; their records say so.")] = False,
    log_dir: Annotated[Path | None, typer.Option(help="A folder for the curves as TensorBoard reads them.", show_default=False)] = None,
    quiet: Quiet = False,
) -> None:
    """Train what a table needs, resuming what was begun, and compare with what was published."""
    from hintkd.study.reproduce import Request, resources
    from hintkd.study.reproduce import reproduce as run
    from hintkd.study.table import find_table
    changed = find_table(table).changed(assignments(changes), data)
    request = Request(changed, scale, repeats, None if rows is None else names("--rows", rows),
                      None if nets is None else numbers("--nets", nets), seed)
    console.quiet = quiet
    used = resources(backend, caffe_python, device, threads, jobs, inexact, precision, together, scheduler)
    done = run(request, used, console, dry_run, log_dir)
    if not dry_run:
        finish(done, request.name, Path.cwd())


@app.command()
def status(
    table: Annotated[str | None, typer.Argument(help="Only this one; default: all that was asked for.", show_default=False,
                                                autocompletion=complete_table)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """What is finished of what was asked for, how far the rest is, and why a finished stage would run again."""
    from hintkd.study.status import data, show
    console.quiet = False
    if as_json:
        print(json.dumps(data(table), indent=1))
    else:
        show(console, table)


@app.command()
def verify(
    table: Annotated[str | None, typer.Argument(help="Only this one; default: every table whose nets lie in results/weights.",
                                                show_default=False, autocompletion=complete_table)] = None,
    backend: Annotated[str, typer.Option(help="torchcaffe, or caffe for an installed one.")] = "torchcaffe",
    caffe_python: Annotated[str | None, typer.Option(help="For --backend caffe: a Python that can import it.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, gpu or gpu:N; default: a GPU where there is one.", show_default=False)] = None,
    jobs: Jobs = None,
) -> None:
    """Test every committed net again on the prepared data, and compare it with its record; exit status 1 if something differs."""
    from hintkd.study.reproduce import resources
    from hintkd.study.verify import verify as run
    console.quiet = False
    if not run(console, resources(backend, caffe_python, device, jobs=jobs), table):
        raise typer.Exit(1)


@app.command()
def exits(
    weights: Annotated[Path, typer.Argument(help="A .caffemodel of byot or deep-supervision, as in runs/weights.")],
    net: Annotated[Path | None, typer.Option(help="Its prototxt; default: that of the same name beside it.", show_default=False)] = None,
    sure: Annotated[str, typer.Option(help="Probabilities from which an exit is sure.")] = "0.5,0.6,0.7,0.8,0.9,0.95,0.99",
    batch: Annotated[int, typer.Option(help="Images at once when passes are timed.")] = 1,
    threads: Annotated[int, typer.Option(help="Of the passes that are timed.")] = 1,
    export: Annotated[Path | None, typer.Option(help="A folder that gets every exit as a net of its own.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
    quiet: Quiet = False,
) -> None:
    """What each exit of a trained net can do and costs, and what it saves to leave at the first one that is sure."""
    from hintkd.study.exits import Trained, as_data, exits_of, show
    from hintkd.study.exits import export as write
    limits.require("--batch", batch, limits.BATCH)
    limits.require("--threads", threads, limits.JOBS)
    confidences = fractions("--sure", sure)
    console.quiet = quiet or as_json
    trained = Trained(weights, net)
    with console.status("testing and timing"):
        found = exits_of(trained, confidences, batch, threads)
    show(console, found)
    if as_json:
        print(json.dumps(as_data(found), indent=1))
    if export:
        files = write(trained, found, export)
        console.print(f"{len(files)} files in {export}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON, for other programs.")] = False,
    quiet: Quiet = False,
) -> None:
    """Render everything in results/measured: published against measured, claims, figures; as Markdown, as a page, and as CSV."""
    from hintkd.results.export import as_data
    from hintkd.results.measured import read_groups
    from hintkd.results.report import MEASURED
    console.quiet = quiet or as_json
    render(Path.cwd())
    if as_json:
        print(json.dumps(as_data(read_groups(MEASURED)), indent=1))


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(help="tables, demos, methods, datasets, networks or options; default: all.",
                                               show_default=False)] = None,
) -> None:
    """The tables, demos, methods, data sets, networks and options that there are, with a line on each."""
    from hintkd.study.listing import show
    console.quiet = False
    show(console, what)


def render(here: Path) -> None:
    """Render the report and say where it is, as seen from the folder `here`."""
    from hintkd.backend import how_to_get
    from hintkd.results.export import FOLDER, write_csv
    from hintkd.results.html import write_page
    from hintkd.results.measured import read_groups
    from hintkd.results.report import FIGURES, MEASURED, write_report
    where, figures, tables, page = (path and os.path.relpath(path, here) for path in (write_report(), FIGURES, FOLDER, write_page()))
    write_csv(read_groups(MEASURED))
    drawn = f"its figures are in {figures}" if find_spec("matplotlib") else f"it has no figures without matplotlib: {how_to_get('report')}"
    also = f"as one page it is {page}" if page else f"it is no page without Jinja2: {how_to_get('report')}"
    console.print(f"the report is {where}, {drawn}, its tables as CSV in {tables}; {also}", markup=False, highlight=False, soft_wrap=True)


def finish(done: bool, name: str, here: Path) -> None:
    """Print a request's table, render the report, say where it is; exit with 1 if some of it could not be done."""
    from hintkd.results.summary import summary
    for line in summary(name):
        console.print(line, soft_wrap=True)
    render(here)
    if not done:
        raise typer.Exit(1)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 if stages failed, 2 for what the user can mend, 130 or 143 when it was stopped."""
    ended_by: list[int] = []

    def terminate(number: int, frame: object) -> None:
        ended_by.append(number)
        raise Terminated
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        if any("\0" in argument for argument in arguments or ()):
            raise UserError("an argument holds a character that no file's name can have")
        status = app(arguments, prog_name="hintkd", standalone_mode=False) or 0
    except UserError as error:
        return complain(str(error))
    except OSError as error:                                 # a full disk, a folder that may not be written
        return complain(f"{error.filename or 'writing failed'}: {error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):             # a usage error, whichever click typer brings
            raise
        return complain(error.format_message())
    finally:
        signal.signal(signal.SIGTERM, before)
    if status != INTERRUPTED:
        return status
    print("hintkd: stopped; the same command goes on from the last snapshots", file=sys.stderr)
    return TERMINATED if ended_by else INTERRUPTED


def complain(sentence: str) -> int:
    """Print a sentence on one line, whatever names are in it and however long they are."""
    short = re.sub(r"\S{300,}", lambda found: f"{found[0][:60]}...", " ".join(sentence.split()))
    print("hintkd: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in short), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
