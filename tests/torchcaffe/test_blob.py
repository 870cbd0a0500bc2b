"""Live arrays: what the engine computes shows on arrays taken before, and what is written there is read."""
import numpy as np
import pytest
import torch

from torchcaffe.errors import CaffeError
from torchcaffe.graph.blob import Blob, check_shape

CPU = torch.device("cpu")


def blob(*shape, fixed=False):
    return Blob(shape, CPU, torch.float32, fixed)


def test_an_array_taken_once_shows_the_next_value():
    b = blob(2, 3)
    array = b.data
    b.data_slot.assign(torch.arange(6.0).reshape(2, 3))
    b.data_slot.flush()
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]] and b.data is array


def test_what_is_written_to_the_array_is_what_the_next_layer_reads():
    b = blob(1, 2, 2, 2)
    b.data_slot.assign(torch.zeros(1, 2, 2, 2))
    b.data[...] = np.arange(8).reshape(1, 2, 2, 2)
    value = b.data_slot.value()
    assert value.flatten().tolist() == list(range(8)) and value.is_contiguous(memory_format=torch.channels_last)


def test_a_deferred_value_is_taken_when_asked_for_and_only_while_it_is_there():
    b, tops = blob(2), {"x": torch.ones(2)}
    b.data_slot.defer(tops, "x")
    tops.clear()
    assert b.data.tolist() == [0, 0]
    tops["x"] = torch.full((2,), 3.0)
    b.data_slot.defer(tops, "x")
    assert b.data.tolist() == [3, 3]


def test_writing_to_the_array_does_not_change_tensors_read_before():
    b = blob(3)
    b.data[...] = 1
    before = b.data_slot.value()
    b.data[...] = 2
    assert before.tolist() == [1, 1, 1]


def test_a_parameter_on_the_cpu_is_its_own_array():
    b = blob(3, fixed=True)
    b.data[...] = 5
    assert b.data_slot.value().tolist() == [5, 5, 5]
    b.data_slot.value().add_(1)
    assert b.data.tolist() == [6, 6, 6]


def test_shared_data_of_another_shape_is_the_same_memory():
    a, b = blob(2, 3, fixed=True), blob(6, fixed=True)
    b.share_data(a)
    a.data[1, 0] = 7
    assert b.data.tolist() == [0, 0, 0, 7, 0, 0] and b.shape == (6,)


def test_channels_last_results_show_in_the_order_of_the_axes():
    b, value = blob(1, 2, 2, 2), torch.arange(8.0).reshape(1, 2, 2, 2)
    b.data_slot.assign(value.contiguous(memory_format=torch.channels_last))
    assert b.data.flatten().tolist() == list(range(8)) and b.data.flags.c_contiguous


def test_legacy_axes_are_one_where_missing():
    b = blob(4, 5)
    assert (b.num, b.channels, b.height, b.width, b.count) == (4, 5, 1, 1, 20)


@pytest.mark.parametrize("shape", [(2**20, 2**20), (-1,), (1,) * 33])
def test_impossible_shapes_are_refused_before_anything_is_allocated(shape):
    with pytest.raises(CaffeError, match="is not possible"):
        check_shape(shape)
