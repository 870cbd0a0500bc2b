"""Prototxts: what people write is read, what is wrong is named with line and column, what is written is read back."""
import math

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2, prototxt, upgrade


def net(text: str) -> caffe_pb2.NetParameter:
    return prototxt.parse(text, caffe_pb2.NetParameter(), "net.prototxt")


def complaint(text: str) -> str:
    with pytest.raises(CaffeError) as caught:
        net(text)
    return str(caught.value)


# -- what is read --------------------------------------------------------------------------------------------------
def test_what_people_write():
    found = net("""
        # a comment with a brace {
        name: "one" 'two'   # strings next to each other are one
        layer < name: "a#b" top: 'it\\'s' >;
        layer: { name: "b", type: "LRN" lrn_param { alpha: 1e-4f beta: .5 k: 1. } }
        input_dim: 0x10 input_dim: 2147483647 input_dim: -1
        input_dim: [1, 2]
        layer { loss_weight: inf loss_weight: -inf loss_weight: nan phase: 1 }
    """)
    assert found.name == "onetwo"
    assert (found.layer[0].name, found.layer[0].top) == ("a#b", ["it's"])
    assert found.layer[1].lrn_param.alpha == pytest.approx(1e-4)
    assert (found.layer[1].lrn_param.beta, found.layer[1].lrn_param.k) == (0.5, 1)
    assert list(found.input_dim) == [16, 2**31 - 1, -1, 1, 2]
    assert list(found.layer[2].loss_weight[:2]) == [math.inf, -math.inf] and math.isnan(found.layer[2].loss_weight[2])
    assert found.layer[2].phase == caffe_pb2.TEST


def test_comments_in_any_encoding_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "net.prototxt"
    file.write_bytes(b'\xef\xbb\xbfname: "n"\r\n# \xc4\xe3\xba\xc3\r\n')
    assert prototxt.read_net(file).name == "n"


# -- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "place", "words"), [
    ('name: "n"\nlayer { name: "x"\n  botom: "y" }', "3:3", "unknown field 'botom' in LayerParameter; did you mean 'bottom'?"),
    ("layer {\n convolution_param { kernel: 3 } }", "2:22", "in ConvolutionParameter; did you mean 'kernel_size'?"),
    ("Layer { }", "1:1", "did you mean 'layer'?"),
    ("base_lr: 1", "1:1", "'base_lr' belongs in a SolverParameter, but this file is read as a NetParameter"),
    ("layer { clip_param { zzz: 1 } }", "1:22", "unknown field 'zzz' in ClipParameter; it has min and max"),
    ("layer { pooling_param { pool: MAXX } }", "1:31", "MAXX is not a value of PoolMethod, which are MAX, AVE, STOCHASTIC"),
    ('state { phase: "TEST" }', "1:16", '"TEST" is not a value of Phase, which are TRAIN, TEST, without quotes'),
    ("layer { pooling_param { pool: 7 } }", "1:31", "7 is not a value of PoolMethod"),
    ('name: "a"\nname: "b"', "2:7", "'name' is given twice in one NetParameter"),
    ("input_dim: 3.5", "1:12", "3.5 is not a whole number"),
    ("layer { convolution_param { num_output: -3 } }", "1:41", "-3 is out of range"),
    ("layer { loss_weight: big }", "1:22", "big is not a number"),
    ("force_backward: maybe", "1:17", "true or false is expected"),
    ("name: n", "1:7", "a string in quotes is expected here, not n"),
    ('name "n"', "1:6", "':' is expected here"),
    ('name: "a\n"', "1:7", "not closed before the end of its line"),
    ('name: "\\377"', "1:13", "bad escape or is not UTF-8"),
    ('layer {\n  name: "x"\n  param {\n    lr_mult: 1\n', "4:14", "inside the block that begins on line 3; a '}' is missing"),
    ('layer { name: "x" }\n}', "2:1", "a '}' without its '{'"),
    ("layer { relu_param: 3 }", "1:21", "'{' is expected here"),
    ('layer { name: "x" >', "1:19", "a field name is expected here, not '>'"),
])
def test_errors_name_place_and_remedy(text, place, words):
    assert complaint(text).startswith(f"net.prototxt:{place}: ")
    assert words in complaint(text)
    assert "\n" not in complaint(text)


def test_required_fields():
    assert complaint("layer { clip_param { min: 1 } }") == "net.prototxt: layer[0].clip_param.max is missing and has no default"


def test_files_that_are_no_prototxt(tmp_path):
    binary = tmp_path / "net.caffemodel"
    binary.write_bytes(b"\x0a\x01a\x00")
    for path, words in ((tmp_path / "none.prototxt", "No such file"), (tmp_path, "directory"), (binary, "binary file")):
        with pytest.raises(CaffeError, match=words) as caught:
            prototxt.read_net(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_read_net_upgrades_and_names_the_file(tmp_path):
    file = tmp_path / "net.prototxt"
    file.write_text('input: "x" input_shape { dim: 2 }')
    assert prototxt.read_net(file).layer[0].type == "Input"
    file.write_text('layer { name: "a" } layers { name: "b" }')
    with pytest.raises(CaffeError, match="both 'layer' and 'layers'") as caught:
        prototxt.read_net(file)
    assert str(caught.value).startswith(f"{file}: ")


# -- solvers -------------------------------------------------------------------------------------------------------
def test_solver_type_becomes_type(tmp_path):
    file = tmp_path / "solver.prototxt"
    file.write_text('solver_type: NESTEROV snapshot_prefix: "p"')
    solver = prototxt.read_solver(file)
    assert (solver.type, solver.HasField("solver_type"), solver.snapshot_prefix) == ("Nesterov", False, "p")
    file.write_text('solver_type: NESTEROV type: "SGD"')
    with pytest.raises(CaffeError, match="both 'solver_type' and 'type'"):
        prototxt.read_solver(file)


def test_snapshot_prefix_without_a_name(tmp_path):
    file = tmp_path / "my.solver.prototxt"
    file.write_text("max_iter: 1")
    assert prototxt.read_solver(file).snapshot_prefix == str(tmp_path / "my.solver")
    file.write_text(f'snapshot_prefix: "{tmp_path}"')
    assert prototxt.read_solver(file).snapshot_prefix == str(tmp_path / "my.solver")


# -- layer_line ----------------------------------------------------------------------------------------------------
def test_layer_line(tmp_path):
    file = tmp_path / "net.prototxt"
    file.write_text('''name: "conv"
# layer { name: "conv" }
layer {
  name: "data" top: "layer { name: 'conv' }"
  param { name: "conv" }
}
layer: < top: "x"
  name: 'conv' >
layers { layer { name: "old" } }
''')
    assert [prototxt.layer_line(file, name) for name in ("data", "conv", "old", "none")] == [3, 7, 9, None]
    assert prototxt.layer_line(tmp_path / "none.prototxt", "conv") is None


# -- properties ----------------------------------------------------------------------------------------------------
SCALARS = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-2**31, 2**31 - 1), FieldDescriptor.CPPTYPE_INT64: st.integers(-2**63, 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1), FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32, allow_nan=False), FieldDescriptor.CPPTYPE_DOUBLE: st.floats(allow_nan=False),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}


@st.composite
def messages(draw, descriptor: Descriptor, depth: int = 3) -> Message:
    """Any message of a type, with a few of its fields set."""
    message = getattr(caffe_pb2, descriptor.name)()
    fields = [field for field in descriptor.fields if depth or field.message_type is None]
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda field: field.name)) if fields else []:
        if field.message_type:
            value = messages(field.message_type, depth - 1)
        elif field.enum_type:
            value = st.sampled_from(sorted(field.enum_type.values_by_number))
        elif field.type == FieldDescriptor.TYPE_BYTES:
            value = st.binary(max_size=8)
        else:
            value = SCALARS.get(field.cpp_type, st.text(max_size=8))
        target = getattr(message, field.name)
        if hasattr(target, "extend"):
            target.extend(draw(st.lists(value, min_size=1, max_size=3)))
        elif field.message_type:
            target.CopyFrom(draw(value))
        else:
            setattr(message, field.name, draw(value))
    return message


TYPES = sorted(caffe_pb2.DESCRIPTOR.message_types_by_name)
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(st.sampled_from(TYPES).flatmap(lambda name: messages(caffe_pb2.DESCRIPTOR.message_types_by_name[name])))
def test_any_message_survives_text_and_binary(message):
    assume(message.IsInitialized())
    text = prototxt.write(message)
    assert prototxt.parse(text, type(message)()) == message
    assert prototxt.write(prototxt.parse(text, type(message)())) == text
    assert type(message).FromString(message.SerializeToString()) == message


@SLOW
@given(messages(caffe_pb2.NetParameter.DESCRIPTOR, depth=2), messages(caffe_pb2.V1LayerParameter.DESCRIPTOR, depth=2))
def test_any_net_upgrades_to_one_without_old_layers_or_is_refused(net, old):
    assume(net.IsInitialized())
    net.layers.append(old)
    try:
        upgraded = upgrade.upgrade_net(net)
    except CaffeError:
        return
    assert not upgraded.layers and not upgraded.input
    again = caffe_pb2.NetParameter.FromString(upgraded.SerializeToString())
    assert upgrade.upgrade_net(again) == upgraded


PIECES = ["layer", "name", "param", "convolution_param", "input_dim", "phase", "force_backward", ":", "{", "}", "<", ">", '"a"', "'", '"',
          "\\", "1", "-", "1e9", "3.5", "inf", "TRAIN", "[", "]", ",", ";", "#", "\n", " ", "\0", "\udcff", "Ä", "[x.y]", "0x", "9" * 5000]


@SLOW
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map(" ".join), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_junk_raises_nothing_but_caffe_error(text):
    for message in (caffe_pb2.NetParameter(), caffe_pb2.SolverParameter()):
        try:
            prototxt.parse(text, message)
        except CaffeError as error:
            assert "\n" not in str(error)


@SLOW
@given(st.binary())
def test_junk_files_raise_nothing_but_caffe_error(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "junk.prototxt"
    file.write_bytes(data)
    for read in (prototxt.read_net, prototxt.read_solver, lambda path: prototxt.layer_line(path, "a")):
        try:
            read(file)
        except CaffeError as error:
            assert "\n" not in str(error)
