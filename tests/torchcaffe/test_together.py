"""Solvers that train together end where each would have ended alone."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import lmdbs
import torchcaffe as caffe
from nets import MLP, conv, feed, parameters, write_solver
from torchcaffe import formats
from torchcaffe.errors import CaffeError
from torchcaffe.graph.blob import Slot
from torchcaffe.train.together import Together, solve_together

FROZEN = "param { lr_mult: 0 decay_mult: 0 } "


def teacher():
    """A frozen convolution, BatchNorm, Scale and ReLU, a pooling and scores, t1 and so on."""
    return f"""
    layer {{ name: "t1" type: "Convolution" bottom: "data" top: "t1" {FROZEN}
      convolution_param {{ num_output: 5 kernel_size: 3 bias_term: false weight_filler {{ type: "msra" }} }} }}
    layer {{ name: "t1_bn" type: "BatchNorm" bottom: "t1" top: "t1" {FROZEN * 3}
      batch_norm_param {{ use_global_stats: true }} }}
    layer {{ name: "t1_scale" type: "Scale" bottom: "t1" top: "t1" {FROZEN * 2}
      scale_param {{ bias_term: true }} }}
    layer {{ name: "t1_relu" type: "ReLU" bottom: "t1" top: "t1" }}
    layer {{ name: "t1_pool" type: "Pooling" bottom: "t1" top: "t1_pool"
      pooling_param {{ pool: AVE global_pooling: true }} }}
    layer {{ name: "t1_fc" type: "InnerProduct" bottom: "t1_pool" top: "target" {FROZEN * 2}
      inner_product_param {{ num_output: 4 weight_filler {{ type: "msra" }} }} }}"""


def student(width=3):
    return conv("s1", "data", width) + """
    layer { name: "drop" type: "Dropout" bottom: "s1" top: "s1" }
    layer { name: "fc" type: "InnerProduct" bottom: "s1" top: "fc"
      inner_product_param { num_output: 4 weight_filler { type: "msra" } } }
    layer { name: "hint" type: "EuclideanLoss" bottom: "fc" bottom: "target" top: "hint" loss_weight: 1
      propagate_down: true propagate_down: false }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "data_label" top: "loss" }"""


@pytest.fixture
def made(tmp_path):
    """made(net, seed) is a solver of `net` on 20 images; all have the teacher of one file of weights."""
    records = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    lmdbs.write_images(tmp_path / "lmdb", records, [i % 4 for i in range(20)])
    data = lmdbs.data_layer(tmp_path / "lmdb", 6, "crop_size: 7 mirror: true scale: 0.01")
    folders = iter(range(100))

    def make(net, seed, replay=False, **settings):
        folder = tmp_path / f"{next(folders)}"
        folder.mkdir()
        with caffe.number_type(torch.float64):
            solver = caffe.get_solver(write_solver(folder, data + net, random_seed=seed, base_lr=0.02, **settings))
        solver.fast, solver.replay = True, replay
        rng = np.random.default_rng(5)
        for name in ("t1", "t1_bn", "t1_scale", "t1_fc"):
            for blob in solver.net.params[name]:
                blob.data[...] = rng.uniform(0.1, 0.3, blob.shape)
        return solver
    return make


def types(solvers):
    shared = [[node.layer.type for node in op.nodes] for op in Together(solvers).shared[0]]
    return [names for names in shared if names != ["Split"]]


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("settings", [{}, {"iter_size": 2, "test_iter": 2, "test_interval": 3, "display": 2, "type": "Nesterov"}])
def test_each_ends_with_the_weights_it_would_have_had_alone(made, replay, settings):
    net = teacher() + student()
    alone = [made(net, seed, **settings) for seed in (1, 2, 3)]
    together = [made(net, seed, replay, **settings) for seed in (1, 2, 3)]
    for solver in alone:
        solver.step(6)
    group = Together(together)
    group.step(2)
    group.step(4)
    for one, other in zip(alone, together, strict=True):
        a, b = parameters(one.net), parameters(other.net)
        assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-12
        assert abs(one.net.blobs["loss"].data - other.net.blobs["loss"].data) < 1e-12 and one.iter == other.iter == 6
    assert not np.allclose(parameters(together[0].net)["fc", 0], parameters(together[1].net)["fc", 0])


def test_the_teacher_runs_once_and_the_students_do_not(made):
    solvers = [made(teacher() + student(), seed) for seed in (1, 2)]
    assert types(solvers) == [["Convolution", "BatchNorm", "Scale", "ReLU"], ["Pooling"], ["InnerProduct"]]


def test_other_students_share_the_teacher_under_other_names(made):
    renamed = (teacher() + student(width=5)).replace('"target"', '"aim"').replace("t1_pool", "pooled")
    solvers = [made(teacher() + student(), 1), made(renamed.replace('name: "pooled"', 'name: "t1_pool"'), 2)]
    assert len(types(solvers)) == 3
    alone = [made(teacher() + student(), 1), made(renamed, 2)]
    Together(solvers).step(3)
    for one, other in zip(alone, solvers, strict=True):
        one.step(3)
        assert np.allclose(parameters(one.net)["fc", 0], parameters(other.net)["fc", 0], rtol=0, atol=1e-12)


def test_what_differs_is_not_shared(made):
    solvers = [made(teacher() + student(), seed) for seed in (1, 2)]
    solvers[1].net.params["t1_scale"][0].data[0] += 1e-9
    assert types(solvers) == []
    learning = (teacher() + student()).replace(FROZEN * 2 + "\n      scale_param", "scale_param")
    assert types([made(learning, seed) for seed in (1, 2)]) == [["Convolution"]]


def test_solve_together_ends_as_solve_does(made):
    solvers = [made(teacher() + student(), seed, max_iter=5) for seed in (1, 2)]
    solve_together(solvers)
    assert [solver.iter for solver in solvers] == [5, 5]
    for solver in solvers:
        assert [name for name, _ in formats.read_weights(f"{solver.param.snapshot_prefix}_iter_5.caffemodel")]


def test_a_group_stops_when_one_of_it_is_asked_to(made, capsys):
    solvers = [made(teacher() + student(), seed, max_iter=5) for seed in (1, 2)]
    seen = solvers[1]._count
    solvers[1]._count = lambda loss: (seen(loss), solvers[1].request("stop"))
    solve_together(solvers)
    assert [solver.iter for solver in solvers] == [1, 1]
    assert capsys.readouterr().err.count("Optimization stopped early.") == 2


def test_solvers_that_cannot_train_together(made, tmp_path):
    first = made(teacher() + student(), 1)
    slow, called, other, ahead = (made(teacher() + student(), 2, **({"iter_size": 2} if i == 2 else {})) for i in range(4))
    slow.fast = False
    called.add_callback(lambda: None)
    ahead.step(1)
    for solver, words in ((slow, "set fast to True"), (called, "with callbacks"), (other, "iter_size, so they cannot")):
        with pytest.raises(CaffeError, match=words):
            Together([first, solver])
    with pytest.raises(CaffeError, match="as many iterations before them, not 19 and 20"):
        solve_together([first, ahead])
    with pytest.raises(CaffeError, match="there are no solvers"):
        Together([])


def test_a_net_without_a_frozen_part_trains_together_all_the_same(tmp_path):
    def make(seed):
        (tmp_path / f"{seed}").mkdir(exist_ok=True)
        solver = caffe.get_solver(write_solver(tmp_path / f"{seed}", MLP, random_seed=seed))
        solver.fast = True
        return solver
    solvers, alone = [make(1), make(2)], make(2)
    Together(solvers).step(3)
    alone.step(3)
    assert np.array_equal(parameters(alone.net)["ip2", 0], parameters(solvers[1].net)["ip2", 0])


def test_a_pass_that_is_fed_does_not_read_the_input_blobs(tmp_path, monkeypatch):
    """They lie on the host, which no recording may ask."""
    solvers = []
    for seed in (1, 2):
        (tmp_path / f"{seed}").mkdir()
        solvers.append(caffe.get_solver(write_solver(tmp_path / f"{seed}", MLP, random_seed=seed)))
        solvers[-1].fast = solvers[-1].replay = True
        feed(solvers[-1].net, seed=seed, classes=3)
    group, inputs, read = Together(solvers), [], Slot.value
    group.step(1)
    blobs = [solver.net.blobs[name].data_slot for solver in solvers for name in solver.net.inputs]
    monkeypatch.setattr(Slot, "value", lambda slot: (inputs.append(slot) if slot in blobs else None, read(slot))[1])
    group.replay._run()
    assert inputs == []
    group.replay()
    assert len(inputs) == len(blobs) == 4
