"""What scripts for pycaffe take for granted of nets, layers, solvers and the module."""
import time

import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import MLP, feed, parameters, write_solver

PYTHON = """
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 } } }
layer { name: "mine" type: "Python" bottom: "x" top: "y" python_param { module: "test_pycaffe_layer" layer: "Scaled" param_str: "3" } }
layer { name: "z" type: "Power" bottom: "y" top: "z" power_param { shift: 1 } }
"""
LAYER = """
import caffe
class Scaled(caffe.Layer):
    def setup(self, bottom, top):
        self.factor = float(self.param_str)
        self.blobs.add_blob(1)
    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].data.shape)
    def forward(self, bottom, top):
        top[0].data[...] = self.factor * bottom[0].data
    def backward(self, top, propagate_down, bottom):
        bottom[0].diff[...] = self.factor * top[0].diff
    def set_factor(self, factor):
        self.factor = factor
"""


@pytest.fixture
def mlp(tmp_path):
    (tmp_path / "net.prototxt").write_text(MLP)
    return str(tmp_path / "net.prototxt")


@pytest.fixture
def python_net(tmp_path, monkeypatch):
    (tmp_path / "test_pycaffe_layer.py").write_text(LAYER)
    (tmp_path / "net.prototxt").write_text(PYTHON)
    monkeypatch.syspath_prepend(str(tmp_path))
    return caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)


# -- nets ----------------------------------------------------------------------------------------------------------
def test_a_net_is_made_by_position_or_by_name_in_the_new_form_and_the_old(tmp_path, mlp):
    net = caffe.Net(mlp, caffe.TEST)
    weights = str(tmp_path / "w.caffemodel")
    net.save(weights)
    others = [caffe.Net(mlp, caffe.TEST, 0, ["deploy"], weights), caffe.Net(mlp, caffe.TEST, weights=weights), caffe.Net(mlp, weights, 1),
              caffe.Net(network_file=mlp, phase=caffe.TEST, level=1, stages=["a"], weights=weights),
              caffe.Net(mlp, weights=weights, phase=caffe.TEST), caffe.Net(mlp, weights, phase=caffe.TEST)]
    for other in others:
        for key, value in parameters(net).items():
            np.testing.assert_array_equal(parameters(other)[key], value)
    with pytest.raises(caffe.CaffeError, match="phase None is not"):
        caffe.Net(mlp)
    with pytest.raises(caffe.CaffeError, match="takes network_file, weights, phase, not 4 arguments"):
        caffe.Net(mlp, weights, caffe.TEST, 0)


def test_layers_have_types_blobs_and_names(mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    assert [layer.type for layer in net.layers][2:4] == ["InnerProduct", "ReLU"]
    assert net.layer_dict["ip1"] is net.layers[2] and list(net.layer_dict) == net._layer_names
    assert net.layers[2].blobs[0] is net.params["ip1"][0]
    net.blobs["data"].reshape(9, 5)
    net.layers[2].reshape([net.blobs["data"]], [net.blobs["ip1"]])
    assert tuple(net.blobs["ip1"].shape) == (9, 4) and net.blobs["ip1"].num == 9
    assert net.bottom_names["ip2"] == ["drop"] and net.top_names["loss"] == ["loss"]
    assert net.blob_loss_weights["loss"] == 1 and net.blob_loss_weights["ip1"] == 0


def test_blobs_have_shapes_and_live_arrays(mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    blob, weights = net.blobs["data"], net.params["ip1"][0]
    assert net.inputs == ["data", "label"] and net.outputs == ["loss"]
    assert (tuple(blob.shape), blob.count, blob.num, blob.channels, blob.height, blob.width) == ((6, 5), 30, 6, 5, 1, 1)
    assert blob.data.dtype == blob.diff.dtype == np.float32 and blob.data.flags.c_contiguous
    blob.data[...] = 1
    loss, gradient = net.blobs["loss"].data, weights.diff
    assert net._forward(0, 6) == loss
    net._backward(6, 0)
    assert loss > 0 and np.abs(gradient).max() > 0
    net.clear_param_diffs()
    assert not gradient.any()
    blob.reshape(2, 3, 4, 5)
    assert (blob.num, blob.channels, blob.height, blob.width, blob.data.shape) == (2, 3, 4, 5, (2, 3, 4, 5))


def test_weights_go_out_and_in_as_hdf5(tmp_path, mlp):
    net, other = caffe.Net(mlp, caffe.TRAIN), caffe.Net(mlp, caffe.TRAIN)
    net.save_hdf5(str(tmp_path / "weights"))
    other.load_hdf5(str(tmp_path / "weights"))
    for key, value in parameters(net).items():
        np.testing.assert_array_equal(parameters(other)[key], value)


def test_hdf5_of_layers_that_caffe_would_not_find_is_written_with_a_line_that_says_so(tmp_path, mlp, capfd):
    caffe.Net(mlp, caffe.TRAIN).save_hdf5(str(tmp_path / "w.h5"))
    assert "will not find" not in capfd.readouterr().err
    (tmp_path / "net.prototxt").write_text(MLP.replace('name: "ip', 'name: "teacher/ip'))
    net, other = caffe.Net(mlp, caffe.TRAIN), caffe.Net(mlp, caffe.TRAIN)
    net.save(str(tmp_path / "w.caffemodel"))
    assert "will not find" not in capfd.readouterr().err
    net.save(str(tmp_path / "w.caffemodel.h5"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "will not find" in line]
    assert len(lines) == 1 and "w.caffemodel.h5: Caffe itself will not find 2 layer(s) of this file" in lines[0]
    assert "'teacher/ip1' first; write binary weights for it" in lines[0]
    other.copy_from(str(tmp_path / "w.caffemodel.h5"))
    for key, value in parameters(net).items():
        np.testing.assert_array_equal(parameters(other)[key], value)


def test_hooks_are_called_around_every_layer(mlp):
    net, seen = caffe.Net(mlp, caffe.TRAIN), []
    for name in ("before_forward", "after_forward", "before_backward", "after_backward"):
        getattr(net, name)(lambda i, name=name: seen.append((name, i)))
    net.forward()
    seen.clear()
    net.forward(end="data")
    net.backward(end="loss")
    assert seen == [("before_forward", 0), ("after_forward", 0), ("before_backward", 6), ("after_backward", 6)]


def test_a_python_layer_s_object_is_in_the_net(python_net):
    mine = python_net.layers[1]
    assert mine is python_net.layer_dict["mine"] and mine.type == "Python" and type(mine).__name__ == "Scaled"
    assert (mine.param_str, mine.phase) == ("3", caffe.TEST)
    assert python_net.params["mine"][0] is mine.blobs[0]
    with pytest.raises(NotImplementedError):
        caffe.Layer().forward([], [])
    mine.set_factor(10)
    np.testing.assert_array_equal(python_net.forward(x=np.ones(2, np.float32))["z"], [11, 11])


def test_backward_from_a_layer_takes_its_tops_diffs_or_the_net_s_outputs(python_net, tmp_path):
    (tmp_path / "net.prototxt").write_text("force_backward: true\n" + PYTHON)
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    net.forward()
    np.testing.assert_array_equal(net.backward(start="mine", y=np.full(2, 2.0))["x"], [6, 6])
    np.testing.assert_array_equal(net.backward(diffs=["y"], z=np.full(2, 5.0))["y"], [5, 5])
    with pytest.raises(caffe.CaffeError, match="do not match the tops"):
        net.backward(start="mine", x=np.ones(2))


def test_backward_without_forward_takes_what_the_blobs_hold(mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    net.blobs["drop"].data[...] = x
    net.blobs["ip2"].diff[...] = dy[:, :3]
    net.backward(start="ip2", end="ip2")
    weights = net.params["ip2"][0]
    np.testing.assert_allclose(net.blobs["drop"].diff, dy[:, :3] @ weights.data, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weights.diff, dy[:, :3].T @ x, rtol=1e-4, atol=1e-6)


# -- solvers -------------------------------------------------------------------------------------------------------
def test_a_solver_shows_its_nets_its_parameters_and_its_rate(tmp_path):
    solver = caffe.SGDSolver(write_solver(tmp_path, MLP, lr_policy="step", stepsize=2, gamma=0.5, test_iter=[1, 1], test_interval=5))
    assert isinstance(solver.net, caffe.Net) and len(solver.test_nets) == 2 and solver.iter == 0
    assert solver.param.max_iter == 20 and solver.param.layer_wise_reduce and abs(solver.param.base_lr - 0.01) < 1e-9
    feed(solver.net, classes=3)
    assert solver.lr == pytest.approx(0.01)
    for net in solver.test_nets:
        feed(net, classes=3)
    solver.step(3)
    assert solver.iter == 3 and solver.lr == pytest.approx(0.005)
    assert solver.test_nets[0].forward()["loss"] > 0


@pytest.mark.parametrize("kind", [caffe.SGDSolver, caffe.NesterovSolver, caffe.AdaGradSolver, caffe.RMSPropSolver, caffe.AdaDeltaSolver,
                                  caffe.AdamSolver])
def test_get_solver_gives_the_class_that_the_file_names(tmp_path, kind):
    name = kind.__name__.removesuffix("Solver")
    path = write_solver(tmp_path, MLP, momentum=0.0 if name in ("AdaGrad", "RMSProp") else 0.9)
    with open(path, "a") as file:
        file.write(f'\ntype: "{name}" rms_decay: 0.9')
    assert type(caffe.get_solver(path)) is kind
    assert type(kind(path)) is kind


def test_apply_update_takes_the_diffs_as_they_are(tmp_path):
    solver = caffe.SGDSolver(write_solver(tmp_path, MLP, momentum=0.0, weight_decay=0.0))
    before = solver.net.params["ip2"][0].data.copy()
    solver.net.params["ip2"][0].diff[...] = 2
    solver.apply_update()
    np.testing.assert_allclose(solver.net.params["ip2"][0].data, before - 0.02, rtol=1e-5)
    assert solver.iter == 0


def test_another_net_can_use_the_trained_weights(tmp_path):
    solver = caffe.SGDSolver(write_solver(tmp_path, MLP))
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    solver.share_weights(net)
    feed(solver.net, classes=3)
    start = solver.net.params["ip1"][0].data.copy()
    solver.step(2)
    assert np.abs(solver.net.params["ip1"][0].data - start).max() > 0
    np.testing.assert_array_equal(net.params["ip1"][0].data, solver.net.params["ip1"][0].data)


def test_solve_runs_to_max_iter_and_restore_goes_on_from_a_snapshot(tmp_path):
    path = write_solver(tmp_path, MLP, max_iter=4, snapshot=2)
    solver = caffe.get_solver(path)
    feed(solver.net, classes=3)
    solver.solve()
    assert solver.iter == 4
    other = caffe.get_solver(path)
    other.restore(str(tmp_path / "snap_iter_2.solverstate"))
    assert other.iter == 2
    (tmp_path / "snap_iter_2.caffemodel").unlink()
    other.snapshot()
    assert (tmp_path / "snap_iter_2.caffemodel").exists()
    feed(other.net, classes=3)
    other.solve(str(tmp_path / "snap_iter_4.solverstate"))
    np.testing.assert_array_equal(other.net.params["ip1"][0].data, solver.net.params["ip1"][0].data)


# -- the module ----------------------------------------------------------------------------------------------------
def test_a_script_for_several_gpus_runs_with_one(tmp_path):
    uid = caffe.NCCL.new_uid()
    caffe.set_solver_count(1)
    caffe.set_solver_rank(0)
    caffe.set_multiprocess(True)
    assert (caffe.solver_count(), caffe.solver_rank(), caffe.has_nccl()) == (1, 0, torch.version.cuda is not None)
    solver = caffe.SGDSolver(write_solver(tmp_path, MLP))
    feed(solver.net, classes=3)
    nccl = caffe.NCCL(solver, uid)
    nccl.bcast()
    solver.add_callback(nccl)
    solver.net.after_backward(nccl)
    solver.step(1)
    assert solver.iter == 1


def test_a_timer_measures_milliseconds():
    timer = caffe.Timer()
    timer.start()
    time.sleep(0.02)
    timer.stop()
    assert timer.ms >= 20


def test_log_writes_a_line_of_the_user_s(capfd):
    caffe.init_log()
    caffe.log("two words")
    assert capfd.readouterr().err.endswith("] two words\n")


def test_the_module_says_what_it_is():
    assert (caffe.TRAIN, caffe.TEST) == (0, 1) and caffe.__version__.count(".") == 2
    assert {"Convolution", "Python", "LSTM"} <= set(caffe.layer_type_list())


def test_seeds_and_modes_can_be_set(mlp):
    caffe.set_mode_cpu()
    caffe.set_device(0)
    draws = []
    for _ in range(2):
        caffe.set_random_seed(5)
        draws.append(caffe.Net(mlp, caffe.TRAIN).params["ip1"][0].data.copy())
    np.testing.assert_array_equal(*draws)
    if not __import__("torch").cuda.is_available():
        with pytest.raises(caffe.CaffeError, match="no GPU"):
            caffe.set_mode_gpu()
