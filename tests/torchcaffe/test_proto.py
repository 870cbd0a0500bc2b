"""caffe.proto and the module made of it, against the table of fields in caffe_schema.json."""
import copy
import importlib.util
import json
import math
import pickle
import struct
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from torchcaffe.proto import caffe_pb2

SCHEMA = json.loads(Path(__file__).with_name("caffe_schema.json").read_text())
FILE = descriptor_pb2.FileDescriptorProto.FromString(caffe_pb2.DESCRIPTOR.serialized_pb)
Field = descriptor_pb2.FieldDescriptorProto


def single(value: float) -> float:
    """Rounded to a C float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def described(field: Field) -> dict:
    """A compiled field in the schema's terms."""
    kind = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    found = {"number": field.number, "label": Field.Label.Name(field.label).removeprefix("LABEL_").lower(), "type": kind}
    if kind in ("message", "enum"):
        found[kind] = field.type_name.lstrip(".")
    if field.options.packed:
        found["packed"] = True
    if field.HasField("default_value"):
        text = field.default_value
        found["default"] = (text == "true" if kind == "bool" else text if kind in ("string", "enum")
                            else single(float(text)) if kind == "float" else int(text))
    return found


def test_every_message_and_field_is_caffes():
    compiled = {f"caffe.{m.name}": {f.name: described(f) for f in m.field} for m in FILE.message_type}
    wanted = copy.deepcopy(SCHEMA["messages"])
    for spec in (spec for fields in wanted.values() for spec in fields.values()):
        if spec["type"] == "float" and "default" in spec:
            spec["default"] = single(spec["default"])
    assert compiled == wanted


def test_every_enum_is_caffes():
    enums = {f"caffe.{e.name}": e for e in FILE.enum_type}
    enums |= {f"caffe.{m.name}.{e.name}": e for m in FILE.message_type for e in m.enum_type}
    assert {name: {v.name: v.number for v in e.value} for name, e in enums.items()} == SCHEMA["enums"]


def test_package_and_syntax():
    assert (FILE.package, FILE.syntax or "proto2") == (SCHEMA["package"], SCHEMA["syntax"])


@pytest.mark.parametrize("name", SCHEMA["messages"])
def test_defaults_of_the_generated_classes(name):
    message = getattr(caffe_pb2, name.removeprefix("caffe."))()
    for field, spec in SCHEMA["messages"][name].items():
        if "default" not in spec:
            continue
        found, wanted = getattr(message, field), spec["default"]
        if spec["type"] == "enum":
            wanted = SCHEMA["enums"][spec["enum"]][wanted]
        if spec["type"] == "float":
            assert math.isclose(found, single(wanted), rel_tol=1e-6)
        else:
            assert found == wanted


def test_messages_pickle():
    net = caffe_pb2.NetParameter(name="n", layer=[caffe_pb2.LayerParameter(name="a", top=["a"])])
    assert pickle.loads(pickle.dumps(net)) == net


def test_messages_stay_out_of_the_default_pool():
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("caffe.NetParameter")


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="needs grpcio-tools")
def test_the_module_is_what_caffe_proto_compiles_to(tmp_path):
    from grpc_tools import protoc
    folder = Path(caffe_pb2.__file__).parent
    compiled = tmp_path / "caffe.bin"
    assert protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={compiled}", str(folder / "caffe.proto")]) == 0
    file = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file[0]
    pool = descriptor_pool.DescriptorPool()
    assert pool.AddSerializedFile(file.SerializeToString()).serialized_pb == caffe_pb2.DESCRIPTOR.serialized_pb
