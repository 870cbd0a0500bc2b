"""The zoo's methods that need more of their records than images and labels: CRD and SSKD, from a data set to weights."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hintkd.backend import read_weights
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Dataset, Experiment
from hintkd.methods.method import stages_of
from hintkd.methods.papers import paper
from hintkd.methods.stage import Stage
from hintkd.nets.records import source_of
from hintkd.nets.titles import network
from hintkd.run.executor import LocalExecutor
from hintkd.run.folders import REMEMBERED, final_snapshots
from hintkd.run.keys import Keys, differences
from running import numerics, run
from tiny_data import write_dataset

ZOO = paper("zoo")
SCHEDULE = replace(ZOO.schedule(), iterations=5, teacher_iterations=2, first_iterations=2, head_iterations=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("zoo")
    return folder, replace(write_dataset("cifar100-zoo", folder, items=40), train_size=40, batch=16)


@pytest.fixture
def workspace(dataset: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    folder, small = dataset
    monkeypatch.chdir(folder)
    yield small
    shutil.rmtree("runs", ignore_errors=True)


def experiment(method: str, dataset: Dataset, **options: Any) -> Experiment:
    shared: dict[str, Any] = {"dataset": dataset, "schedule": SCHEDULE, "options": ZOO.options(**options), "tau": 4.0}
    taught = Experiment(ZOO.methods["original"], student=network("resnet14"), generation=1, pupil=network("resnet8"), **shared)
    return Experiment(ZOO.methods[method], student=network("resnet8"), teacher=taught, **shared)


def told(stage: Stage, phase: int = 0) -> dict[str, Any]:
    """What a stage's data layer is told."""
    (layer,) = (layer for layer in stage.net.layer if not layer.bottom and layer.include[0].phase == phase)
    return {"tops": list(layer.top), **json.loads(layer.python_param.param_str)}


def final(plan: Any, stage: Stage) -> dict[str, list[np.ndarray]]:
    """All layers of a stage's last snapshot."""
    task = plan.task(stage)
    return dict(read_weights(task.folder / final_snapshots(task)[""]))


# -- what stages are made of ---------------------------------------------------------------------------------------------------
def test_the_protocols_records_are_shuffled_and_scaled_and_the_test_sets_are_scaled_alone() -> None:
    (stage,) = stages_of(experiment("kd", DATASETS["cifar100-zoo"]))
    mean, std = [129.31, 124.11, 112.4], [68.21, 65.41, 70.41]
    assert told(stage) == {"tops": ["data", "label"], "source": "data/cifar100/train_lmdb", "batch": 64, "shuffle": True, "last": "kept",
                           "mean": mean, "std": std, "crop": 32, "mirror": True}
    assert told(stage, 1) == {"tops": ["data", "label"], "source": "data/cifar100/test_lmdb", "batch": 100, "shuffle": False,
                              "mean": mean, "std": std}


def test_caffes_own_layer_reads_where_it_can() -> None:
    stock = {"order": "stored", "last_batch": "wrapped", "std": "none"}
    (stage,) = stages_of(experiment("kd", DATASETS["cifar100-zoo"], **stock))
    assert [layer.type for layer in stage.net.layer if not layer.bottom] == ["Data", "Data"]
    (stage,) = stages_of(experiment("kd", DATASETS["cifar100-zoo"], **stock, padding="reflect"))
    assert {name: told(stage)[name] for name in ("border", "pad", "padding", "crop")} == {
        "border": 4, "pad": 4, "padding": "reflect", "crop": 32}


def test_crd_has_positions_and_asks_as_the_protocol_does() -> None:
    (stage,) = stages_of(experiment("crd", DATASETS["cifar100-zoo"]))
    assert told(stage)["tops"] == ["data", "label", "position"] and told(stage, 1)["tops"] == ["data", "label"]
    (loss,) = (layer for layer in stage.net.layer if layer.name == "crd_loss")
    assert json.loads(loss.python_param.param_str) == {"samples": 50_000, "source": "data/cifar100/train_lmdb", "negatives": 16_384}
    assert [spec.lr_mult for spec in loss.param] == 4 * [0] and list(loss.propagate_down) == [True, True, False]


def test_sskd_trains_a_head_first_and_the_student_on_four_views() -> None:
    head, last = stages_of(experiment("sskd", DATASETS["cifar100-zoo"]))
    assert (head.title, head.solver.test_iter, told(head)["tops"], told(head)["views"]) == ("head", [], ["data"], 4)
    assert (told(last)["tops"], told(last)["views"], "views" in told(last, 1)) == (["data", "label"], 4, False)
    learned = {layer.name for layer in head.net.layer if not layer.param and layer.type == "InnerProduct"}
    assert learned == {"teacher_head0", "teacher_head1"}
    full, _ = stages_of(replace(experiment("sskd", DATASETS["cifar100-zoo"]), schedule=ZOO.schedule()))
    assert (full.solver.max_iter, list(full.solver.stepvalue)) == (60 * 782, [30 * 782, 45 * 782])
    (loss,) = (layer for layer in last.net.layer if layer.name == "sskd_loss")
    assert json.loads(loss.python_param.param_str) == {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10, "kd_tau": 4, "tf_tau": 4}


def test_what_does_not_go_together_is_a_sentence() -> None:
    known = DATASETS["cifar100-zoo"]
    for method, dataset, options, sentence in (
            ("crd", replace(known, train_size=0), {}, "crd needs its train_size"),
            ("kd", replace(known, std_value=()), {}, "std: values needs its std_value"),
            ("kd", known, {"mean": "file"}, "set mean to values or none")):
        with pytest.raises(UserError, match=sentence):
            stages_of(experiment(method, dataset, **options))
    with pytest.raises(UserError, match="sskd has no loss on the test set"):
        stages_of(replace(experiment("sskd", known), test_loss=True))


# -- keys ----------------------------------------------------------------------------------------------------------------------
def test_what_python_layers_read_counts_by_its_contents(workspace: Dataset, tmp_path: Path) -> None:
    (stage,) = stages_of(experiment("crd", workspace))
    assert {source_of(layer) for layer in stage.net.layer} == {None, workspace.train_lmdb, workspace.test_lmdb}
    shutil.copytree("data/cifar100", tmp_path / "moved")
    elsewhere = replace(workspace, train_lmdb=str(tmp_path / "moved/train_lmdb"), test_lmdb=str(tmp_path / "moved/test_lmdb"))
    (moved,) = stages_of(experiment("crd", elsewhere))
    assert moved != stage and Keys(numerics()).key(moved) == Keys(numerics()).key(stage)
    shutil.copy(tmp_path / "moved/test_lmdb/data.mdb", tmp_path / "moved/train_lmdb/data.mdb")
    assert any("python_param.param_str" in each for each in differences(Keys(numerics()).parts(stage), Keys(numerics()).parts(moved)))


# -- training ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["kd", "crd", "crd-kd", "sskd"])
def test_a_method_trains_and_hands_on_the_student(method: str, workspace: Dataset, executor: LocalExecutor) -> None:
    stages = stages_of(experiment(method, workspace))
    plan, _, watcher = run(stages, executor)
    assert [event for event, _ in watcher.events].count("failed") == 0
    last = plan.task(stages[-1])
    assert 0 <= last.result()["outputs"]["accuracy"] <= 1
    (plain,) = stages_of(experiment("original", workspace))
    learned = {layer.name for layer in plain.net.layer if layer.type in ("Convolution", "InnerProduct", "BatchNorm", "Scale")}
    assert set(dict(read_weights(last.weights))) == learned
    whole = final(plan, stages[-1])
    if method.startswith("crd"):
        banks, (normaliser, count) = whole["crd_loss"][:2], whole["crd_loss"][2:]
        assert all(bank.shape == (40, 128) for bank in banks) and normaliser.min() > 0 and count.tolist() == [5]
        lengths = np.linalg.norm(banks[0], axis=1)
        assert (np.abs(lengths - 1) < 1e-5).sum() >= 40                # all rows, after an epoch of three batches and two more
        assert any(REMEMBERED.glob("*.table"))                        # the teacher's features are numbered by the records
    if method == "sskd":
        before = dict(read_weights(plan.task(stages[0]).weights))
        assert set(before) == {"teacher_head0", "teacher_head1"}
        assert all((a == b).all() for name in before for a, b in zip(before[name], whole[name], strict=True))
        assert whole["student_head0"][0].shape == (64, 64)
