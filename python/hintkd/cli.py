"""The command line: `hintkd demo | generate | list | prepare | reproduce | status | report | verify`.

Turns flags into calls, and errors into one sentence with exit status 2.  Most imports stand inside the commands: torch takes seconds,
and `hintkd --help` should not.
"""
from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")          # before torch: its waiting threads would spin and slow all others

import typer
from rich.console import Console
from rich.progress import track

from hintkd import limits
from hintkd.errors import UserError
from hintkd.experiment import SCHEDULES, Options
from hintkd.methods.choices import OPEN_OPTIONS

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Hint-based knowledge transfer as it was published, trained again and compared.")
console = Console()
Command = TypeVar("Command", bound=Callable[..., None])
T = TypeVar("T")
INTERRUPTED, TERMINATED = 130, 143                           # exit status after Ctrl-C and SIGTERM, as a shell has it

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what is wrong.")]
Jobs = Annotated[int | None, typer.Option(help="Stages side by side; default: as many as the cores allow.", show_default=False)]
Widths = Annotated[str, typer.Option(help="Channels of the three stacks, such as 16,32,64.")]


def with_options(command: Command) -> Command:
    """Give a command a flag for each of the papers' open points (experiment.Options), None where it is not given."""
    signature = inspect.signature(command, eval_str=True)
    known = {option.name: option for option in OPEN_OPTIONS}
    added = []
    for option in fields(Options):
        kind = str if option.name == "label_tau" else type(option.default)
        default = f"{option.default:.6g}" if isinstance(option.default, float) else str(option.default).lower()
        text = f"Open in the paper: {known[option.name].meaning}. Default: the table's; {default} where it does not say."
        added.append(inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                                       annotation=Annotated[kind | None, typer.Option(help=text, show_default=False)]))
    kept = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *added]}
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, with the label term's temperature as a number where it is one.  Raises UserError naming the flag."""
    found = {name: value for name, value in options.items() if value is not None}
    if re.fullmatch("[0-9]{1,9}", found.get("label_tau", "")):
        found["label_tau"] = int(found["label_tau"])
    for name, value in found.items():
        if name in limits.NUMBERS:
            limits.require("--" + name.replace("_", "-"), value, limits.NUMBERS[name])
    return found


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """1,2,3 as numbers, each once.  Raises UserError naming the flag."""
    if not re.fullmatch("-?[0-9]{1,30}(,-?[0-9]{1,30})*", text):
        raise UserError(f"{flag} {limits.shown(text)}: give whole numbers with commas between them, such as 1,2,3")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def names(flag: str, text: str) -> tuple[str, ...]:
    """a,b,c as names, each once.  Raises UserError naming the flag."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(found):
        raise UserError(f"{flag} {limits.shown(text)}: give names with commas between them")
    return found


def three(flag: str, text: str) -> tuple[int, int, int]:
    """Channel counts of three stacks.  Raises UserError naming the flag."""
    found = re.fullmatch("([0-9]{1,9}),([0-9]{1,9}),([0-9]{1,9})", text)
    if not found:
        raise UserError(f"{flag} {limits.shown(text)}: give three channel counts, such as 16,32,64")
    counts = int(found[1]), int(found[2]), int(found[3])
    for count in counts:
        limits.require(flag, count, limits.NUMBERS["widths"])
    return counts


def bar(items: Iterable[T], description: str, total: int | None, /) -> Iterable[T]:
    """rich's progress bar, as data_prep asks for it."""
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)


def show_version(wanted: bool) -> None:
    if wanted:
        from hintkd.extras import version
        print(f"hintkd {version()}")
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
    return [name for name in SCHEDULES if name.startswith(incomplete)]


@app.command()
def demo(
    workspace: Annotated[Path, typer.Option(help="The folder that gets its data, runs and results.")] = Path("demo"),
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """Every method in small, on scikit-learn's handwritten digits: minutes, and seconds when it was run before."""
    from hintkd.study.demo import demo as run
    console.quiet = quiet
    here = Path.cwd()
    finish(run(workspace, console, jobs), "demo", here)


@app.command()
@with_options
def generate(
    table: Annotated[str | None, typer.Argument(help="A table whose stages are written, all of them; without it, those of one experiment, "
                                                     "which the flags describe.", autocompletion=complete_table)] = None,
    dataset: Annotated[str, typer.Option(help="mnist, cifar10, cifar100 or digits.")] = "cifar10",
    method: Annotated[str, typer.Option(help="original, kd, hint-kd, layerwise-hint ...")] = "layerwise-hint",
    teacher_depth: Annotated[int, typer.Option(help="6n+2: 8, 14, 20, 26, 32 ...")] = 26,
    student_depth: Annotated[int, typer.Option(help="6m+2.")] = 14,
    teacher_widths: Widths = "16,32,64",
    student_widths: Widths = "16,32,64",
    regressor: Annotated[bool, typer.Option("--regressor", help="Put a convolution on guided layers narrower than their hints.")] = False,
    net: Annotated[int, typer.Option(help="Which of the nets that differ in their seed, counted from 1.")] = 1,
    out: Annotated[Path, typer.Option(help="The folder that gets prototxt/ and solvers/.")] = Path(),
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Write the prototxts of every stage, which any Caffe trains: nets into prototxt/, solvers into solvers/."""
    from hintkd.methods.generate import generate_all as write
    from hintkd.run.progress import counted
    console.quiet = quiet
    experiments = table_experiments(table, options) if table is not None else [one_experiment(
        dataset, method, teacher_depth, student_depth, three("--teacher-widths", teacher_widths), three("--student-widths", student_widths),
        regressor, net, options)]
    files = write(experiments, out)
    console.print(f"{counted(len(files), 'prototxt')} in {out / 'prototxt'} and {out / 'solvers'}", markup=False, highlight=False,
                  soft_wrap=True)


def table_experiments(table: str, options: dict[str, Any]) -> list[Any]:
    from hintkd.study.table import TEACHER, find_table
    return [x for x in find_table(table).changed(options=given(options)).experiments() if x.method != TEACHER]


def one_experiment(dataset: str, method: str, teacher_depth: int, student_depth: int, teacher_widths: tuple[int, int, int],
                   student_widths: tuple[int, int, int], regressor: bool, net: int, options: dict[str, Any]) -> Any:
    from hintkd.experiment import DATASETS, SCHEDULES, Experiment, ResNet
    from hintkd.methods.hint_2019 import METHODS
    from hintkd.study.table import near
    for flag, name, known in (("--dataset", dataset, list(SCHEDULES)), ("--method", method, list(METHODS))):
        if name not in known:
            raise UserError(f"{flag} {limits.shown(name)}: unknown; {near(name, known)}")
    for flag, value, allowed in (("--teacher-depth", teacher_depth, limits.NUMBERS["depth"]), ("--net", net, limits.NET),
                                 ("--student-depth", student_depth, limits.NUMBERS["depth"])):
        limits.require(flag, value, allowed)
    teacher = DATASETS["digits-teacher"] if dataset == "digits" else None
    return Experiment(method=method, dataset=DATASETS[dataset], student=ResNet(student_depth, student_widths), net=net,
                      teacher=ResNet(teacher_depth, teacher_widths), teacher_dataset=teacher, table=f"{dataset}/{method}",
                      schedule=SCHEDULES[dataset], regressor=regressor, options=Options(**given(options)))


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
@with_options
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6, figure4, 5, 7 to 10, demo, or a YAML file of one's own.",
                                         autocompletion=complete_table)],
    teacher_depth: Annotated[int | None, typer.Option(help="Another teacher: 6n+2 layers.", show_default=False)] = None,
    student_depth: Annotated[int | None, typer.Option(help="Another student: 6m+2 layers.", show_default=False)] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="A trained teacher's caffemodel.", show_default=False)] = None,
    teacher_prototxt: Annotated[Path | None, typer.Option(help="Its net, where that is not the table's.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the stages and what they will take, and stop.")] = False,
    scale: Annotated[float, typer.Option(help="Shorten every schedule in proportion.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="Complete replications, each with a teacher of its own.")] = 1,
    methods: Annotated[str | None, typer.Option(help="Only these, with commas between them.", show_default=False)] = None,
    nets: Annotated[str | None, typer.Option(help="Only these, such as 1,2.", show_default=False)] = None,
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
    **options: Any,
) -> None:
    """Train what a table needs, resuming what was begun, and compare with what was published."""
    from hintkd.backend import read_net, read_weights
    from hintkd.study.reproduce import Request, resources
    from hintkd.study.reproduce import reproduce as run
    from hintkd.study.table import find_table
    for flag, depth in (("--teacher-depth", teacher_depth), ("--student-depth", student_depth)):
        limits.require(flag, 8 if depth is None else depth, limits.NUMBERS["depth"])
    for flag, file, read in (("--teacher-weights", teacher_weights, read_weights), ("--teacher-prototxt", teacher_prototxt, read_net)):
        if file is not None:
            if not file.is_file():
                raise UserError(f"{flag} {file}: there is no such file")
            read(file)
    changed = find_table(table).changed(teacher_depth=teacher_depth, student_depth=student_depth, teacher_weights=teacher_weights,
                                        teacher_prototxt=teacher_prototxt, data=data, options=given(options))
    request = Request(changed, scale, repeats, None if methods is None else names("--methods", methods),
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
    what: Annotated[str | None, typer.Argument(help="tables, methods, datasets, networks or options; default: all.",
                                               show_default=False)] = None,
) -> None:
    """The tables, methods, data sets, networks and options that there are, with a line on each."""
    from hintkd.study.listing import show
    console.quiet = False
    show(console, what)


def render(here: Path) -> None:
    """Render the report and say where it is, as seen from the folder `here`."""
    from hintkd.extras import how_to_get
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
