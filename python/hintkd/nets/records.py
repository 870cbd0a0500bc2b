"""Data layers that shuffle their records, scale them per channel or show them in several views, as messages; and what any data layer reads.

Caffe's own Data layer does none of that, so these are Python layers (layers/records.py), which every pycaffe runs.
"""
from __future__ import annotations

import json
from typing import Any

from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.experiment import Dataset, Options

READERS = ("hintkd.layers.records", "hintkd.layers.contrastive")       # Python layers whose param_str has the `source` that they read


def are_needed(options: Options) -> bool:
    """Whether the options ask for what a Data layer does not do."""
    return (options.order, options.last_batch, options.std, options.padding) != ("stored", "wrapped", "none", "zeros")


def add_records(net: caffe_pb2.NetParameter, dataset: Dataset, options: Options, phase: str, tops: list[str], views: int = 1) -> None:
    """One data layer "data" of a phase: images and, with more tops, labels and positions.

    Raises UserError where the options want a mean per pixel, or values that the data set does not have.
    """
    train = phase == "TRAIN"
    told: dict[str, Any] = {"source": dataset.train_lmdb if train else dataset.test_lmdb,
                            "batch": dataset.batch if train else dataset.test_batch, "shuffle": train and options.order == "shuffled"}
    if options.mean == "file" and dataset.train_mean:
        raise UserError(f"data set {dataset.name}: records that are shuffled, scaled or padded anew have a mean per channel and none "
                        "per pixel; set mean to values or none")
    for name, wanted, values in (("mean", options.mean, dataset.mean_value), ("std", options.std, dataset.std_value)):
        if wanted == "values":
            if not values and (name == "std" or dataset.train_mean):
                raise UserError(f"data set {dataset.name}: {name}: values needs its {name}_value, one number per channel")
            told[name] = list(values)
    scale = options.mnist_scale if dataset.name == "mnist" else dataset.scale
    if scale != 1 and options.std == "none":
        told["std"] = [1 / scale]
    if train and options.last_batch == "kept":
        told["last"] = "kept"
    if train and dataset.crop:
        told["crop"] = dataset.size
        if options.padding == "reflect":
            told |= {"border": dataset.border, "pad": dataset.border, "padding": "reflect"}
    if train and dataset.mirror and options.mirror:
        told["mirror"] = True
    if views > 1:
        told["views"] = views
    net.layer.add(name="data", type="Python", top=tops, include=[{"phase": phase}], python_param={
        "module": "hintkd.layers.records", "layer": "ShuffledRecords", "param_str": json.dumps(told)})


def source_of(layer: caffe_pb2.LayerParameter) -> str | None:
    """The LMDB that a layer reads, if it does."""
    if layer.type == "Python" and layer.python_param.module in READERS:
        source: str | None = json.loads(layer.python_param.param_str or "{}").get("source")
        return source
    return layer.data_param.source if layer.type == "Data" else None


def with_source(layer: caffe_pb2.LayerParameter, source: str) -> caffe_pb2.LayerParameter:
    """The same Python layer with another source."""
    other = caffe_pb2.LayerParameter()
    other.CopyFrom(layer)
    other.python_param.param_str = json.dumps({**json.loads(layer.python_param.param_str), "source": source})
    return other
