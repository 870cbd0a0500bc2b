"""Evidence that is committed: a fresh copy of records and weights trains nothing again, and `verify` says whether they are true."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from data_prep.check import files
from hintkd import cli
from hintkd.files import read_sealed, write_sealed
from hintkd.study.probabilities import keep
from torchcaffe.proto.caffe_pb2 import Datum

FAKE_CAFFE = Path(__file__).parent / "fake_caffe"
TABLE = {
    "title": "Mine", "source": "nobody", "dataset": "digits", "student": {"depth": 8, "widths": [2, 2, 2]},
    "teacher": {"depth": 8, "widths": [2, 2, 4]}, "nets": 2, "rows": [{"method": "hint-kd"}],
    "schedule": {"iterations": 8, "teacher_iterations": 8, "hint_iterations": 8}}
STAGES = 6                                                   # the teacher, two original students, Stage 1, two nets
NETS = ["hint-kd/net1", "hint-kd/net2", "original/net1", "original/net2", "teacher/net1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a small table of one's own was trained in full."""
    folder, here = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    try:
        Path("mine.yaml").write_text(json.dumps(TABLE))
        assert cli.main(["prepare", "digits"]) == 0
        assert cli.main(["reproduce", "mine.yaml", "--device", "cpu"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def clone(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a fresh copy of the repository has, and the data."""
    shutil.copytree(trained / "results", tmp_path / "results")
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copy(trained / "mine.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, " ".join(out.split()), err


def reproduce(capsys: pytest.CaptureFixture[str], *arguments: str, table: str = "mine.yaml") -> str:
    status, out, err = run(capsys, "reproduce", table, "--device", "cpu", *arguments)
    assert status == 0, err
    return out


def run_stages() -> set[str]:
    return {path.parent.name.rsplit("-", 1)[0] for path in Path("runs").glob("stages/*/result.json")}


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for top in ("results/measured", "results/weights") for path in Path(top).glob("**/*") if path.is_file()}


def record(net: str, folder: str = "mine") -> dict:
    return read_sealed(f"results/measured/{folder}/{net}.json")


def rewrite(net: str, content: dict) -> None:
    write_sealed(f"results/measured/mine/{net}.json", content)


def damage(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)


# ------------------------------------------------------------------------------------------------- what need not be trained again

def test_a_full_schedules_weights_are_kept_and_their_digest_is_recorded(trained: Path) -> None:
    for net in NETS:
        kept, own = (trained / top / "mine" / f"{net}.caffemodel" for top in ("results/weights", "runs/weights"))
        assert kept.read_bytes() == own.read_bytes() and kept.with_suffix(".prototxt").exists()
        entry = json.loads((trained / f"results/measured/mine/{net}.json").read_text())["weights"]
        assert entry["file"] == f"results/weights/mine/{net}.caffemodel" and entry["test_iter"] == 4
        assert entry["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()


def test_a_shortened_schedules_weights_are_not_kept(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce(capsys, "--scale", "0.5", "--methods", "original", "--nets", "1")
    assert record("original/net1", "mine-scale0.5")["weights"] is None and not Path("results/weights/mine-scale0.5").exists()


def test_a_fresh_copy_runs_nothing_again_and_changes_nothing(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents()
    assert f"{STAGES} stages, {STAGES} of them finished" in reproduce(capsys)
    assert run_stages() == set() and contents() == before


def test_status_shows_what_is_committed_as_finished(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):                                       # before anything was asked for here, and after
        status, out, _ = run(capsys, "status", "mine")
        assert status == 0 and f"mine: {STAGES} of {STAGES} stages finished" in out
        assert "teacher finished in results/weights" in out
        assert "hint-kd: hint finished recorded, weights not kept" in out
        reproduce(capsys)


def test_status_says_why_a_net_does_not_count(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage("results/weights/mine/original/net1.caffemodel")
    _, out, _ = run(capsys, "status")
    assert f"mine: {STAGES - 1} of {STAGES} stages finished" in out and "original net1 waiting" in out
    assert "original/net1.caffemodel, which results/measured/mine/original/net1.json names, is damaged" in out


def test_status_without_the_data_says_what_is_missing(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("data")
    status, out, _ = run(capsys, "status")
    assert status == 0 and re.search(r"mine: 5 nets in results/weights, but data/digits/\w+(.\w+)? is missing: prepare the data", out)


def test_what_is_not_committed_is_run_and_nothing_else(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = record("hint-kd/net2"), contents()
    for path in ("measured/mine/hint-kd/net2.json", "measured/mine/hint-kd/net2.npz", "weights/mine/hint-kd/net2.caffemodel"):
        Path("results", path).unlink()
    assert f"{STAGES} stages, {STAGES - 2} of them finished" in reproduce(capsys)
    assert run_stages() == {"hint", "kd"}                    # Stage 1, because a net starts from it whose weights are not there
    again = record("hint-kd/net2")
    assert (again["last"], again["weights"]) == (before[0]["last"], before[0]["weights"])
    assert {path for path, content in contents().items() if before[1][path] != content} == {Path("results/measured/mine/hint-kd/net2.json")}


@pytest.mark.parametrize("change", [damage, os.unlink])
def test_weights_that_are_not_the_records_are_named_and_trained_again(clone: Path, capsys: pytest.CaptureFixture[str], change) -> None:
    weights = "results/weights/mine/original/net1.caffemodel"
    before = contents()
    change(weights)
    out = reproduce(capsys)
    why = "is missing" if change is os.unlink else "is damaged"
    assert f"{weights}, which results/measured/mine/original/net1.json names, {why}: the net counts as not trained" in out
    assert run_stages() == {"original"} and contents()[Path(weights)] == before[Path(weights)]
    assert "not trained" not in reproduce(capsys)


def test_another_table_with_the_same_stages_takes_them_and_their_records(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text(json.dumps({**TABLE, "title": "Other", "rows": [{"method": "kd"}], "nets": 1}))
    assert "3 stages, 2 of them finished" in reproduce(capsys, table="other.yaml")
    assert run_stages() == {"kd"}
    ours, theirs = record("teacher/net1", "other"), record("teacher/net1")
    assert ours["weights"]["file"] == "results/weights/other/teacher/net1.caffemodel" and Path(ours["weights"]["file"]).exists()
    assert Path("results/measured/other/teacher/net1.npz").read_bytes() == Path("results/measured/mine/teacher/net1.npz").read_bytes()
    assert ours["provenance"] == theirs["provenance"] and ours["last"] == theirs["last"] and ours["table"] == "other"


def test_nets_of_another_setting_are_not_taken_and_it_is_said_why(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reproduce(capsys, "--precision", "bf16", "--methods", "original", "--nets", "1")
    assert "1 stage, 0 of them finished" in out
    assert "the nets of mine in results/weights are not the ones asked for: they were trained with precision fp32" in out


def test_kept_weights_serve_in_the_place_of_a_damaged_stage(trained: Path, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "runs", "runs")
    (folder,) = {path.parent for path in Path("runs/stages").glob("original-*/result.json")
                 if path.parent.name.endswith(record("original/net1")["stages"][0]["key"][:12])}
    damage(str(folder / "predictions.npz"))
    out = reproduce(capsys)
    assert f"{folder}/predictions.npz is damaged; the stage's weights in results/weights serve instead" in out
    assert f"{STAGES} stages, {STAGES} of them finished" in out and not (folder / "result.json").exists()


def test_a_damaged_record_is_told_and_its_net_is_trained_again(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = record("original/net2")
    Path("results/measured/mine/original/net2.json").write_text("[]")
    assert "results/measured/mine/original/net2.json is damaged: the net counts as not trained" in run(capsys, "status")[1]
    out = reproduce(capsys)
    assert "results/measured/mine/original/net2.json is damaged: the net counts as not trained" in out and run_stages() == {"original"}
    assert record("original/net2")["last"] == before["last"]


# ------------------------------------------------------------------------------------------------------------------------- verify

def test_verify_finds_the_same_accuracies(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents()
    status, out, _ = run(capsys, "verify", "--device", "cpu")
    assert status == 0 and "5 of 5 nets as recorded" in out and out.count("the same") == 5
    assert contents() == before and not list(Path("runs").iterdir())


def test_verify_compares_to_a_hundredth_of_a_point_on_another_machine(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for net, off in (("teacher/net1", 0.0001), ("original/net1", 0.00011)):
        content = record(net)
        content["provenance"]["instructions"] = "another"
        content["last"]["accuracy"] += off
        rewrite(net, content)
    status, out, _ = run(capsys, "verify", "mine", "--device", "cpu")
    assert status == 1 and "4 of 5 nets as recorded" in out
    assert out.count("within 0.01 points") == 1 and "original/net1: its accuracy differs by more than 0.01 points" in out


def test_verify_counts_what_no_net_puts_out(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("five.yaml").write_text(json.dumps({**TABLE, "title": "Five", "metric": "top-5", "nets": 1, "rows": [{"method": "original"}]}))
    reproduce(capsys, table="five.yaml")
    last = record("original/net1", "five")["last"]
    assert last["top-5"] > last["accuracy"]
    status, out, _ = run(capsys, "verify", "five", "--device", "cpu")
    assert status == 0 and "2 of 2 nets as recorded" in out and f"{100 * last['top-5']:.2f}" in out


def test_verify_says_what_differs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage("results/weights/mine/original/net1.caffemodel")
    damage("results/weights/mine/original/net2.prototxt")
    content = record("teacher/net1")
    content["last"]["accuracy"] += 1e-6
    rewrite("teacher/net1", content)
    shutil.copy("results/measured/mine/hint-kd/net1.npz", "results/measured/mine/hint-kd/net2.npz")
    status, out, _ = run(capsys, "verify", "--device", "cpu")
    assert status == 1 and "1 of 5 nets as recorded" in out
    assert "results/measured/mine/hint-kd/net2.npz does not hold its class probabilities" in out
    assert "original/net1.caffemodel, which" in out and "original/net2.prototxt, which" in out and out.count("is damaged") == 2
    assert re.search(r"teacher/net1: its outputs are .* are recorded, on the same engine and kind of processor", out)


def test_verify_reads_all_records_of_the_data(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lmdb.open("data/digits/train_lmdb") as environment, environment.begin(write=True) as transaction:
        datum = Datum.FromString(transaction.get(b"00000001"))         # no net is tested on it
        datum.data = datum.data[:-1] + bytes([datum.data[-1] ^ 1])
        transaction.put(b"00000001", datum.SerializeToString())
    description = read_sealed("data/digits/dataset.json")
    write_sealed("data/digits/dataset.json", {**description, "files": files(Path("data/digits"))})
    assert "already prepared" in run(capsys, "prepare", "digits")[1]
    status, out, _ = run(capsys, "verify", "--device", "cpu")
    assert status == 1 and re.search(r"data/digits/test_lmdb is not what mine/\S+ was trained and tested with", out)


def test_verify_without_the_data_or_without_nets_is_one_sentence(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("data")
    status, _, err = run(capsys, "verify")
    assert status == 2 and err.count("\n") == 1 and re.search(r"data/digits/test_\S+ is missing: prepare the data set", err)
    status, _, err = run(capsys, "verify", "/mine")
    assert status == 2 and err == "hintkd: results/weights has no nets of /mine; there are those of mine\n"
    shutil.rmtree("results")
    status, _, err = run(capsys, "verify")
    assert status == 2 and err == "hintkd: results/weights has no nets: full schedules leave theirs there\n"


def test_verify_tests_in_a_real_caffe_too(clone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_CAFFE))        # its accuracy is always a half
    for net in NETS:
        keep(Path(f"results/measured/mine/{net}.npz"), np.tile(np.eye(4), (4, 1)), np.tile(np.arange(4), 4))       # and these its scores
        content = record(net)
        content["last"]["accuracy"] = 0.5 if net != "original/net1" else 0.6
        rewrite(net, content)
    status, out, err = run(capsys, "verify", "--backend", "caffe", "--caffe-python", sys.executable)
    assert status == 1 and "3 of 5 nets as recorded" in out, err
    assert "mine/original/net1 60.00 50.00 differs" in out and "mine/teacher/net1 50.00 not tested" in out
    assert re.search(r"mine/teacher/net1: cannot reshape array of size 40 into shape \(10,2\)", out)      # it knows nets of one width
