"""Whatever is written is read back: weights and solver states of any shapes, scalars and empty arrays too, in both formats."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchcaffe import formats
from torchcaffe.proto import caffe_pb2

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ARRAYS = st.lists(hnp.arrays(st.sampled_from([np.float32, np.float64]), hnp.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=3)),
                  max_size=3)
NAMES = st.text("abcäß-_ 0#é文", min_size=1, max_size=6)                    # `/` makes groups in HDF5: test_formats.py
BINARY_AND_HDF5 = pytest.mark.parametrize("ending", ["", ".h5"])


def assert_equal(found: list[np.ndarray | None], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for array, want in zip(found, wanted, strict=True):
        assert array is not None and array.shape == want.shape
        assert array.dtype == want.dtype or not want.size              # a message without numbers does not say of which type they are
        np.testing.assert_array_equal(array, want)
        assert array.flags.writeable


@BINARY_AND_HDF5
@QUICK
@given(layers=st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=4))
def test_any_weights_are_read_back(tmp_path, ending, layers):
    net = caffe_pb2.NetParameter()
    for name, arrays in layers.items():
        net.layer.add(name=name).blobs.extend(formats.array_to_blob(array) for array in arrays)
    path = tmp_path / f"w.caffemodel{ending}"
    formats.write_weights(path, net)
    found = dict(formats.read_weights(path))
    assert set(found) == set(layers)
    for name, arrays in layers.items():
        assert_equal(found[name], arrays)


@BINARY_AND_HDF5
@QUICK
@given(iteration=st.integers(0, 2**31 - 1), current_step=st.integers(0, 2**31 - 1), history=ARRAYS,
       learned_net=st.text("a/ä.文", max_size=9))
def test_any_state_is_read_back(tmp_path, ending, iteration, current_step, history, learned_net):
    path = tmp_path / f"s.solverstate{ending}"
    formats.write_state(path, formats.State(iteration, learned_net, current_step, history))
    found = formats.read_state(path)
    assert (found.iter, found.current_step, found.learned_net) == (iteration, current_step, learned_net)
    assert_equal(found.history, history)


@QUICK
@given(image=hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4)))
def test_any_mean_is_read_back(tmp_path, image):
    formats.write_mean(tmp_path / "m.binaryproto", image)
    assert_equal([formats.read_mean(tmp_path / "m.binaryproto")], [image])
