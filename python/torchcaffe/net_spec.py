"""Nets written in Python: `layers` makes layers, `params` names constants, NetSpec gives names, to_proto makes the message.

    n = NetSpec()
    n.data = layers.Input(shape=dict(dim=[1, 3, 8, 8]))
    n.conv = layers.Convolution(n.data, kernel_size=3, num_output=4)
    n.relu = layers.ReLU(n.conv, in_place=True)
    print(n.to_proto())

Nothing is checked beyond the fields of the messages; building the net does that.  Caffe: python/caffe/net_spec.py.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.message import Message

from torchcaffe.errors import CaffeAttributeError, CaffeError, CaffeKeyError, CaffeTypeError, CaffeValueError
from torchcaffe.proto import caffe_pb2
from torchcaffe.proto.prototxt import nearest


class NoTop(CaffeAttributeError, CaffeKeyError):
    """A name that a NetSpec does not have."""


class Top:
    """One output of a layer: `fn` the Function that makes it, `n` its number there."""

    def __init__(self, fn: Function, n: int):
        self.fn, self.n = fn, n

    def to_proto(self) -> caffe_pb2.NetParameter:
        """The net of all layers that this top needs."""
        return to_proto(self)


class Function:
    """A layer: its type, its bottoms (Tops of other layers) and its parameters.

    `ntop` (1 by default) is how many tops it has; with `in_place` they are its bottoms.  Other parameters are fields of the layer's own
    message (`kernel_size`) or, if that has none of this name, of LayerParameter (`loss_weight`, `convolution_param`, `param`).
    """

    def __init__(self, type_name: str, inputs: Iterable[Top], params: dict[str, Any]):
        self.type_name, self.inputs, self.params = type_name, tuple(inputs), dict(params)
        for number, bottom in enumerate(self.inputs):
            if not isinstance(bottom, Top):
                made = ": a layer without tops" if isinstance(bottom, Function) else ""
                raise CaffeTypeError(f"{type_name} input {number} is not a Top (type is {type(bottom)}{made})")
        self.ntop: int = self.params.pop("ntop", 1)
        self.in_place: bool = self.params.pop("in_place", False)
        self.tops = tuple(Top(self, n) for n in range(self.ntop))

    def message(self, name: str, bottoms: list[str], tops: list[str]) -> caffe_pb2.LayerParameter:
        """The LayerParameter with these names.  Raises CaffeError for a parameter that is no field, or of another type than the field."""
        layer = caffe_pb2.LayerParameter(name=name, type=self.type_name, bottom=bottoms, top=tops)
        own = _OWN.get(self.type_name, "")
        fields = set(getattr(layer, own).DESCRIPTOR.fields_by_name) if own else set()
        for key, value in self.params.items():
            holder = getattr(layer, own) if key in fields and not key.endswith("param") else layer
            _assign(holder, key, value, f"layers.{self.type_name}", fields)
        return layer


def param_name_dict() -> dict[str, str]:
    """{layer type: name of its own message in LayerParameter, without _param}, as far as types and messages are named alike."""
    layer = caffe_pb2.LayerParameter()
    names = [field.name for field in layer.DESCRIPTOR.fields if field.name.endswith("_param")]
    return {getattr(layer, name).DESCRIPTOR.name.removesuffix("Parameter"): name.removesuffix("_param") for name in names}


_OWN = {kind: f"{name}_param" for kind, name in param_name_dict().items()}


def assign_proto(proto: Message, name: str, val: Any) -> None:
    """Set a field: a list extends a repeated one (other values count as a list of one), a dict fills in a message."""
    _assign(proto, name, val, proto.DESCRIPTOR.name, set())


def _assign(message: Message, name: str, value: Any, where: str, others: set[str]) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    if name not in fields:
        raise CaffeAttributeError(f"{where} has no parameter '{name}'{nearest(name, {*fields, *others})}")
    target, field = getattr(message, name), fields[name]
    try:
        if hasattr(target, "extend"):
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if not field.message_type:
                    target.append(item)
                elif isinstance(item, dict):
                    _fill(target.add(), item, where)
                else:
                    target.add().CopyFrom(item)
        elif isinstance(value, dict):
            target.SetInParent()
            _fill(target, value, where)
        elif field.message_type:
            target.CopyFrom(value)
        else:
            setattr(message, name, value)
    except CaffeError:                                      # of a message in a message
        raise
    except (TypeError, ValueError, AttributeError) as error:
        kinds = {ValueError: CaffeValueError, AttributeError: CaffeAttributeError}
        raise kinds.get(type(error), CaffeTypeError)(f"{where}: {name} cannot be {value!r} ({error})") from None


def _fill(message: Message, values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        _assign(message, name, value, f"{where}, {message.DESCRIPTOR.name}", set())


def _in_order(functions: Iterable[Function]) -> list[Function]:
    """The functions and all they need, each after its inputs."""
    done: dict[Function, None] = {}
    waiting = list(functions)[::-1]
    while waiting:
        missing = [bottom.fn for bottom in waiting[-1].inputs if bottom.fn not in done]
        if missing:
            waiting += missing[::-1]
        else:
            done.setdefault(waiting.pop())
    return list(done)


def _net(functions: Iterable[Function], names: dict[Top | Function, str]) -> caffe_pb2.NetParameter:
    """The net of these layers and all they need; what `names` leaves without a name is called by its type and a number."""
    counts: Counter[str] = Counter()
    blobs: dict[Top, str] = {}
    net = caffe_pb2.NetParameter()

    def name(item: Top | Function, kind: str) -> str:
        if item not in names:
            counts[kind] += 1
            names[item] = f"{kind}{counts[kind]}"
        return names[item]

    for fn in _in_order(functions):
        bottoms = [blobs[bottom] for bottom in fn.inputs]
        tops = bottoms if fn.in_place else [name(top, fn.type_name) for top in fn.tops]
        blobs.update(zip(fn.tops, tops, strict=False))
        first = fn.tops[0] if fn.tops and fn not in names else fn
        net.layer.append(fn.message(name(first, fn.type_name), bottoms, tops))
    return net


def to_proto(*tops: Top) -> caffe_pb2.NetParameter:
    """The net of all layers that these tops need, with names made up from the types."""
    return _net([top.fn for top in tops], {})


class NetSpec:
    """A net whose tops are assigned as attributes or items, which names them and their layers.

    A layer is called as its first top; one without tops (`ntop=0`) as what it is assigned to.
    """

    tops: dict[str, Top | Function]

    def __init__(self) -> None:
        super().__setattr__("tops", {})

    def __setattr__(self, name: str, value: Top | Function) -> None:
        self.tops[name] = value

    def __getattr__(self, name: str) -> Any:
        if name not in self.tops:
            raise NoTop(f"the NetSpec has no top '{name}'")
        return self.tops[name]

    def __setitem__(self, name: str, value: Top | Function) -> None:
        self.tops[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.tops[name]

    def __delitem__(self, name: str) -> None:
        del self.tops[name]

    def keys(self) -> list[str]:
        """The names given so far."""
        return list(self.tops)

    def vals(self) -> list[Top | Function]:
        """What they name."""
        return list(self.tops.values())

    def update(self, name: str, params: dict[str, Any]) -> None:
        """Change parameters of the layer that makes the top `name`."""
        self._function(self.tops[name]).params.update(params)

    def to_proto(self) -> caffe_pb2.NetParameter:
        """The net of all that was assigned, in that order, and what it needs."""
        for name, value in self.tops.items():
            if not isinstance(value, (Top, Function)):
                raise CaffeAttributeError(f"NetSpec: '{name}' is a {type(value).__name__}, not a top; several tops come as a tuple")
        return _net(map(self._function, self.tops.values()), {value: name for name, value in self.tops.items()})

    @staticmethod
    def _function(value: Top | Function) -> Function:
        return value.fn if isinstance(value, Top) else value


class Layers:
    """layers.Convolution(bottom, kernel_size=3): the top of a layer of this type, a tuple of them, or with ntop=0 the Function."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def make(*inputs: Top, **params: Any) -> Top | tuple[Top, ...] | Function:
            fn = Function(name, inputs, params)
            return fn if fn.ntop == 0 else fn.tops[0] if fn.ntop == 1 else fn.tops
        return make


class Parameters:
    """params.Pooling.MAX: constants of the message PoolingParameter."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(caffe_pb2, f"{name}Parameter"):
            raise AttributeError(f"there is no message {name}Parameter")
        return getattr(caffe_pb2, f"{name}Parameter")


layers = Layers()
params = Parameters()
