"""Layers without bottoms: what they fill, and when."""
from __future__ import annotations

import numpy as np
import pytest

import torchcaffe as caffe
from one_layer import make

DUMMY = """
layer { name: "dummy" type: "DummyData" top: "noise" top: "fixed"
  dummy_data_param { shape { dim: 4 dim: 3 } shape { dim: 2 } data_filler { type: "gaussian" } data_filler { value: 0.5 } } }"""


@pytest.fixture
def dummy(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(DUMMY)

    def build():
        caffe.set_random_seed(3)
        return caffe.Net(str(path), caffe.TRAIN)
    return build


class TestDummyData:
    def test_constants_are_there_before_the_first_pass_and_stay_what_the_user_makes_them(self, dummy):
        net = dummy()
        assert net.blobs["fixed"].data.tolist() == [0.5, 0.5]
        net.blobs["fixed"].data[0] = 7
        for _ in range(2):
            net.forward()
            assert net.blobs["fixed"].data.tolist() == [7, 0.5]

    def test_other_fillers_draw_in_every_pass_what_the_seed_says(self, dummy):
        passes = [[net.forward()["noise"].copy() for _ in range(2)] for net in (dummy(), dummy())]
        assert not np.array_equal(*passes[0])
        assert np.array_equal(passes[0], passes[1])

    def test_old_fields_give_four_axes(self):
        text = "dummy_data_param { num: 2 num: 5 channels: 3 height: 1 width: 4 }"
        assert make("DummyData", text=text, tops=2).top_shapes() == [(2, 3, 1, 4), (5, 3, 1, 4)]

    @pytest.mark.parametrize(("text", "words"), [
        ("", "0 shapes for 2 tops"), ("shape { dim: 1 } num: 2", "not both"), ("num: 2 channels: 1 height: 1", "0 sizes for 2 tops"),
        ("shape { dim: 1 } data_filler { } data_filler { } data_filler { }", "3 data_fillers for 2 tops"),
        ("shape { dim: 1 } data_filler { type: 'nosuch' }", r"'it' \(DummyData\): unknown filler type 'nosuch'")])
    def test_what_does_not_fit_is_refused(self, text, words):
        with pytest.raises(caffe.CaffeError, match=words):
            make("DummyData", text=f"dummy_data_param {{ {text} }}", tops=2)


def test_input_takes_one_shape_for_all_tops_or_one_for_each():
    assert make("Input", text="input_param { shape { dim: 2 dim: 3 } }", tops=2).top_shapes() == [(2, 3), (2, 3)]
    assert make("Input", text="input_param { shape { dim: 2 } shape { } }", tops=2).top_shapes() == [(2,), ()]
    assert make("Input", tops=2).top_shapes() == [(), ()]
    with pytest.raises(caffe.CaffeError, match="2 shapes for 3 tops"):
        make("Input", text="input_param { shape { dim: 2 } shape { } }", tops=3)


def test_a_parameter_is_its_own_top():
    layer = make("Parameter", text="parameter_param { shape { dim: 2 dim: 3 } }")
    assert layer.forward() is layer.params[0] and not layer.params[0].any()
