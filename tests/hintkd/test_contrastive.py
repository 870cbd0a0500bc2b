"""The contrastive loss that draws its own negatives: what is drawn, both forms, gradients, and banks that resume to the same bytes."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from reading import COUNT, LABELS, layer, net, solver, weights, write
from torchcaffe.settings import number_type

FROZEN = " ".join(4 * ["param { lr_mult: 0 decay_mult: 0 }"])
K = 9


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with mock.patch.dict(sys.modules, caffe=caffe):
        from hintkd.layers import contrastive
        yield contrastive


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "lmdb")


def text(source: str, negatives: int = K, batch: int = 6, **more: Any) -> str:
    told = json.dumps({"source": source, "samples": COUNT, "negatives": negatives}).replace('"', '\\"')
    embed = "\n".join(
        f'layer {{ name: "{side}" type: "InnerProduct" bottom: "data" top: "{side}" '
        f'inner_product_param {{ num_output: 5 weight_filler {{ type: "msra" }} }} }}' for side in ("student", "teacher"))
    return layer(source, batch=batch, std=[64], mean=[120], **more) + embed + f"""
        layer {{ name: "loss" type: "Python" bottom: "student" bottom: "teacher" bottom: "index" top: "loss" loss_weight: 1 {FROZEN}
          propagate_down: true propagate_down: true propagate_down: false
          python_param {{ module: "hintkd.layers.contrastive" layer: "ContrastiveLoss" param_str: "{told}" }} }}
        layer {{ name: "none" type: "Silence" bottom: "label" }}"""


def chosen(negatives: Any, own: np.ndarray, passes: int, torch_form: bool = False) -> list[np.ndarray]:
    """The records that each pass takes for the images `own`, (N, K)."""
    found = []
    for now in range(passes):
        if torch_form:
            indices, counted = (each.numpy() for each in negatives.torch_form(torch.from_numpy(own), 77, torch.tensor([now])))
        else:
            indices, counted = negatives.of(own, 77, np.array([now]))
        assert (indices[:, 0] == own).all() and counted[:, 0].all()
        found.append(np.array([row[1:][mask[1:] > 0] for row, mask in zip(indices, counted, strict=True)]))
    return found


def test_negatives_are_of_other_classes_and_none_comes_twice(module: ModuleType) -> None:
    labels = np.random.default_rng(0).integers(0, 7, 300)
    negatives, own = module.Negatives(labels, 150), np.arange(0, 300, 11)
    for rows in chosen(negatives, own, 5):
        assert rows.shape == (len(own), 150)
        assert all(len(set(row)) == 150 for row in rows.tolist())
        assert (labels[rows] != labels[own][:, None]).all()


def test_each_negative_is_taken_as_often_and_sets_have_in_common_what_independent_ones_would(module: ModuleType) -> None:
    labels = np.repeat(np.arange(4), 10)
    negatives, own = module.Negatives(labels, 10), np.array([3, 3, 17])
    passes = chosen(negatives, own, 2000)
    others = labels != labels[3]
    taken = np.bincount(np.concatenate([rows[0] for rows in passes]), minlength=40)
    assert (taken[~others] == 0).all()
    expected = 2000 * 10 / 30
    assert np.square(taken[others] - expected).sum() / (expected * (1 - 10 / 30)) < 58.30           # chi-square, 29 degrees, p = 0.001
    together = sum(1 for rows in passes if {11, 12} <= set(rows[0])) / 2000
    assert abs(together - 10 * 9 / (30 * 29)) < 0.02                                                # of two records that lie together
    common = np.mean([len(set(rows[0]) & set(rows[1])) for rows in passes])
    assert abs(common - 10 * 10 / 30) < 0.25


def test_both_forms_draw_the_same(module: ModuleType) -> None:
    negatives, own = module.Negatives(LABELS, K), np.array([4, 9, 21])
    for mine, theirs in zip(chosen(negatives, own, 6), chosen(negatives, own, 6, torch_form=True), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_more_negatives_than_there_are_are_refused(module: ModuleType) -> None:
    assert module.Negatives(LABELS, 17).walked == COUNT
    with pytest.raises(ValueError, match="negatives is 18, and 22 records of these classes have at least 1 and at most 17"):
        module.Negatives(LABELS, 18)


def test_gradients_are_those_of_finite_differences(tmp_path: Path, source: str) -> None:
    with number_type(torch.float64):
        made = net(tmp_path, text(source))
    made.forward()                                          # Z is known from here on
    kept = [np.array(blob.data) for blob in made.params["loss"]]

    def loss() -> float:
        for blob, value in zip(made.params["loss"], kept, strict=True):
            blob.data[...] = value
        return float(made.forward(start="student")["loss"].sum())
    loss()
    made.backward()
    for side in ("student", "teacher"):
        weight, given = made.params[side][0], np.array(made.params[side][0].diff)
        for place in ((0, 0), (2, 7), (4, 100)):
            before = weight.data[place]
            values = []
            for step in (1e-6, -1e-6):
                weight.data[place] = before + step
                values.append(loss())
            weight.data[place] = before
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(given[place], rel=1e-5, abs=1e-8)


def test_both_forms_train_alike(tmp_path: Path, source: str) -> None:
    solvers = []
    for fast, replay in ((False, False), (True, False), (True, True)):
        with number_type(torch.float64):
            solvers.append(solver(tmp_path, text(source), fast=fast, replay=replay))
        solvers[-1].step(8)
    for other in solvers[1:]:
        for name, value in weights(solvers[0]).items():
            np.testing.assert_allclose(weights(other)[name], value, atol=1e-10, err_msg=name)
    assert weights(solvers[0])["loss3"].tolist() == [8]


def test_of_a_record_that_comes_twice_the_last_image_counts(tmp_path: Path, source: str) -> None:
    found = []
    for fast in (False, True):
        made = solver(tmp_path, text(source, batch=30, mirror=True, crop=7), fast=fast)
        made.step(2)
        found.append(weights(made))
    for name in ("loss0", "loss1"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)


@pytest.mark.parametrize(("fast", "replay"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("last", ["wrapped", "kept"])
def test_banks_and_draws_resume_to_the_same_bytes(tmp_path: Path, source: str, fast: bool, replay: bool, last: str) -> None:
    whole, resumed = (solver(tmp_path, text(source, last=last), fast=fast, replay=replay) for _ in range(2))
    whole.step(3)
    state = whole.snapshot()
    whole.step(5)
    resumed.restore(state)
    resumed.step(5)
    assert all((value == weights(resumed)[name]).all() for name, value in weights(whole).items())


def test_seeds_have_banks_and_draws_of_their_own(tmp_path: Path, source: str) -> None:
    one, other = (weights(solver(tmp_path, text(source), seed=seed)) for seed in (1, 2))
    assert (one["loss0"] != other["loss0"]).any() and np.abs(one["loss0"]).max() <= (5 / 3) ** -0.5
