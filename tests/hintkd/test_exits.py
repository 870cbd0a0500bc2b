"""Exits of a trained net: what is counted, measured and exported, against the same computed from scores by hand."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import torchcaffe as caffe
from hintkd import cli
from hintkd.backend import read_net, write_text
from hintkd.errors import UserError
from hintkd.experiment import Experiment
from hintkd.methods.byot import Options, Schedule
from hintkd.methods.papers import paper
from hintkd.nets.basic_resnet import BasicResNet
from hintkd.run.folders import test_net as published_net
from hintkd.study.exits import Cost, Exit, Trained, exits_of, leaving
from tiny_data import write_dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with random digits, a net with exits and one without, both untrained, as a run leaves them."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dataset = write_dataset("digits", folder, items=40)
        x = Experiment(paper("byot").methods["byot"], replace(dataset, test_batch=8, test_iter=5), BasicResNet(8), lambda_=0.1,
                       schedule=Schedule(), options=Options(mean="file", sections=3))
        for name, method in (("exits", x.method), ("plain", paper("byot").methods["original"])):
            (stage,) = method(x)
            (folder / f"{name}.prototxt").write_text(write_text(published_net(stage)))
            caffe.set_random_seed(2)
            net = caffe.Net(str(folder / f"{name}.prototxt"), caffe.TEST)
            for layer, blobs in net.params.items():
                if layer.endswith("_bn"):                    # statistics of some batch or other
                    blobs[1].data[...], blobs[2].data[...] = 4, 1
            net.save(str(folder / f"{name}.caffemodel"))
    return folder


@pytest.fixture
def workspace(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def scores(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of the whole test set, by the net as it is."""
    net = caffe.Net(str(folder / "exits.prototxt"), str(folder / "exits.caffemodel"), caffe.TEST)
    kept: dict[str, list[np.ndarray]] = {"exit1_fc": [], "exit2_fc": [], "fc": [], "label": []}
    for _ in range(5):
        net.forward()
        for name, batches in kept.items():
            batches.append(np.array(net.blobs[name].data))
    found = {name: np.concatenate(batches) for name, batches in kept.items()}
    return found, found.pop("label").astype(int)


def test_accuracies_and_costs_are_those_of_each_exit_by_itself(workspace: Path) -> None:
    found = exits_of(Trained(workspace / "exits.caffemodel"), confidences=[0.2])
    by_hand, labels = scores(workspace)
    assert [(each.name, each.scores) for each in found.exits] == [("1/3", "exit1_fc"), ("2/3", "exit2_fc"), ("3/3", "fc")]
    assert [each.accuracy for each in found.exits] == [float(np.mean(by_hand[name].argmax(1) == labels)) for name in by_hand]
    assert found.ensemble and found.ensemble.accuracy == float(np.mean(sum(by_hand.values()).argmax(1) == labels))
    trunk = [64 * 9 * (1 * 16 + 2 * 16 * 16), 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32), 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)]
    branch = [64 * 16 * 16 + 4 * 16 * 16 * 16 + 4 * 16 * 64 + 640, 16 * 32 * 16 + 4 * 16 * 16 * 4 + 4 * 16 * 64 + 640]
    assert [each.alone.multiply_adds for each in found.exits] == [trunk[0] + branch[0], sum(trunk[:2]) + branch[1], sum(trunk) + 640]
    whole = sum(trunk) + sum(branch) + 640
    assert [each.in_turn.multiply_adds for each in found.exits] == [trunk[0] + branch[0], sum(trunk[:2]) + sum(branch), whole]
    assert found.ensemble.alone.multiply_adds == whole and found.images == 40 and found.shape == (1, 8, 8)
    assert all(cost.ms > 0 for each in found.exits for cost in (each.alone, each.in_turn))


def test_an_image_leaves_at_the_first_exit_that_is_sure() -> None:
    """Four images of three classes: sure at once, sure at the second exit, never sure, sure and wrong."""
    sure, unsure = 8.0, 0.5
    first = np.array([[sure, 0, 0], [0, unsure, 0], [0, 0, unsure], [sure, 0, 0]])
    second = np.array([[0, 0, sure], [0, sure, 0], [unsure, 0, 0], [0, sure, 0]])
    last = np.array([[0, 0, 1], [1, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    exits = [Exit(str(k), "", 0, Cost(0, 0), Cost(10.0 ** k, k)) for k in range(3)]
    early = leaving(0.9, [first, second, last], np.array([0, 1, 2, 1]), exits)
    assert early.shares == {"0": 0.5, "1": 0.25, "2": 0.25} and early.accuracy == 0.75
    assert early.cost == Cost(0.5 * 1 + 0.25 * 10 + 0.25 * 100, 0.25 * 1 + 0.25 * 2)
    always, never = (leaving(confidence, [first, second, last], np.array([0, 1, 2, 1]), exits) for confidence in (0.0, 1.0))
    assert always.shares["0"] == 1 and always.accuracy == 0.75 and never.shares["2"] == 1 and never.accuracy == 0.5


def test_the_curve_goes_from_the_first_exit_to_the_last(workspace: Path) -> None:
    found = exits_of(Trained(workspace / "exits.caffemodel"), confidences=[0.0, 0.15, 0.3, 1.0])
    costs = [early.cost.multiply_adds for early in found.early]
    assert found.early[0].accuracy == found.exits[0].accuracy and costs == sorted(costs)
    assert found.early[-1].shares["3/3"] == 1 and found.early[-1].accuracy == found.exits[-1].accuracy
    assert all(sum(early.shares.values()) == pytest.approx(1) for early in found.early)


def test_every_exit_is_exported_as_a_net_of_its_own(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exits", "exits.caffemodel", "--export", str(tmp_path / "new" / "out")]) == 0
    shown = capsys.readouterr().out
    assert "6 files in" in shown and "ensemble" in shown and "sure from" in shown
    by_hand, _ = scores(workspace)
    whole = caffe.Net("exits.prototxt", "exits.caffemodel", caffe.TEST)
    whole.forward()
    for number, name in enumerate(by_hand, start=1):
        path = tmp_path / "new" / "out" / f"exit{number}"
        net = caffe.Net(f"{path}.prototxt", f"{path}.caffemodel", caffe.TEST)
        assert not any(layer.name.startswith("exit") and not layer.name.startswith(f"exit{number}_")
                       for layer in read_net(f"{path}.prototxt").layer)
        net.blobs["data"].data[...] = np.array(whole.blobs["data"].data)[:1]
        (given,) = net.forward().values()
        powers = np.exp(by_hand[name][0] - by_hand[name][0].max())
        assert given[0] == pytest.approx(powers / powers.sum(), rel=1e-4)


def test_json_says_the_same(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exits", "exits.caffemodel", "--json", "--sure", "0.5,0.2", "--batch", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in said["exits"]] == ["1/3", "2/3", "3/3"] and said["batch"] == 4
    assert [each["confidence"] for each in said["early"]] == [0.2, 0.5] and set(said["early"][0]["shares"]) == {"1/3", "2/3", "3/3"}


@pytest.mark.parametrize(("arguments", "said"), [
    (["none.caffemodel"], "none.caffemodel: there is no such file; name a .caffemodel"),
    (["plain.caffemodel"], "plain.prototxt: the net has one classifier and no other exit"),
    (["exits.prototxt"], "exits.prototxt"),
    (["exits.caffemodel", "--sure", "0.5,2"], "--sure 0.5,2: give numbers from 0 to 1"),
    (["exits.caffemodel", "--batch", "0"], "--batch 0: give a whole number from 1"),
    (["exits.caffemodel", "--net", "none.prototxt"], "none.prototxt: there is no such file")])
def test_what_is_wrong_is_told(workspace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exits", *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_data_that_are_missing_are_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/digits/test_lmdb is missing"):
        exits_of(Trained(place / "exits.caffemodel"))


@pytest.mark.slow
def test_a_demos_nets_are_trained_reported_and_looked_at_by_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "digits"]) == 0
    assert cli.main(["reproduce", "demo-byot", "--scale", "0.01", "--nets", "1", "--device", "cpu", "--quiet"]) == 0
    (folder,) = (tmp_path / "results/measured").iterdir()
    last = json.loads((folder / "byot/net1.json").read_text())["last"]
    capsys.readouterr()
    assert cli.main(["exits", f"runs/weights/{folder.name}/byot/net1.caffemodel", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    measured = [last[name] for name in ("accuracy_1", "accuracy_2", "accuracy", "accuracy_ensemble")]
    assert [each["accuracy"] for each in (*said["exits"], said["ensemble"])] == pytest.approx(measured, abs=1e-6)
    text = (tmp_path / "results/report.md").read_text()
    assert "byot > deep-supervision in column 1/3" in text and "| deepest_alpha |" in text
    assert all(f"| {row} | {column} |" in text for row in ("byot", "deep-supervision") for column in ("1/3", "3/3", "ensemble"))
