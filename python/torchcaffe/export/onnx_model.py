"""A plan as an ONNX model (opset 17), built node by node: what Caffe computes in the operators every runtime has.

Importing this needs the package onnx; running the model uses onnxruntime where it is installed, else onnx's own evaluator.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.export.plan import Plan, Step, Value, power_constant, refuse, trailing_axes
from torchcaffe.layers.vision import Pool
from torchcaffe.proto import caffe_pb2
from torchcaffe.version import __version__

OPSET, IR_VERSION = 17, 8                               # of 2022; every runtime in use reads them
LARGEST = 2**31 - 1                                     # bytes of a model in one file
LOWEST = float(np.finfo(np.float32).min)
Writer = Callable[..., str | list[str]]
WRITERS: dict[str, Writer] = {}


def writes(*types: str) -> Callable[[Writer], Writer]:
    """Register a function (graph, step, *names of the bottoms) -> name of the top, or names of all tops."""
    def register(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(types, function))
        return function
    return register


class Graph:
    """The nodes and constants while they are written, first under names of their own, in the end under those of the values."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._taken = {value.name for value in [*plan.inputs, *(top for step in plan.steps for top in step.tops)]}
        self._made: set[str] = set()                    # by the present step, and not yet anybody's value
        self._final: dict[str, str] = {}
        names = {value: value.name for value in plan.inputs}
        for step in plan.steps:
            self._step, self._made = step, set()
            written = WRITERS[step.layer.type](self, step, *(names[value] for value in step.bottoms))
            for value, name in zip(step.tops, [written] if isinstance(written, str) else written, strict=True):
                if name not in self._made and value in plan.outputs:        # an output is a node's own, not another value handed on
                    name = self.node("Identity", name)
                if name in self._made:
                    self._made.remove(name)
                    self._final[name] = value.name
                names[value] = name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output; its name."""
        return self.nodes_outputs(operator, 1, *inputs, **attributes)[0]

    def nodes_outputs(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node with several outputs; their names."""
        name = self._unique(operator)
        outputs = [name] if count == 1 else [self._unique(f"{operator}:{i}") for i in range(count)]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name, **attributes))
        self._made.update(outputs)
        return outputs

    def _unique(self, name: str) -> str:
        """A name within the present layer's."""
        wanted = f"{self._step.layer.name}/{name}"
        result, count = wanted, 1
        while result in self._taken:
            result, count = f"{wanted}@{count}", count + 1
        self._taken.add(result)
        return result

    def constant(self, values: Any, name: str = "constant", kind: type = np.float32) -> str:
        """An array that the file holds; its name."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        name = self._unique(name)
        self.constants.append(numpy_helper.from_array(np.array(array, kind), name))
        return name

    def numbers(self, values: Sequence[int]) -> str:
        """A list of whole numbers; its name."""
        return self.constant(values, kind=np.int64)

    def linear(self, x: str, scale: float, shift: float = 0) -> str:
        """scale * x + shift, leaving out what does nothing."""
        x = x if scale == 1 else self.node("Mul", x, self.constant(scale))
        return self.node("Add", x, self.constant(shift)) if shift else x

    def finished(self) -> list[onnx.NodeProto]:
        """The nodes, values under their own names."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [self._final.get(name, name) for name in names]
        return self.nodes


def write(plan: Plan) -> bytes:
    """The model's file.  Raises CaffeError where it would be larger than ONNX's files can be."""
    graph = Graph(plan)
    size = sum(len(constant.raw_data) for constant in graph.constants)
    if size > LARGEST - 2**20:
        raise CaffeError(f"{plan.source}: its weights take {size / 2**30:.1f} GiB, and an ONNX file holds 2; export it as .py")
    body = helper.make_graph(graph.finished(), plan.source, [_info(value) for value in plan.inputs],
                             [_info(value) for value in plan.outputs], graph.constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="torchcaffe",
                              producer_version=__version__, doc_string="\n".join(plan.notes))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CaffeError(f"{plan.source}: gives no valid ONNX model: {str(error).splitlines()[0]}") from None
    return model.SerializeToString()


def _info(value: Value) -> onnx.ValueInfoProto:
    dims = ["N" if size is None and i == 0 else f"{value.name}_{i}" if size is None else size for i, size in enumerate(value.dims)]
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, dims)


def runner(plan: Plan, path: Path) -> tuple[str, Callable[[list[list[np.ndarray]]], list[Any]]]:
    """What runs the model here, by name, and as a function from batches of inputs to outputs, which raises CaffeError where it fails."""
    errors: tuple[type[Exception], ...]
    try:
        import onnxruntime  # type: ignore[import-untyped]
        from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]
        name, errors = "onnxruntime", (state.Fail, state.InvalidGraph, state.InvalidArgument, state.NotImplemented, state.RuntimeException)
    except ModuleNotFoundError:
        name, errors = "onnx's reference evaluator", (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)

    def model() -> Any:
        if name != "onnxruntime":
            return ReferenceEvaluator(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batches: list[list[np.ndarray]]) -> list[Any]:
        names = [value.name for value in plan.inputs]
        try:
            ready = model()
            with np.errstate(all="ignore"):
                return [ready.run(None, dict(zip(names, inputs, strict=True))) for inputs in batches]
        except errors as error:
            advice = "" if name == "onnxruntime" else "; install onnxruntime"
            raise CaffeError(f"{plan.source}: {name} cannot run its ONNX model ({str(error).splitlines()[0]}){advice}") from None
    return name, run


# -- weights -------------------------------------------------------------------------------------------------------
@writes("Convolution", "Deconvolution")
def _convolution(g: Graph, s: Step, *x: str) -> list[str]:
    layer = s.layer
    weights = [g.constant(tensor, name) for name, tensor in zip(("weight", "bias"), layer.params, strict=False)]
    operator = "Conv" if layer.type == "Convolution" else "ConvTranspose"
    tops = []
    for v, bottom, top in zip(x, s.bottoms, s.tops, strict=True):
        if layer.channel_axis != 1:
            v = g.node("Reshape", v, g.numbers([-1, *bottom.shape[layer.channel_axis:]]))
        y = g.node(operator, v, *weights, kernel_shape=layer.kernel, strides=layer.stride, pads=[*layer.pad, *layer.pad],
                   dilations=layer.dilation, group=layer.param.convolution_param.group)
        tops.append(y if layer.channel_axis == 1 else g.node("Reshape", y, g.numbers(top.template)))
    return tops


@writes("InnerProduct")
def _inner_product(g: Graph, s: Step, x: str) -> str:
    layer, transposed = s.layer, s.layer.param.inner_product_param.transpose
    weights = [g.constant(tensor, name) for name, tensor in zip(("weight", "bias"), layer.params, strict=False)]
    if len(layer.kept) == 1:
        if len(s.bottoms[0].dims) != 2:
            x = g.node("Flatten", x, axis=1)
        return g.node("Gemm", x, *weights, transB=int(not transposed))
    rows = g.node("Reshape", x, g.numbers([-1, layer.size]))
    return g.node("Reshape", g.node("Gemm", rows, *weights, transB=int(not transposed)), g.numbers(s.tops[0].template))


@writes("BatchNorm")
def _batch_norm(g: Graph, s: Step, x: str) -> str:
    layer, size = s.layer, s.layer.channels
    if not layer.stored:
        over = [0, *range(2, len(s.bottoms[0].dims))]
        return _standardised(g, x, over, lambda variance: g.node("Sqrt", g.linear(variance, 1, layer.eps)))
    mean, variance = layer.statistics()
    scale, shift = [*(s.scale.params if s.scale else []), None, None][:2]
    return g.node("BatchNormalization", x, g.constant(np.ones(size) if scale is None else scale, "scale"),
                  g.constant(np.zeros(size) if shift is None else shift, "shift"),
                  g.constant(mean, "mean"), g.constant(variance, "variance"), epsilon=layer.eps)


@writes("MVN")
def _mvn(g: Graph, s: Step, x: str) -> str:
    p = s.layer.param.mvn_param
    if len(s.bottoms[0].dims) != 4:
        x = g.node("Reshape", x, g.numbers(s.tops[0].template))
    over = [1, 2, 3] if p.across_channels else [2, 3]
    return _standardised(g, x, over, (lambda variance: g.linear(g.node("Sqrt", variance), 1, p.eps)) if p.normalize_variance else None)


def _standardised(g: Graph, x: str, over: list[int], divisor: Callable[[str], str] | None) -> str:
    x = g.node("Sub", x, g.node("ReduceMean", x, axes=over))
    return x if divisor is None else g.node("Div", x, divisor(g.node("ReduceMean", g.node("Mul", x, x), axes=over)))


@writes("Scale", "Bias")
def _affine(g: Graph, s: Step, x: str, other: str | None = None) -> str:
    layer, trailing, params = s.layer, trailing_axes(s), list(s.layer.params)
    if other:
        if trailing:
            axes = len(s.bottoms[1].dims)
            other = g.node("Unsqueeze", other, g.numbers(range(axes, axes + trailing)))
        x = g.node("Mul" if layer.type == "Scale" else "Add", x, other)
    elif layer.type == "Scale":
        x = g.node("Mul", x, g.constant(_behind(params.pop(0), trailing), "weight"))
    return g.node("Add", x, g.constant(_behind(params[0], trailing), "bias")) if params else x


def _behind(tensor: Tensor, trailing: int) -> Tensor:
    return tensor.reshape(*tensor.shape, *[1] * trailing)


@writes("PReLU")
def _prelu(g: Graph, s: Step, x: str) -> str:
    return g.node("PRelu", x, g.constant(_behind(s.layer.params[0].reshape(-1), len(s.bottoms[0].dims) - 2), "slope"))


@writes("Parameter")
def _parameter(g: Graph, s: Step) -> str:
    return g.constant(s.layer.params[0], "weight")


# -- windows -------------------------------------------------------------------------------------------------------
@writes("Pooling")
def _pooling(g: Graph, s: Step, x: str) -> str | list[str]:
    p, image = s.layer.param.pooling_param, s.bottoms[0].shape[2:]
    average = p.pool == p.AVE
    if len(s.tops) == 1:
        return g.node(f"Global{'Average' if average else 'Max'}Pool", x) if p.global_pooling else _pool(g, s.layer.pool, image, x, average)
    attributes, outside = _windows(s.layer.pool, image)
    refuse(outside is not None, g.plan, s, "has a mask, and windows outside the image that ONNX does not have")
    y, index = g.nodes_outputs("MaxPool", 2, x, **attributes)
    return [y, g.node("Cast", g.node("Mod", index, g.numbers([prod(image)])), to=TensorProto.FLOAT)]


@writes("SPP")
def _spp(g: Graph, s: Step, x: str) -> str:
    average, image = s.layer.param.spp_param.pool == caffe_pb2.SPPParameter.AVE, s.bottoms[0].shape[2:]
    levels = [_pool(g, pool, image, x, average) for pool in s.layer.levels]
    return levels[0] if len(levels) == 1 else g.node("Concat", *(g.node("Flatten", y, axis=1) for y in levels), axis=1)


def _windows(pool: Pool, image: Sequence[int]) -> tuple[dict[str, Any], list[int] | None]:
    """Attributes that give Caffe's windows over an image, and the padding that a Pad has to do, since pooling refuses so much."""
    around = [(pad, max((n - 1) * stride + kernel - size - pad, 0))
              for n, size, kernel, stride, pad in zip(pool.sizes(image), image, pool.kernel, pool.stride, pool.pad, strict=True)]
    pads = [before for before, _ in around] + [behind for _, behind in around]
    attributes: dict[str, Any] = {"kernel_shape": pool.kernel, "strides": pool.stride}
    if all(pad < kernel for pad, kernel in zip(pads, pool.kernel * 2, strict=True)):
        return attributes | {"pads": pads}, None
    return attributes | {"auto_pad": "VALID"}, [0, 0, *pads[:2], 0, 0, *pads[2:]]


def _pool(g: Graph, pool: Pool, image: Sequence[int], x: str, average: bool) -> str:
    attributes, outside = _windows(pool, image)
    if outside:
        x = g.node("Pad", x, g.numbers(outside), g.constant(0 if average else LOWEST))
    if not average:
        return g.node("MaxPool", x, **attributes)
    y = g.node("AveragePool", x, count_include_pad=1, **attributes)
    high, wide = (np.minimum(size + 2 * pad - stride * np.arange(n), kernel)            # what Caffe divides by, along each axis
                  for n, size, kernel, stride, pad in zip(pool.sizes(image), image, pool.kernel, pool.stride, pool.pad, strict=True))
    with np.errstate(divide="ignore"):
        factors = prod(pool.kernel) / (high[:, None] * wide).astype(np.float64)
    return y if (factors == 1).all() else g.node("Mul", y, g.constant(factors))


@writes("LRN")
def _lrn(g: Graph, s: Step, x: str) -> str:
    p = s.layer.param.lrn_param
    if p.norm_region == p.ACROSS_CHANNELS:
        return g.node("LRN", x, size=p.local_size, alpha=p.alpha, beta=p.beta, bias=p.k)
    half = p.local_size // 2
    mean = g.node("AveragePool", g.node("Mul", x, x), kernel_shape=[p.local_size] * 2, pads=[half] * 4, count_include_pad=1)
    return g.node("Mul", x, g.node("Pow", g.linear(mean, p.alpha, 1), g.constant(-p.beta)))


# -- each element alike --------------------------------------------------------------------------------------------
def _operator(type_name: str, operator: str) -> None:
    """A layer that is one of ONNX's operators."""
    WRITERS[type_name] = lambda g, s, x: g.node(operator, x)


for _type, _name in (("Sigmoid", "Sigmoid"), ("TanH", "Tanh"), ("AbsVal", "Abs"), ("BNLL", "Softplus")):
    _operator(_type, _name)


@writes("Dropout")
def _dropout(g: Graph, s: Step, x: str) -> str:
    return x


@writes("ReLU")
def _relu(g: Graph, s: Step, x: str) -> str:
    slope = s.layer.param.relu_param.negative_slope
    return g.node("LeakyRelu", x, alpha=slope) if slope else g.node("Relu", x)


@writes("ELU")
def _elu(g: Graph, s: Step, x: str) -> str:
    return g.node("Elu", x, alpha=s.layer.param.elu_param.alpha)


@writes("Clip")
def _clip(g: Graph, s: Step, x: str) -> str:
    p = s.layer.param.clip_param
    return g.node("Clip", x, g.constant(p.min), g.constant(p.max))


@writes("Swish")
def _swish(g: Graph, s: Step, x: str) -> str:
    return g.node("Mul", x, g.node("Sigmoid", g.linear(x, s.layer.param.swish_param.beta)))


@writes("Threshold")
def _threshold(g: Graph, s: Step, x: str) -> str:
    return g.node("Cast", g.node("Greater", x, g.constant(s.layer.param.threshold_param.threshold)), to=TensorProto.FLOAT)


@writes("Power")
def _power(g: Graph, s: Step, x: str) -> str:
    p, constant = s.layer.param.power_param, power_constant(s)
    if constant is not None:
        return g.node("ConstantOfShape", g.node("Shape", x), value=numpy_helper.from_array(np.array([constant], np.float32)))
    x = g.linear(x, p.scale, p.shift)
    return x if p.power == 1 else g.node("Pow", x, g.constant(p.power))


@writes("Exp")
def _exp(g: Graph, s: Step, x: str) -> str:
    return g.linear(g.node("Exp", g.linear(x, s.layer.inner)), s.layer.outer)


@writes("Log")
def _log(g: Graph, s: Step, x: str) -> str:
    p = s.layer.param.log_param
    return g.linear(g.node("Log", g.linear(x, p.scale, p.shift)), s.layer.factor)


# -- across elements and blobs -------------------------------------------------------------------------------------
@writes("Softmax")
def _softmax(g: Graph, s: Step, x: str) -> str:
    return g.node("Softmax", x, axis=s.layer.along)


@writes("Eltwise")
def _eltwise(g: Graph, s: Step, *x: str) -> str:
    p = s.layer.param.eltwise_param
    if p.operation == p.SUM:
        return g.node("Sum", *(g.linear(v, c) for v, c in zip(x, list(p.coeff) or [1.0] * len(x), strict=True)))
    if p.operation == p.MAX:
        return g.node("Max", *x)
    y = x[0]
    for v in x[1:]:
        y = g.node("Mul", y, v)
    return y


@writes("Reduction")
def _reduction(g: Graph, s: Step, x: str) -> str:
    p, over = s.layer.param.reduction_param, list(s.layer.over)
    if p.operation == p.SUM:
        y = g.node("ReduceSum", x, g.numbers(over), keepdims=0)
    else:
        y = g.node({p.ASUM: "ReduceL1", p.SUMSQ: "ReduceSumSquare", p.MEAN: "ReduceMean"}[p.operation], x, axes=over, keepdims=0)
    return g.linear(y, p.coeff)


@writes("ArgMax")
def _arg_max(g: Graph, s: Step, x: str) -> str:
    """TopK takes the first of equal numbers and Caffe the last, so it looks from behind."""
    p, axis, shape = s.layer.param.argmax_param, s.layer.along, s.bottoms[0].shape
    count = prod(shape[1:]) if axis is None else shape[axis]
    if axis is None:
        x = g.node("Flatten", x, axis=1)
    along = 1 if axis is None else axis
    behind = g.node("Slice", x, g.numbers([-1]), g.numbers([-count - 1]), g.numbers([along]), g.numbers([-1]))
    values, places = g.nodes_outputs("TopK", 2, behind, g.numbers([p.top_k]), axis=along)
    places = g.node("Sub", g.constant(count - 1), g.node("Cast", places, to=TensorProto.FLOAT))
    if axis is not None:
        return values if p.out_max_val else places
    y = g.node("Concat", places, values, axis=1) if p.out_max_val else places
    return g.node("Reshape", y, g.numbers(s.tops[0].template))


# -- elements moved about ------------------------------------------------------------------------------------------
@writes("Concat")
def _concat(g: Graph, s: Step, *x: str) -> str:
    return x[0] if len(x) == 1 else g.node("Concat", *x, axis=s.layer.along)


@writes("Slice")
def _slice(g: Graph, s: Step, x: str) -> str | list[str]:
    if len(s.tops) == 1:
        return x
    return g.nodes_outputs("Split", len(s.tops), x, g.numbers(s.layer.pieces), axis=s.layer.along)


@writes("Split")
def _split(g: Graph, s: Step, x: str) -> list[str]:
    return [x] * len(s.tops)


@writes("Flatten", "Reshape")
def _reshape(g: Graph, s: Step, x: str) -> str:
    return g.node("Reshape", x, g.numbers(s.tops[0].template))


@writes("Tile")
def _tile(g: Graph, s: Step, x: str) -> str:
    return g.node("Tile", x, g.numbers(s.layer.repeats))


@writes("Crop")
def _crop(g: Graph, s: Step, x: str, like: str) -> str:
    axes, begins, sizes = zip(*s.layer.places, strict=True)
    return g.node("Slice", x, g.numbers(begins), g.numbers([b + n for b, n in zip(begins, sizes, strict=True)]), g.numbers(axes))
