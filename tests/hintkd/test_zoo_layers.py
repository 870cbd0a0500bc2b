"""The zoo's losses against finite differences in float64, for each bottom that has a gradient, and for what they learn themselves."""
from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import torchcaffe
from test_layers import Blob, build, finite_differences


@dataclass(frozen=True)
class Case:
    """A loss, the shapes of its bottoms, which of these have a gradient, and what the others and its own blobs hold."""
    module: str
    layer: str
    shapes: tuple[tuple[int, ...], ...]
    towards: tuple[int, ...] = (0,)
    param: dict[str, Any] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)
    blobs: tuple[Any, ...] = ()


MAPS = ((3, 4, 3, 3), (3, 4, 3, 3))
VIEWS = ((12, 6), (12, 6), (12, 5), (12, 7), (3,))
ROWS = np.random.default_rng(9).standard_normal((2, 8, 5)) / 5 ** 0.5
CASES = (
    Case("kl_divergence", "KLDivergence", ((4, 6), (4, 6)), param={"tau": 4.0}),
    Case("attention", "AttentionLoss", ((3, 4, 3, 3), (3, 5, 3, 3))),
    Case("attention", "AttentionLoss", MAPS, param={"norm": 1}), Case("similarity", "SimilarityLoss", ((4, 3, 2, 2), (4, 5, 3, 3))),
    Case("variational", "VariationalLoss", MAPS), Case("relation", "RelationalLoss", ((5, 6), (5, 7))),
    Case("correlation", "ProbabilisticLoss", ((5, 6), (5, 7))), Case("boundary", "BoundaryLoss", MAPS),
    Case("margin_relu", "MarginLoss", MAPS, blobs=([1, -0.5, 2, 0.1], [0.5, -1, 0, 3])),
    Case("self_supervision", "ViewMatching", ((12, 5),)),
    Case("self_supervision", "SelfSupervisedLoss", VIEWS, (0, 2), held={4: [1, 5, 0]}),
    Case("self_supervision", "SelfSupervisedLoss", VIEWS, (0, 2), {"tf_ratio": 0.5, "ss_ratio": 0.0}, held={4: [1, 5, 0]}),
    Case("contrastive", "ContrastiveLoss", ((3, 5), (3, 5), (3, 4)), (0, 1), {"samples": 8},
         {2: [[0, 3, 4, 5], [7, 0, 2, 1], [4, 5, 6, 0]]}, (*ROWS, [9.0, 11.0])))


def made(case: Case) -> tuple[Any, list[Blob], list[Blob]]:
    """The layer in TEST, where nothing moves, its bottoms and its tops."""
    draw = np.random.default_rng(5)
    bottoms = [Blob(case.held.get(i, draw.standard_normal(shape))) for i, shape in enumerate(case.shapes)]
    with mock.patch.dict(sys.modules, caffe=torchcaffe):
        found = getattr(importlib.import_module(f"hintkd.layers.{case.module}"), case.layer)
    layer, tops = build(found, bottoms, torchcaffe.TEST, **case.param)
    for blob, values in zip(layer.blobs, case.blobs, strict=False):
        blob.data[...] = values
    return layer, bottoms, tops


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layer}{case.param or ''}")
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    layer, bottoms, tops = made(case)
    expected = {i: finite_differences(layer, bottoms, tops, i, weight=0.7) for i in case.towards}
    tops[0].diff[...] = 0.7
    layer.backward(tops, [True] * len(bottoms), bottoms)
    for i, blob in enumerate(bottoms):
        np.testing.assert_allclose(blob.diff, expected.get(i, np.zeros(blob.shape)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layer}{case.param or ''}")
def test_torch_form_equals_numpy_form(case: Case) -> None:
    layer, bottoms, tops = made(case)
    layer.forward(bottoms, tops)
    tops[0].diff[...] = 0.7
    layer.backward(tops, [True] * len(bottoms), bottoms)
    tensors = [torch.tensor(blob.data, requires_grad=i in case.towards) for i, blob in enumerate(bottoms)]
    loss = layer.forward_torch(tensors, [torch.tensor(blob.data) for blob in layer.blobs])
    (0.7 * loss).sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), tops[0].data, rtol=1e-10)
    for i in case.towards:
        np.testing.assert_allclose(tensors[i].grad.numpy(), bottoms[i].diff, rtol=1e-8, atol=1e-11)


def test_a_learned_variance_has_the_gradient_of_finite_differences() -> None:
    layer, bottoms, tops = made(next(case for case in CASES if case.module == "variational"))
    rho, steps = layer.blobs[0], []
    for channel in range(4):
        sides = []
        for step in (1e-5, -2e-5):
            rho.data[channel] += step
            layer.forward(bottoms, tops)
            sides.append(tops[0].data[0])
        rho.data[channel] += 1e-5
        steps.append((sides[0] - sides[1]) / 2e-5)
    layer.forward(bottoms, tops)
    tops[0].diff[...] = 1
    layer.backward(tops, [True, False], bottoms)
    np.testing.assert_allclose(rho.diff, steps, rtol=1e-5, atol=1e-9)


def test_an_embedding_of_zeros_has_no_gradient_and_leaves_those_of_others_finite() -> None:
    layer, bottoms, tops = made(next(case for case in CASES if case.module == "contrastive"))
    bottoms[0].data[1] = 0
    layer.forward(bottoms, tops)
    tops[0].diff[...] = 1
    layer.backward(tops, [True, True, False], bottoms)
    tensors = [torch.tensor(blob.data, requires_grad=i < 2) for i, blob in enumerate(bottoms)]
    layer.forward_torch(tensors, [torch.tensor(blob.data) for blob in layer.blobs]).sum().backward()
    for tensor, blob in zip(tensors[:2], bottoms[:2], strict=True):
        assert np.isfinite(blob.diff).all() and blob.diff[0].any()
        np.testing.assert_allclose(tensor.grad.numpy(), blob.diff, rtol=1e-8, atol=1e-12)
    assert not bottoms[0].diff[1].any()
