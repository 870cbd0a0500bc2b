"""Filtering by state and inserted splits, as Caffe does them."""
import pytest

from torchcaffe import CaffeError
from torchcaffe.graph import filter as graph
from torchcaffe.proto import caffe_pb2, prototxt


def net(text):
    return prototxt.parse(text, caffe_pb2.NetParameter(), "test")


def names(param):
    return [layer.name for layer in param.layer]


RULES = """
layer { name: "always" type: "X" }
layer { name: "train" type: "X" include { phase: TRAIN } }
layer { name: "not_test" type: "X" exclude { phase: TEST } }
layer { name: "high" type: "X" include { min_level: 2 max_level: 3 } }
layer { name: "both_stages" type: "X" include { stage: "a" stage: "b" } }
layer { name: "no_b" type: "X" include { not_stage: "b" } }
layer { name: "either" type: "X" include { stage: "a" } include { stage: "b" } }
"""


@pytest.mark.parametrize(("phase", "level", "stages", "kept"), [
    (caffe_pb2.TRAIN, 0, [], ["always", "train", "not_test", "no_b"]),
    (caffe_pb2.TEST, 2, ["a"], ["always", "high", "no_b", "either"]),
    (caffe_pb2.TEST, 4, ["a", "b"], ["always", "both_stages", "either"]),
])
def test_a_layer_stays_when_any_of_its_rules_matches_the_state(phase, level, stages, kept):
    assert names(graph.filter_net(graph.set_state(net(RULES), phase, level, stages))) == kept


def test_include_together_with_exclude_is_refused():
    with pytest.raises(CaffeError, match="layer 'x': has include and exclude"):
        graph.filter_net(net('layer { name: "x" include { phase: TRAIN } exclude { phase: TEST } }'))


def test_a_top_used_twice_gets_a_split_named_as_caffe_names_it():
    result = graph.insert_splits(net("""
        layer { name: "in" type: "Input" top: "x" }
        layer { name: "a" type: "ReLU" bottom: "x" top: "a" }
        layer { name: "b" type: "ReLU" bottom: "x" top: "b" }"""))
    assert names(result) == ["in", "x_in_0_split", "a", "b"]
    assert list(result.layer[1].top) == ["x_in_0_split_0", "x_in_0_split_1"]
    assert [list(la.bottom) for la in result.layer[2:]] == [["x_in_0_split_0"], ["x_in_0_split_1"]]


def test_a_split_after_an_in_place_chain_is_named_after_the_chain_s_last_layer():
    result = graph.insert_splits(net("""
        layer { name: "in" type: "Input" top: "x" }
        layer { name: "relu" type: "ReLU" bottom: "x" top: "x" }
        layer { name: "a" type: "ReLU" bottom: "x" top: "a" }
        layer { name: "b" type: "ReLU" bottom: "x" top: "b" }"""))
    assert names(result) == ["in", "relu", "x_relu_0_split", "a", "b"]


def test_a_written_loss_weight_counts_as_a_use_and_moves_to_the_split():
    result = graph.insert_splits(net("""
        layer { name: "in" type: "Input" top: "x" }
        layer { name: "loss" type: "Reduction" bottom: "x" top: "l" loss_weight: 3 }
        layer { name: "a" type: "ReLU" bottom: "l" top: "a" }"""))
    assert names(result) == ["in", "loss", "l_loss_0_split", "a"]
    assert not result.layer[1].loss_weight and list(result.layer[2].loss_weight) == [3, 0]
    assert list(result.layer[3].bottom) == ["l_loss_0_split_1"]


def test_an_unknown_bottom_names_the_layer_and_the_nearest_blob():
    with pytest.raises(CaffeError, match="layer 'a'.*unknown bottom blob 'data1'.*did you mean 'data'"):
        graph.insert_splits(net('layer { name: "i" top: "data" } layer { name: "a" type: "ReLU" bottom: "data1" top: "a" }'))
