"""Layers that move elements about."""
from __future__ import annotations

import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError

ONE = (2, 3, 4)


@pytest.mark.parametrize(("kind", "shapes", "text", "tops"), [
    ("Concat", [(2, 3, 2), (2, 1, 2), (2, 2, 2)], "", 1), ("Concat", [(2, 3)], "", 1),
    ("Slice", [(2, 5, 2)], "slice_param { slice_point: 1 }", 2), ("Split", [ONE], "", 3),
    ("Flatten", [ONE], "", 1), ("Reshape", [ONE], "reshape_param { shape { dim: -1 dim: 8 } }", 1),
    ("Tile", [ONE], "tile_param { axis: 1 tiles: 2 }", 1)])
def test_gradients_and_shapes_are_true(kind, shapes, text, tops):
    layer = make(kind, *shapes, text=text, tops=tops)
    bottoms = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert layer.top_shapes(*shapes) == [tuple(top.shape) for top in run(layer, *bottoms)]
    assert gradients_are_true(layer, *bottoms)


@pytest.mark.parametrize("field", ["axis: 2", "concat_dim: 2", "axis: -1"])
def test_slice_undoes_concat(field):
    parts = [draw(2, 3, n, seed=n).detach() for n in (1, 2, 3)]
    joined = run(make("Concat", *(p.shape for p in parts), text=f"concat_param {{ {field} }}"), *parts)[0]
    assert torch.equal(joined, torch.cat(parts, 2))
    cut = make("Slice", (2, 3, 6), tops=3, text=f"slice_param {{ {field.replace('concat', 'slice')} slice_point: 1 slice_point: 3 }}")
    assert all(torch.equal(a, b) for a, b in zip(run(cut, joined), parts, strict=True))


def test_slice_without_points_makes_equal_pieces():
    assert make("Slice", (2, 6), tops=3).top_shapes((2, 6)) == [(2, 2)] * 3


@pytest.mark.parametrize(("text", "shape"), [
    ("", (2, 60)), ("axis: 0", (120,)), ("axis: -2", (2, 3, 20)), ("axis: 1 end_axis: 2", (2, 12, 5)), ("end_axis: -3", (2, 3, 4, 5)),
    ("axis: 2 end_axis: 1", (2, 3, 1, 4, 5))])
def test_flatten_joins_the_axes_between(text, shape):
    assert make("Flatten", (2, 3, 4, 5), text=f"flatten_param {{ {text} }}").top_shapes((2, 3, 4, 5)) == [shape]


@pytest.mark.parametrize(("text", "shape"), [
    ("shape { dim: 0 dim: -1 }", (2, 12)), ("shape { dim: 0 dim: 2 dim: 6 }", (2, 2, 6)), ("shape { dim: -1 }", (24,)),
    ("shape { dim: -1 dim: 0 dim: 2 }", (4, 3, 2)), ("axis: 1 shape { dim: 12 }", (2, 12)), ("axis: -1 shape { dim: 1 }", (2, 3, 4, 1)),
    ("axis: 1 num_axes: 0 shape { dim: 1 dim: 1 }", (2, 1, 1, 3, 4)), ("axis: 1 num_axes: 1 shape { dim: 3 dim: 1 }", (2, 3, 1, 4)),
    ("axis: -3 num_axes: 1 shape { dim: 3 }", (2, 3, 4)), ("shape { dim: 0 dim: 0 dim: 0 }", (2, 3, 4))])
def test_reshape_follows_caffe_s_rules(text, shape):
    layer = make("Reshape", ONE, text=f"reshape_param {{ {text} }}")
    assert layer.top_shapes(ONE) == [shape]
    x = draw(*ONE)
    assert torch.equal(run(layer, x)[0], x.reshape(shape))


def test_order_is_caffe_s_whatever_the_layout():
    x = draw(2, 3, 4, 5).detach()
    last = x.contiguous(memory_format=torch.channels_last)
    for kind, text in (("Flatten", ""), ("Reshape", "reshape_param { shape { dim: 5 dim: -1 } }")):
        layer = make(kind, (2, 3, 4, 5), text=text)
        assert torch.equal(run(layer, last)[0], run(layer, x)[0])


def test_silence_has_no_tops():
    assert run(make("Silence", ONE, ONE, tops=0), draw(*ONE), draw(*ONE)) == []


@pytest.mark.parametrize(("text", "begin"), [
    ("", (0, 0, 0)), ("offset: 1", (0, 1, 1)), ("axis: 1 offset: 1 offset: 0 offset: 2", (1, 0, 2))])
def test_crop_takes_the_second_bottom_s_shape(text, begin):
    layer = make("Crop", (2, 4, 5, 6), (2, 3, 3, 4), text=f"crop_param {{ {text} }}")
    channels = 3 if "axis: 1" in text else 4
    x, like = draw(2, 4, 5, 6), draw(2, 3, 3, 4).detach()
    assert layer.top_shapes((2, 4, 5, 6), (2, 3, 3, 4)) == [(2, channels, 3, 4)]
    assert torch.equal(run(layer, x, like)[0], x[:, begin[0]:begin[0] + channels, begin[1]:begin[1] + 3, begin[2]:begin[2] + 4])
    assert gradients_are_true(layer, x, like)


def test_batch_reindex_may_repeat_items():
    layer = make("BatchReindex", (3, 2), (4,))
    x, index = draw(3, 2), torch.tensor([2.0, 0.0, 2.0, 2.0])
    assert torch.equal(run(layer, x, index)[0], x[[2, 0, 2, 2]])
    run(layer, x, index)[0].sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 3]


def test_filter_keeps_what_is_selected():
    layer = make("Filter", (3, 2), (3,), (3, 1), tops=2)
    a, b = run(layer, draw(3, 2), draw(3, seed=1), torch.tensor([[0.5], [0.0], [-1.0]]))
    assert torch.equal(a, draw(3, 2)[[0, 2]]) and torch.equal(b, draw(3, seed=1)[[0, 2]])
    assert layer.not_differentiable == {2}


@pytest.mark.parametrize(("kind", "shapes", "text", "tops", "words"), [
    ("Concat", [(2, 3), (3, 3)], "", 1, r"\(2, 3\) and \(3, 3\) do not fit together along axis 1"),
    ("Concat", [(2, 3)], "concat_param { axis: 1 concat_dim: 1 }", 1, "not both"),
    ("Concat", [(2, 3)], "concat_param { axis: 2 }", 1, "axis 2 is out of range"),
    ("Slice", [(2, 5)], "", 2, "2 equal pieces"),
    ("Slice", [(2, 5)], "slice_param { slice_point: 2 }", 3, "1 slice_points for 3 tops"),
    ("Slice", [(2, 5)], "slice_param { slice_point: 5 }", 2, "must grow"),
    ("Flatten", [(2, 3, 4)], "flatten_param { axis: 2 end_axis: 0 }", 1, "behind end_axis"),
    ("Reshape", [(2, 3)], "reshape_param { shape { dim: 4 dim: -1 } }", 1, r"\(2, 3\) cannot be divided"),
    ("Reshape", [(2, 3)], "reshape_param { shape { dim: -1 dim: -1 } }", 1, "at most one -1"),
    ("Reshape", [(2, 3)], "reshape_param { shape { dim: 5 } }", 1, "same number of elements"),
    ("Reshape", [(2, 3)], "reshape_param { shape { dim: 6 dim: 1 dim: 0 } }", 1, "no axis to copy"),
    ("Reshape", [(2, 3)], "reshape_param { axis: 3 shape { dim: 6 } }", 1, "axis 3 is out of range"),
    ("Tile", [(2, 3)], "", 1, "tiles"),
    ("Crop", [(2, 3, 4, 4), (2, 3, 5, 4)], "", 1, "reaches beyond axis 2"),
    ("Crop", [(2, 3, 4, 4), (2, 3, 2, 2)], "crop_param { axis: 1 offset: 0 offset: 1 }", 1, "2 offsets for 3 axes"),
    ("Filter", [(2, 3), (3,)], "", 1, "as many items"),
    ("Filter", [(2, 3), (2,)], "", 2, "needs 1 tops"),
    ("BatchReindex", [(2, 3), (2, 1)], "", 1, "one-axis index")])
def test_what_does_not_fit_is_refused(kind, shapes, text, tops, words):
    with pytest.raises(CaffeError, match=words):
        make(kind, *shapes, text=text, tops=tops)
