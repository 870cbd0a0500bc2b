"""Errors are of the type that pycaffe raises, so that scripts written for it catch them, and are CaffeErrors all the same."""
from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

import torchcaffe as caffe
from torchcaffe import coord_map, draw, io
from torchcaffe import layers as L
from torchcaffe.net_spec import assign_proto
from torchcaffe.proto import caffe_pb2

NET = """
layer { name: "data" type: "MemoryData" top: "x" top: "label" memory_data_param { batch_size: 2 channels: 3 height: 4 width: 4 } }
layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip" inner_product_param { num_output: 2 } }
"""
SPEC = caffe.NetSpec()
SPEC.data = L.Input(shape={"dim": [2, 1, 100, 100]})
SPEC.deconv = L.Deconvolution(SPEC.data, convolution_param={"kernel_size": 10, "stride": 1, "num_output": 10})
SPEC.pool = L.Pooling(SPEC.data, kernel_size=2, stride=2)
SPEC.ip = L.InnerProduct(SPEC.data, num_output=10)
ARRAY = np.zeros((4, 4))


@pytest.fixture(autouse=True)
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> caffe.Net:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    Path("noise.png").write_bytes(b"no picture")
    return caffe.Net("net.prototxt", caffe.TEST)


@pytest.mark.parametrize(("kind", "call"), [
    (AssertionError, lambda: coord_map.crop(SPEC.deconv, SPEC.data)),                   # to more than there is
    (AssertionError, lambda: coord_map.crop(SPEC.pool, SPEC.data)),                     # from another scale
    (AssertionError, lambda: coord_map.coord_map(L.Convolution(SPEC.data, kernel_size=3, pad_h=1).fn)),
    (KeyError, lambda: coord_map.coord_map(L.Convolution(SPEC.data, kernel_h=3, kernel_w=3).fn)),
    (RuntimeError, lambda: coord_map.coord_map_from_to(SPEC.ip, SPEC.data)),
])
def test_of_coord_map(kind, call):
    is_both(kind, call)


@pytest.mark.parametrize(("kind", "call"), [
    (TypeError, lambda: L.Silence((1, 2))), (TypeError, lambda: L.Silence(L.Silence(SPEC.data, ntop=0))),
    (KeyError, lambda: SPEC.nothing), (AttributeError, lambda: SPEC.nothing),
    (AttributeError, lambda: L.ReLU(SPEC.data, kernel_size=3).to_proto()),
    (TypeError, lambda: L.Pooling(SPEC.data, kernel_size="three").to_proto()),
    (TypeError, lambda: L.Convolution(SPEC.data, weight_filler={"std": "wide"}).to_proto()),
    (AttributeError, lambda: assign_proto(caffe_pb2.LayerParameter(), "nothing", 1)),
    (ValueError, lambda: assign_proto(caffe_pb2.PoolingParameter(), "kernel_size", -1)),
    (AttributeError, lambda: tuple_spec().to_proto()),
])
def test_of_net_spec(kind, call):
    is_both(kind, call)


def tuple_spec() -> caffe.NetSpec:
    spec = caffe.NetSpec()
    spec.both = L.DummyData(ntop=2)
    return spec


@pytest.mark.parametrize(("kind", "call"), [
    (ValueError, lambda: io.blobproto_to_array(caffe_pb2.BlobProto(data=[1.0] * 100))),
    (ValueError, lambda: io.datum_to_array(caffe_pb2.Datum(channels=1, height=2, width=2, data=b"abc"))),
    (ValueError, lambda: io.array_to_datum(ARRAY)), (ValueError, lambda: io.oversample([np.zeros((4, 4, 3))], (5, 5))),
    (ValueError, lambda: transformer(3).set_mean("data", ARRAY)), (ValueError, lambda: transformer(3).set_mean("data", np.zeros(7))),
    (ValueError, lambda: transformer(1).set_mean("data", np.zeros((5, 5)))),
    (ValueError, lambda: transformer(3).set_mean("data", np.zeros((1, 3, 4, 4)))),
    (Exception, lambda: transformer(3).preprocess("other", ARRAY)), (OSError, lambda: io.load_image("none.png")),
    (OSError, lambda: io.load_image("noise.png")),
])
def test_of_io(kind, call):
    is_both(kind, call)


def transformer(channels: int) -> io.Transformer:
    return io.Transformer({"data": (1, channels, 4, 4)})


def test_a_mean_of_two_axes_has_the_size_of_an_input_of_one_channel():
    gray = transformer(1)
    gray.set_transpose("data", (2, 0, 1))
    gray.set_mean("data", np.arange(16.0).reshape(4, 4))
    np.testing.assert_array_equal(gray.preprocess("data", np.zeros((4, 4, 1)))[0], -np.arange(16.0).reshape(4, 4))


@pytest.mark.parametrize(("kind", "call"), [
    (RuntimeError, lambda net: caffe.Net("none.prototxt", caffe.TEST)),
    (RuntimeError, lambda net: caffe.Net("net.prototxt", caffe.TEST, weights="none.caffemodel")),
    (TypeError, lambda net: caffe.Net("net.prototxt")), (TypeError, lambda net: caffe.Net("net.prototxt", "w", caffe.TEST, 0)),
    (Exception, lambda net: net.forward(data=np.zeros(2))), (KeyError, lambda net: net.forward(blobs=["none"])),
    (ValueError, lambda net: net.forward(start="none")), (ValueError, lambda net: net.forward(end="none")),
    (ValueError, lambda net: net.backward(start="none")), (KeyError, lambda net: net.backward(diffs=["none"])),
    (Exception, lambda net: net.backward(nothing=np.zeros(2))),
    (RuntimeError, lambda net: net.set_input_arrays(np.zeros((2, 3, 4, 4)), np.zeros(2, np.float32))),
    (RuntimeError, lambda net: net.set_input_arrays(np.zeros((3, 3, 4, 4), np.float32), np.zeros(3, np.float32))),
])
def test_of_nets(kind, call, net):
    net.set_input_arrays(np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, np.float32))
    is_both(kind, lambda: call(net))


def test_of_nets_without_records(tmp_path):
    (tmp_path / "net.prototxt").write_text('layer { name: "x" type: "DummyData" top: "x" dummy_data_param { shape { dim: 1 } } }')
    is_both(RuntimeError, lambda: caffe.Net("net.prototxt", caffe.TEST).set_input_arrays(ARRAY, ARRAY))


def test_of_packages_that_are_not_installed(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "pydot":
            raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    is_both(ImportError, lambda: draw.get_pydot_graph(SPEC.to_proto(), "LR"))


def is_both(kind: type[Exception], call) -> None:
    """The call raises an error of this type that is a CaffeError, whose words are a sentence, not a name in quotes."""
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, caffe.CaffeError) and str(caught.value) == caught.value.args[0]
