"""The command line, end to end, on the embedded digits at a hundredth of the demo's schedule."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

import torchcaffe
from hintkd import cli
from hintkd.files import read_sealed, write_sealed
from hintkd.methods.hint_2019 import Options
from hintkd.results.measured import read_groups
from hintkd.study import probabilities
from hintkd.study.reproduce import Request
from running import wait_for

PYTHON = Path(cli.__file__).parents[1]
SMALL = ["reproduce", "demo", "--scale", "0.01", "--methods", "hint-kd", "--nets", "1,2", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the digits."""
    folder = tmp_path_factory.mktemp("workspace")
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main(["prepare", "digits"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def workspace(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The workspace after SMALL."""
    done = subprocess.run([sys.executable, "-m", "hintkd.cli", *SMALL], cwd=place, env=environment(), capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    (place / "first-run.txt").write_text(done.stdout)
    return place


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(PYTHON), str(PYTHON.parent)]), "COLUMNS": "160"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, " ".join(out.split()), err


# ------------------------------------------------------------------------------------------------------------------ sentences

@pytest.mark.parametrize("command", ["demo", "generate", "prepare", "reproduce", "status", "verify", "report"])
def test_every_flag_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and len(out) > 60
    assert not re.search(r"--[a-z-]+(?: <\w+>)? (?=--)(?!--no-)", out.replace(" / --no-", "/no-")), "a flag without a text"


@pytest.mark.parametrize("command", ["generate", "reproduce"])
def test_commands_have_few_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is a field of an experiment is set, and has no flag."""
    _, out, _ = run(capsys, command, "--help")
    assert "--set" in out and not any("--" + option.name.replace("_", "-") in out for option in fields(Options))


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["reproduce", "tabel3"], "there is no table 'tabel3'; did you mean 'table3'?"),
    (["reproduce", "nowhere.yaml"], "nowhere.yaml cannot be read: No such file"),
    (["reproduce", "table3"], "data/mnist/train_lmdb is missing: prepare the data set first, with `hintkd prepare mnist`"),
    (["demo", "lamda"], "there is no demo 'lamda'; did you mean 'lambda'?"),
    (["reproduce", "demo", "--methods", "hint-dk"], "demo has no row 'hint-dk'; did you mean 'hint-kd'?"),
    (["reproduce", "demo", "--nets", "one"], "--nets one: give whole numbers"),
    (["reproduce", "demo", "--nets", "0"], "--nets 0: give a whole number from 1 to 3"),
    (["reproduce", "demo", "--scale", "0"], "--scale 0.0: give a number from 0.0001 to 100"),
    (["reproduce", "demo", "--scale", "half"], "'--scale'"),
    (["reproduce", "demo", "--repeats", "0"], "--repeats"),
    (["reproduce", "demo", "--jobs", "0"], "--jobs 0: give a whole number from 1 to 256"),
    (["reproduce", "demo", "--together", "0"], "--together 0: give a whole number from 1 to 64"),
    (["reproduce", "demo", "--precision", "fp16"], "--precision fp16: choose one of fp32, tf32, bf16"),
    (["reproduce", "demo", "--precision", "tf32", "--device", "cpu"], "--precision tf32: only a GPU has it"),
    (["reproduce", "demo", "--backend", "caffe", "--caffe-python", "x", "--precision", "bf16"], "--precision bf16: a real Caffe cannot"),
    (["reproduce", "demo", "--backend", "caffe", "--caffe-python", "x", "--together", "2"], "--together 2: a real Caffe cannot"),
    (["reproduce", "demo", "--device", "tpu"], "--device tpu: choose cpu, gpu or gpu:N"),
    (["reproduce", "demo", "--backend", "caffe2"], "--backend caffe2: choose one of torchcaffe, caffe"),
    (["reproduce", "demo", "--backend", "caffe"], "--backend caffe needs --caffe-python"),
    (["reproduce", "demo", "--backend", "caffe", "--caffe-python", "nowhere/python"], "--caffe-python nowhere/python: No such file"),
    (["reproduce", "demo", "--caffe-python", "python"], "give both or neither"),
    (["reproduce", "demo", "--set", "teacher.depth=21"], "teacher: a ResNet of depth 21 does not exist"),
    (["reproduce", "demo", "--set", "teacher.weights=no.caffemodel"], "--set teacher.weights=no.caffemodel: there is no such file"),
    (["reproduce", "demo", "--set", "teacher.prototxt=t.prototxt"], "--set teacher.prototxt=t.prototxt: there is no such file"),
    (["reproduce", "demo", "--set", "shortcut=C"], "shortcut is 'C'; it must be one of 'A', 'B'"),
    (["reproduce", "demo", "--set", "label_tau=two"], "label_tau: two will not do; choose one of 1, tau"),
    (["reproduce", "demo", "--set", "lamda=3"], "lamda: unknown; did you mean 'lambda'?"),
    (["reproduce", "demo", "--set", "lambda"], "--set lambda: write NAME=VALUE"),
    (["reproduce", "demo", "--set", "lambda=[3"], "--set lambda=[3:1:3: not YAML"),
    (["reproduce", "demo", "--set", "lambda=high"], "--set: lambda: high will not do; give a number from 0 to 1,000,000"),
    (["reproduce", "demo", "--set", "student.net=resent"], "student.net: 'resent' is not a network; did you mean 'resnet'?"),
    (["reproduce", "demo", "--set", "student.dpeth=8"], "student.dpeth: unknown field; did you mean 'depth'?"),
    (["reproduce", "demo", "--set", "teacher.method=hint"], "teacher.method: 'hint' is not a method; did you mean"),
    (["reproduce", "demo", "--data", "nowhere"], "nowhere has no train_lmdb"),
    (["reproduce", "demo", "--bogus"], "--bogus"),
    (["reproduce"], "Missing argument"),
    (["generate"], "name a table, or instead of it --student, --method"),
    (["generate", "table3", "--student", "vgg8"], "name a table, or instead of it --student, --method"),
    (["generate", "--student", "wrn_16_2", "--method", "kd"], "'kd' needs a teacher"),
    (["generate", "--student", "wrn_16_2", "--teacher", "wrn_40_2", "--method", "kdd"], "'kdd' is not a method; did you mean 'kd'?"),
    (["generate", "--student", "wrm_16_2", "--method", "original"], "there is no network 'wrm_16_2'"),
    (["generate", "table3", "--rows", "kkd"], "table3 has no row 'kkd'; did you mean 'kd'?"),
    (["generate", "table3", "--set", "student.widths=[1,2]"], "student.widths"),
    (["generate", "table7"], "there is no table 'table7'"),
    (["prepare", "mnits"], "did you mean 'mnist'?"),
    (["prepare", "mnist", "--from", "nowhere"], "--from nowhere is not a folder"),
    (["status", "table5"], "table5 was not asked for"),
    (["verify", "table5"], "results/weights has no nets of table5"),
    (["verify", "--backend", "caffe"], "--backend caffe needs --caffe-python"),
    (["frobnicate"], "frobnicate"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_the_user_can_mend_is_one_sentence(arguments: list[str], sentence: str, workspace: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert sentence in err and err.startswith("hintkd: ") and err.count("\n") == 1


def test_a_test_set_that_would_not_be_looked_at_whole_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = "data/digits"
    Path("part.yaml").write_text(json.dumps({
        "title": "Part", "source": "nobody", "student": {"depth": 8}, "rows": [],
        "dataset": {"name": "digits", "classes": 10, "channels": 1, "size": 8, "batch": 32, "crop": True, "test_batch": 100, "test_iter": 3,
                    "train_lmdb": f"{folder}/train_lmdb", "test_lmdb": f"{folder}/test_lmdb"}}))
    status, _, err = run(capsys, "reproduce", "part.yaml", "--device", "cpu")
    assert status == 2 and "data/digits/test_lmdb holds 1,000 images, and a test looks at 100 x 3: give the" in err


# ------------------------------------------------------------------------------------------------------------------- generate

def test_generate_writes_what_any_caffe_trains_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "table3", "--rows", "hint-kd", "--nets", "1", "--set", "teacher.depth=14", "--set", "shortcut=B"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "6 prototxts" in out
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.prototxt")}
    assert len(files) == 6 and all((tmp_path / top).is_dir() for top in ("prototxt", "solvers"))
    assert run(capsys, *arguments)[0] == 0
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.prototxt")}


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prototxt").write_text("a file where a folder is needed")
    status, _, err = run(capsys, "generate", "table3", "--out", str(tmp_path))
    assert status == 2 and err.count("\n") == 1 and f"{tmp_path}/prototxt" in err


def test_generate_writes_all_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "table3", "--out", str(tmp_path))[0] == 0
    stages = {path.stem for path in tmp_path.glob("prototxt/mnist/**/*.prototxt")}
    assert {"1-teacher", "1-original", "1-hint", "3-hint3", "4-kd"} <= stages


# ------------------------------------------------------------------------------------------------------------------ reproduce

def test_a_dry_run_says_what_it_would_take_and_does_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "reproduce", "demo", "--dry-run", "--methods", "kd", "--nets", "1", "--scale", "0.02", "--device", "cpu")
    assert status == 0
    assert re.search(r"2 stages, 0 of them finished", out)
    assert re.search(r"teacher 24 \S+ s runs/stages/teacher-\w{12}", out) and re.search(r"kd net1 12 \S+ s runs/stages/kd-\w{12}", out)
    assert re.search(r"about \S+ s? ?with \d+ stages? side by side on cpu, and \d+ MB of disk", out)
    assert not list(Path("runs").glob("stages/*-*/result.json")) or "trained" in str(workspace)


def test_a_table_is_trained_and_recorded(trained: Path) -> None:
    out = (trained / "first-run.txt").read_text()
    assert "4 stages, 0 of them finished" in out and "[4/4]" in out and "report" in out
    record = json.loads((trained / "results/measured/demo-scale0.01/hint-kd/net2.json").read_text())
    assert set(record) == {"schema", "table", "row", "method", "net", "repeat", "scale", "seed", "options", "choices", "metric", "last",
                           "best", "iterations", "wall_s", "stages", "provenance", "weights", "scaled_from", "sha256"}
    assert (record["table"], record["method"], record["net"], record["scale"], record["iterations"]) == ("demo", "hint-kd", 2, 0.01, [9, 6])
    assert [stage["title"] for stage in record["stages"]] == ["hint", "kd"]
    kd = record["stages"][1]
    assert kd["lr"] == [[0, 0.1], [3, 0.01], [4, 0.001]] or [rate for _, rate in kd["lr"]] == [0.1, 0.01, 0.001]
    assert [i for i, _ in kd["loss"]] == list(range(7)) and [i for i, _ in kd["test"]["accuracy"]] == [6]
    assert record["stages"][0]["train"]["hint_loss"][0][1] > 0 and record["stages"][0]["last"] == {}
    best = record["best"]["accuracy"]
    assert best["value"] == max(value for _, value in kd["test"]["accuracy"]) or best["value"] == record["last"]["accuracy"]
    provenance = record["provenance"]
    assert provenance["engine"] == torchcaffe.ENGINE and provenance["threads"] == 1 and provenance["device"] == "cpu"
    assert record["options"].keys() == {option.name for option in fields(Options)}
    assert (trained / "results/measured/demo-scale0.01/teacher/net1.json").exists()


def test_trained_weights_lie_under_readable_names_and_give_what_is_recorded(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    place = "runs/weights/demo-scale0.01/hint-kd/net1"
    net = torchcaffe.Net(place + ".prototxt", torchcaffe.TEST, weights=place + ".caffemodel")
    accuracy = np.mean([float(net.forward()["accuracy"]) for _ in range(4)])
    record = json.loads(Path("results/measured/demo-scale0.01/hint-kd/net1.json").read_text())
    assert accuracy == pytest.approx(record["last"]["accuracy"])
    assert record["stages"][-1]["weights"] == place + ".caffemodel"


def test_a_demo_is_a_table_with_its_data_in_a_workspace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(cli.__file__).parents[2] / "results/paper", "demo/results/paper")
    table = Path("demo/results/paper/demo-lambda.yaml")
    found = yaml.safe_load(table.read_text())
    table.write_text(yaml.safe_dump({**found, "nets": 2, "schedule": {"iterations": 4, "teacher_iterations": 3, "hint_iterations": 2}}))
    status, out, err = run(capsys, "demo", "lambda", "--jobs", "1")
    assert status == 0, err
    assert re.search(r"What is claimed: \S+ .*fixed > linear-to-1", out) and "linear-to-0" in out
    (group,) = read_groups(tmp_path / "demo/results/measured", "demo-lambda")
    assert {record.name: len(record.stages) for record in group.records} == {
        "teacher": 1, "original": 1, "fixed": 2, "linear-to-1": 2, "linear-to-0": 2, "steps-to-1": 2}
    assert (tmp_path / "demo/results/report.md").is_file()


def test_class_probabilities_are_kept_beside_the_record_and_give_its_accuracy(trained: Path) -> None:
    for net in (1, 2):
        place = trained / f"results/measured/demo-scale0.01/hint-kd/net{net}"
        found, labels = probabilities.read(place.with_suffix(".npz"))
        assert found.shape == (1000, 10)
        accuracy = json.loads(place.with_suffix(".json").read_text())["last"]["accuracy"]
        assert np.mean(found.argmax(axis=1) == labels) == pytest.approx(accuracy, abs=0.005)       # equal thousandths count for the first
    (group,) = read_groups(trained / "results/measured", "demo-scale0.01")
    assert group.ensembles == {}                             # the row has a third net


def test_running_again_finds_everything_done(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    found = [*Path("runs").glob("**/*"), *Path("results/measured").glob("**/*.*")]
    files = {path: path.stat().st_mtime_ns for path in found if path.is_file()}
    status, out, _ = run(capsys, *SMALL)
    assert status == 0 and "4 stages, 4 of them finished" in out and "about" not in out
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_curves_of_finished_stages_are_copied_for_tensorboard(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(trained)
    assert run(capsys, *SMALL, "--log-dir", str(tmp_path))[0] == 0
    record = json.loads(Path("results/measured/demo-scale0.01/hint-kd/net1.json").read_text())
    found = loader.EventAccumulator(str(tmp_path / "hint-kd-net1/kd"))
    found.Reload()
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars("test/accuracy")] == [
        (iteration, value) for iteration, value in record["stages"][1]["test"]["accuracy"]]


def test_status_says_what_is_finished_and_why_it_would_run_again(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    status, out, _ = run(capsys, "status", "demo")
    assert status == 0 and "demo-scale0.01: 4 of 4 stages finished" in out and "hint-kd net2: kd finished" in out
    facts = Path("data/digits/dataset.json")
    before = facts.read_text()
    try:
        write_sealed(facts, {**read_sealed(facts), "fingerprint": "another"})
        _, out, _ = run(capsys, "status")
    finally:
        facts.write_text(before)
    assert "demo-scale0.01: 0 of 4 stages finished" in out
    assert "teacher changed was finished, and would run again, because of the data of" in out


def test_report_renders_what_was_measured(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    status, out, _ = run(capsys, "report")
    assert status == 0 and "results/report.md" in out and "as one page it is results/report.html" in out
    assert Path("results/report.md").exists() and Path("results/report.html").exists()


def test_an_option_makes_a_table_of_its_own(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    status, out, _ = run(capsys, "reproduce", "demo", "--scale", "0.01", "--methods", "original", "--nets", "1", "--set", "shortcut=B",
                         "--device", "cpu")
    assert status == 0 and "1 stage, 0 of them finished" in out
    (table,) = Path("results/measured").glob("demo-shortcut-B-scale0.01/table.yaml")
    record = json.loads((table.parent / "original/net1.json").read_text())
    assert record["options"]["shortcut"] == "B"


def test_nets_that_train_together_in_another_precision_say_so(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    status, out, err = run(capsys, "reproduce", "demo", "--scale", "0.005", "--methods", "kd", "--nets", "1,2", "--device", "cpu",
                           "--together", "2", "--precision", "bf16")
    assert status == 0 and "3 stages, 0 of them finished" in out, err
    records = [json.loads(Path(f"results/measured/demo-scale0.005/kd/net{net}.json").read_text()) for net in (1, 2)]
    for record in records:
        assert (record["provenance"]["precision"], record["provenance"]["together"], record["stages"][0]["together"]) == ("bf16", 2, 2)
    assert records[0]["stages"][0]["loss"] != records[1]["stages"][0]["loss"]
    report = Path("results/report.md").read_text()
    assert "bf16, torchcaffe" in report and "2 trained together" in report
    assert "demo-scale0.005: 3 of 3 stages finished" in run(capsys, "status", "demo")[1]


def test_a_teacher_from_elsewhere_takes_the_tables_place(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    teacher = "runs/weights/demo-scale0.01/teacher/net1"
    status, out, err = run(capsys, "reproduce", "demo", "--scale", "0.01", "--methods", "kd", "--nets", "1", "--device", "cpu",
                           "--set", f"teacher.weights={teacher}.caffemodel", "--set", f"teacher.prototxt={teacher}.prototxt")
    assert status == 0, err
    assert "1 stage, 0 of them finished" in out


def test_a_stage_that_fails_is_told_and_the_rest_is_done(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    table = Path("mine.yaml")
    table.write_text(json.dumps({
        "title": "Mine", "source": "nobody", "dataset": "digits", "student": {"depth": 8, "widths": [2, 2, 2]},
        "teacher": {"depth": 8, "widths": [2, 2, 2]}, "nets": 1, "rows": [{"method": "kd"}, {"method": "hint-kd"}],
        "schedule": {"iterations": 8, "teacher_iterations": 8, "hint_iterations": 8, "hint_lr": 1_000_000}}))
    status, out, _ = run(capsys, "reproduce", "mine.yaml", "--device", "cpu")
    assert status == 1
    assert "hint-kd net1: hint failed: the training diverged at iteration" in out and "not done: hint-kd net1" in out
    assert out.count("diverged") == 1
    assert "hint-kd net1: hint failed the training diverged" in run(capsys, "status", "mine")[1]
    assert Path("results/measured/mine/kd/net1.json").exists() and not Path("results/measured/mine/hint-kd/net1.json").exists()


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_that_it_goes_on_and_leaves_nothing_running(workspace: Path, stop: signal.Signals, status: int) -> None:
    command = ["reproduce", "demo", "--methods", "original", "--nets", "1", "--device", "cpu", "--scale", "50", "--seed", str(status)]
    before = begun(workspace)
    process = subprocess.Popen([sys.executable, "-m", "hintkd.cli", *command], cwd=workspace, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))       # a background job ignores it
    wait_for(lambda: begun(workspace) != before or process.poll() is not None, "a stage that begins")
    process.send_signal(stop)
    _, err = process.communicate()
    assert process.returncode == status
    assert err == "hintkd: stopped; the same command goes on from the last snapshots\n"
    assert processes_in(workspace) - {os.getpid()} == set()


def begun(workspace: Path) -> set[Path]:
    """The folders of stages that have been started."""
    return {path.parent for path in workspace.glob("runs/stages/original-*/progress.json")}


def processes_in(folder: Path) -> set[int]:
    """The processes whose current directory this is."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                found.add(int(process.name))
    return found


@pytest.mark.slow
def test_the_demo_runs_every_method_and_the_second_time_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hintkd.study.demo.Request", partial(Request, scale=0.01))
    status, out, _ = run(capsys, "demo", "--workspace", "here")
    assert status == 0 and "43 stages, 0 of them finished" in out
    assert "the report is here/results/report.md, its figures are in here/results/figures" in out
    methods = {path.parent.name for path in tmp_path.glob("here/results/measured/demo-scale0.01/*/net1.json")}
    assert methods == {"teacher", "original", "kd", "kd-equal-iterations", "hint-kd", "hint-kd-plus", "layerwise-hint", "concurrent-hint",
                       "sl-resnet", "sl-resnet-kd"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hintkd.study.reproduce.LocalExecutor", None)             # nothing is run
    assert "43 of them finished" in run(capsys, "demo", "--workspace", "here")[1]
