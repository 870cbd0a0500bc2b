"""pycaffe's Net: partial passes, hooks, sharing, weights in and out, errors with file and line."""
import numpy as np
import pytest

import torchcaffe as caffe
from nets import MLP, feed, parameters, resnet8


@pytest.fixture
def mlp(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(MLP)
    return str(path)


def make(path, text=None, phase=caffe.TRAIN):
    if text is not None:
        path.write_text(text)
    return caffe.Net(str(path), phase)


def test_forward_returns_live_outputs_and_takes_inputs_by_name(mlp):
    net = caffe.Net(mlp, caffe.TEST)
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    out = net.forward(data=x, label=np.zeros(6), blobs=["ip2"])
    assert sorted(out) == ["ip2", "loss"] and out["ip2"] is net.blobs["ip2"].data
    w1, b1, w2, b2 = (b.data for name in ("ip1", "ip2") for b in net.params[name])
    assert np.allclose(out["ip2"], np.maximum(x @ w1.T + b1, 0) @ w2.T + b2, atol=1e-6)


def test_a_pass_from_one_layer_to_another_uses_what_the_blobs_hold(mlp):
    net = caffe.Net(mlp, caffe.TEST)
    feed(net, classes=3)
    net.forward()
    net.blobs["drop"].data[...] = 1
    out = net.forward(start="ip2", end="ip2")
    w, b = (p.data for p in net.params["ip2"])
    assert np.allclose(out["ip2"], w.sum(1) + b, atol=1e-6)


def test_gradients_agree_with_finite_differences(tmp_path):
    with caffe.number_type(__import__("torch").float64):
        net = make(tmp_path / "n.prototxt", resnet8(batch=3))
    feed(net)
    net.forward()
    net.clear_param_diffs()
    net.backward()
    rng, step = np.random.default_rng(0), 1e-6
    for name in ("first", "g1_p", "g2_b_scale", "fc"):
        data, diff = net.params[name][0].data, net.params[name][0].diff.copy()
        index = tuple(rng.integers(0, n) for n in data.shape)
        before, losses = data[index], []
        for sign in (1, -1):
            data[index] = before + sign * step
            losses.append(float(net.forward()["loss"]))
        data[index] = before
        assert diff[index] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_parameter_diffs_add_up_and_blob_diffs_do_not(mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    feed(net, classes=3)
    net._forward(0, len(net.layers) - 1)
    net.clear_param_diffs()
    net.backward()
    once, blob = net.params["ip1"][0].diff.copy(), net.blobs["ip1"].diff.copy()
    net.backward()
    assert np.allclose(net.params["ip1"][0].diff, 2 * once) and np.array_equal(net.blobs["ip1"].diff, blob)


def test_a_diff_written_by_hand_is_what_backward_starts_from(mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    feed(net, classes=3)
    net.forward()
    net.clear_param_diffs()
    net.backward(start="ip2", end="ip2", ip2=np.ones((6, 3)))
    assert np.allclose(net.params["ip2"][1].diff, 6)


def test_hooks_see_every_layer_in_order(mlp):
    net, seen = caffe.Net(mlp, caffe.TRAIN), []
    net.before_forward(lambda i: seen.append(("f", i)))
    net.after_backward(lambda i: seen.append(("b", i)))
    net.forward()
    net.backward()
    n = len(net.layers)
    assert seen == [("f", i) for i in range(n)] + [("b", i) for i in reversed(range(n))]


def test_reshaping_an_input_reaches_every_blob(mlp):
    net = caffe.Net(mlp, caffe.TEST)
    for name, shape in (("data", (2, 5)), ("label", (2,))):
        net.blobs[name].reshape(*shape)
    net.reshape()
    assert net.blobs["ip2"].shape == (2, 3) and net.forward()["loss"].shape == ()


def test_a_shape_that_does_not_fit_a_layer_names_layer_and_both_shapes(mlp):
    net = caffe.Net(mlp, caffe.TEST)
    net.blobs["data"].reshape(6, 7)
    with pytest.raises(caffe.CaffeError, match="layer 'ip1'"):
        net.reshape()


@pytest.mark.parametrize("name", ["w.caffemodel", "w.caffemodel.h5"])
def test_saved_weights_load_by_layer_name(tmp_path, mlp, name):
    first, second = (caffe.Net(mlp, caffe.TRAIN) for _ in range(2))
    assert not np.array_equal(first.params["ip1"][0].data, second.params["ip1"][0].data)
    array = second.params["ip1"][0].data
    first.save(tmp_path / name)
    second.copy_from(tmp_path / name)
    a, b = parameters(first), parameters(second)
    assert all(np.array_equal(a[k], b[k]) for k in a) and np.array_equal(array, a["ip1", 0])


def test_weights_of_another_shape_change_nothing_and_name_the_layer(tmp_path, mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    other = make(tmp_path / "o.prototxt", MLP.replace("num_output: 3", "num_output: 9"))
    other.save(tmp_path / "o.caffemodel")
    before = parameters(net)
    with pytest.raises(caffe.CaffeError, match="parameter 0 of layer 'ip2' has shape .9, 4. there and .3, 4. in"):
        net.copy_from(tmp_path / "o.caffemodel")
    after = parameters(net)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_nets_that_share_see_each_other_s_updates(mlp):
    train, test = caffe.Net(mlp, caffe.TRAIN), caffe.Net(mlp, caffe.TEST)
    test.share_with(train)
    train.params["ip1"][0].data[...] = 3
    assert (test.params["ip1"][0].data == 3).all()


@pytest.mark.parametrize(("old", "new", "message"), [
    ('type: "ReLU"', 'type: "RelU"', r"net.prototxt:5: layer 'relu': layer type 'RelU' is not registered; did you mean 'ReLU'\?"),
    ('bottom: "ip1" top: "drop"', 'bottom: "ipp1" top: "drop"', r"net.prototxt:6: layer 'drop'.*unknown bottom blob 'ipp1'.*mean 'ip1'\?"),
    ('layer { name: "loss"', 'layer { name: "again" type: "TanH" bottom: "label" top: "data" } layer { name: "loss"',
     r"net.prototxt:8: layer 'again' \(TanH\): top 'data' is already made by another layer"),
    ('bottom: "ip2" bottom: "label"', 'bottom: "ip2"', r"net.prototxt:8: layer 'loss' \(SoftmaxWithLoss\): takes .* bottom"),
])
def test_a_net_that_does_not_fit_together_is_refused_with_file_line_and_layer(tmp_path, old, new, message):
    path = tmp_path / "net.prototxt"
    assert old in MLP
    with pytest.raises(caffe.CaffeError, match=message):
        make(path, MLP.replace(old, new))


def test_seeded_nets_draw_the_same_weights_and_unseeded_ones_do_not(mlp):
    drawn = []
    for _ in range(2):
        caffe.set_random_seed(5)
        drawn.append([caffe.Net(mlp, caffe.TRAIN).params["ip1"][0].data.copy() for _ in range(2)])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0][0], drawn[0][1])


def test_the_older_form_net_weights_phase_is_understood(tmp_path, mlp):
    net = caffe.Net(mlp, caffe.TRAIN)
    net.save(tmp_path / "w.caffemodel")
    again = caffe.Net(mlp, str(tmp_path / "w.caffemodel"), caffe.TEST)
    assert np.array_equal(again.params["ip1"][0].data, net.params["ip1"][0].data)
