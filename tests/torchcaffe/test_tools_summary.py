"""summary: numbers counted by hand and by torch, for nets whose data are there, are not, or would not fit into memory."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import torchcaffe as caffe
from lmdbs import data_layer, numbered, write_images
from torchcaffe.cli import main
from torchcaffe.graph import filter as graph
from torchcaffe.proto import prototxt
from torchcaffe.tools import summary
from torchcaffe.tools.outline import outline

NET = """name: "small"
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 6 kernel_size: 3 group: 2 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" param { name: "w" }
  inner_product_param { num_output: 5 bias_term: false } }
layer { name: "more" type: "InnerProduct" bottom: "conv" top: "more" param { name: "w" } include { stage: "two" }
  inner_product_param { num_output: 5 bias_term: false } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "data_label" top: "loss" include { phase: TRAIN } }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, list[str]], str]:
    """The cells of the table's lines, by their first, and what stands under the table."""
    assert main(["summary", *arguments]) == 0
    out = capfd.readouterr().out
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines() if line[:1] in "│┃" and line]
    return {cells[0]: cells[1:] for cells in lines}, out[out.index("└"):]


def test_the_table_says_what_every_layer_makes_and_costs(folder, capfd):
    write_images(folder / "lmdb", numbered(4))
    Path("net.prototxt").write_text(data_layer("lmdb", 8, "crop_size: 10") + NET)
    cells, notes = table(capfd, "net.prototxt")
    assert cells == {
        "layer": ["type", "tops", "parameters", "multiply-adds", "memory"],
        "data": ["Data", "data 8x2x10x10", "", "", "6.3 KiB"], "": ["", "data_label 8", "", "", ""],
        "conv": ["Convolution", "conv 8x6x8x8", "60", "27,648", "12.0 KiB"],                # 6 * 1 * 3 * 3 + 6; 8 * 6 * 64 * 9
        "relu": ["ReLU", "conv 8x6x8x8", "", "", ""],
        "ip": ["InnerProduct", "ip 8x5", "1,920", "15,360", "160 B"],                       # 5 * 384; 8 of that
        "loss": ["SoftmaxWithLoss", "loss scalar", "", "", "4 B"], "total": ["5 layers", "", "1,980", "43,008", "18.4 KiB"]}
    assert "multiply-adds: 5,376 for each of 8 items" in notes and "assumed" not in notes
    assert "18.4 KiB of blobs and 7.7 KiB of parameters in a forward pass; 60.1 KiB in training" in notes


def test_phase_and_stage_choose_layers_and_shared_parameters_count_once(folder, capfd):
    write_images(folder / "lmdb", numbered(4))
    Path("net.prototxt").write_text(data_layer("lmdb", 8) + NET)
    cells, _ = table(capfd, "net.prototxt", "--phase", "TEST", "--stage", "two,x")
    assert "loss" not in cells and cells["ip"][2] == cells["more"][2] == "3,000" and cells["total"][2] == "3,060"


def test_without_the_data_the_crop_and_the_mean_tell_the_shape(capfd):
    Path("net.prototxt").write_text(data_layer("gone", 8, "crop_size: 10 mean_value: 1 mean_value: 2") + NET)
    cells, notes = table(capfd, "net.prototxt")
    assert cells["data"] == ["Input", "data 8x2x10x10", "", "", "6.3 KiB"] and cells["conv"][2] == "60"
    assert "assumed shapes: net.prototxt:1: layer 'data' (Data): there is no LMDB gone" in notes


def test_without_the_data_another_layer_for_the_same_top_tells_the_size(capfd):
    train, test = (data_layer("gone", batch, crop).replace("top:", f"include {{ phase: {phase} }} top:", 1)
                   for batch, crop, phase in ((8, "crop_size: 10 mean_value: 1 mean_value: 2", "TRAIN"), (5, "", "TEST")))
    Path("net.prototxt").write_text(train + test + NET)
    cells, notes = table(capfd, "net.prototxt", "--phase", "TEST")
    assert cells["data"][1] == "data 5x2x10x10" and cells[""][1] == "data_label 5" and "assumed shapes" in notes


@pytest.mark.parametrize(("shapes", "tops"), [
    (["data=4,2,9,9"], ["data 4x2x9x9", "data_label 4"]), (["data=8,2,9,9", "data_label=8,1,1,1"], ["data 8x2x9x9", "data_label 8x1x1x1"]),
])
def test_without_the_data_a_shape_can_be_given(capfd, shapes, tops):
    Path("net.prototxt").write_text(data_layer("gone", 8) + NET)
    cells, notes = table(capfd, "net.prototxt", *(word for shape in shapes for word in ("--shape", shape)))
    assert [cells["data"][1], cells[""][1]] == tops
    assert "assumed shapes: net.prototxt:1: layer 'data' (Data): there is no LMDB gone" in notes


def test_hdf5_tops_are_given_each(capfd):
    Path("net.prototxt").write_text('layer { name: "rows" type: "HDF5Data" top: "data" top: "data_label" '
                                    'hdf5_data_param { source: "gone" batch_size: 3 } }' + NET)
    assert main(["summary", "net.prototxt", "--shape", "data=3,2,5,5"]) == 2
    assert "say what shape 'data_label' has, as in --shape data_label=3" in capfd.readouterr().err
    cells, _ = table(capfd, "net.prototxt", "--shape", "data=3,2,5,5", "--shape", "data_label=3")
    assert cells["rows"][1] == "data 3x2x5x5"


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "there is no LMDB gone"), ([], "say what shape 'data' has, as in --shape data=8,3,32,32"),
    (["--shape", "dta=1,2,3,4"], "no data layer of phase TRAIN has a top 'dta' that could be given a shape"),
    (["--shape", "data=1,x"], "'data=1,x' is not a top's name, ="), (["--shape", "1,2"], "'1,2' is not a top's name, ="),
])
def test_shapes_that_are_missing_or_wrong_are_asked_for(capfd, arguments, words):
    Path("net.prototxt").write_text(data_layer("gone", 8) + NET)
    if arguments and "dta" in arguments[1]:
        arguments = [*arguments, "--shape", "data=1,2,3,4"]
    assert main(["summary", "net.prototxt", *arguments]) == 2
    assert words in capfd.readouterr().err


def test_nets_too_large_for_any_machine_are_only_looked_at(capfd):
    Path("net.prototxt").write_text("""
      layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 2 dim: 1000000 } } }
      layer { name: "a" type: "InnerProduct" bottom: "x" top: "a"
        inner_product_param { num_output: 2000 weight_filler { type: "xavier" } } }
      layer { name: "b" type: "InnerProduct" bottom: "a" top: "b" inner_product_param { num_output: 1000000 bias_term: false } }""")
    cells, _ = table(capfd, "net.prototxt")
    assert cells["total"][2:4] == ["4,000,002,000", "8,000,000,000"]


@pytest.mark.parametrize("layers", [
    "convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 }",
    'type: "Deconvolution" convolution_param { num_output: 4 kernel_size: 3 stride: 2 group: 2 }',
    'type: "InnerProduct" inner_product_param { num_output: 7 axis: 2 }',
    'type: "InnerProduct" inner_product_param { num_output: 7 transpose: true }',
])
def test_multiply_adds_are_those_that_torch_counts(layers):
    kind = "" if "type" in layers else 'type: "Convolution"'
    Path("net.prototxt").write_text('layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 3 dim: 2 dim: 6 dim: 5 } } }'
                                    f'layer {{ name: "y" bottom: "x" top: "y" {kind} {layers} }}')
    net = caffe.Net("net.prototxt", caffe.TEST)
    with FlopCounterMode(display=False) as counter:
        net.forward()
    assert sum(row.multiply_adds for row in summary.rows(net)) == counter.get_total_flops() / 2


@pytest.mark.parametrize(("kind", "want"), [("LSTM", 7 * 3 * 4 * 4 * (10 + 4) + 3 * 4 * 4 * 6),
                                            ("RNN", 7 * 3 * 4 * (10 + 4 + 4) + 3 * 4 * 6)])
def test_multiply_adds_of_recurrent_layers(kind, want):
    Path("net.prototxt").write_text(f"""
      layer {{ name: "in" type: "Input" top: "x" top: "cont" top: "static"
        input_param {{ shape {{ dim: 7 dim: 3 dim: 10 }} shape {{ dim: 7 dim: 3 }} shape {{ dim: 3 dim: 6 }} }} }}
      layer {{ name: "y" type: "{kind}" bottom: "x" bottom: "cont" bottom: "static" top: "y" recurrent_param {{ num_output: 4 }} }}""")
    param = graph.set_state(prototxt.read_net("net.prototxt"), caffe.TEST)
    assert sum(row.multiply_adds for row in summary.rows(outline(param, "net.prototxt").net)) == want


@pytest.mark.parametrize(("text", "words"), [
    ("layer {", "net.prototxt:1:7: "), (data_layer("gone", 8) + NET, "net.prototxt:1: layer 'data' (Data): there is no LMDB gone"),
    (NET, "layer 'conv' (Convolution): unknown bottom blob 'data'"),
    ('layer { name: "x" type: "Mine" top: "x" }', "net.prototxt:1: layer 'x': layer type 'Mine' is not registered"),
])
def test_nets_that_cannot_be_built_are_one_sentence(capfd, text, words):
    Path("net.prototxt").write_text(text)
    assert main(["summary", "net.prototxt"]) == 2
    out, err = capfd.readouterr()
    assert words in err and err.count("\n") == 1 and not out
