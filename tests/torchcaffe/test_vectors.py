"""pycaffe's vectors, and layers that compute with the blobs that a script puts into theirs."""
from __future__ import annotations

import numpy as np
import pytest

import torchcaffe as caffe
from nets import MLP, feed, parameters, write_solver
from torchcaffe import _caffe
from torchcaffe.graph.vectors import BlobVec, BoolVec, IntVec, StringVec

NET = """
layer { name: "x" type: "Input" top: "x" top: "w" input_param { shape { dim: 1 dim: 4 } shape { dim: 2 dim: 4 } } }
layer { name: "f" type: "InnerProduct" bottom: "x" top: "y" inner_product_param { num_output: 2 bias_filler { value: 1 } } }
layer { name: "s" type: "Silence" bottom: "w" }
"""


@pytest.fixture
def make(tmp_path):
    """A net of NET, with all weights 0 and the input all ones."""
    path = tmp_path / "net.prototxt"
    path.write_text("force_backward: true" + NET)

    def make() -> caffe.Net:
        net = caffe.Net(str(path), caffe.TRAIN)
        net.blobs["x"].data[...] = 1
        return net
    return make


# -- the operations ------------------------------------------------------------------------------------------------
def test_a_vector_does_what_boost_python_s_does():
    names = StringVec(["a", "b", "c"])
    assert (len(names), names[0], names[-1], list(names), "b" in names, 5 in names) == (3, "a", "c", ["a", "b", "c"], True, False)
    part = names[1:]
    assert type(part) is StringVec and part == ["b", "c"] and names[-2:-1] == ["b"] and names[2:1] == []
    part[0] = "other"
    assert names[1] == "b"                                                              # a slice is a copy
    names.append("d")
    names.extend(name for name in "ef")
    names[0], names[-1] = "A", "F"
    assert names == ["A", "b", "c", "d", "e", "F"]
    del names[0]
    del names[3:]
    assert names == ["b", "c", "d"]
    names[1:3] = ["x", "y", "z"]
    names[:1] = "w"                                                                     # one element, not its letters
    names[3:2] = "no place"
    assert names == StringVec(["w", "x", "y", "z"]) and names != ["w"]


@pytest.mark.parametrize(("kind", "call"), [
    (IndexError, lambda v: v[2]), (IndexError, lambda v: v[-3]), (IndexError, lambda v: v[::2]), (TypeError, lambda v: v["0"]),
    (IndexError, lambda v: v.__delitem__(2)), (IndexError, lambda v: v.__setitem__(5, 1)), (TypeError, lambda v: v.__setitem__(0, "one")),
    (TypeError, lambda v: v.append(None)), (TypeError, lambda v: v.extend([3, "four"])),
    (TypeError, lambda v: v.__setitem__(slice(1), ["a"])),
])
def test_what_a_vector_refuses_leaves_it_as_it_was(kind, call):
    vector = IntVec([1, 2])
    with pytest.raises(kind):
        call(vector)
    assert vector == [1, 2]


def test_vectors_are_where_pycaffe_has_them(tmp_path, make):
    net = make()
    assert type(net.params["f"]) is type(net.layers[1].blobs) is type(net._blobs) is _caffe.BlobVec
    assert net.params["f"] is net.layers[1].blobs and list(net.params) == ["f"]
    assert [type(v) for v in (net.layers, net._layer_names, net._blob_names, net._inputs, net._outputs, net._top_ids(1), net._bottom_ids(1),
                              net._blob_loss_weights)] == [_caffe.LayerVec, _caffe.StringVec, _caffe.StringVec, *[_caffe.IntVec] * 4,
                                                           _caffe.DtypeVec]
    solver = caffe.get_solver(write_solver(tmp_path, MLP, test_iter=1, test_interval=5))
    assert type(solver.test_nets) is _caffe.NetVec and solver.test_nets[-1].phase == caffe.TEST
    with pytest.raises(TypeError, match="stay those it was built with"):
        net.layers[1] = net.layers[0]


def test_a_python_layer_gets_vectors(tmp_path, monkeypatch):
    (tmp_path / "layer_with_vectors.py").write_text("""
import caffe
from caffe._caffe import RawBlobVec, BoolVec, BlobVec
class Mine(caffe.Layer):
    def setup(self, bottom, top):
        assert type(bottom) is type(top) is RawBlobVec and type(self.blobs) is BlobVec
        assert self.blobs.add_blob(2) is None and len(self.blobs) == 1
    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].shape)
    def forward(self, bottom, top):
        top[0].data[...] = bottom[-1].data * self.blobs[0].data
    def backward(self, top, propagate_down, bottom):
        assert type(propagate_down) is BoolVec and list(propagate_down) == [True]
        bottom[0].diff[...] = top[0].diff * self.blobs[0].data
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net.prototxt").write_text("""force_backward: true
        layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 3 dim: 2 } } }
        layer { name: "p" type: "Python" bottom: "x" top: "y" python_param { module: "layer_with_vectors" layer: "Mine" } }""")
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    other = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    other.params["p"][0].data[...] = 5
    net.params["p"][0] = other.params["p"][0]
    np.testing.assert_array_equal(net.forward(x=np.ones((3, 2)))["y"], np.full((3, 2), 5))
    np.testing.assert_array_equal(net.backward(y=np.ones((3, 2)))["x"], np.full((3, 2), 5))
    assert BoolVec([True])[0] is True


# -- blobs that a script puts in -------------------------------------------------------------------------------------
def test_a_layer_computes_with_the_blob_that_is_put_in(tmp_path, make):
    one, two = make(), make()
    two.params["f"][0].data[...] = 1
    old = one.params["f"][0]
    one.layers[1].blobs[0] = two.layers[1].blobs[0]
    np.testing.assert_array_equal(one.forward()["y"], [[5, 5]])
    two.params["f"][0].data[...] = 2                                                    # it is the same blob
    np.testing.assert_array_equal(one.forward()["y"], [[9, 9]])
    np.testing.assert_array_equal(one.backward(y=np.array([[1, 10]]))["x"], [[22, 22, 22, 22]])
    np.testing.assert_array_equal(two.params["f"][0].diff, [[1] * 4, [10] * 4])
    assert not old.diff.any()
    one.save(str(tmp_path / "w"))
    third = caffe.Net(one.source, caffe.TRAIN, weights=str(tmp_path / "w"))
    np.testing.assert_array_equal(third.params["f"][0].data, two.params["f"][0].data)


def test_a_net_that_shares_its_weights_shares_the_new_ones(make):
    one, two, third = make(), make(), make()
    two.params["f"][0].data[...] = 1
    one.params["f"][0] = two.params["f"][0]
    third.share_with(one)
    np.testing.assert_array_equal(third.forward()["y"], [[5, 5]])


def test_another_shape_of_as_many_numbers_and_a_blob_of_the_net_will_do(make):
    net = make()
    net.params["f"][0] = net.blobs["w"]                                                 # weights that the net is fed
    net.blobs["w"].data[...] = [[1, 2, 3, 4], [0, 0, 0, 1]]
    np.testing.assert_array_equal(net.forward()["y"], [[11, 2]])
    blobs = BlobVec()
    blobs.add_blob(8)
    blobs[0].data[...] = np.arange(8)
    net.params["f"][0] = blobs[0]
    np.testing.assert_array_equal(net.forward()["y"], [[7, 23]])


def test_what_a_layer_cannot_compute_with_is_said_when_it_has_to(make):
    net = make()
    net.params["f"][0], net.params["f"][1] = net.params["f"][1], net.params["f"][0]
    with pytest.raises(caffe.CaffeError, match=r"prototxt:3: layer 'f' \(InnerProduct\): computes with a parameter 0 of shape \(2, 4\)"):
        net.forward()
    net = make()
    del net.params["f"][1]
    with pytest.raises(caffe.CaffeError, match="computes with 2 parameters, and 1 are left"):
        net.forward()
    net = make()
    net.params["f"].add_blob(3)                                                         # one more is saved, and nothing else
    net.forward()
    assert len(net.to_message().layer[1].blobs) == 3


@pytest.mark.parametrize("fast", [False, True])
def test_a_solver_goes_on_updating_its_own_blobs(tmp_path, capfd, fast):
    path = write_solver(tmp_path, MLP, weight_decay=0.0)
    solver, other = caffe.get_solver(path), caffe.get_solver(path)
    solver.fast = fast
    feed(solver.net, classes=3)
    solver.step(1)
    before, foreign = parameters(solver.net), other.net.params["ip2"][0]
    foreign.data[...] = 0
    mine = solver.net.params["ip2"][0]
    solver.net.params["ip2"][0] = foreign
    solver.net.params["ip2"][1].data[...] = 0
    solver.step(1)
    assert solver.net.blobs["loss"].data == pytest.approx(np.log(3))                    # with the foreign weights
    assert np.abs(foreign.diff).max() > 0 and not foreign.data.any()                    # which the solver does not know
    momentum = 0.9 * (mine.data - before["ip2", 0])
    assert np.abs(momentum).max() > 0                                                   # its own go on by their momentum alone
    assert not fast or "runs layer by layer: layer 'ip2' has other blobs than it was built with" in capfd.readouterr().err


# -- layers of one name ------------------------------------------------------------------------------------------------
TWINS = """
layer { name: "x" type: "Input" top: "x" top: "t" input_param { shape { dim: 1 dim: 2 } } }
layer { name: "a" type: "InnerProduct" bottom: "x" top: "y" inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "%s" type: "InnerProduct" bottom: "y" top: "z" inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "z" bottom: "t" top: "loss" }
"""


def test_of_layers_of_one_name_the_first_takes_weights(tmp_path):
    (tmp_path / "net.prototxt").write_text(TWINS % "a")
    net, other, third = (caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST) for _ in range(3))
    for i in (1, 2):
        net.layers[i].blobs[0].data[...] = i
        other.layers[i].blobs[0].data[...] = third.layers[i].blobs[0].data[...] = 0
    net.save(str(tmp_path / "w.caffemodel"))
    other.copy_from(str(tmp_path / "w.caffemodel"))
    third.share_with(net)
    for filled in (other, third):
        assert [filled.layers[i].blobs[0].data.max() for i in (1, 2)] == [2, 0]


def test_of_layers_of_one_name_the_last_takes_weights_from_hdf5(tmp_path):
    (tmp_path / "net.prototxt").write_text(TWINS % "b")
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    net.params["a"][0].data[...] = 1
    net.save_hdf5(str(tmp_path / "w.h5"))
    (tmp_path / "net.prototxt").write_text(TWINS % "a")
    twins = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    twins.layers[1].blobs[0].data[...] = 0
    twins.load_hdf5(str(tmp_path / "w.h5"))
    assert [twins.layers[i].blobs[0].data.max() for i in (1, 2)] == [0, 1]


@pytest.mark.parametrize("fast", [False, True])
def test_layers_of_one_name_learn_as_others_do(tmp_path, fast):
    ends = []
    for name in "ab":
        solver = caffe.get_solver(write_solver(tmp_path, TWINS % name, weight_decay=0.0))
        solver.fast = fast
        for i in (1, 2):
            solver.net.layers[i].blobs[0].data[...] = [[1, 0.5 * i], [0.25, -1]]
        solver.net.blobs["x"].data[...] = [[1, 2]]
        solver.step(5)
        ends.append([solver.net.layers[i].blobs[0].data.copy() for i in (1, 2)])
    np.testing.assert_array_equal(*ends)


# -- the modules ---------------------------------------------------------------------------------------------------------
def test_the_names_of_the_two_modules_are_those_of_the_package():
    from torchcaffe import pycaffe
    assert all(getattr(module, name) is getattr(caffe, name)
               for module in (_caffe, pycaffe) for name in module.__all__ if hasattr(caffe, name))
    assert _caffe.BlobVec is BlobVec and {"InnerProduct", "Python"} <= set(_caffe.layer_type_list())
