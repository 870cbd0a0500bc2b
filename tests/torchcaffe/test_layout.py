"""Images with one channel train channels-last, like those with three."""
import numpy as np
import pytest
import torch

import torchcaffe as caffe
from nets import conv, write_solver


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
