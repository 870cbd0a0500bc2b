"""Whatever file of a run is gone, empty or changed: it is named in one sentence, the run goes on, and it ends as if nothing had been."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hintkd import cli
from hintkd.files import read_sealed, write_sealed
from hintkd.methods import common, hint_2019
from hintkd.run.estimate import Estimate
from hintkd.run.executor import LocalExecutor
from hintkd.stage import program
from hintkd.study import reproduce
from torchcaffe.data.lmdb_reader import open_database

TABLE = {"title": "Mine", "source": "nobody", "dataset": "digits", "student": {"depth": 8, "widths": [2, 2, 2]}, "nets": 2,
         "teacher": {"depth": 8, "widths": [2, 2, 2], "dataset": "digits-teacher"}, "rows": [{"method": "kd"}],
         "schedule": {"iterations": 30, "teacher_iterations": 30}}
COMMAND = ["reproduce", "mine.yaml", "--methods", "kd", "--device", "cpu", "--scale", "2"]    # of scale 1 kept weights would serve instead
TOPS = ("runs", "results", "data")
Places, Capture = tuple[Path, Path, Path], pytest.CaptureFixture[str]
solver = common.solver


def with_snapshots(*arguments: Any, **more: Any) -> Any:
    """As common.solver, with snapshots for stages as short as these."""
    made = solver(*arguments, **more)
    made.snapshot = 20
    return made


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """A workspace, and what is in it after a whole run, and after one in which kd's net 1 was killed after its second snapshot."""
    root = tmp_path_factory.mktemp("damage")
    here, whole, killed = root / "here", root / "whole", root / "killed"
    here.mkdir()
    before = Path.cwd()
    os.chdir(here)
    with LocalExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        for module in (common, hint_2019):
            patch.setattr(module, "solver", with_snapshots)
        patch.setattr(cli, "finish", lambda *arguments: None)
        patch.setattr(reproduce, "LocalExecutor", lambda jobs: contextlib.nullcontext(pool))
        patch.setattr(reproduce, "estimate", lambda *arguments: Estimate({}, 0.0, 2, 0))
        Path("mine.yaml").write_text(json.dumps(TABLE))
        assert cli.main(["prepare", "digits"]) == 0
        assert cli.main(COMMAND) == 0
        save(whole)
        kill(stage_folder(1), patch)
        shutil.rmtree("results")
        shutil.rmtree("runs/weights")
        save(killed)
        yield here, whole, killed
    os.chdir(before)


def stage_folder(net: int) -> Path:
    """The folder of a net's kd stage."""
    (record,) = Path("results/measured/mine-scale2/kd").glob(f"net{net}.json")
    key = json.loads(record.read_text())["stages"][0]["key"]
    return Path(f"runs/stages/kd-{key[:12]}")


def kill(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Train the stage again, as a process that is killed after iteration 40."""
    for path in folder.iterdir():
        if path.name not in ("net.prototxt", "solver.prototxt", "stage.json", "key.json", "init.caffemodel"):
            path.unlink()

    class Killed(BaseException):
        pass

    def killing(solver: Any, path: str) -> None:
        if solver.iter > 40:
            raise Killed
    with patch.context() as inner:
        inner.setattr(program, "require_finite", killing)
        with pytest.raises(Killed):
            program.run(str(folder))
    for path in folder.glob("snapshot_iter_60.*"):
        path.unlink()


def save(place: Path) -> None:
    for top in filter(os.path.exists, TOPS):
        shutil.copytree(top, place / top)


def restore(place: Path) -> None:
    for top in TOPS:
        shutil.rmtree(top, ignore_errors=True)
        if (place / top).exists():
            shutil.copytree(place / top, top)


def harm(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:len(content) // 2], "flipped": content}[how])


def run(capsys: Capture, *command: str) -> tuple[int, str]:
    """Status and all that is said, of a command that must not say a traceback."""
    status = cli.main(list(command or COMMAND))
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    return status, said


def outcome() -> dict[str, Any]:
    """All that a run is for: weights, readable weights with their nets, and the results in the records."""
    patterns = ("runs/stages/*/weights.caffemodel", "runs/weights/**/*.*", "results/**/*.npz")
    found: dict[str, Any] = {str(path): path.read_bytes() for pattern in patterns for path in Path().glob(pattern)}
    for path in Path().glob("results/**/*.json"):
        content = json.loads(path.read_text())
        found[str(path)] = content.get("last", content)
    return found


def names_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("note: ")]


FINISHED = ["result.json", "progress.json", "weights.caffemodel", "predictions.npz", "snapshot_iter_60.caffemodel",
            "snapshot_iter_60.solverstate", "snapshot_iter_60.sidecar.json", "key.json", "stage.json", "net.prototxt", "solver.prototxt",
            "init.caffemodel", "log.txt"]
RESULTS = ["results/measured/mine-scale2/kd/net1.json", "results/measured/mine-scale2/kd/net1.npz", "runs/requests/mine-scale2.json",
           "runs/requests/mine-scale2.yaml", "runs/weights/mine-scale2/kd/net1.caffemodel", "runs/weights/mine-scale2/kd/net1.prototxt"]
UNFINISHED = ["progress.json", "snapshot_iter_40.caffemodel", "snapshot_iter_40.solverstate", "snapshot_iter_40.sidecar.json", "key.json",
              "stage.json", "net.prototxt", "solver.prototxt", "init.caffemodel", "log.txt"]
DATA = ["train_lmdb/data.mdb", "test_lmdb/data.mdb", "train_mean.binaryproto", "test_mean.binaryproto"]
WAYS = ["gone", "empty", "cut", "flipped"]


def mended(path: Path, place: Path, how: str, capsys: Capture) -> str:
    """Harm a file, run the command, and what it said of the file; the second run says nothing."""
    harm(path, how)
    status, said = run(capsys)
    (sentence,) = names_of(said)
    fault = {"gone": "is missing", "empty": "is empty"}.get(how, "is damaged")
    assert status == 0 and sentence.startswith(f"note: {path}") and (fault in sentence or path.name == "log.txt"), said
    assert names_of(run(capsys)[1]) == []
    return sentence


@pytest.mark.parametrize("how", WAYS[1:])
def test_a_folder_that_does_not_say_any_more_what_was_trained_there_is_told_of(how: str, places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    other = Path("runs/stages/kd-0123456789ab/key.json")
    write_sealed(other, {"key": "0" * 64, "parts": {"solver.max_iter": 60}})
    assert names_of(run(capsys)[1]) == []
    harm(other, how)
    (sentence,) = names_of(run(capsys)[1])
    assert sentence.startswith(f"note: {other} is ") and sentence.endswith("nothing else says what was trained there, so it is not used")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_stage(name: str, how: str, places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    mended(folder / name, whole, how, capsys)
    assert outcome() == before


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", RESULTS)
def test_what_was_made_of_finished_stages(name: str, how: str, places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before = outcome()
    mended(Path(name), whole, how, capsys)
    assert outcome() == before


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", UNFINISHED)
def test_a_stage_that_was_killed(name: str, how: str, places: Places, capsys: Capture) -> None:
    _, whole, killed = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    restore(killed)
    sentence = mended(folder / name, killed, how, capsys)
    assert outcome() == before
    log = (folder / "log.txt").read_text()
    if name.startswith("snapshot"):
        assert "goes on from iteration 20" in sentence and "starts at iteration 20" in log
    elif name == "progress.json":
        assert "the stage starts again" in sentence and log.count("starts at iteration 0") == 2
    else:
        assert "starts at iteration 40" in log


def test_a_stage_without_a_whole_snapshot_starts_again(places: Places, capsys: Capture) -> None:
    _, whole, killed = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    restore(killed)
    for iteration in (20, 40):
        harm(folder / f"snapshot_iter_{iteration}.solverstate", "flipped")
    status, said = run(capsys)
    assert status == 0 and [line.split("; ")[1] for line in names_of(said)] == ["the stage starts again"] * 2
    assert outcome() == before


def test_a_finished_stage_without_weights_starts_again(places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    harm(folder / "weights.caffemodel", "flipped")
    harm(folder / "snapshot_iter_60.caffemodel", "flipped")
    status, said = run(capsys)
    assert status == 0 and len(names_of(said)) >= 2
    assert outcome() == before


def test_a_log_that_is_lost_takes_the_curves_of_a_record_with_it(places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    record, folder = Path(RESULTS[0]), stage_folder(1)
    harm(folder / "log.txt", "flipped")
    record.unlink()
    status, said = run(capsys)
    assert status == 0 and len(names_of(said)) == 2
    (stage,) = json.loads(record.read_text())["stages"]
    assert stage["loss"] == [] and stage["test"] == {} and stage["last"]["accuracy"] > 0


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", DATA)
def test_data_are_refused_until_they_are_prepared_again(name: str, how: str, places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before = outcome()
    harm(Path("data/digits", name), how)
    status, said = run(capsys)
    assert status == 2 and said.count("\n") == 1 and f"data/digits/{name} is " in said and "prepare" in said
    assert cli.main(["prepare", "digits"]) == 0 and "is damaged and is written anew" in capsys.readouterr().out
    assert run(capsys)[0] == 0 and outcome() == before


@pytest.mark.parametrize("how", WAYS)
def test_the_description_of_data_is_written_again(how: str, places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before = outcome()
    mended(Path("data/digits/dataset.json"), whole, how, capsys)
    assert outcome() == before


def test_a_dry_run_tells_and_leaves_all_as_it_is(places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    path = stage_folder(1) / "weights.caffemodel"
    harm(path, "flipped")
    before = path.read_bytes()
    _, said = run(capsys, *COMMAND, "--dry-run")
    assert len(names_of(said)) == 1 and path.read_bytes() == before


def test_status_names_what_is_damaged_and_goes_on(places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    harm(stage_folder(1) / "result.json", "flipped")
    shutil.copy("runs/requests/mine-scale2.json", "runs/requests/other.json")
    _, said = run(capsys, "status")
    assert "2 of 3 stages finished" in said and "kd net1 damaged" in " ".join(said.split())
    assert "runs/requests/other.yaml is missing" in said
    assert open_database("data/digits/train_lmdb")


def test_damage_upon_damage_is_mended_too(places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    for name in ("snapshot_iter_60.caffemodel", "init.caffemodel", "weights.caffemodel"):
        harm(folder / name, "gone")
        assert run(capsys)[0] == 0
    assert outcome() == before


def test_an_input_whose_sources_are_gone_is_told_and_not_needed(places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    harm(folder / "init.caffemodel", "flipped")
    (teacher,) = Path("runs/stages").glob("teacher-*")
    shutil.rmtree(teacher)
    status, said = run(capsys)
    assert status == 0 and f"note: {folder}/init.caffemodel is damaged; nothing needs it any more" in said
    assert outcome() == before


@pytest.mark.parametrize("harmed", [False, True])
def test_a_result_from_before_there_were_digests_gets_its_own(harmed: bool, places: Places, capsys: Capture) -> None:
    _, whole, _ = places
    restore(whole)
    before, folder = outcome(), stage_folder(1)
    old = {name: value for name, value in read_sealed(folder / "result.json").items() if name != "digests"}
    (folder / "result.json").write_text(json.dumps(old))
    if harmed:
        harm(folder / "weights.caffemodel", "flipped")
    status, said = run(capsys)
    assert status == 0 and ("weights.caffemodel was damaged; it is written again from the final snapshot" in said) == harmed
    assert "weights.caffemodel" in read_sealed(folder / "result.json")["digests"] and outcome() == before
