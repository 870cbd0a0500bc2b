"""Taking nets apart: shapes against the engine's, cuts, and what cannot become a teacher."""
from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format

import torchcaffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.nets import surgery

VARIED = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 17 dim: 23 } } }
layer { name: "a" type: "Convolution" bottom: "data" top: "a"
  convolution_param { num_output: 4 kernel_h: 3 kernel_w: 5 stride: 2 pad: 1 pad: 2 } }
layer { name: "b" type: "Convolution" bottom: "a" top: "b"
  convolution_param { num_output: 6 kernel_size: 3 dilation: 2 pad_h: 1 pad_w: 0 } }
layer { name: "bn" type: "BatchNorm" bottom: "b" top: "b" }
layer { name: "up" type: "Pooling" bottom: "b" top: "up" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "down" type: "Pooling" bottom: "b" top: "down" pooling_param { kernel_size: 2 stride: 2 round_mode: FLOOR } }
layer { name: "pad" type: "Pooling" bottom: "b" top: "pad"
  pooling_param { kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 3 pad_h: 1 pad_w: 1 } }
layer { name: "both" type: "Concat" bottom: "up" bottom: "up" top: "both" }
layer { name: "sum" type: "Eltwise" bottom: "both" bottom: "both" top: "sum" }
layer { name: "relu" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "gap" type: "Pooling" bottom: "sum" top: "gap" pooling_param { global_pooling: true pool: AVE } }
layer { name: "fc" type: "InnerProduct" bottom: "gap" top: "fc" inner_product_param { num_output: 7 } }
layer { name: "flat" type: "Flatten" bottom: "down" top: "flat" }
layer { name: "after" type: "ReLU" bottom: "flat" top: "after" }
"""


def parsed(text: str) -> caffe_pb2.NetParameter:
    return text_format.Parse(text, caffe_pb2.NetParameter())


def test_shapes_are_the_engines(tmp_path: Path) -> None:
    net = parsed(VARIED)
    (tmp_path / "net.prototxt").write_text(write_text(net))
    engine = torchcaffe.Net(str(tmp_path / "net.prototxt"), torchcaffe.TEST)
    found = surgery.shapes(net.layer, (3, 17, 23))
    assert {blob: (2, *shape) for blob, shape in found.items()} == {blob: tuple(engine.blobs[blob].data.shape) for blob in found}
    assert set(engine.blobs) - set(found) - {b for b in engine.blobs if "_split_" in b} == {"flat", "after"}


def test_a_cut_keeps_what_is_needed_and_in_place_layers() -> None:
    assert [layer.name for layer in surgery.cut(parsed(VARIED).layer, ["sum"])] == ["data", "a", "b", "bn", "up", "both", "sum", "relu"]


def test_blobs_are_found_by_layer_or_by_blob() -> None:
    layers = parsed(VARIED).layer
    assert surgery.blob_of(layers, "relu") == surgery.blob_of(layers, "sum") == "sum"
    with pytest.raises(UserError, match="no layer or blob 'rely'; did you mean 'relu'"):
        surgery.blob_of(layers, "rely")


def test_class_scores_are_what_softmax_reads_or_the_one_end() -> None:
    scored = VARIED + 'layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }'
    assert surgery.logits(parsed(scored)) == "fc"
    assert surgery.logits(parsed(scored[:scored.index('layer { name: "down"')])) == "up"
    with pytest.raises(UserError, match="does not say which blob"):
        surgery.logits(parsed(VARIED))


@pytest.mark.parametrize(("layer", "complaint"), [
    ('layer { name: "p" type: "Python" bottom: "sum" top: "end" }', "'p' has type Python, which cannot be frozen"),
    ('layer { name: "p" type: "Eltwise" bottom: "sum" bottom: "mask" top: "end" }', "'p' needs 'mask'"),
])
def test_what_cannot_teach_is_refused(layer: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        surgery.teacher_layers(parsed(VARIED + layer), ["end"])


def test_shared_weights_stay_shared() -> None:
    tied = """layer { name: "a" type: "InnerProduct" bottom: "data" top: "a" param { name: "w" } inner_product_param { num_output: 3 } }
              layer { name: "b" type: "InnerProduct" bottom: "data" top: "b" param { name: "w" } inner_product_param { num_output: 3 } }"""
    for layer in surgery.teacher_layers(parsed(tied), ["a", "b"]):
        assert [(spec.name, spec.lr_mult) for spec in layer.param] == [("teacher/w", 0), ("", 0)]
