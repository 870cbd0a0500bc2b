"""Nets of images are computed channels-last, whatever their channels and shortcuts."""
import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import conv, feed, parameters, resnet8, write_solver, zero_padded
from torchcaffe.graph import work
from torchcaffe.graph.build import _Builder
from torchcaffe.layers import per_channel


@pytest.mark.parametrize("channels", [1, 3])
def test_all_tops_of_a_convolutional_net_are_channels_last(tmp_path, channels):
    text = f"""
    layer {{ name: "data" type: "DummyData" top: "data" dummy_data_param {{ shape {{ dim: 4 dim: {channels} dim: 6 dim: 6 }} }} }}
    {conv("a", "data", 8)} {conv("b", "a", 8)}
    layer {{ name: "loss" type: "Reduction" bottom: "b" top: "loss" loss_weight: 1 }}"""
    solver = caffe.get_solver(write_solver(tmp_path, text))
    solver.fast = True
    solver.step(1)
    values = [solver.net.blobs[name].data_slot.value() for name in ("a", "b")]
    assert all(v.is_contiguous(memory_format=torch.channels_last) and not v.is_contiguous() for v in values)
    assert np.isfinite(solver.net.blobs["loss"].data)


def test_shortcuts_that_pad_with_zeros_leave_the_layout_alone_in_both_directions(tmp_path, monkeypatch):
    backward, found = per_channel._Normalise.backward, []

    def noting(ctx, dy, *others):
        found.append(dy.is_contiguous(memory_format=torch.channels_last))
        return backward(ctx, dy, *others)
    monkeypatch.setattr(per_channel._Normalise, "backward", staticmethod(noting))
    monkeypatch.setattr(work, "NUMBERS", 0)              # as in nets that are not tiny
    monkeypatch.setattr(per_channel, "LITTLE", 0)
    solver = caffe.get_solver(write_solver(tmp_path, zero_padded()))
    solver.fast = True
    feed(solver.net)
    solver.step(1)
    assert found[1:] == [True, True]                     # the first comes from an inner product, which gives rows
    tops = solver._programs[id(solver.net)].tops
    assert all(tops[name].is_contiguous(memory_format=torch.channels_last) for name in ("a", "b", "half", "zeros", "pad", "sum", "c"))


@pytest.fixture
def weights_as_on_a_gpu(monkeypatch):
    """Convolutions' weights lie channels-last, as only a GPU has them."""
    layout = _Builder._layout

    def as_on_a_gpu(builder, message, index, shape):
        builder.context.device = torch.device("cuda")
        try:
            return layout(builder, message, index, shape)
        finally:
            builder.context.device = torch.device("cpu")
    return lambda: monkeypatch.setattr(_Builder, "_layout", as_on_a_gpu)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("snapshot_format", ["BINARYPROTO", "HDF5"])
def test_how_weights_lie_in_memory_shows_nowhere(tmp_path, weights_as_on_a_gpu, fast, snapshot_format):
    def make(restored=None):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with caffe.number_type(torch.float64):
            solver = caffe.get_solver(write_solver(folder, resnet8(), snapshot_format=snapshot_format))
        solver.fast = solver.exact = fast
        feed(solver.net)
        if restored:
            solver.restore(restored)
        return solver
    plain = make()
    weights_as_on_a_gpu()
    other = make()
    weight = other.net.params["g0_a"][0]
    assert weight.data_slot.value().is_contiguous(memory_format=torch.channels_last)
    for solver in (plain, other):
        solver.step(3)
    a, b = parameters(plain.net), parameters(other.net)
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-12
    history = other.histories[0][next(i for i, item in enumerate(other.learnable) if item.layer == "g0_a")]
    assert history.stride() == weight.data_slot.value().stride() == weight.diff_slot.value().stride()
    again = make(other.snapshot())
    for solver in (other, again):
        solver.step(2)
    a, b = parameters(other.net), parameters(again.net)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    weight.data[...] = np.arange(weight.count).reshape(weight.shape)
    assert torch.equal(weight.data_slot.value().flatten(), torch.arange(weight.count, dtype=torch.float64))


def test_a_weight_that_another_layer_sees_in_another_shape_lies_row_by_row(tmp_path, weights_as_on_a_gpu):
    weights_as_on_a_gpu()
    shared = 'param { name: "w" share_mode: PERMISSIVE }'
    path = tmp_path / "net.prototxt"
    path.write_text(f"""
    layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: 2 dim: 3 dim: 4 dim: 4 }} }} }}
    layer {{ name: "conv" type: "Convolution" bottom: "data" top: "conv" {shared}
      convolution_param {{ num_output: 5 kernel_size: 4 bias_term: false weight_filler {{ type: "xavier" }} }} }}
    layer {{ name: "ip" type: "InnerProduct" bottom: "data" top: "ip" {shared}
      inner_product_param {{ num_output: 5 bias_term: false }} }}""")
    net = caffe.Net(str(path), caffe.TEST)
    net.blobs["data"].data[...] = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    net.forward()
    assert np.allclose(net.blobs["conv"].data.reshape(2, 5), net.blobs["ip"].data, rtol=1e-5, atol=1e-6)
