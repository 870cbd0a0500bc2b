"""The stage process on tiny stages: what it leaves behind, and that interruptions leave no trace in it."""
from __future__ import annotations

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import torchcaffe
from hintkd.backend import caffe_pb2, read_weights, write_text, write_weights
from hintkd.errors import StageFailed
from hintkd.files import read_sealed, write_sealed
from hintkd.stage import program as run_stage
from hintkd.stage.log import Tail, parse
from hintkd.stage.program import run, run_together
from running import wait_for

PYTHON = Path(run_stage.__file__).parents[2]
FINAL = "snapshot_iter_60.caffemodel"


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path)
    return tmp_path


def write_stage(folder: str, net: caffe_pb2.NetParameter, solver: caffe_pb2.SolverParameter, **more: Any) -> Path:
    path = Path(folder)
    path.mkdir()
    solver.net, solver.snapshot_prefix = f"{folder}/net.prototxt", f"{folder}/snapshot"
    (path / "net.prototxt").write_text(write_text(net))
    (path / "solver.prototxt").write_text(write_text(solver))
    stage = {"title": folder, "key": "k", "program": "solve", "iterations": solver.max_iter, "snapshot": solver.snapshot, "threads": 1,
             "test_iter": sum(solver.test_iter), "predictions": {}, "backend": "torchcaffe", "device": "cpu", "device_id": 0,
             "precision": "fp32", "inexact": False, "group": [more.get("key", "k")], **more}
    (path / "stage.json").write_text(json.dumps(stage))
    return path


def bytes_of(folder: Path) -> bytes:
    return (folder / FINAL).read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, *folders: Path, at: int) -> None:
    """Run the folders and stop it, as a kill would, when they come to iteration `at`."""
    class Killed(BaseException):
        pass

    def killing(solver: Any, path: str) -> None:
        if solver.iter >= at:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(run_stage, "require_finite", killing)
        with pytest.raises(Killed):
            run_together([str(folder) for folder in folders])


def test_a_stage_leaves_weights_log_and_every_output_of_the_saved_weights() -> None:
    folder = write_stage("a", tiny.net(), tiny.solver())
    result = run("a")
    assert result == read_sealed(folder / "result.json")
    assert sorted(p.name for p in folder.iterdir()) == [
        "lock", "log.txt", "net.prototxt", "progress.json", "result.json", FINAL, "snapshot_iter_60.sidecar.json",
        "snapshot_iter_60.solverstate", "solver.prototxt", "stage.json"]
    net = torchcaffe.Net("a/net.prototxt", torchcaffe.TEST)
    net.copy_from("a/" + FINAL)
    passes = [{name: float(value) for name, value in net.forward().items()} for _ in range(tiny.TEST // 10)]
    assert result["outputs"] == pytest.approx({name: np.mean([p[name] for p in passes]) for name in ("accuracy", "loss")})
    log = parse((folder / "log.txt").read_text())
    assert log.done and [i for i, _ in log.loss] == [0, 10, 20, 30, 40, 50, 60]
    assert [i for i, _ in log.test["accuracy"]] == [0, 20, 40, 60]


def test_when_a_net_is_tested_on_the_way_does_not_change_what_comes_out() -> None:
    results = []
    for name, interval, first in (("a", 20, True), ("b", 7, False), ("c", 1000, False)):
        solver = tiny.solver()
        solver.test_interval, solver.test_initialization = interval, first
        folder = write_stage(name, tiny.net(), solver)
        results.append((run(name)["outputs"], bytes_of(folder)))
    assert results[0] == results[1] == results[2]
    assert len({Path(name, "log.txt").read_text().count("Testing net") for name in "abc"}) == 3


def test_a_finished_stage_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    write_stage("a", tiny.net(), tiny.solver())
    result = run("a")
    monkeypatch.setattr(run_stage, "PROGRAMS", {})
    assert run("a") == result


def test_it_trains_as_the_solver_alone_would() -> None:
    folder = write_stage("a", tiny.net(), tiny.solver())
    run("a")
    solver = torchcaffe.get_solver("a/solver.prototxt")
    solver.fast = True
    solver.param.snapshot = 0
    solver.step(60)
    for (_, saved), params in zip([p for p in read_weights(folder / FINAL) if p[1]], solver.net.params.values(), strict=True):
        for blob, param in zip(saved, params, strict=True):
            assert blob.tobytes() == param.data.tobytes()


def test_it_starts_from_init_caffemodel() -> None:
    folder = write_stage("a", tiny.net(), tiny.solver(lr=0.0))
    start = np.arange(16 * 36, dtype=np.float32).reshape(16, 36) / 1000
    write_weights(folder / "init.caffemodel", [("hidden", [start, np.ones(16, np.float32)])])
    run("a")
    saved = dict(read_weights(folder / FINAL))
    assert np.array_equal(saved["hidden"][0], start)
    assert saved["fc"][0].any()


@pytest.mark.parametrize("at", [20, 40, 60])
def test_an_interrupted_stage_ends_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    whole, other = write_stage("whole", tiny.net(), tiny.solver()), write_stage("other", tiny.net(), tiny.solver())
    run("whole")
    interrupt(monkeypatch, other, at=at)
    result = run("other")
    assert result["resumed"] == 1
    assert bytes_of(other) == bytes_of(whole)
    curves = [parse((folder / "log.txt").read_text()) for folder in (whole, other)]
    assert curves[0].loss == curves[1].loss and curves[0].test == curves[1].test


@pytest.mark.parametrize("damage", ["remove", "cut", "exchange"])
def test_a_snapshot_that_does_not_fit_its_sidecar_is_passed_over_for_the_one_before(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    whole, other = write_stage("whole", tiny.net(), tiny.solver()), write_stage("other", tiny.net(), tiny.solver())
    run("whole")
    interrupt(monkeypatch, other, at=40)
    newest, older = (other / f"snapshot_iter_{i}.sidecar.json" for i in (40, 20))
    if damage == "remove":
        newest.unlink()
    else:
        newest.write_text(older.read_text() if damage == "exchange" else "{")
    run("other")
    log = (other / "log.txt").read_text()
    assert "Cannot go on from other/snapshot_iter_40.solverstate" in log and "starts at iteration 20" in log
    assert bytes_of(other) == bytes_of(whole)


def test_without_a_usable_snapshot_the_stage_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, other = write_stage("whole", tiny.net(), tiny.solver()), write_stage("other", tiny.net(), tiny.solver())
    run("whole")
    interrupt(monkeypatch, other, at=40)
    for sidecar in other.glob("*.sidecar.json"):
        sidecar.unlink()
    run("other")
    assert bytes_of(other) == bytes_of(whole)


def test_going_on_under_other_numerics_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stage("a", tiny.net(), tiny.solver())
    interrupt(monkeypatch, folder, at=40)
    progress = read_sealed(folder / "progress.json")
    progress["environment"]["instructions"] = "ABACUS"
    write_sealed(folder / "progress.json", progress)
    with pytest.raises(StageFailed, match=r"a was begun with other numerics \(instructions ABACUS -> .*--inexact"):
        run("a")
    stage = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**stage, "inexact": True}))
    result = run("a")
    assert result["inexact"] and "starts at iteration 40" in (folder / "log.txt").read_text()


def test_what_never_came_to_a_snapshot_starts_again_under_any_numerics() -> None:
    folder = write_stage("a", tiny.net(), tiny.solver())
    (folder / "progress.json").write_text('{"environment": {"instructions": "ABACUS"}}')
    assert not run("a")["inexact"]


def test_only_the_last_two_snapshots_stay_while_a_stage_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stage("a", tiny.net(), tiny.solver(iterations=100))
    interrupt(monkeypatch, folder, at=80)
    assert sorted(p.name for p in folder.glob("*.solverstate")) == [f"snapshot_iter_{i}.solverstate" for i in (40, 60, 80)]   # 80 is new


def test_a_stage_without_test_layers_has_no_outputs() -> None:
    write_stage("a", tiny.net(tested=False), tiny.solver(tested=False))
    assert run("a")["outputs"] == {}


def test_a_diverging_stage_fails_with_its_iteration_and_publishes_nothing() -> None:
    folder = write_stage("a", tiny.net(scale=1.0), tiny.solver(lr=1e30))
    with pytest.raises(StageFailed, match=r"diverged at iteration 10: .* is not a finite number \(see a/log.txt\)"):
        run("a")
    assert not (folder / "result.json").exists()


def test_weights_whose_test_is_not_finite_fail_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stage("a", tiny.net(scale=1.0), tiny.solver(lr=0.0))
    write_weights(folder / "init.caffemodel", [("fc", [np.full((4, 16), 3e38, np.float32), np.zeros(4, np.float32)])])
    monkeypatch.setattr(run_stage, "require_finite", lambda solver, path: None)
    with pytest.raises(StageFailed, match="the test output .* is not a finite number"):
        run("a")
    assert not (folder / "result.json").exists()


def test_the_caller_keeps_its_own_output(capfd: pytest.CaptureFixture[str]) -> None:
    write_stage("a", tiny.net(), tiny.solver())
    run("a")
    print("mine")
    assert capfd.readouterr() == ("mine\n", "")


def command(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "hintkd.stage.program", *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PYTHON)}, **more)


def test_the_log_is_whole_whatever_the_environment_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    write_stage("a", tiny.net(), tiny.solver())
    monkeypatch.setenv("GLOG_minloglevel", "1")
    assert command("a").wait() == 0
    log = parse(Path("a/log.txt").read_text())
    assert [i for i, _ in log.loss] == [0, 10, 20, 30, 40, 50, 60] and [i for i, _ in log.test["accuracy"]] == [0, 20, 40, 60]


def test_two_processes_never_write_one_folder() -> None:
    write_stage("a", tiny.net(), tiny.solver(iterations=400))
    both = [command("a") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    log = Path("a/log.txt").read_text()
    assert log.count("starts at iteration 0") == 1 and log.count("Optimization Done") == 1


def test_the_command_says_errors_in_one_sentence() -> None:
    write_stage("a", tiny.net(), tiny.solver())
    Path("a/net.prototxt").write_text("layer { nme: 'x' }")
    process = command("a")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.count("\n") == 1 and "a/net.prototxt" in errors and "see a/log.txt" in errors
    assert "Traceback" in Path("a/log.txt").read_text()


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_no_trace_in_the_final_bytes() -> None:
    iterations = 4000
    whole, other = (write_stage(name, tiny.net(hidden=64), tiny.solver(iterations=iterations)) for name in ("whole", "other"))
    assert command("whole").wait() == 0
    tail, draw, kills = Tail(str(other / "log.txt")), random.Random(5), 0
    for mark in sorted(draw.randrange(iterations // 2) for _ in range(4)):
        process = command("other")
        wait_for(lambda mark=mark, process=process: (tail.poll().iteration or 0) >= mark or process.poll() is not None, f"iteration {mark}")
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills and command("other").wait() == 0
    name = f"snapshot_iter_{iterations}.caffemodel"
    assert (other / name).read_bytes() == (whole / name).read_bytes()


# ------------------------------------------------------------------------------------------------------------------- a group

def write_group(*folders: str, iterations: int = 60, **more: Any) -> list[Path]:
    """Stages that differ in their seed and, in their frozen part, in nothing."""
    made = []
    for seed, folder in enumerate(folders, start=1):
        path = write_stage(folder, tiny.net(prefix="old/"), tiny.solver(seed, iterations), key=f"key of {folder}",
                           **{"group": [f"key of {each}" for each in folders], **more})
        draw = np.random.default_rng(0)
        write_weights(path / "init.caffemodel", [("old/hidden", [draw.normal(0, 0.1, (16, 36)).astype(np.float32),
                                                                 np.zeros(16, np.float32)])])
        made.append(path)
    return made


def test_a_group_ends_as_its_stages_do_alone_each_with_its_own_log_and_files() -> None:
    alone = [write_group(name)[0] for name in "xyz"]
    for seed, folder in enumerate(alone, start=1):
        solver = tiny.solver(seed)
        solver.net, solver.snapshot_prefix = f"{folder}/net.prototxt", f"{folder}/snapshot"
        (folder / "solver.prototxt").write_text(write_text(solver))
        run(str(folder))
    group = write_group("a", "b", "c")
    results = run_together(["a", "b", "c"])
    for one, other, result in zip(alone, group, results, strict=True):
        weights = [dict(read_weights(folder / FINAL)) for folder in (one, other)]
        assert all(np.allclose(a, b, rtol=0, atol=1e-5) for name in weights[0]
                   for a, b in zip(weights[0][name], weights[1][name], strict=True))
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
        assert result["together"] == 3 and result == read_sealed(other / "result.json")
        logs = [parse((folder / "log.txt").read_text()) for folder in (one, other)]
        assert logs[1].done and [i for i, _ in logs[0].loss] == [i for i, _ in logs[1].loss]
        assert np.allclose(logs[0].loss, logs[1].loss, atol=1e-4) and logs[0].test.keys() == logs[1].test.keys()
        assert (other / "log.txt").read_text().count("starts at iteration 0") == 1
    assert len({bytes_of(folder) for folder in group}) == 3


@pytest.mark.parametrize("at", [20, 40, 60])
def test_an_interrupted_group_ends_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    whole, other = write_group("a", "b"), write_group("c", "d")
    run_together(["a", "b"])
    interrupt(monkeypatch, *other, at=at)
    results = run_together(["c", "d"])
    assert [result["resumed"] for result in results] == [1, 1]
    assert [bytes_of(folder) for folder in whole] == [bytes_of(folder) for folder in other]
    assert f"starts at iteration {at}" in (other[1] / "log.txt").read_text()


def test_a_group_goes_on_from_where_all_of_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, other = write_group("a", "b"), write_group("c", "d")
    run_together(["a", "b"])
    interrupt(monkeypatch, *other, at=40)
    (other[1] / "snapshot_iter_40.sidecar.json").unlink()
    run_together(["c", "d"])
    assert all("starts at iteration 20" in (folder / "log.txt").read_text() for folder in other)
    assert "Cannot go on from d/snapshot_iter_40.solverstate" in (other[1] / "log.txt").read_text()
    assert [bytes_of(folder) for folder in whole] == [bytes_of(folder) for folder in other]


def test_another_group_starts_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    group = write_group("a", "b", "c")
    interrupt(monkeypatch, *group, at=40)

    def run_as(*names: str) -> list[dict[str, Any]]:
        for name in names:
            stage = json.loads(Path(name, "stage.json").read_text())
            Path(name, "stage.json").write_text(json.dumps({**stage, "group": [f"key of {each}" for each in names]}))
        return run_together(names)
    results = run_as("b", "c")
    assert [(result["resumed"], result["together"]) for result in results] == [(0, 2), (0, 2)]
    assert (group[1] / "log.txt").read_text().count("starts at iteration 0") == 2
    with pytest.raises(StageFailed, match="b was finished meanwhile, but not in this group"):
        run_as("a", "b", "c")


def test_folders_that_are_not_their_group_are_refused() -> None:
    write_group("a", "b")
    for folders in (["a"], ["b", "a"]):
        with pytest.raises(StageFailed, match="/stage.json names the group key of a, key of b: give the folders of these keys"):
            run_together(folders)


def test_a_group_fails_with_the_first_of_its_stages_that_does() -> None:
    a, b = write_group("a", "b")
    (b / "solver.prototxt").write_text((b / "solver.prototxt").read_text().replace("base_lr: 0.02", "base_lr: 1e30"))
    process = command("--together", "a", "b")
    _, errors = process.communicate()
    assert process.returncode == 1 and errors.count("\n") == 1
    assert "the training diverged at iteration 10" in errors and "(see b/log.txt)" in errors
    assert not (a / "result.json").exists() and json.loads((a / "failure.json").read_text()) in errors


def test_kill_9_leaves_no_trace_in_a_groups_final_bytes() -> None:
    iterations = 1200
    whole, other = (write_group(*names, iterations=iterations) for names in ("ab", "cd"))
    assert command("--together", "a", "b").wait() == 0
    kills, log = 0, other[1] / "log.txt"
    for mark in ("Iteration 110 ", "Iteration 500 "):
        process = command("--together", "c", "d")
        while not (log.exists() and mark in log.read_text()) and process.poll() is None:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 2 and command("--together", "c", "d").wait() == 0
    name = f"snapshot_iter_{iterations}.caffemodel"
    assert [(folder / name).read_bytes() for folder in whole] == [(folder / name).read_bytes() for folder in other]


def test_bf16_trains_otherwise_and_is_measured_in_float32() -> None:
    one, other = write_stage("a", tiny.net(), tiny.solver()), write_stage("b", tiny.net(), tiny.solver(), precision="bf16")
    run("a")
    result = run("b")
    assert bytes_of(one) != bytes_of(other)
    net = torchcaffe.Net("b/net.prototxt", torchcaffe.TEST, weights="b/" + FINAL)
    losses = [float(net.forward()["loss"]) for _ in range(tiny.TEST // 10)]
    assert result["outputs"]["loss"] == np.mean(losses)


# ----------------------------------------------------------------------------------------------------------- inside any caffe

def inside() -> list[Path]:
    """The layers and the stage process, and the modules of hintkd that they import."""
    found, open_ = set(), [*(PYTHON / "hintkd/layers").glob("*.py"), *(PYTHON / "hintkd/stage").glob("*.py")]
    while open_:
        path = open_.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r"^ *from (hintkd[\w.]*) import", path.read_text(), re.MULTILINE)
            open_ += [PYTHON / (name.replace(".", "/") + ".py") for name in names if (PYTHON / (name.replace(".", "/") + ".py")).exists()]
    return sorted(found)


@pytest.mark.parametrize("path", inside(), ids=lambda path: str(path.relative_to(PYTHON)))
def test_what_runs_inside_another_caffe_is_python_3_8(path: Path) -> None:
    source = path.read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source or not re.search(r"^(import|from|def|class) ", source, re.MULTILINE)


def test_the_linter_takes_it_for_python_3_8() -> None:
    patterns = tomllib.loads((PYTHON.parent / "pyproject.toml").read_text())["tool"]["ruff"]["per-file-target-version"]
    told = {each for pattern, version in patterns.items() if version == "py38" for each in braces(pattern)}
    assert all(any(path.relative_to(PYTHON.parent).match(each) for each in told) for path in inside())


def braces(pattern: str) -> list[str]:
    """A glob with at most one {a,b}, spelled out."""
    head, opened, rest = pattern.partition("{")
    names, _, tail = rest.partition("}")
    return [head + name + tail for name in names.split(",")] if opened else [pattern]


def test_it_starts_without_torch_protobuf_or_torchcaffe() -> None:
    code = "import sys, hintkd.stage.program; print(sorted({'torch', 'google.protobuf', 'torchcaffe', 'lmdb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PYTHON)}, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "[]\n"
