"""Losses and Accuracy: normalisers, ignored labels, bounds, and the gradients Caffe gives."""
from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError

FLT_MIN = np.finfo(np.float32).tiny


def labels(*values):
    return torch.tensor(values, dtype=torch.float64)


def value(kind, *bottoms, text="", tops=1):
    return run(make(kind, *(tuple(b.shape) for b in bottoms), text=text, tops=tops), *bottoms)[0]


class TestSoftmaxWithLoss:
    @pytest.mark.parametrize(("text", "divisor"), [
        ("", 6), ("loss_param { normalization: FULL }", 6), ("loss_param { normalization: BATCH_SIZE }", 2),
        ("loss_param { normalization: NONE }", 1), ("loss_param { normalize: false }", 2), ("loss_param { normalize: true }", 6),
        ("loss_param { ignore_label: 3 }", 4), ("loss_param { ignore_label: 3 normalization: FULL }", 6),
        ("loss_param { ignore_label: 3 normalization: BATCH_SIZE }", 2), ("loss_param { ignore_label: 255 }", 6)])
    def test_the_sum_of_logarithms_is_divided_by_the_normaliser(self, text, divisor):
        x, y = draw(2, 4, 3), labels([0, 3, 1], [2, 2, 3])
        p = torch.softmax(x, 1).detach().numpy()
        kept = [(n, int(k), i) for (n, i), k in np.ndenumerate(y.numpy()) if not ("ignore_label: 3" in text and k == 3)]
        assert np.isclose(value("SoftmaxWithLoss", x, y, text=text).item(), -sum(log(p[place]) for place in kept) / divisor)
        layer = make("SoftmaxWithLoss", (2, 4, 3), (2, 3), text=text)
        assert gradients_are_true(layer, x, y)

    def test_the_probability_is_bounded_but_not_its_gradient(self):
        for kind in (torch.float32, torch.float64):
            x = torch.tensor([[0.0, 200.0]], dtype=kind, requires_grad=True)
            loss = value("SoftmaxWithLoss", x, labels(0))
            loss.backward()
            assert loss.item() == pytest.approx(-log(FLT_MIN)) and x.grad.tolist() == [[-1, 1]]

    def test_nothing_counted_gives_zero(self):
        x = draw(2, 3)
        loss = value("SoftmaxWithLoss", x, labels(1, 1), text="loss_param { ignore_label: 1 }")
        loss.backward()
        assert loss == 0 and not x.grad.any()

    @pytest.mark.parametrize(("axis", "shape", "label"), [(-1, (2, 3, 4), (2, 3)), (0, (4, 3), (1, 3)), (1, (2, 4), (2, 1, 1, 1))])
    def test_classes_may_lie_on_any_axis(self, axis, shape, label):
        if axis == 0:
            with pytest.raises(CaffeError, match="number of items"):
                make("SoftmaxWithLoss", shape, label, text="softmax_param { axis: 0 }")
            return
        x, y = draw(*shape), torch.from_numpy(np.random.default_rng(0).integers(0, 4, label).astype(float))
        p = torch.softmax(x, axis).movedim(axis, -1).reshape(-1, 4)
        expected = -p[torch.arange(len(p)), y.flatten().long()].log().mean()
        assert torch.allclose(value("SoftmaxWithLoss", x, y, text=f"softmax_param {{ axis: {axis} }}"), expected)

    @pytest.mark.parametrize(("y", "words"), [(labels(0, 4), "label 4 is not one of the classes 0 to 3"), (labels(-1, 0), "label -1"),
                                              (labels([0, 1], [1, 0]), r"labels of shape \(2, 2\) for scores of shape \(2, 4\)")])
    def test_impossible_labels_are_refused(self, y, words):
        with pytest.raises(CaffeError, match=words):
            value("SoftmaxWithLoss", draw(2, 4), y)

    def test_a_second_top_is_refused_as_by_caffe(self):
        with pytest.raises(CaffeError, match="second top"):
            make("SoftmaxWithLoss", (2, 4), (2,), tops=2)


class TestInfogainLoss:
    def test_the_identity_gives_the_softmax_loss(self):
        x, y = draw(3, 4, 2), labels([0, 1], [2, 3], [1, 1])
        assert torch.allclose(value("InfogainLoss", x, y, torch.eye(4, dtype=torch.float64)), value("SoftmaxWithLoss", x, y))

    def test_gradients_are_true_and_the_second_top_holds_the_probabilities(self):
        layer = make("InfogainLoss", (3, 4), (3,), (4, 4), tops=2, text="loss_param { ignore_label: 2 }")
        x, y, matrix = draw(3, 4), labels(0, 2, 3), draw(4, 4, seed=1).detach()
        p = torch.softmax(x, 1)
        loss, probabilities = run(layer, x, y, matrix)
        assert torch.allclose(probabilities, p) and layer.top_shapes((3, 4), (3,), (4, 4)) == [(), (3, 4)]
        assert torch.allclose(loss, -(matrix[[0, 3]] * p[[0, 2]].log()).sum() / 2)
        assert gradients_are_true(layer, x, y, matrix)

    def test_a_matrix_that_is_missing_or_too_small_is_refused(self):
        with pytest.raises(CaffeError, match="needs the matrix"):
            make("InfogainLoss", (3, 4), (3,))
        with pytest.raises(CaffeError, match="cannot read the matrix from source 'nowhere'"):
            make("InfogainLoss", (3, 4), (3,), text="infogain_loss_param { source: 'nowhere' }")
        with pytest.raises(CaffeError, match=r"\(3, 3\) is not one of 4 x 4"):
            make("InfogainLoss", (3, 4), (3,), (3, 3))


def test_multinomial_logistic_loss_bounds_the_probability():
    x = torch.tensor([[0.0, 1.0], [0.25, 0.75]], dtype=torch.float64, requires_grad=True)
    loss = value("MultinomialLogisticLoss", x, labels(0, 1))
    loss.backward()
    assert loss.item() == pytest.approx(-(log(1e-20) + log(0.75)) / 2)
    assert np.allclose(x.grad, [[-0.5e20, 0], [0, -0.5 / 0.75]])


@pytest.mark.parametrize(("norm", "power"), [("L1", 1), ("L2", 2)])
def test_hinge_loss_has_a_margin_for_every_class(norm, power):
    layer = make("HingeLoss", (3, 4), (3,), text=f"hinge_loss_param {{ norm: {norm} }}")
    x, y = draw(3, 4), labels(0, 3, 1)
    sign = 1 - 2 * np.eye(4)[y.numpy().astype(int)]
    expected = (np.maximum(0, 1 + sign * x.detach().numpy()) ** power).sum() / 3
    assert np.isclose(run(layer, x, y)[0].item(), expected)
    assert gradients_are_true(layer, x, y)


class TestEuclideanLoss:
    def test_it_is_half_the_squared_distance_per_item_with_gradients_to_both(self):
        layer = make("EuclideanLoss", (4, 2, 3), (4, 6))
        a, b = draw(4, 2, 3), draw(4, 6, seed=1)
        assert torch.allclose(run(layer, a, b)[0], (a.flatten(1) - b).square().sum() / 8)
        assert gradients_are_true(layer, a, b)

    def test_equal_bottoms_have_loss_and_gradient_zero(self):
        a = draw(2, 3)
        loss = value("EuclideanLoss", a, a.detach())
        loss.backward()
        assert loss == 0 and not a.grad.any()

    def test_different_sizes_are_refused(self):
        for other in ((4, 5), (3, 6)):
            with pytest.raises(CaffeError, match=r"\(4, 2, 3\) and"):
                make("EuclideanLoss", (4, 2, 3), other)


class TestSigmoidCrossEntropyLoss:
    @pytest.mark.parametrize(("text", "divisor"), [
        ("", 3), ("normalization: VALID", 6), ("normalization: FULL", 6), ("normalization: NONE", 1), ("normalize: true", 6),
        ("normalize: false", 3), ("ignore_label: 0 normalization: VALID", 3), ("ignore_label: 0", 3)])
    def test_soft_targets_and_normalisers(self, text, divisor):
        x, t = draw(3, 2), labels([1, 0.7], [0, 1], [1, 0])
        s = 1 / (1 + np.exp(-x.detach().numpy()))
        each = -(t.numpy() * np.log(s) + (1 - t.numpy()) * np.log(1 - s))
        if "ignore" in text:
            each[np.trunc(t.numpy()) == 0] = 0              # 0.7 is cut to 0
        layer = make("SigmoidCrossEntropyLoss", (3, 2), (3, 2), text=f"loss_param {{ {text} }}")
        assert np.isclose(run(layer, x, t)[0].item(), each.sum() / divisor)
        assert gradients_are_true(layer, x, t)

    def test_large_scores_stay_finite(self):
        x = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
        loss = value("SigmoidCrossEntropyLoss", x, torch.tensor([[0.0, 1.0]]))
        loss.backward()
        assert loss == 2000 and x.grad.tolist() == [[1, -1]]


class TestContrastiveLoss:
    @pytest.mark.parametrize("legacy", ["true", "false"])
    def test_like_pairs_attract_and_unlike_pairs_repel_within_the_margin(self, legacy):
        a, b, alike = draw(4, 3), draw(4, 3, seed=1), labels(1, 0, 0, 1)
        margin = 3.0
        d2 = (a - b).detach().square().sum(1).numpy()
        apart = np.maximum(margin - d2, 0) if legacy == "true" else np.maximum(margin - np.sqrt(d2), 0) ** 2
        loss = value("ContrastiveLoss", a, b, alike, text=f"contrastive_loss_param {{ margin: {margin} legacy_version: {legacy} }}")
        assert np.isclose(loss.item(), np.where(alike.numpy() != 0, d2, apart).sum() / 8)
        loss.backward()
        pull = (d2 < margin).astype(float) if legacy == "true" else np.maximum(margin - np.sqrt(d2), 0) / (np.sqrt(d2) + 1e-4)
        expected = np.where(alike.numpy() != 0, 1, -pull)[:, None] * (a - b).detach().numpy() / 4
        assert np.allclose(a.grad, expected) and np.allclose(b.grad, -expected)

    def test_an_unlike_pair_at_one_place_has_gradient_zero(self):
        a = draw(1, 3)
        value("ContrastiveLoss", a, a.detach(), labels(0)).backward()
        assert not a.grad.any()

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(CaffeError, match=r"\(2, 3\) and \(2, 4\)"):
            make("ContrastiveLoss", (2, 3), (2, 4), (2,))
        with pytest.raises(CaffeError, match="one number per pair"):
            make("ContrastiveLoss", (2, 3), (2, 3), (2, 2))


class TestAccuracy:
    def test_a_tie_is_wrong_and_nan_is_right(self):
        x = torch.tensor([[0.5, 0.5], [0.2, 0.8], [float("nan")] * 2])
        assert value("Accuracy", x, labels(0, 1, 1)).item() == pytest.approx(2 / 3)

    def test_top_k_counts_better_classes(self):
        x = torch.tensor([[3.0, 2.0, 1.0]] * 3)
        assert value("Accuracy", x, labels(0, 1, 2), text="accuracy_param { top_k: 2 }").item() == pytest.approx(2 / 3)

    def test_ignored_labels_are_not_counted_and_classes_that_do_not_occur_have_zero(self):
        x = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
        layer = make("Accuracy", (4, 3), (4,), tops=2, text="accuracy_param { ignore_label: 9 }")
        overall, each = run(layer, x, labels(0, 1, 1, 9))
        assert overall.item() == pytest.approx(2 / 3) and each.tolist() == [1, 0.5, 0]
        assert run(layer, x, labels(9, 9, 9, 9))[0] == 0

    def test_it_counts_over_places(self):
        x, y = draw(2, 5, 3, 3), torch.from_numpy(np.random.default_rng(0).integers(0, 5, (2, 3, 3)).astype(float))
        assert torch.allclose(value("Accuracy", x, y), (x.argmax(1) == y).double().mean())

    def test_it_names_an_impossible_top_k(self):
        with pytest.raises(CaffeError, match="top_k 4 is not between 1 and the number of classes, 3"):
            make("Accuracy", (2, 3), (2,), text="accuracy_param { top_k: 4 }")
