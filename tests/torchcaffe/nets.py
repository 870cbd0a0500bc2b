"""Small nets and solvers that tests of the engine share."""
from __future__ import annotations

import numpy as np

INPUTS = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: %(batch)d dim: 3 dim: %(size)d dim: %(size)d } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: %(batch)d } } }
"""


def conv(name, bottom, channels, stride=1, relu=True):
    """Convolution, BatchNorm, Scale and ReLU in Caffe's usual in-place pattern."""
    text = f"""
    layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}"
      convolution_param {{ num_output: {channels} kernel_size: 3 pad: 1 stride: {stride} bias_term: false
        weight_filler {{ type: "msra" }} }} }}
    layer {{ name: "{name}_bn" type: "BatchNorm" bottom: "{name}" top: "{name}" }}
    layer {{ name: "{name}_scale" type: "Scale" bottom: "{name}" top: "{name}" scale_param {{ bias_term: true }} }}"""
    return text + (f'layer {{ name: "{name}_relu" type: "ReLU" bottom: "{name}" top: "{name}" }}' if relu else "")


def block(name, bottom, channels, stride):
    """A residual module with a projection where the shape changes."""
    text = conv(f"{name}_a", bottom, channels, stride) + conv(f"{name}_b", f"{name}_a", channels, relu=False)
    other = bottom
    if stride != 1:
        text += conv(f"{name}_p", bottom, channels, stride, relu=False)
        other = f"{name}_p"
    return text + f"""
    layer {{ name: "{name}" type: "Eltwise" bottom: "{name}_b" bottom: "{other}" top: "{name}" }}
    layer {{ name: "{name}_relu" type: "ReLU" bottom: "{name}" top: "{name}" }}"""


def resnet8(batch=8, size=8, width=4):
    """An eight-layer residual net on Input layers, with loss and accuracy."""
    return (INPUTS % {"batch": batch, "size": size} + conv("first", "data", width) + block("g0", "first", width, 1)
            + block("g1", "g0", 2 * width, 2) + block("g2", "g1", 4 * width, 2) + """
    layer { name: "pool" type: "Pooling" bottom: "g2" top: "pool" pooling_param { pool: AVE global_pooling: true } }
    layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc"
      inner_product_param { num_output: 10 weight_filler { type: "msra" } } }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
    layer { name: "accuracy" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy" }""")


def zero_padded():
    """A net whose shortcut takes every second pixel and adds channels of zeros."""
    return (INPUTS % {"batch": 4, "size": 8} + conv("a", "data", 4) + conv("b", "a", 8, stride=2, relu=False) + """
    layer { name: "half" type: "Convolution" bottom: "a" top: "half" param { lr_mult: 0 decay_mult: 0 }
      convolution_param { num_output: 4 kernel_size: 1 stride: 2 group: 4 bias_term: false weight_filler { type: "constant" value: 1 } } }
    layer { name: "zeros" type: "Power" bottom: "half" top: "zeros" power_param { scale: 0 } }
    layer { name: "pad" type: "Concat" bottom: "half" bottom: "zeros" top: "pad" }
    layer { name: "sum" type: "Eltwise" bottom: "pad" bottom: "b" top: "sum" }
    layer { name: "sum_relu" type: "ReLU" bottom: "sum" top: "sum" }""" + conv("c", "sum", 8) + """
    layer { name: "fc" type: "InnerProduct" bottom: "c" top: "fc" inner_product_param { num_output: 10 weight_filler { type: "msra" } } }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }""")


MLP = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 6 dim: 5 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 6 } } }
layer { name: "ip1" type: "InnerProduct" bottom: "data" top: "ip1" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "ip1" top: "ip1" }
layer { name: "drop" type: "Dropout" bottom: "ip1" top: "drop" dropout_param { dropout_ratio: 0.5 } }
layer { name: "ip2" type: "InnerProduct" bottom: "drop" top: "ip2" inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label" top: "loss" }
"""


def write_solver(folder, net, **fields):
    """net.prototxt and solver.prototxt in `folder`; the solver's path."""
    (folder / "net.prototxt").write_text(net)
    settings = {"net": str(folder / "net.prototxt"), "base_lr": 0.01, "lr_policy": "fixed", "momentum": 0.9, "weight_decay": 1e-4,
                "max_iter": 20, "random_seed": 7, "snapshot_prefix": str(folder / "snap"), "display": 0, **fields}
    lines = []
    for key, value in settings.items():
        for v in value if isinstance(value, list) else [value]:
            text = str(v).lower() if isinstance(v, bool) else str(v)
            lines.append(f'{key}: "{v}"' if isinstance(v, str) and not v.isupper() else f"{key}: {text}")
    path = folder / "solver.prototxt"
    path.write_text("\n".join(lines))
    return str(path)


def feed(net, seed=0, classes=10):
    """Fill the input blobs with a fixed batch."""
    rng = np.random.default_rng(seed)
    net.blobs["data"].data[...] = rng.normal(size=net.blobs["data"].shape)
    net.blobs["label"].data[...] = rng.integers(0, classes, net.blobs["label"].shape)


def parameters(net):
    """{(layer, index): copy of the array}."""
    return {(name, i): b.data.copy() for name, blobs in net.params.items() for i, b in enumerate(blobs)}
