"""Products, sums of blobs, softmax, reductions, places of maxima."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError


class TestInnerProduct:
    @pytest.mark.parametrize(("text", "weight", "top"), [
        ("", (5, 12), (2, 5)), ("axis: 2", (5, 4), (2, 3, 5)), ("axis: -1 transpose: true", (4, 5), (2, 3, 5)),
        ("axis: 0 bias_term: false", (5, 24), (5,))])
    def test_it_multiplies_what_follows_the_axis(self, text, weight, top):
        layer = make("InnerProduct", (2, 3, 4), text=f"inner_product_param {{ num_output: 5 {text} weight_filler {{ type: 'xavier' }} }}")
        x = draw(2, 3, 4)
        assert layer.params[0].shape == weight and layer.top_shapes((2, 3, 4)) == [top]
        matrix = layer.params[0] if "transpose" in text else layer.params[0].t()
        assert torch.allclose(run(layer, x)[0], (x.reshape(-1, matrix.shape[0]) @ matrix).reshape(top))
        assert gradients_are_true(layer, x)

    def test_a_channels_last_bottom_is_flattened_in_caffe_s_order(self):
        layer = make("InnerProduct", (2, 3, 4, 5), text="inner_product_param { num_output: 2 weight_filler { type: 'xavier' } }")
        x = draw(2, 3, 4, 5)
        assert torch.allclose(run(layer, x.contiguous(memory_format=torch.channels_last))[0], run(layer, x)[0])

    def test_another_size_than_at_setup_is_refused(self):
        with pytest.raises(CaffeError, match=r"vectors of 3 numbers.*\(2, 4\) gives 4"):
            make("InnerProduct", (2, 3), text="inner_product_param { num_output: 2 }").top_shapes((2, 4))


def test_embed_looks_rows_up_and_adds_up_their_gradients():
    layer = make("Embed", (2, 2), text="embed_param { num_output: 3 input_dim: 4 weight_filler { type: 'gaussian' } }")
    index = torch.tensor([[1.0, 3.0], [1.0, 0.0]])
    y = run(layer, index)[0]
    assert torch.equal(y, layer.params[0][index.long()]) and layer.top_shapes((2, 2)) == [(2, 2, 3)]
    y.sum().backward()
    assert layer.params[0].grad[:, 0].tolist() == [1, 2, 0, 1] and layer.params[1].grad.tolist() == [4, 4, 4]


class TestEltwise:
    @pytest.mark.parametrize("text", ["", "coeff: 0.5 coeff: -1 coeff: 2", "operation: PROD", "operation: MAX"])
    def test_gradients_are_true(self, text):
        layer = make("Eltwise", *[(2, 3)] * 3, text=f"eltwise_param {{ {text} }}")
        assert gradients_are_true(layer, *(draw(2, 3, seed=i) for i in range(3)))

    def test_a_product_has_gradients_at_zeros(self):
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.0, 0.0], [2.0, 0.0]))
        run(make("Eltwise", (2,), (2,), text="eltwise_param { operation: PROD stable_prod_grad: false }"), a, b)[0].sum().backward()
        assert a.grad.tolist() == [2, 0] and b.grad.tolist() == [0, 0]

    def test_of_equal_numbers_the_second_of_the_first_two_is_the_maximum(self):
        bottoms = [torch.tensor(v, requires_grad=True) for v in ([1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0])]
        run(make("Eltwise", (3,), (3,), (3,), text="eltwise_param { operation: MAX }"), *bottoms)[0].sum().backward()
        assert [x.grad.tolist() for x in bottoms] == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]

    @pytest.mark.parametrize(("shapes", "text", "words"), [
        ([(2, 3), (3, 2)], "", r"\(2, 3\) and \(3, 2\)"), ([(2,), (2,)], "coeff: 1", "1 coeff for 2 bottoms"),
        ([(2,), (2,)], "operation: MAX coeff: 1 coeff: 1", "SUM only")])
    def test_what_does_not_fit_is_refused(self, shapes, text, words):
        with pytest.raises(CaffeError, match=words):
            make("Eltwise", *shapes, text=f"eltwise_param {{ {text} }}")


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 3)), (-1, (2, 3, 4)), (0, (3,)), (1, (2, 3, 2, 2))])
def test_softmax_adds_up_to_one_along_its_axis(axis, shape):
    layer = make("Softmax", shape, text=f"softmax_param {{ axis: {axis} }}")
    x = draw(*shape)
    assert torch.allclose(run(layer, x)[0].sum(axis), torch.ones(1, dtype=torch.float64))
    assert gradients_are_true(layer, x)


class TestReduction:
    @pytest.mark.parametrize(("operation", "function"), [
        ("SUM", np.sum), ("ASUM", lambda x, **o: np.abs(x).sum(**o)), ("SUMSQ", lambda x, **o: np.square(x).sum(**o)), ("MEAN", np.mean)])
    @pytest.mark.parametrize(("axis", "over"), [(0, (0, 1, 2)), (1, (1, 2)), (-1, (2,))])
    def test_it_reduces_the_tail(self, operation, function, axis, over):
        layer = make("Reduction", (2, 3, 4), text=f"reduction_param {{ operation: {operation} axis: {axis} coeff: 0.5 }}")
        x = draw(2, 3, 4)
        y = run(layer, x)[0]
        assert np.allclose(y.detach(), 0.5 * function(x.detach().numpy(), axis=over))
        assert [tuple(y.shape)] == layer.top_shapes((2, 3, 4))
        assert gradients_are_true(layer, x)

    def test_the_magnitude_of_zero_has_no_gradient(self):
        x = torch.zeros(3, requires_grad=True)
        run(make("Reduction", (3,), text="reduction_param { operation: ASUM }"), x)[0].backward()
        assert not x.grad.any()


class TestArgMax:
    @pytest.mark.parametrize(("shape", "text", "top"), [
        ((2, 5), "", (2, 1, 1)), ((2, 3, 4, 5), "top_k: 2", (2, 1, 2, 1)), ((2, 3, 4, 5), "out_max_val: true", (2, 2, 1, 1)),
        ((2, 3, 4), "axis: 1 top_k: 2", (2, 2, 4)), ((2, 3, 4), "axis: -1 out_max_val: true", (2, 3, 1))])
    def test_tops_have_caffe_s_axes(self, shape, text, top):
        layer = make("ArgMax", shape, text=f"argmax_param {{ {text} }}")
        assert layer.top_shapes(shape) == [top] == [tuple(run(layer, draw(*shape))[0].shape)]

    def test_of_equal_numbers_the_later_comes_first(self):
        x = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
        assert run(make("ArgMax", (1, 4), text="argmax_param { top_k: 3 }"), x)[0].flatten().tolist() == [2, 1, 0]
        assert run(make("ArgMax", (1, 4), text="argmax_param { axis: 1 top_k: 3 }"), x)[0].flatten().tolist() == [2, 1, 0]

    def test_places_come_before_numbers(self):
        y = run(make("ArgMax", (1, 3), text="argmax_param { top_k: 2 out_max_val: true }"), torch.tensor([[5.0, 7.0, 6.0]]))[0]
        assert y.tolist() == [[[1, 2], [7, 6]]]

    def test_more_places_than_candidates_are_refused(self):
        with pytest.raises(CaffeError, match="top_k 4 is not between 1 and 3"):
            make("ArgMax", (2, 3), text="argmax_param { top_k: 4 }")
