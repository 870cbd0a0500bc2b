"""Nets written in Python against the prototxts they stand for."""
# ruff: noqa: C408    dict(dim=[1]) is how such nets are written
import numpy as np
import pytest

import torchcaffe as caffe
from torchcaffe import layers as L
from torchcaffe import params as P
from torchcaffe.net_spec import Function, Top, assign_proto, param_name_dict
from torchcaffe.proto import caffe_pb2, prototxt


def same(net, text):
    assert net == prototxt.parse(text, caffe_pb2.NetParameter())


def test_names_come_from_the_attributes():
    n = caffe.NetSpec()
    n.data, n.label = L.Data(batch_size=64, backend=P.Data.LMDB, source="train", transform_param=dict(scale=1 / 256), ntop=2)
    n.conv1 = L.Convolution(n.data, kernel_size=5, num_output=20, weight_filler=dict(type="xavier"),
                            param=[dict(lr_mult=1), dict(lr_mult=2)])
    n.pool1 = L.Pooling(n.conv1, kernel_size=2, stride=2, pool=P.Pooling.MAX)
    n.relu1 = L.ReLU(n.pool1, in_place=True)
    n["fc"] = L.InnerProduct(n.relu1, num_output=10, include=dict(phase=caffe.TEST))
    n.loss = L.SoftmaxWithLoss(n.fc, n["label"], loss_weight=0.5, loss_param=dict(ignore_label=3))
    same(n.to_proto(), """
        layer { name: "data" type: "Data" top: "data" top: "label" transform_param { scale: 0.00390625 }
          data_param { batch_size: 64 backend: LMDB source: "train" } }
        layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1" param { lr_mult: 1 } param { lr_mult: 2 }
          convolution_param { kernel_size: 5 num_output: 20 weight_filler { type: "xavier" } } }
        layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1" pooling_param { kernel_size: 2 stride: 2 pool: MAX } }
        layer { name: "relu1" type: "ReLU" bottom: "pool1" top: "pool1" }
        layer { name: "fc" type: "InnerProduct" bottom: "pool1" top: "fc" include { phase: TEST } inner_product_param { num_output: 10 } }
        layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" loss_weight: 0.5
          loss_param { ignore_label: 3 } }""")


def test_what_has_no_name_is_called_by_its_type_in_the_order_of_the_net():
    x = L.Input(shape=dict(dim=[1, 2]))
    a, b = L.Slice(x, ntop=2, slice_point=1)
    same(caffe.to_proto(L.Eltwise(L.ReLU(a, in_place=True), b)), """
        layer { name: "Input1" type: "Input" top: "Input1" input_param { shape { dim: 1 dim: 2 } } }
        layer { name: "Slice1" type: "Slice" bottom: "Input1" top: "Slice1" top: "Slice2" slice_param { slice_point: 1 } }
        layer { name: "ReLU1" type: "ReLU" bottom: "Slice1" top: "Slice1" }
        layer { name: "Eltwise1" type: "Eltwise" bottom: "Slice1" bottom: "Slice2" top: "Eltwise1" }""")
    same(b.to_proto(), """
        layer { name: "Input1" type: "Input" top: "Input1" input_param { shape { dim: 1 dim: 2 } } }
        layer { name: "Slice1" type: "Slice" bottom: "Input1" top: "Slice1" top: "Slice2" slice_param { slice_point: 1 } }""")


def test_a_layer_without_tops_is_called_as_it_is_assigned():
    n = caffe.NetSpec()
    n.x = L.DummyData(shape=[dict(dim=[2])])
    n.quiet = L.Silence(n.x, ntop=0)
    assert isinstance(n.quiet, Function) and isinstance(n.x, Top)
    same(n.to_proto(), """
        layer { name: "x" type: "DummyData" top: "x" dummy_data_param { shape { dim: 2 } } }
        layer { name: "quiet" type: "Silence" bottom: "x" }""")


def test_the_net_can_be_built_and_run(tmp_path):
    n = caffe.NetSpec()
    n.x = L.Input(shape=dict(dim=[2, 3]))
    n.y = L.Power(n.x, scale=2, shift=1)
    (tmp_path / "net.prototxt").write_text(str(n.to_proto()))
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(net.forward(x=x)["y"], 2 * x + 1)


def test_a_net_of_a_thousand_layers_is_no_recursion():
    top = L.Input(shape=dict(dim=[1]))
    for _ in range(3000):
        top = L.ReLU(top)
    assert len(top.to_proto().layer) == 3001


def test_a_spec_can_be_looked_into_and_changed():
    n = caffe.NetSpec()
    n.x = L.Input(shape=dict(dim=[1]))
    n.y = L.Power(n.x, scale=2)
    n.z = L.ReLU(n.y)
    assert n.keys() == ["x", "y", "z"] and n.vals() == [n.x, n.y, n.z]
    n.update("y", dict(scale=3))
    del n["z"]
    assert [layer.name for layer in n.to_proto().layer] == ["x", "y"] and n.to_proto().layer[1].power_param.scale == 3
    with pytest.raises(AttributeError, match="no top 'z'"):
        n.z  # noqa: B018    read for its error


@pytest.mark.parametrize(("make", "message"), [
    (lambda x: L.Convolution(x, num_ouput=3), "layers.Convolution has no parameter 'num_ouput'; did you mean 'num_output'"),
    (lambda x: L.Convolution(x, num_output="three"), "num_output cannot be 'three'"),
    (lambda x: L.Convolution(x, weight_filler=dict(typ="xavier")), "FillerParameter has no parameter 'typ'; did you mean 'type'"),
])
def test_a_parameter_that_is_none_names_layer_and_parameter(make, message):
    with pytest.raises(caffe.CaffeError, match=message):
        make(L.Input(shape=dict(dim=[1]))).to_proto()


def test_bottoms_must_be_tops():
    data = L.Data(ntop=2)
    with pytest.raises(caffe.CaffeError, match="ReLU input 0 is not a Top .type is .*tuple"):
        L.ReLU(data)
    n = caffe.NetSpec()
    n.both = data
    with pytest.raises(caffe.CaffeError, match="'both' is a tuple"):
        n.to_proto()


def test_layers_and_params_know_only_what_could_be_there():
    assert caffe.layers is L and L.Anything(shape=1).fn.type_name == "Anything"
    assert not hasattr(L, "__wrapped__") and not hasattr(P, "Nothing")
    assert param_name_dict()["InnerProduct"] == "inner_product" and param_name_dict()["HDF5Data"] == "hdf5_data"


def test_assign_proto_fills_messages_from_lists_and_dicts():
    layer = caffe_pb2.LayerParameter()
    assign_proto(layer, "top", "a")
    assign_proto(layer, "param", [dict(lr_mult=2), caffe_pb2.ParamSpec(decay_mult=0)])
    assign_proto(layer, "input_param", dict(shape=dict(dim=[3])))
    assert layer == prototxt.parse('top: "a" param { lr_mult: 2 } param { decay_mult: 0 } input_param { shape { dim: 3 } }',
                                   caffe_pb2.LayerParameter())
