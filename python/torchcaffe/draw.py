"""A net as a picture: blobs and layers as nodes of a graph, in graphviz's language.

graphviz's program `dot` makes SVG, PNG, PDF and so on of it; without graphviz there is the text itself (.dot).  Only get_pydot_graph
needs the package pydot.  Caffe: python/caffe/draw.py.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchcaffe.errors import CaffeError, CaffeImportError
from torchcaffe.extras import how_to_get
from torchcaffe.formats import replacing
from torchcaffe.proto import caffe_pb2
from torchcaffe.proto.upgrade import upgrade_net

TEXT = ("dot", "gv", "raw")                                 # endings of files that hold the graph and not a picture of it
COLORS = {"Convolution": "#FF5050", "Deconvolution": "#FF5050", "Pooling": "#FF9900", "InnerProduct": "#CC33FF"}
LAYER, IN_PLACE, BLOB = "#6495ED", "#90EE90", "#E0E0E0"


def dot_source(caffe_net: caffe_pb2.NetParameter, rankdir: str = "LR", label_edges: bool = True, phase: int | None = None,
               display_lrm: bool = False) -> str:
    """The graph in graphviz's language; the arguments are those of get_pydot_graph."""
    if rankdir not in ("LR", "TB", "BT", "RL"):
        raise CaffeError(f"rankdir {rankdir!r} is none of LR, TB, BT, RL")
    net = upgrade_net(caffe_net)
    layers = [layer for layer in net.layer if phase is None or _in_phase(layer, phase)]
    lines = [f"digraph {_quoted(net.name or 'Net')} {{", f"rankdir={rankdir};"]
    for blob in dict.fromkeys(name for layer in layers for name in (*layer.bottom, *layer.top)):
        lines.append(_node(f"{blob}_blob", blob, shape="octagon", fillcolor=BLOB))
    separator = " " if rankdir in ("TB", "BT") else "\n"
    for layer in layers:
        in_place = len(layer.bottom) == 1 and list(layer.bottom) == list(layer.top)
        node = f"{layer.name}_{layer.type}"
        lines.append(_node(node, separator.join(_descriptions(layer, display_lrm)), shape="box",
                           fillcolor=IN_PLACE if in_place else COLORS.get(layer.type, LAYER)))
        lines += [_edge(f"{bottom}_blob", node) for bottom in layer.bottom]
        lines += [_edge(node, f"{top}_blob", _edge_label(layer) if label_edges else "") for top in layer.top]
    return "\n".join([*lines, "}\n"])


def get_pydot_graph(caffe_net: caffe_pb2.NetParameter, rankdir: str, label_edges: bool = True, phase: int | None = None,
                    display_lrm: bool = False) -> Any:
    """The graph as a pydot.Dot.

    `rankdir` is the direction from bottom to top: LR, TB, BT or RL; `phase` leaves out layers that are only for the other one;
    `display_lrm` shows the lr_mult of weights and bias.  Raises CaffeError without pydot.
    """
    try:
        import pydot
    except ImportError:
        raise CaffeImportError(f"get_pydot_graph needs pydot: {how_to_get('draw')}; draw_net and draw_net_to_file do without it") from None
    graphs = pydot.graph_from_dot_data(dot_source(caffe_net, rankdir, label_edges, phase, display_lrm))
    assert graphs
    return graphs[0]


def draw_net(caffe_net: caffe_pb2.NetParameter, rankdir: str, ext: str = "png", phase: int | None = None,
             display_lrm: bool = False) -> bytes:
    """The picture as bytes of a file of type `ext`, by graphviz; its source for dot, gv and raw, which needs no graphviz.

    Raises CaffeError where graphviz's program `dot` is missing or does not make such pictures.
    """
    source = dot_source(caffe_net, rankdir, phase=phase, display_lrm=display_lrm).encode()
    if ext in TEXT:
        return source
    program = shutil.which("dot")
    if program is None:
        raise CaffeError(f"a picture of type {ext} takes graphviz, whose program `dot` is not on PATH; "
                         "install graphviz, or write a .dot file")
    made = subprocess.run([program, f"-T{ext}"], input=source, capture_output=True)
    if made.returncode:
        reason = made.stderr.decode(errors="replace").strip().splitlines() or [f"status {made.returncode}"]
        raise CaffeError(f"graphviz's dot makes no picture of type {ext}: {reason[0]}")
    return made.stdout


def draw_net_to_file(caffe_net: caffe_pb2.NetParameter, filename: str | os.PathLike[str], rankdir: str = "LR", phase: int | None = None,
                     display_lrm: bool = False) -> None:
    """Write the picture whose type the file's ending names, whole or not at all."""
    ext = Path(filename).suffix[1:]
    if not ext:
        raise CaffeError(f"{filename}: the ending names the type of a picture, such as .svg, .png, .pdf or .dot")
    picture = draw_net(caffe_net, rankdir, ext, phase, display_lrm)
    with replacing(filename) as part:
        part.write_bytes(picture)


def _in_phase(layer: caffe_pb2.LayerParameter, phase: int) -> bool:
    """Whether the layer is for this phase, whatever its rules say of levels and stages."""
    if layer.include:
        return any(rule.phase == phase or not rule.HasField("phase") for rule in layer.include)
    return not any(rule.phase == phase and rule.HasField("phase") for rule in layer.exclude)


def _descriptions(layer: caffe_pb2.LayerParameter, rates: bool) -> Iterator[str]:
    """What a layer's node says: its name, its type, its window, its rates."""
    yield layer.name
    pool = f" {caffe_pb2.PoolingParameter.PoolMethod.Name(layer.pooling_param.pool)}" if layer.type == "Pooling" else ""
    yield f"({layer.type}{pool})"
    if layer.type in ("Convolution", "Deconvolution", "Pooling"):
        for what, name, default in (("kernel size", "kernel_size", 1), ("stride", "stride", 1), ("pad", "pad", 0)):
            value = getattr(layer.pooling_param if layer.type == "Pooling" else layer.convolution_param, name)
            yield f"{what}: {value if isinstance(value, int) else (*value, default)[0]}"
    if rates and layer.type in ("Convolution", "Deconvolution", "InnerProduct"):
        weight, bias = [*(spec.lr_mult for spec in layer.param), 1.0, 1.0][:2]
        yield f"lr mult: {weight:.1f}, {bias:.1f}"


def _edge_label(layer: caffe_pb2.LayerParameter) -> str:
    if layer.type == "Data":
        return f"Batch {layer.data_param.batch_size}"
    if layer.type in ("Convolution", "Deconvolution"):
        return str(layer.convolution_param.num_output)
    return str(layer.inner_product_param.num_output) if layer.type == "InnerProduct" else ""


def _quoted(text: str) -> str:
    """A string of graphviz's language, in which a new line is written as it is in JSON."""
    return json.dumps(text, ensure_ascii=False)


def _node(name: str, label: str, **style: str) -> str:
    attributes = {"label": label, "style": "filled", **style}
    return f"{_quoted(name)} [{', '.join(f'{key}={_quoted(value)}' for key, value in attributes.items())}];"


def _edge(start: str, end: str, label: str = "") -> str:
    return f"{_quoted(start)} -> {_quoted(end)}" + (f" [label={_quoted(label)}];" if label else ";")
