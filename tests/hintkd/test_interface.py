"""What the command line offers beside its work: version, lists, JSON, CSV, completion, quiet, curves for TensorBoard."""
from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import synthetic
from experiments import METHODS
from hintkd import cli
from hintkd.backend import how_to_get
from hintkd.errors import UserError
from hintkd.methods.hint_2019 import Options
from hintkd.results.export import as_data, write_csv
from hintkd.results.measured import read_groups
from hintkd.run import scalars
from hintkd.study.names import demo_names
from hintkd.study.table import find_table, table_names

PYTHON = Path(cli.__file__).parents[1]
Capture = pytest.CaptureFixture[str]
LOG = """\
I0101 00:00:00.000000 1 program.py:1] Stage kd starts at iteration {start}
I0101 00:00:01.000000 1 solver.cpp:1] Iteration {start}, loss = 2.5
I0101 00:00:01.000000 1 solver.cpp:1] Iteration {start}, lr = 0.1
I0101 00:00:02.000000 1 solver.cpp:1] Iteration {end}, Testing net (#0)
I0101 00:00:02.000000 1 solver.cpp:1]     Test net output #0: accuracy = 0.75
"""


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_version_is_one_line(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"hintkd (\d+\.\S+|of a checkout that is not installed)\n", capsys.readouterr().out)


def test_the_lists_have_everything_with_a_line(capsys: Capture) -> None:
    assert cli.main(["list"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name in (*table_names(), *demo_names(), *METHODS, "mnist", "cifar100", "resnet", *Options().as_dict()):
        assert any(line.startswith(f"{name} ") and len(line.split(maxsplit=1)[1]) > 10 for line in lines), name
    assert cli.main(["list", "methods"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("methods: ")
    assert cli.main(["list", "metods"]) == 2 and "did you mean 'methods'" in capsys.readouterr().err


def test_a_shell_completes_names() -> None:
    def completed(line: str) -> list[str]:
        words = line.split()
        environment = {**os.environ, "PYTHONPATH": f"{PYTHON}{os.pathsep}{PYTHON.parent}", "_HINTKD_COMPLETE": "complete_bash",
                       "COMP_WORDS": line, "COMP_CWORD": str(len(words) - (not line.endswith(" ")))}
        done = subprocess.run([sys.executable, "-c", "import sys; from hintkd.cli import main; sys.exit(main())"], env=environment,
                              capture_output=True, text=True, check=False)
        return done.stdout.split()
    assert completed("hintkd reproduce figure1") == ["figure10"]
    assert "cifar100" in completed("hintkd prepare ")
    assert {"reproduce", "list", "status"} <= set(completed("hintkd "))


def test_measured_values_leave_as_json_and_csv(empty: Path, capsys: Capture) -> None:
    table = find_table("table3")
    synthetic.measure(empty, table, {"teacher": [0.39], "kd": [0.56, 0.57, 0.55], "layerwise-hint": [0.41, 0.40, 0.44]})
    assert cli.main(["report", "--json"]) == 0
    (data,) = json.loads(capsys.readouterr().out)
    assert data == json.loads(json.dumps(as_data(read_groups(empty / "results/measured"))[0]))
    methods = {each["row"]: each for each in data["rows"]}
    assert methods["kd"]["mean"] == pytest.approx(0.56)
    assert [net["last"] for net in methods["kd"]["nets"]] == pytest.approx([0.56, 0.57, 0.55])
    assert {claim["verdict"] for claim in data["claims"]} >= {"not judged"}
    with Path("results/csv/table3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["net"], float(row["last"])) for row in rows] == [
        ("teacher", "1", 0.39), ("kd", "1", 0.56), ("kd", "2", 0.57), ("kd", "3", 0.55), ("layerwise-hint", "1", 0.41),
        ("layerwise-hint", "2", 0.4), ("layerwise-hint", "3", 0.44)]
    assert rows[1]["published"] == str(table.row("kd").published[0])


def test_records_of_two_kinds_in_one_folder_share_a_csv_file(empty: Path) -> None:
    table = find_table("table3")
    synthetic.measure(empty, table, {"kd": [0.5]})
    synthetic.measure(empty, table, {"hint-kd": [0.5]}, provenance={**synthetic.PROVENANCE, "precision": "bf16"})
    (path,) = write_csv(read_groups(empty / "results/measured"))
    assert {line.split(",")[-2] for line in path.read_text().splitlines()[1:]} == {"fp32", "bf16"}


def test_quiet_says_nothing_but_what_is_wrong(capsys: Capture) -> None:
    assert cli.main(["generate", "table3", "--quiet"]) == 0 and capsys.readouterr() == ("", "")
    assert cli.main(["report", "--quiet"]) == 0 and capsys.readouterr() == ("", "")
    assert cli.main(["prepare", "digits", "--quiet"]) == 0 and capsys.readouterr() == ("", "")
    assert cli.main(["generate", "table3", "--quiet", "--rows", "kdd"]) == 2 and "kdd" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["demo", "report", "cluster"])
def test_a_missing_extra_is_a_command_for_this_python(extra: str) -> None:
    command = how_to_get(extra)
    assert command.startswith(f"{sys.executable} -m pip install ") and ("hintkd[" not in command or extra == "cluster")


def test_without_an_extra_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["prepare", "digits"]) == 2
    assert "scikit-learn, which is not installed: " in capsys.readouterr().err and not Path("data").exists()
    assert cli.main(["demo", "--workspace", "here"]) == 2 and not Path("here").exists()


# ----------------------------------------------------------------------------------------------------------------- TensorBoard

def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a folder of event files."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loader.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_curves_are_written_as_a_log_grows_and_anew_where_it_goes_back(empty: Path) -> None:
    pytest.importorskip("tensorboard")
    log = empty / "log.txt"
    log.write_text(LOG.format(start=0, end=50))
    followed = scalars.Followed(empty / "events", log)
    followed.write()
    log.write_text(log.read_text() + LOG.format(start=100, end=150))
    followed.write()
    found = written(empty / "events")
    assert found["loss"] == [(0, 2.5), (100, 2.5)] and found["test/accuracy"] == [(50, 0.75), (150, 0.75)]
    assert [step for step, _ in found["lr"]] == [0, 100] and len(found) == 3
    log.write_text(log.read_text() + LOG.format(start=50, end=70))
    followed.write()
    followed.close()
    assert written(empty / "events")["loss"] == [(0, 2.5), (50, 2.5)]


def test_a_log_dir_without_the_extra_or_in_a_file_is_a_sentence(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def label(task: object) -> str:
        return "x"
    (empty / "file").write_text("")
    monkeypatch.setattr(scalars, "tensorboard", lambda module: SimpleNamespace())
    with pytest.raises(UserError, match="--log-dir file: File exists; name another folder"):
        scalars.Scalars(Path("file"), label)

    def missing(module: str) -> None:
        raise ImportError
    monkeypatch.setattr(scalars, "tensorboard", missing)
    with pytest.raises(UserError, match="--log-dir needs TensorBoard's writer: .* -m pip install "):
        scalars.Scalars(Path("new"), label)
