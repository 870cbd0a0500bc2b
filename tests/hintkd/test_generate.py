"""Generated files: the committed ones are what the generator writes today, and Caffe's own tool can use them as they lie."""
from __future__ import annotations

from pathlib import Path

import pytest

from experiments import METHODS, experiment
from hintkd.backend import read_net
from hintkd.experiment import Experiment
from hintkd.methods.generate import generate
from hintkd.methods.method import stages_of
from hintkd.nets.resnet import ResNet
from hintkd.study.table import load_table
from torchcaffe.proto import prototxt

ROOT = Path(__file__).parents[2]


def test_committed_files_are_those_of_tables_1_and_3(tmp_path: Path) -> None:
    written = {path.relative_to(tmp_path) for name in ("table1", "table3")
               for x in load_table(ROOT / "results" / "paper" / f"{name}.yaml").experiments() for path in generate(x, tmp_path)}
    committed = {path.relative_to(ROOT) for folder in ("prototxt", "solvers") for path in (ROOT / folder).rglob("*.prototxt")}
    assert committed == written
    for path in sorted(written):
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} has drifted: run `hintkd generate table1` and `table3`"


@pytest.mark.parametrize("method", [*METHODS, "teacher"])
def test_files_hold_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.chdir(tmp_path)                                        # paths are relative to the repository's root
    x = experiment(method)
    files = generate(x)
    assert [path.parts[0] for path in files] == ["prototxt", "solvers"] * (len(files) // 2)
    for stage, path in zip(reversed(stages_of(x)), reversed(files[1::2]), strict=False):
        solver = prototxt.read_solver(path)
        assert (solver.net, solver.snapshot_prefix) == (str(files[files.index(path) - 1]), str(path.with_suffix("")))
        assert read_net(solver.net) == stage.net
        for field in ("net", "snapshot_prefix"):
            solver.ClearField(field)
        assert solver == stage.solver


def test_names_say_data_nets_method_and_stage(tmp_path: Path) -> None:
    def names(x: Experiment) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in generate(x, tmp_path)]
    assert names(experiment("hint-kd", teacher=ResNet(14, (32, 64, 128)), regressor=True)) == [
        f"{folder}/cifar10/{place}.prototxt" for place in (
            "resnet14-32-64-128/teacher/1-teacher", "resnet14-32-64-128-to-resnet8/hint-kd/1-hint",
            "resnet14-32-64-128-to-resnet8/hint-kd/2-kd")
        for folder in ("prototxt", "solvers")]
    assert names(experiment("original")) == [
        "prototxt/cifar10/resnet8/original/1-original.prototxt", "solvers/cifar10/resnet8/original/1-original.prototxt"]
    assert names(experiment("hint-kd", net=2))[-3:] == [
        "solvers/cifar10/resnet14-to-resnet8/hint-kd/1-hint.prototxt",                      # Stage 1 is the same for all nets
        "prototxt/cifar10/resnet14-to-resnet8/hint-kd/2-kd.prototxt", "solvers/cifar10/resnet14-to-resnet8/hint-kd/2-kd-net2.prototxt"]


def test_solvers_say_what_they_start_from(tmp_path: Path) -> None:
    text = generate(experiment("hint-kd", net=2), tmp_path)[-1].read_text()
    assert "caffe train --solver=solvers/cifar10/resnet14-to-resnet8/hint-kd/2-kd-net2.prototxt --weights=" in text
    teacher = "solvers/cifar10/resnet14/teacher/1-teacher_iter_64000.caffemodel"
    assert f"# Weights: {teacher}, with \"teacher/\" put before every layer's name\n" in text
    assert "# Weights: solvers/cifar10/resnet14-to-resnet8/hint-kd/1-hint_iter_25000.caffemodel\n" in text


def test_writing_again_touches_nothing_and_leaves_no_parts(tmp_path: Path) -> None:
    files = generate(experiment("kd"), tmp_path)
    times = [path.stat().st_mtime_ns for path in files]
    files[0].write_text("drifted")
    assert generate(experiment("kd"), tmp_path) == files
    assert [path.stat().st_mtime_ns for path in files[1:]] == times[1:]
    assert files[0].read_text() != "drifted"
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)


def test_a_pair_needs_no_table(tmp_path):
    from hintkd import cli
    command = ["generate", "--student", "wrn_16_2", "--teacher", "wrn_40_2", "--method", "ft", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.prototxt"))
    own = "cifar100/wrn_40_2-to-wrn_16_2/ft"
    nets = [f"{own}/1-paraphraser", f"{own}/2-ft", "cifar100/wrn_40_2/teacher/1-teacher"]
    assert written == [f"{folder}/{net}.prototxt" for folder in ("prototxt", "solvers") for net in nets]
    head = (tmp_path / f"solvers/{nets[1]}.prototxt").read_text()
    assert 'wrn_40_2/teacher/1-teacher_iter_187680.caffemodel, with "teacher/"' in head and "1-paraphraser_iter_23460.caffemodel" in head
