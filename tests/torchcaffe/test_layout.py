"""Nets of images are computed channels-last, whatever their channels and shortcuts."""
import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import conv, feed, write_solver, zero_padded
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
    solver = caffe.get_solver(write_solver(tmp_path, zero_padded()))
    solver.fast = True
    feed(solver.net)
    solver.step(1)
    assert found[1:] == [True, True]                     # the first comes from an inner product, which gives rows
    tops = solver._programs[id(solver.net)].tops
    assert all(tops[name].is_contiguous(memory_format=torch.channels_last) for name in ("a", "b", "half", "zeros", "pad", "sum", "c"))
