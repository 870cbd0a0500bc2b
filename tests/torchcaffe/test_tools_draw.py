"""draw, end to end."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from torchcaffe import draw
from torchcaffe.cli import main
from torchcaffe.proto import caffe_pb2, prototxt

NET = """layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 1 dim: 2 } } }
layer { name: "ip" type: "InnerProduct" bottom: "x" top: "y" param { lr_mult: 3 } inner_product_param { num_output: 1 } }
layer { name: "only" type: "Silence" bottom: "y" include { phase: TEST } }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text(NET)
    return tmp_path


@pytest.mark.parametrize(("flags", "options"), [
    ([], {}), (["--rankdir=TB", "--phase", "TRAIN", "--display_lrm"], {"rankdir": "TB", "phase": caffe_pb2.TRAIN, "display_lrm": True}),
])
def test_the_picture_is_that_of_the_module(folder, flags, options):
    assert main(["draw", *flags, "net.prototxt", "net.dot"]) == 0
    want = draw.dot_source(prototxt.read_net("net.prototxt"), **options)
    assert (folder / "net.dot").read_text() == want and ("only" in want) == (not flags)


def test_graphviz_gets_the_source_and_its_picture_is_written(folder, monkeypatch):
    program = folder / "bin" / "dot"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('<svg>', sys.argv[1], sys.stdin.read().count('octagon'))\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert main(["draw", "net.prototxt", "net.svg"]) == 0
    assert (folder / "net.svg").read_text() == "<svg> -Tsvg 2\n"


@pytest.mark.parametrize(("arguments", "words"), [
    (["none", "a.dot"], "none: cannot be read"), (["net.prototxt", "a"], "a: the ending names the type"),
    (["net.prototxt", "a.svg"], "takes graphviz, whose program `dot` is not on PATH"), (["net.prototxt"], "required: PICTURE"),
    (["net.prototxt", "none/a.dot"], "none/a.dot: cannot be written"),
])
def test_mistakes_are_one_sentence(capfd, monkeypatch, arguments, words):
    monkeypatch.setenv("PATH", "")
    before = sorted(os.listdir())
    assert main(["draw", *arguments]) == 2
    out, err = capfd.readouterr()
    assert words in err and err.count("\n") == 1 and not out and sorted(os.listdir()) == before
