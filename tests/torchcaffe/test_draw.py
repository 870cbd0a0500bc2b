"""Pictures of nets: the graph's nodes and edges as pydot reads them, and what is said without graphviz."""
import shutil
import sys
from xml.etree import ElementTree

import pytest

import torchcaffe as caffe
from torchcaffe import draw
from torchcaffe.proto import caffe_pb2, prototxt

NET = """
name: "a \\"net\\""
layer { name: "data" type: "Data" top: "data" top: "label" data_param { batch_size: 32 } include { phase: TRAIN } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { lr_mult: 2 }
  convolution_param { num_output: 20 kernel_size: 5 stride: 2 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 3 stride: 2 pad: 1 pool: AVE } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 10 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" exclude { phase: TEST } }
"""


pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")          # pydot's use of pyparsing


@pytest.fixture
def net():
    return prototxt.parse(NET, caffe_pb2.NetParameter())


@pytest.fixture
def graph(net):
    pytest.importorskip("pydot")

    def get(**options):
        found = draw.get_pydot_graph(net, options.pop("rankdir", "LR"), **options)
        nodes = {node.get_name().strip('"'): node.get_label().strip('"') for node in found.get_nodes()}
        edges = {(edge.get_source().strip('"'), edge.get_destination().strip('"')): edge.get("label") for edge in found.get_edges()}
        return found, nodes, edges
    return get


def test_every_layer_and_every_blob_is_a_node_with_what_it_is(graph):
    found, nodes, edges = graph()
    assert found.get_rankdir() == "LR" and found.get_name() == r'"a \"net\""'
    blobs = ("data", "label", "conv", "pool", "ip", "loss")
    assert {name for name in nodes if name.endswith("_blob")} == {f"{blob}_blob" for blob in blobs}
    assert nodes["conv_Convolution"] == r"conv\n(Convolution)\nkernel size: 5\nstride: 2\npad: 0"
    assert nodes["pool_Pooling"] == r"pool\n(Pooling AVE)\nkernel size: 3\nstride: 2\npad: 1"
    assert edges["data_Data", "data_blob"] == '"Batch 32"' and edges["conv_Convolution", "conv_blob"] == '"20"'
    assert edges["ip_InnerProduct", "ip_blob"] == '"10"' and edges["label_blob", "loss_SoftmaxWithLoss"] is None
    assert ("conv_blob", "relu_ReLU") in edges and ("relu_ReLU", "conv_blob") in edges


def test_options_choose_phase_direction_rates_and_labels(graph):
    _, nodes, edges = graph(phase=caffe.TEST, rankdir="TB", display_lrm=True, label_edges=False)
    assert "data_Data" not in nodes and "loss_SoftmaxWithLoss" not in nodes
    assert nodes["conv_Convolution"].endswith("pad: 0 lr mult: 2.0, 1.0")
    assert set(edges.values()) == {None}


@pytest.mark.skipif(not shutil.which("dot"), reason="needs graphviz")
def test_graphviz_draws_it(net, tmp_path):
    for name in ("net.svg", "net.png"):
        draw.draw_net_to_file(net, tmp_path / name)
    picture = ElementTree.parse(tmp_path / "net.svg").getroot()
    titles = [group.findtext("{*}title") for group in picture.iterfind(".//{*}g[@class='node']")]
    assert set(titles) >= {"conv_Convolution", "conv_blob"} and len(titles) == 6 + 6
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")


def test_old_nets_are_drawn_upgraded():
    text = 'input: "x" input_dim: [1, 2, 3, 4] layers { name: "r" type: RELU bottom: "x" top: "r" }'
    old = prototxt.parse(text, caffe_pb2.NetParameter())
    assert '"x_blob" -> "r_ReLU";' in draw.dot_source(old)


def test_the_graph_itself_takes_no_graphviz(net, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    draw.draw_net_to_file(net, tmp_path / "net.dot", rankdir="BT")
    assert (tmp_path / "net.dot").read_text() == draw.dot_source(net, "BT")
    assert draw.draw_net(net, "LR", "raw") == draw.dot_source(net).encode()
    with pytest.raises(caffe.CaffeError, match="svg takes graphviz, whose program `dot` is not on PATH"):
        draw.draw_net_to_file(net, str(tmp_path / "net.svg"))
    assert not (tmp_path / "net.svg").exists()


def test_graphviz_gets_the_graph_and_the_type_of_picture(net, tmp_path, monkeypatch):
    program = tmp_path / "dot"
    program.write_text(f"""#!{sys.executable}
import sys
if sys.argv[1] == "-Tbmp9":
    sys.exit('Format: "bmp9" not recognized.')
print(sys.argv[1:], sys.stdin.read(), end="")
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    draw.draw_net_to_file(net, str(tmp_path / "net.svg"))
    assert (tmp_path / "net.svg").read_text() == "['-Tsvg'] " + draw.dot_source(net)
    with pytest.raises(caffe.CaffeError, match='type bmp9: Format: "bmp9" not recognized'):
        draw.draw_net(net, "LR", "bmp9")


def test_arguments_that_are_none_are_refused(net, tmp_path, monkeypatch):
    with pytest.raises(caffe.CaffeError, match="rankdir 'up'"):
        draw.dot_source(net, "up")
    with pytest.raises(caffe.CaffeError, match="the ending names the type"):
        draw.draw_net_to_file(net, str(tmp_path / "picture"))
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(caffe.CaffeError, match=r"-m pip install \S*(pydot|hintkd\[draw\])"):
        draw.get_pydot_graph(net, "LR")
