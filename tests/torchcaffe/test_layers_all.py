"""What every layer owes to the whole-iteration step: no waiting for the device, no lost memory layout, nothing changed in a bottom."""
from __future__ import annotations

import pytest
import torch

from one_layer import make, run
from torchcaffe.layers import LAYERS

IMAGE, LABELS = (2, 4, 6, 6), (2, 6, 6)
CONVOLUTION = "convolution_param { num_output: 4 kernel_size: 3 pad: 1 }"
CASES = {
    "AbsVal": ([IMAGE], ""), "Accuracy": ([IMAGE, LABELS], "accuracy_param { ignore_label: 1 }"), "ArgMax": ([IMAGE], ""),
    "BNLL": ([IMAGE], ""), "BatchNorm": ([IMAGE], ""), "BatchReindex": ([IMAGE, (3,)], ""), "Bias": ([IMAGE], ""),
    "Clip": ([IMAGE], "clip_param { min: 0 max: 1 }"), "Concat": ([IMAGE, IMAGE], ""), "ContrastiveLoss": ([(2, 3), (2, 3), (2,)], ""),
    "Convolution": ([IMAGE], CONVOLUTION), "Crop": ([IMAGE, (2, 4, 3, 3)], ""), "Deconvolution": ([IMAGE], CONVOLUTION),
    "Dropout": ([IMAGE], ""),
    "ELU": ([IMAGE], ""), "Eltwise": ([IMAGE, IMAGE], ""), "Embed": ([(2, 3)], "embed_param { num_output: 2 input_dim: 5 }"),
    "EuclideanLoss": ([IMAGE, IMAGE], ""), "Exp": ([IMAGE], ""), "Flatten": ([IMAGE], ""), "HingeLoss": ([(2, 3), (2,)], ""),
    "Im2col": ([IMAGE], CONVOLUTION), "InfogainLoss": ([IMAGE, LABELS, (4, 4)], ""),
    "InnerProduct": ([IMAGE], "inner_product_param { num_output: 3 }"), "LRN": ([IMAGE], ""), "Log": ([IMAGE], ""), "MVN": ([IMAGE], ""),
    "MultinomialLogisticLoss": ([(2, 3), (2,)], ""), "PReLU": ([IMAGE], ""), "Parameter": ([], ""),
    "Pooling": ([IMAGE], "pooling_param { kernel_size: 3 stride: 2 }"), "Power": ([IMAGE], "power_param { power: 2 scale: 3 shift: 1 }"),
    "LSTM": ([(3, 2, 5), (3, 2)], "recurrent_param { num_output: 4 }"), "LSTMUnit": ([(1, 2, 3), (1, 2, 12), (1, 2)], ""),
    "RNN": ([(3, 2, 5), (3, 2)], "recurrent_param { num_output: 4 }"), "ReLU": ([IMAGE], ""), "Reduction": ([IMAGE], ""),
    "Reshape": ([IMAGE], "reshape_param { shape { dim: 0 dim: -1 } }"),
    "SPP": ([IMAGE], "spp_param { pyramid_height: 2 }"), "Scale": ([IMAGE], "scale_param { bias_term: true }"), "Sigmoid": ([IMAGE], ""),
    "SigmoidCrossEntropyLoss": ([IMAGE, IMAGE], "loss_param { ignore_label: 1 }"), "Silence": ([IMAGE], ""),
    "Slice": ([IMAGE], ""), "Softmax": ([IMAGE], ""), "SoftmaxWithLoss": ([IMAGE, LABELS], "loss_param { ignore_label: 1 }"),
    "Split": ([IMAGE], ""), "Swish": ([IMAGE], ""), "TanH": ([IMAGE], ""), "Threshold": ([IMAGE], ""),
    "Tile": ([IMAGE], "tile_param { tiles: 2 }"),
}
TOPS = {"LSTMUnit": 2}
ELSEWHERE = {"Data", "DummyData", "HDF5Data", "HDF5Output", "ImageData", "Input", "MemoryData", "Python", "WindowData"}
WAITING = {"Filter"}                                     # its top's shape depends on data


def test_every_type_is_looked_at():
    assert set(CASES) | ELSEWHERE | WAITING >= set(LAYERS) >= set(CASES) | WAITING


@pytest.mark.parametrize("kind", sorted(CASES))
def test_forward_and_backward_never_wait_for_the_device(kind):
    shapes, text = CASES[kind]
    layer = make(kind, *shapes, text=text, tops=TOPS.get(kind, 1), device="meta")    # a tensor without contents cannot be waited for
    bottoms = [torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=i == 0) for i, shape in enumerate(shapes)]
    tops = run(layer, *bottoms)
    assert [tuple(top.shape) for top in tops] == [tuple(shape) for shape in layer.top_shapes(*shapes)][:len(tops)]
    roots = [top for top in tops if top.requires_grad]
    if roots:
        torch.autograd.grad(roots, [t for t in [*bottoms, *layer.params] if t.requires_grad], [torch.empty_like(r) for r in roots],
                            allow_unused=True)


@pytest.mark.parametrize("kind", ["BatchNorm", "Bias", "Convolution", "Dropout", "ELU", "Eltwise", "Pooling", "PReLU", "ReLU", "Scale",
                                  "Sigmoid", "TanH"])
@pytest.mark.parametrize("phase", [0, 1])
def test_channels_last_tensors_stay_so_in_both_directions(kind, phase):
    shapes, text = CASES.get(kind, ([IMAGE], ""))
    layer = make(kind, *shapes, text=text, phase=phase)
    bottoms = [torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_() for shape in shapes]
    before = [bottom.detach().clone() for bottom in bottoms]
    top = run(layer, *bottoms)[0]
    assert top.is_contiguous(memory_format=torch.channels_last)
    for grad in torch.autograd.grad(top, bottoms, torch.randn_like(top)):
        assert grad.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, bottoms, strict=True))
