"""forward_all and forward_backward_all against passes written out, and pycaffe's private names."""
import numpy as np
import pytest

import torchcaffe as caffe

NET = """
force_backward: true
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 4 dim: 3 } } }
layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip" inner_product_param { num_output: 2 weight_filler { type: "gaussian" } } }
layer { name: "split" type: "Split" bottom: "ip" top: "y" top: "z" }
layer { name: "total" type: "Reduction" bottom: "z" top: "total" }
"""


def make(folder, text):
    (folder / "net.prototxt").write_text(text)
    return caffe.Net(str(folder / "net.prototxt"), caffe.TEST)


@pytest.fixture
def net(tmp_path):
    return make(tmp_path, NET)


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_forward_all_runs_as_many_batches_as_it_needs(net, count):
    x = draw(count, 3)
    found = net.forward_all(blobs=["ip"], x=x)
    expected = x @ net.params["ip"][0].data.T
    assert sorted(found) == ["ip", "total", "y"]
    np.testing.assert_allclose(found["ip"], expected, rtol=1e-5, atol=1e-5)
    padded = np.concatenate([expected, np.zeros((-count % 4, 2), np.float32)]).reshape(-1, 8)
    np.testing.assert_allclose(found["total"], padded.sum(1), rtol=1e-5, atol=1e-5)     # one number per batch


def test_forward_backward_all_gives_both_results_for_all_items(tmp_path):
    net = make(tmp_path, NET.split('layer { name: "split"')[0].replace('top: "ip"', 'top: "y"'))
    x, dy = draw(6, 3), draw(6, 2)[::-1].copy()
    tops, diffs = net.forward_backward_all(diffs=["y"], x=x, y=dy)
    weights = net.params["ip"][0].data
    np.testing.assert_allclose(tops["y"], x @ weights.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(diffs["y"], dy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(diffs["x"], dy @ weights, rtol=1e-5, atol=1e-5)


def test_arrays_of_different_lengths_or_none_are_refused(net):
    with pytest.raises(caffe.CaffeError, match="needs an array for each input"):
        net.forward_all()
    with pytest.raises(caffe.CaffeError, match="differ in length: x 5, y 4"):
        list(net._batch({"x": draw(5, 3), "y": draw(4, 2)}))


def test_private_names_count_blobs_as_pycaffe_does(net):
    assert net._blob_names == ["x", "ip", "y", "z", "total"] and net._layer_names == ["x", "ip", "split", "total"]
    assert net._blobs == list(net.blobs.values())
    assert (net._inputs, net._outputs) == ([0], [4, 2])
    assert (net._bottom_ids(2), net._top_ids(2)) == ([1], [2, 3])
    assert net._blob_loss_weights == [0, 0, 0, 0, 0]
