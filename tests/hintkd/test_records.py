"""The data layer that shuffles: which records come when, how they are shown, and that every way to run it gives the same batches."""
from __future__ import annotations

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
from reading import COUNT, IMAGES, LABELS, SIZE, batches, layer, net, solver, weights, write
from torchcaffe.errors import CaffeError
from torchcaffe.step.table import Table


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "lmdb")


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with mock.patch.dict(sys.modules, caffe=caffe):
        from hintkd.layers import records
        yield records


class Blob:
    def __init__(self) -> None:
        self.data = np.zeros(0)

    def reshape(self, *shape: int) -> None:
        self.data = np.zeros(shape, np.float32)


def by_numpy(module: ModuleType, net: Any, count: int, phase: int = caffe.TRAIN) -> list[dict[str, np.ndarray]]:
    """What the class itself makes of the net's first layer, with blobs of numpy alone."""
    message = net.layers[0].param
    made = module.ShuffledRecords(None)
    made.param_str, made.phase, made.seed = message.python_param.param_str, phase, net.layers[0].context.streams.seed
    blobs, found = [Blob() for _ in message.top], []
    made.setup([], blobs)
    for _ in range(count):
        made.reshape([], blobs)
        made.forward([], blobs)
        found.append({name: blob.data.copy() for name, blob in zip(message.top, blobs, strict=True)})
    return found


def positions(found: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([each["index"] for each in found]).astype(int)


# -- which records -------------------------------------------------------------------------------------------------------------
def test_every_epoch_has_every_record_once_in_an_order_of_its_own(tmp_path: Path, source: str) -> None:
    found = positions(batches(net(tmp_path, layer(source)), 22)).reshape(6, COUNT)
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in found.tolist())
    assert len({tuple(epoch) for epoch in found.tolist()}) == 6


def test_the_last_batch_of_an_epoch_is_short_where_it_is_kept(tmp_path: Path, source: str) -> None:
    found = batches(net(tmp_path, layer(source, last="kept")), 8)
    assert [len(each["data"]) for each in found] == 2 * [6, 6, 6, 4]
    assert sorted(positions(found[:4])) == sorted(positions(found[4:])) == list(range(COUNT))


def test_places_of_a_record_are_uniform_over_epochs(tmp_path: Path) -> None:
    source = write(tmp_path / "few", IMAGES[:8], LABELS[:8])
    orders = positions(batches(net(tmp_path, layer(source, batch=8)), 800)).reshape(800, 8)
    seen = np.array([(orders == record).sum(0) for record in range(8)])                   # record, place: 100 each on average
    assert np.square(seen - 100).sum() / 100 < 85.35                                      # chi-square of 49 degrees, p = 0.001
    assert len({tuple(order[:2]) for order in orders.tolist()}) == 56                     # any record may follow any other


def test_labels_belong_to_positions_and_seeds_draw_apart(tmp_path: Path, source: str) -> None:
    one, other = (batches(net(tmp_path, layer(source), seed=seed), 4) for seed in (1, 2))
    np.testing.assert_array_equal(np.concatenate([each["label"] for each in one]), LABELS[positions(one)])
    assert (positions(one) != positions(other)).any()


def test_records_in_their_order_are_the_data_layers(tmp_path: Path, source: str) -> None:
    stock = (f'layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ crop_size: 6 mean_value: 100 }} '
             f'data_param {{ source: "{source}" batch_size: 6 backend: LMDB }} }}')
    mine, theirs = (batches(net(tmp_path, text, caffe.TEST), 5) for text in (layer(source, shuffle=False, crop=6, mean=[100]), stock))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a["data"], b["data"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_solvers_that_train_together_share_an_epoch(tmp_path: Path, source: str) -> None:
    found = []
    for rank in range(2):
        caffe.set_solver_count(2)
        caffe.set_solver_rank(rank)
        try:
            found.append(batches(net(tmp_path, layer(source, batch=11, crop=5)), 2))
        finally:
            caffe.set_solver_rank(0)
            caffe.set_solver_count(1)
    for number in range(2):
        assert sorted(positions([found[0][number], found[1][number]])) == list(range(COUNT))


# -- how they are shown ----------------------------------------------------------------------------------------------------------
def test_windows_lie_in_the_framed_image_and_each_comes_as_often(tmp_path: Path) -> None:
    source = write(tmp_path / "one", np.arange(1, 17, dtype=np.uint8).reshape(1, 1, 4, 4), LABELS[:1])
    framed = np.pad(np.arange(1, 17).reshape(4, 4), 2, "reflect")
    windows = [framed[top:top + 4, left:left + 4] for top in range(5) for left in range(5)]
    shown = [window[:, ::step] for window in windows for step in (1, -1)]
    found = np.concatenate([each["data"][:, 0] for each in batches(net(tmp_path, layer(
        source, batch=500, pad=2, padding="reflect", crop=4, mirror=True)), 4)])
    counts = np.array([(found == one).all((1, 2)).sum() for one in shown])
    assert counts.sum() >= len(found) and counts.min() > 15                               # 40 each on average


@pytest.mark.parametrize("told", [
    {"crop": 6, "mirror": True, "mean": [100, 110, 120], "std": [50, 60, 70]}, {"pad": 2, "crop": 8, "mirror": True},
    {"border": 2, "pad": 2, "padding": "reflect", "crop": 8, "std": [2]}, {"border": 1, "pad": 3, "last": "kept"},
    {"views": 4, "pad": 2, "crop": 8, "mirror": True, "mean": [100]},
    {"views": 4, "last": "kept", "border": 1, "padding": "reflect", "pad": 2},
    {"shuffle": False, "crop": 7}, {"batch": 50, "crop": 7}, {"batch": 50, "last": "kept"}])
def test_the_engine_reads_what_the_class_reads(tmp_path: Path, source: str, module: ModuleType, told: dict[str, Any]) -> None:
    for phase in (caffe.TRAIN, caffe.TEST):
        made = net(tmp_path, layer(source, **told), phase)
        for mine, theirs in zip(batches(made, 9), by_numpy(module, made, 9, phase), strict=True):
            for name in theirs:
                assert mine[name].shape == theirs[name].shape
                np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5)


def test_views_are_one_image_turned(tmp_path: Path, source: str) -> None:
    for each in batches(net(tmp_path, layer(source, views=4, mirror=True)), 3):
        for views, position in zip(each["data"].reshape(6, 4, 3, SIZE, SIZE), each["index"].astype(int), strict=True):
            assert any((views[0] == image).all() for image in (IMAGES[position], IMAGES[position][:, :, ::-1]))
            for turns in range(4):
                np.testing.assert_array_equal(views[turns], np.rot90(views[0], turns, (1, 2)))


# -- every way to run it ---------------------------------------------------------------------------------------------------------
FROZEN = "param { lr_mult: 0 decay_mult: 0 }"
BODY = f"""
layer {{ name: "teacher" type: "Convolution" bottom: "data" top: "teacher" {FROZEN} {FROZEN}
  convolution_param {{ num_output: 4 kernel_size: 3 stride: 2 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "pool" type: "Pooling" bottom: "teacher" top: "pool" pooling_param {{ pool: AVE global_pooling: true }} }}
layer {{ name: "said" type: "InnerProduct" bottom: "pool" top: "said" {FROZEN} {FROZEN}
  inner_product_param {{ num_output: 4 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param {{ num_output: 4 kernel_size: 3 stride: 2 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" }}
layer {{ name: "flat" type: "Reshape" bottom: "conv" top: "flat" reshape_param {{ shape {{ dim: 0 dim: -1 }} }} }}
layer {{ name: "fc" type: "InnerProduct" bottom: "flat" top: "fc"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "like" type: "InnerProduct" bottom: "flat" top: "like"
  inner_product_param {{ num_output: 4 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "hint" type: "Python" bottom: "like" bottom: "said" top: "hint" loss_weight: 1 propagate_down: true propagate_down: false
  python_param {{ module: "hintkd.layers.kl_divergence" layer: "KLDivergence" }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }}
"""
WAYS = {"layer by layer": {"fast": False}, "whole iterations": {}, "from device memory": {"replay": True}, "remembered": {"remember": True},
        "remembered, from device memory": {"remember": True, "replay": True}}


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("told", [{"last": "wrapped"}, {"last": "kept"}])
def test_every_way_trains_on_the_same_batches(tmp_path: Path, source: str, way: str, told: dict[str, Any]) -> None:
    text = layer(source, tops="data label", mirror=True, crop=7, std=[64], mean=[120], **told) + BODY
    one, other = (solver(tmp_path, text, **WAYS[name]) for name in ("layer by layer", way))
    for each in (one, other):
        each.step(9)
    for name, value in weights(one).items():
        np.testing.assert_allclose(weights(other)[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    if "remembered" in way:
        assert other.memory is not None and isinstance(other.memory.store.table, Table) and other.memory.store.table.known() > 30


@pytest.mark.parametrize("last", ["wrapped", "kept"])
def test_a_caffe_that_lets_the_class_read_trains_on_the_same_batches(tmp_path: Path, source: str, module: ModuleType, last: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    text = layer(source, tops="data label", mirror=True, crop=7, std=[64], mean=[120], last=last) + BODY
    engine = solver(tmp_path, text, fast=False)
    monkeypatch.delattr(module.ShuffledRecords, "records")
    own = solver(tmp_path, text, fast=False)
    assert isinstance(own.net.layers[0], module.ShuffledRecords) and not isinstance(engine.net.layers[0], module.ShuffledRecords)
    for each in (engine, own):
        each.step(9)
    for name, value in weights(engine).items():
        np.testing.assert_allclose(weights(own)[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("last", ["wrapped", "kept"])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, source: str, way: str, last: str) -> None:
    text = layer(source, tops="data label", mirror=True, crop=7, std=[64], mean=[120], last=last) + BODY
    whole, resumed = (solver(tmp_path, text, **WAYS[way]) for _ in range(2))
    whole.step(3)
    state = whole.snapshot()
    whole.step(6)
    resumed.restore(state)
    resumed.step(6)
    assert all((value == weights(resumed)[name]).all() for name, value in weights(whole).items())


def test_solvers_in_step_read_what_each_reads_alone(tmp_path: Path, source: str) -> None:
    text = layer(source, tops="data label", mirror=True, crop=7, std=[64], last="kept") + BODY
    alone = [solver(tmp_path, text, seed=seed) for seed in (3, 4)]
    together = [solver(tmp_path, text, seed=seed) for seed in (3, 4)]
    for each in alone:
        each.step(9)
    caffe.Together(together).step(9)
    for one, other in zip(alone, together, strict=True):
        for name, value in weights(one).items():
            np.testing.assert_allclose(weights(other)[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


# -- what does not fit -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("told", "sentence"), [
    ({"crop": 9}, "crop_size 9 is larger"), ({"border": 4}, "cannot lose 4 pixels"), ({"pad": 8, "padding": "reflect"}, "be given 8"),
    ({"std": [1, 2]}, "2 values of std for images of 3 channels"), ({"mean": [1, 2]}, "2 mean_values")])
def test_settings_that_do_not_fit_the_images_are_named(tmp_path: Path, source: str, told: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CaffeError, match=rf"layer 'data' \(Python\).*{sentence}"):
        net(tmp_path, layer(source, **told))


@pytest.mark.parametrize(("told", "sentence"), [
    ({"last": "dropped"}, "last must be one of wrapped, kept"), ({"std": [0]}, "must not hold 0"),
    ({"views": 2}, "views must be one of 1, 4"),
    ({"batch": 0}, "batch of at least 1"), ({"flip": True}, "unknown entry 'flip'")])
def test_settings_that_mean_nothing_are_named(tmp_path: Path, source: str, told: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        net(tmp_path, layer(source, **told))


def test_lmdbs_of_many_pages_and_large_records_are_read(tmp_path: Path, module: ModuleType) -> None:
    images = np.random.default_rng(1).integers(0, 256, (400, 1, 40, 40), dtype=np.uint8)
    images[::2, :, :, 20:] = 7
    found = module.records(write(tmp_path / "many", images, np.arange(400) % 130))
    assert len(found) == 400 and found.labels().tolist() == (np.arange(400) % 130).tolist()
    np.testing.assert_array_equal([found.image(i) for i in range(400)], images)
    large = module.records(write(tmp_path / "large", np.arange(3 * 60 * 60, dtype=np.uint8).reshape(1, 3, 60, 60), LABELS[:1]))
    np.testing.assert_array_equal(large.image(0).ravel(), np.arange(3 * 60 * 60, dtype=np.uint8))
    with pytest.raises(ValueError, match="there is no LMDB"):
        module.records(str(tmp_path / "none"))


def test_draws_are_the_engines(module: ModuleType) -> None:
    from torchcaffe.streams import Streams
    streams, draws = Streams(5), module.draws
    mine, theirs = draws.uniform(draws.key(5, "transform"), 9, (3, 4)), streams.uniform("transform", "", 9, (3, 4))
    np.testing.assert_array_equal(mine, theirs.numpy())
    order = streams.order("order", "", torch.tensor([8, 9]), 100)[1]
    np.testing.assert_array_equal(draws.order(draws.key(5, "order"), 9, 100), order.numpy())
