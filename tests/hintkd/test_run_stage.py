"""The stage program on tiny stages: what it leaves behind, and that interruptions leave no trace in it."""
from __future__ import annotations

import ast
import json
import os
import random
import re
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
from hintkd import run_stage
from hintkd.backend import caffe_pb2, read_weights, write_text, write_weights
from hintkd.log_parser import parse
from hintkd.run_stage import StageFailed, run

PYTHON = Path(run_stage.__file__).parents[1]
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
             "test_iter": sum(solver.test_iter), "predictions": {}, "backend": "torchcaffe", "device": "cpu", "device_id": 0, "fast": True,
             "inexact": False, **more}
    (path / "stage.json").write_text(json.dumps(stage))
    return path


def bytes_of(folder: Path) -> bytes:
    return (folder / FINAL).read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, folder: Path, at: int) -> None:
    """Run the folder and stop it, as a kill would, when it comes to iteration `at`."""
    class Killed(BaseException):
        pass

    def killing(solver: Any, path: str) -> None:
        if solver.iter >= at:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(run_stage, "require_finite", killing)
        with pytest.raises(Killed):
            run(str(folder))


def test_a_stage_leaves_weights_log_and_every_output_of_the_saved_weights() -> None:
    folder = write_stage("a", tiny.net(), tiny.solver())
    result = run("a")
    assert result == json.loads((folder / "result.json").read_text())
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
    interrupt(monkeypatch, other, at)
    result = run("other")
    assert result["resumed"] == 1
    assert bytes_of(other) == bytes_of(whole)
    curves = [parse((folder / "log.txt").read_text()) for folder in (whole, other)]
    assert curves[0].loss == curves[1].loss and curves[0].test == curves[1].test


@pytest.mark.parametrize("damage", ["remove", "cut", "exchange"])
def test_a_snapshot_that_does_not_fit_its_sidecar_is_passed_over_for_the_one_before(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    whole, other = write_stage("whole", tiny.net(), tiny.solver()), write_stage("other", tiny.net(), tiny.solver())
    run("whole")
    interrupt(monkeypatch, other, 40)
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
    interrupt(monkeypatch, other, 40)
    for sidecar in other.glob("*.sidecar.json"):
        sidecar.unlink()
    run("other")
    assert bytes_of(other) == bytes_of(whole)


def test_going_on_under_other_numerics_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stage("a", tiny.net(), tiny.solver())
    interrupt(monkeypatch, folder, 40)
    progress = json.loads((folder / "progress.json").read_text())
    progress["environment"]["instructions"] = "ABACUS"
    (folder / "progress.json").write_text(json.dumps(progress))
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
    interrupt(monkeypatch, folder, 80)
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
    return subprocess.Popen([sys.executable, "-m", "hintkd.run_stage", *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PYTHON)}, **more)


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
    start = time.monotonic()
    assert command("whole").wait() == 0
    duration = time.monotonic() - start
    draw, kills = random.Random(5), 0
    while not (other / "result.json").exists():
        process = command("other")
        try:
            assert process.wait(draw.uniform(0.4, 1.0) * duration if kills < 4 else None) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills
    name = f"snapshot_iter_{iterations}.caffemodel"
    assert (other / name).read_bytes() == (whole / name).read_bytes()


def imported(name: str) -> set[str]:
    """A module of hintkd, and those that it imports."""
    found = re.findall(r"^ *from hintkd\.(\w+) import", (PYTHON / f"hintkd/{name}.py").read_text(), re.MULTILINE)
    return {name}.union(*map(imported, found))


INSIDE = sorted(imported("run_stage") | imported("layers"))


@pytest.mark.parametrize("name", INSIDE)
def test_what_runs_inside_another_caffe_is_python_3_8(name: str) -> None:
    source = (PYTHON / f"hintkd/{name}.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source


def test_the_linter_takes_it_for_python_3_8() -> None:
    project = tomllib.loads((PYTHON.parent / "pyproject.toml").read_text())
    assert project["tool"]["ruff"]["per-file-target-version"][f"python/hintkd/{{{','.join(INSIDE)}}}.py"] == "py38"


def test_it_starts_without_torch_protobuf_or_torchcaffe() -> None:
    code = "import sys, hintkd.run_stage; print(sorted({'torch', 'google.protobuf', 'torchcaffe', 'lmdb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PYTHON)}, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "[]\n"
