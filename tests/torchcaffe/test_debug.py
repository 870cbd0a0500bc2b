"""debug_info: Caffe's lines, with values worked out by hand, and when they are printed."""
from __future__ import annotations

import re

import pytest

import torchcaffe as caffe
from torchcaffe.cli import main

# ip = 3 * 0.5, twice 2 of them; d loss / d ip = 1.5 / 2; a weight's gradient is the sum of that over two rows; the update 0.1 of it
NET = """
layer { name: "data" type: "DummyData" top: "data" top: "zero" dummy_data_param { shape { dim: 2 dim: 3 } shape { dim: 2 dim: 2 }
  data_filler { value: 1 } data_filler { value: 0 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" param { name: "w" }
  inner_product_param { num_output: 2 bias_term: false weight_filler { value: -0.5 } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "zero" top: "loss" }
"""
SOLVER = 'net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" snapshot_after_train: false debug_info: true '
FORWARD = ["    [Forward] Layer data, top blob data data: 1", "    [Forward] Layer data, top blob zero data: 0",
           "    [Forward] Layer ip, top blob ip data: 1.5", "    [Forward] Layer ip, param blob w data: 0.5",
           "    [Forward] Layer loss, top blob loss data: 2.25"]
BACKWARD = ["    [Backward] Layer loss, bottom blob ip diff: 0.75", "    [Backward] Layer ip, param blob 0 diff: 1.5",
            "    [Backward] All net params (data, diff): L1 norm = (3, 9); L2 norm = (1.22474, 3.67423)"]
UPDATE = ["    [Update] Layer ip, param w data: 0.5; diff: 0.15"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text(NET)
    return tmp_path


def said(capfd) -> list[str]:
    return [line.split("] ", 1)[1] for line in capfd.readouterr().err.splitlines() if re.search(r"    \[\w+\] ", line)]


@pytest.mark.parametrize("fast", [False, True])
def test_displayed_iterations_print_every_blob_gradient_and_update(folder, capfd, fast):
    (folder / "solver.prototxt").write_text(SOLVER + "display: 2 max_iter: 3")
    solver = caffe.get_solver("solver.prototxt")
    solver.fast = fast
    solver.step(1)
    assert said(capfd) == FORWARD + BACKWARD + UPDATE
    solver.step(1)
    assert said(capfd) == []
    solver.step(1)
    assert len(said(capfd)) == len(FORWARD + BACKWARD + UPDATE)


def test_train_prints_them_and_test_nets_their_forward_pass(folder, capfd):
    (folder / "solver.prototxt").write_text(SOLVER + 'display: 5 max_iter: 1 test_iter: 2 test_interval: 10 snapshot_prefix: "x"')
    assert main(["train", "--solver", "solver.prototxt"]) == 0
    assert said(capfd) == FORWARD * 2 + FORWARD + BACKWARD + UPDATE


def test_a_net_may_ask_for_them_itself(folder, capfd):
    (folder / "net.prototxt").write_text("debug_info: true" + NET)
    net = caffe.Net("net.prototxt", caffe.TRAIN)
    net.forward()
    net.backward()
    assert said(capfd) == FORWARD + BACKWARD


def test_shared_parameters_name_their_owner(folder, capfd):
    twin = NET + """layer { name: "ip2" type: "InnerProduct" bottom: "data" top: "ip2" param { name: "w" }
      inner_product_param { num_output: 2 bias_term: false } }
      layer { name: "loss2" type: "EuclideanLoss" bottom: "ip2" bottom: "zero" top: "loss2" }"""
    (folder / "net.prototxt").write_text(twin)
    (folder / "solver.prototxt").write_text(SOLVER + "display: 1")
    caffe.get_solver("solver.prototxt").step(1)
    assert said(capfd)[-2:] == ["    [Update] Layer ip, param w data: 0.5; diff: 0.3",
                                "    [Update] Layer ip2, param blob w (owned by layer ip, param w) diff: 0.3"]
