"""A plan as Python source with an nn.Module, and its weights as a state_dict: readable code that needs torch alone.

Every layer is a line, in Caffe's order: a module where torch has one or the layer has weights, otherwise an expression.  Names from the
prototxt reach the code as identifiers of letters, digits and underscores only.
"""
from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchcaffe.export import helpers
from torchcaffe.export.plan import Plan, Step, Value, power_constant, refuse, trailing_axes
from torchcaffe.layers.vision import Pool
from torchcaffe.proto import caffe_pb2

Writer = Callable[..., str]
WRITERS: dict[str, Writer] = {}
RESERVED = {"self", "torch", "F", "nn", "math", "json", "Path", "Tensor", "Net", "load", "tuple", "float", "super", "str"}


def writes(*types: str) -> Callable[[Writer], Writer]:
    """Register a function (module, step, *names of the bottoms) -> expression of the top, or of all tops with commas between."""
    def register(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(types, function))
        return function
    return register


class Module:
    """The source text while it is written."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.state: dict[str, Tensor] = {}
        self.setup: list[str] = []                      # lines of __init__
        self.body: list[str] = []                       # lines of forward
        self.helpers: dict[str, object] = {"read_weights": helpers.read_weights}
        self._attributes: set[str] = set(dir(nn.Module())) | RESERVED
        self._variables: set[str] = RESERVED | set(dir(helpers))
        self._holds: dict[str, Value] = {}              # what a variable holds now
        self._names: dict[Value, str] = {}
        self._owners: dict[tuple[object, ...], tuple[str, Tensor]] = {}
        last = {value: i for i, step in enumerate(plan.steps) for value in step.bottoms}
        self._last_read = last | dict.fromkeys(plan.outputs, len(plan.steps))
        self.arguments = [self._variable(value, -1) for value in plan.inputs]
        for i, step in enumerate(plan.steps):
            self._step(i, step)
        self.results = [self._names[value] for value in plan.outputs]

    def _step(self, index: int, step: Step) -> None:
        layer = step.layer
        self.attribute = _identifier(layer.name, "layer", self._attributes)
        expression = WRITERS[layer.type](self, step, *(self._names[value] for value in step.bottoms))
        tops = ", ".join([self._variable(value, index) for value in step.tops])
        told = self.attribute in (*tops.split(", "), *re.findall(r"self\.(\w+)", expression))
        if expression != tops:
            self.body.append(f"{tops} = {expression}" + ("" if told else f"  # {_shown(layer.name)}"))

    def _variable(self, value: Value, index: int) -> str:
        """A name for a value made by step `index`: the one its blob had before, if that is not needed any more."""
        name = _identifier(value.blob, "blob", set())
        held = self._holds.get(name)
        if name in self._variables and (held is None or held.blob != value.blob or self._last_read.get(held, -1) > index):
            name = _identifier(value.blob, "blob", self._variables)
        self._variables.add(name)
        self._holds[name] = value
        self._names[value] = name
        return name

    def module(self, constructor: str, comment: str = "", **weights: Tensor | None) -> str:
        """Make an attribute for the step with these weights, and return its name; the same memory twice is one parameter."""
        self._attributes.add(self.attribute)
        self.setup.append(f"self.{self.attribute} = {constructor}" + (f"  # {comment}" if comment else ""))
        for part, tensor in weights.items():
            if tensor is not None:
                self._keep(f"{self.attribute}.{part}", tensor)
        return f"self.{self.attribute}"

    def _keep(self, name: str, tensor: Tensor) -> None:
        owner, _ = self._owners.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), (name, tensor))    # alive, so one address
        if owner != name:
            self.setup.append(f"self.{name} = self.{owner}")
        self.state[name] = tensor.detach().to("cpu", torch.float32).contiguous().clone()

    def parameter(self, tensor: Tensor) -> str:
        """Make a parameter of its own for the step, and return its name."""
        name = self.module(f"nn.Parameter(torch.zeros({tuple(tensor.shape)}))")
        self._keep(self.attribute, tensor)
        return name

    def helper(self, name: str) -> str:
        """Take a part of helpers.py into the file."""
        self.helpers[name] = getattr(helpers, name)
        return name

    def text(self, weights_file: str) -> str:
        """The whole file, whose weights lie beside it in `weights_file`."""
        plan, arguments, results = self.plan, ", ".join(self.arguments), ", ".join(self.results)
        read = [_dims(name, value) for name, value in zip(self.arguments, plan.inputs, strict=True)]
        made = [_dims(name, value) for name, value in zip(self.results, plan.outputs, strict=True)]
        stem = Path(weights_file).stem
        parts = [inspect.getsource(part).rstrip() for part in self.helpers.values()]        # type: ignore[arg-type]
        kind = "Tensor" if len(self.results) == 1 else f"tuple[{', '.join(['Tensor'] * len(self.results))}]"
        lines = [
            f'"""The net of {_shown(plan.source)} with the weights of {_shown(plan.weights)}, for PyTorch.', "",
            f"    from {_shown(stem)} import load",
            f"    net = load()                    # reads {_shown(weights_file)} beside this file",
            f"    {results} = net({arguments})", "",
            *(f"reads: {line}" for line in read), *(f"makes: {line}" for line in made), *(_shown(note) for note in plan.notes),
            'Written by `torchcaffe export`.', '"""', "from __future__ import annotations", "",
            "import json", "import math", "from pathlib import Path", "", "import torch",
            *(["import torch.nn.functional as F"] if any("F." in text for text in (*self.body, *parts)) else []),
            "from torch import Tensor, nn", "", "",
            "class Net(nn.Module):", '    """The layers in Caffe\'s order and under their names."""', "",
            "    def __init__(self) -> None:", "        super().__init__()", *_indented(self.setup), "",
            f"    def forward({', '.join(['self', *(f'{name}: Tensor' for name in self.arguments)])}) -> {kind}:",
            *_indented(self.body), f"        return {results}", "", "",
            f"def load(weights: str | Path = Path(__file__).with_name({weights_file!a})) -> Net:",
            '    """The net with its weights, set to inference."""', "    net = Net()", "    net.load_state_dict(read_weights(weights))",
            "    return net.eval()"]
        return "\n".join(lines) + "\n" + "".join(f"\n\n{part}\n" for part in parts)


def _indented(lines: list[str]) -> list[str]:
    return [" " * 8 + line for line in lines]


def _dims(name: str, value: Value) -> str:
    sizes = ["N" if size is None and i == 0 else "..." if size is None else str(size) for i, size in enumerate(value.dims)]
    return f"{name} ({', '.join(sizes)})"


def _identifier(name: str, prefix: str, taken: set[str]) -> str:
    """The name with everything but letters, digits and underscores replaced, as an identifier that is not taken."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    plain = plain if plain[:1].isalpha() else f"{prefix}_{plain}"
    result, count = plain, 1
    while result in taken or keyword.iskeyword(result):
        result, count = f"{plain}_{count}", count + 1
    return result


def _shown(text: str) -> str:
    """Text from a file as it may stand in a comment or a docstring."""
    return re.sub(r"[^\w ./:,+=(){}@-]", "_", text, flags=re.ASCII)


# -- pieces of code ------------------------------------------------------------------------------------------------
def number(value: float) -> str:
    """The shortest text of a float32."""
    single = np.float32(value)
    return repr(float(str(single))) if np.isfinite(single) else f'float("{single}")'


def plain(values: Sequence[int]) -> object:
    """One number for several that are equal."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def call(function: str, *positional: object, **named: tuple[object, object]) -> str:
    """A call's text, with named arguments (value, default) where they differ from their default."""
    given = [str(value) for value in positional] + [f"{name}={value}" for name, (value, default) in named.items() if value != default]
    return f"{function}({', '.join(given)})"


# -- weights -------------------------------------------------------------------------------------------------------
@writes("Convolution", "Deconvolution")
def _convolution(m: Module, s: Step, *x: str) -> str:
    layer, p = s.layer, s.layer.param.convolution_param
    kind = "Conv" if layer.type == "Convolution" else "ConvTranspose"
    weight, bias = [*layer.params, None][:2]
    name = m.module(call(f"nn.{kind}{layer.spatial}d", layer.channels, p.num_output, plain(layer.kernel), stride=(plain(layer.stride), 1),
                         padding=(plain(layer.pad), 0), dilation=(plain(layer.dilation), 1), groups=(p.group, 1),
                         bias=(p.bias_term, True)), weight=weight, bias=bias)
    items = layer.channel_axis                          # torch wants one axis of items, or none
    return ", ".join(f"{name}({v})" if items < 2 else f"{name}({v}.flatten(0, {items - 1})).unflatten(0, {v}.shape[:{items}])" for v in x)


@writes("InnerProduct")
def _inner_product(m: Module, s: Step, x: str) -> str:
    layer, p = s.layer, s.layer.param.inner_product_param
    weight, bias = [*layer.params, None][:2]
    name = m.module(call("nn.Linear", layer.size, p.num_output, bias=(p.bias_term, True)),
                    weight=weight.t() if p.transpose else weight, bias=bias)
    axis = len(layer.kept)
    return f"{name}({x})" if axis == len(s.bottoms[0].dims) - 1 else f"{name}({x}.flatten({axis}))"


@writes("BatchNorm")
def _batch_norm(m: Module, s: Step, x: str) -> str:
    layer, axes = s.layer, len(s.bottoms[0].dims)
    refuse(axes > 5, m.plan, s, f"has {axes} axes, and torch's has at most 5")
    kind = f"nn.BatchNorm{max(axes - 2, 1)}d"
    if not layer.stored:
        return m.module(call(kind, layer.channels, eps=(number(layer.eps), "1e-05"), affine=(False, True),
                             track_running_stats=(False, True))) + f"({x})"
    momentum = 1 - float(number(layer.fraction))
    mean, variance = layer.statistics()
    weight, bias = [*(s.scale.params if s.scale else []), None, None][:2]
    if weight is not None and bias is None:
        bias = torch.zeros_like(weight)
    comment = f"with {_shown(s.scale.name)}" if s.scale else ""
    return m.module(call(kind, layer.channels, eps=(number(layer.eps), "1e-05"), momentum=(number(momentum), "0.1"),
                         affine=(weight is not None, True)), comment,
                    weight=weight, bias=bias, running_mean=mean, running_var=variance) + f"({x})"


@writes("Scale", "Bias")
def _affine(m: Module, s: Step, x: str, other: str | None = None) -> str:
    layer, trailing, operator = s.layer, trailing_axes(s), "*" if s.layer.type == "Scale" else "+"
    if other:
        x = f"{x} {operator} {other}" + (f"[..., {', '.join(['None'] * trailing)}]" if trailing else "")
    if not layer.params:
        return x
    weight, bias = [None, *layer.params] if other or layer.type == "Bias" else [*layer.params, None][:2]
    shape = tuple(layer.params[0].shape)
    name = m.module(call(m.helper("Affine"), shape, trailing, weight=(weight is not None, True), bias=(bias is not None, True)),
                    weight=weight, bias=bias)
    return f"{name}({x})"


@writes("PReLU")
def _prelu(m: Module, s: Step, x: str) -> str:
    slope = s.layer.params[0].reshape(-1)
    return m.module(f"nn.PReLU({slope.numel()})", weight=slope) + f"({x})"


@writes("Parameter")
def _parameter(m: Module, s: Step) -> str:
    return m.parameter(s.layer.params[0])


# -- windows -------------------------------------------------------------------------------------------------------
def _pool(m: Module, pool: Pool, average: bool) -> str:
    """The constructor of a pooling module with exactly Caffe's windows."""
    outside = pool.ceil and not any(pool.pad) and any(s > k for s, k in zip(pool.stride, pool.kernel, strict=True))
    if outside or any(2 * p > k for p, k in zip(pool.pad, pool.kernel, strict=True)):
        return call(m.helper("CaffePool2d"), pool.kernel, pool.stride, pool.pad, pool.ceil, average)
    return call(f"nn.{'Avg' if average else 'Max'}Pool2d", plain(pool.kernel), plain(pool.stride),
                padding=(plain(pool.pad), 0), ceil_mode=(pool.ceil, False))


@writes("Pooling")
def _pooling(m: Module, s: Step, x: str) -> str:
    p, average = s.layer.param.pooling_param, s.layer.param.pooling_param.pool == caffe_pb2.PoolingParameter.AVE
    if len(s.tops) == 1 and p.global_pooling:
        return m.module(f"nn.Adaptive{'Avg' if average else 'Max'}Pool2d(1)") + f"({x})"
    constructor = _pool(m, s.layer.pool, average)
    if len(s.tops) == 2:
        refuse("CaffePool" in constructor, m.plan, s, "has a mask and windows that torch's pooling does not have")
        constructor = constructor[:-1].replace("nn.MaxPool2d", m.helper("MaxPool2dWithMask")) + ", return_indices=True)"
    return m.module(constructor) + f"({x})"


@writes("SPP")
def _spp(m: Module, s: Step, x: str) -> str:
    average = s.layer.param.spp_param.pool == caffe_pb2.SPPParameter.AVE
    pools = [_pool(m, pool, average) for pool in s.layer.levels]
    if len(pools) == 1:
        return m.module(pools[0]) + f"({x})"
    return f"torch.cat([pool({x}).flatten(1) for pool in {m.module(f'nn.ModuleList([{chr(44).join(pools)}])')}], 1)"


@writes("LRN")
def _lrn(m: Module, s: Step, x: str) -> str:
    p = s.layer.param.lrn_param
    if p.norm_region == p.ACROSS_CHANNELS:
        return m.module(call("nn.LocalResponseNorm", p.local_size, number(p.alpha), number(p.beta), k=(number(p.k), "1.0"))) + f"({x})"
    mean = f"F.avg_pool2d({x}.square(), {p.local_size}, 1, {p.local_size // 2})"
    return f"{x} * (1 + {number(p.alpha)} * {mean}) ** -{number(p.beta)}"


# -- each element alike --------------------------------------------------------------------------------------------
def _function(type_name: str, constructor: Callable[[caffe_pb2.LayerParameter], str]) -> None:
    """A layer that is one of torch's modules without weights."""
    WRITERS[type_name] = lambda m, s, x: m.module(constructor(s.layer.param)) + f"({x})"


def _relu(p: caffe_pb2.LayerParameter) -> str:
    return f"nn.LeakyReLU({number(p.relu_param.negative_slope)})" if p.relu_param.negative_slope else "nn.ReLU()"


_function("ReLU", _relu)
_function("ELU", lambda p: call("nn.ELU", *([] if p.elu_param.alpha == 1 else [number(p.elu_param.alpha)])))
_function("Sigmoid", lambda p: "nn.Sigmoid()")
_function("TanH", lambda p: "nn.Tanh()")
_function("BNLL", lambda p: "nn.Softplus(threshold=50)")
_function("Dropout", lambda p: f"nn.Dropout({number(p.dropout_param.dropout_ratio)})")


@writes("AbsVal")
def _absolute(m: Module, s: Step, x: str) -> str:
    return f"{x}.abs()"


@writes("Clip")
def _clip(m: Module, s: Step, x: str) -> str:
    p = s.layer.param.clip_param
    return f"{x}.clamp({number(p.min)}, {number(p.max)})"


@writes("Swish")
def _swish(m: Module, s: Step, x: str) -> str:
    beta = s.layer.param.swish_param.beta
    return f"F.silu({x})" if beta == 1 else f"{x} * torch.sigmoid({number(beta)} * {x})"


@writes("Threshold")
def _threshold(m: Module, s: Step, x: str) -> str:
    return f"({x} > {number(s.layer.param.threshold_param.threshold)}).to({x}.dtype)"


@writes("Power")
def _power(m: Module, s: Step, x: str) -> str:
    p, constant = s.layer.param.power_param, power_constant(s)
    if constant is not None:
        return f"torch.zeros_like({x})" if constant == 0 else f"torch.full_like({x}, {number(constant)})"
    inner = _linear(x, p.scale, p.shift)
    return inner if p.power == 1 else f"({inner}) ** {number(p.power)}"


@writes("Exp")
def _exp(m: Module, s: Step, x: str) -> str:
    return _linear(f"torch.exp({_linear(x, s.layer.inner, 0)})", s.layer.outer, 0)


@writes("Log")
def _log(m: Module, s: Step, x: str) -> str:
    p = s.layer.param.log_param
    return _linear(f"torch.log({_linear(x, p.scale, p.shift)})", s.layer.factor, 0)


def _linear(x: str, scale: float, shift: float) -> str:
    return (x if scale == 1 else f"{number(scale)} * {x}") + (f" + {number(shift)}" if shift else "")


# -- across elements and blobs -------------------------------------------------------------------------------------
@writes("Softmax")
def _softmax(m: Module, s: Step, x: str) -> str:
    return m.module(f"nn.Softmax({s.layer.along})") + f"({x})"


@writes("MVN")
def _mvn(m: Module, s: Step, x: str) -> str:
    p = s.layer.param.mvn_param
    return f"{m.helper('standardise')}({x}, {p.across_channels}, {number(p.eps) if p.normalize_variance else None})"


@writes("Eltwise")
def _eltwise(m: Module, s: Step, *x: str) -> str:
    p = s.layer.param.eltwise_param
    if p.operation == p.SUM:
        return " + ".join(_linear(v, c, 0) for v, c in zip(x, list(p.coeff) or [1.0] * len(x), strict=True))
    return " * ".join(x) if p.operation == p.PROD else functools.reduce(lambda a, b: f"torch.maximum({a}, {b})", x)


@writes("Reduction")
def _reduction(m: Module, s: Step, x: str) -> str:
    p, over = s.layer.param.reduction_param, plain([*s.layer.over]) if len(s.layer.over) == 1 else s.layer.over
    part = {p.SUM: f"{x}.sum", p.ASUM: f"{x}.abs().sum", p.SUMSQ: f"{x}.square().sum", p.MEAN: f"{x}.mean"}[p.operation]
    return _linear(f"{part}({over})", p.coeff, 0)


@writes("ArgMax")
def _arg_max(m: Module, s: Step, x: str) -> str:
    p = s.layer.param.argmax_param
    return f"{m.helper('arg_max')}({x}, {p.top_k}, {s.layer.along}, values={p.out_max_val})"


# -- elements moved about ------------------------------------------------------------------------------------------
@writes("Concat")
def _concat(m: Module, s: Step, *x: str) -> str:
    return x[0] if len(x) == 1 else f"torch.cat([{', '.join(x)}], {s.layer.along})"


@writes("Slice")
def _slice(m: Module, s: Step, x: str) -> str:
    return x if len(s.tops) == 1 else f"{x}.split({s.layer.pieces}, {s.layer.along})"


@writes("Split")
def _split(m: Module, s: Step, x: str) -> str:
    return ", ".join([x] * len(s.tops))


@writes("Flatten")
def _flatten(m: Module, s: Step, x: str) -> str:
    p, axes = s.layer.param.flatten_param, len(s.bottoms[0].dims)
    start, stop = p.axis % axes, p.end_axis % axes
    return f"{x}.flatten({start})" if stop == axes - 1 else f"{x}.flatten({start}, {stop})"


@writes("Reshape")
def _reshape(m: Module, s: Step, x: str) -> str:
    return f"{x}.reshape({', '.join(map(str, s.tops[0].template)) or ()})"


@writes("Tile")
def _tile(m: Module, s: Step, x: str) -> str:
    return f"{x}.repeat({', '.join(map(str, s.layer.repeats))})"


@writes("Crop")
def _crop(m: Module, s: Step, x: str, like: str) -> str:
    parts = [":"] * s.layer.places[0][0]
    parts += [f"{offset}:{offset} + {like}.shape[{axis}]" if offset else f":{like}.shape[{axis}]" for axis, offset, _ in s.layer.places]
    return f"{x}[{', '.join(parts)}]"
