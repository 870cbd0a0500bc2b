"""Older forms of nets, against what Caffe's upgrade tools make of them and against the schema."""
import pytest

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2, prototxt, upgrade


def upgraded(text: str) -> caffe_pb2.NetParameter:
    return upgrade.upgrade_net(prototxt.parse(text, caffe_pb2.NetParameter()))


def test_inputs_become_an_input_layer_in_front():
    net = upgraded('name: "n" input: "a" input: "b" input_dim: 1 input_dim: 2 input_dim: 3 input_dim: 4'
                   ' input_dim: 5 input_dim: 6 input_dim: 7 input_dim: 8 layer { name: "r" }')
    assert [(layer.name, layer.type, list(layer.top)) for layer in net.layer] == [("input", "Input", ["a", "b"]), ("r", "", [])]
    assert [list(shape.dim) for shape in net.layer[0].input_param.shape] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert not (net.input or net.input_dim)


@pytest.mark.parametrize("text", ['input: "a" input: "b" input_shape { dim: 1 }', 'input: "a" input_dim: 1 input_dim: 2'])
def test_inputs_without_their_shapes_are_refused(text):
    with pytest.raises(CaffeError, match="give one input_shape or four input_dim for each"):
        upgraded(text)


def test_three_batch_norm_params_are_frozen_and_fewer_are_left():
    net = upgraded('layer { type: "BatchNorm" param { lr_mult: 1 } param { decay_mult: 2 name: "v" } param { } }'
                   'layer { type: "BatchNorm" param { lr_mult: 1 } }')
    assert [(p.lr_mult, p.decay_mult, p.name) for p in net.layer[0].param] == [(0, 0, ""), (0, 0, "v"), (0, 0, "")]
    assert net.layer[1].param[0].lr_mult == 1 and not net.layer[1].param[0].HasField("decay_mult")


def test_every_v1_field_has_a_place():
    renamed = {"param", "blob_share_mode", "blobs_lr", "weight_decay", "layer"}
    assert set(caffe_pb2.V1LayerParameter.DESCRIPTOR.fields_by_name) - renamed <= set(caffe_pb2.LayerParameter.DESCRIPTOR.fields_by_name)


def test_every_v0_field_has_a_place():
    for field, (places, name) in upgrade.V0_FIELDS.items():
        assert field in caffe_pb2.V0LayerParameter.DESCRIPTOR.fields_by_name
        for place in places.values():
            target = caffe_pb2.V1LayerParameter.DESCRIPTOR
            assert name in (target.fields_by_name[place].message_type if place else target).fields_by_name
    assert set(caffe_pb2.V0LayerParameter.DESCRIPTOR.fields_by_name) - set(upgrade.V0_FIELDS) == {
        "name", "type", "blobs", "blobs_lr", "weight_decay"}


def test_every_solver_type_has_a_name():
    assert set(upgrade.SOLVER_TYPES) == set(caffe_pb2.SolverParameter.SolverType.keys())


def test_v0_and_v1_mistakes_are_refused():
    pad = 'layers { layer { name: "p" type: "padding" } bottom: "x" top: "y" }'
    for text, words in (('layers { layer { name: "p" type: "nothing" } }', "no V0 layer type 'nothing'"),
                        ('layers { layer { name: "c" type: "conv" } bottom: "x" }', "bottom 'x' is neither"),
                        (f'input: "x" {pad} layers {{ layer {{ type: "relu" }} bottom: "y" }}', "layer 'p': padding must lie between"),
                        ('layer { name: "a" } layers { name: "b" }', "both 'layer' and 'layers'")):
        with pytest.raises(CaffeError, match=words):
            upgraded(text)


def test_a_field_that_means_nothing_to_a_v0_type_is_dropped_and_logged(capfd):
    net = upgraded('layers { layer { name: "r" type: "relu" dropout_ratio: 0.5 } }')
    assert prototxt.write(net) == prototxt.write(caffe_pb2.NetParameter(layer=[caffe_pb2.LayerParameter(name="r", type="ReLU")]))
    assert "'dropout_ratio' means nothing to type 'relu'" in capfd.readouterr().err
