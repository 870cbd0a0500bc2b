"""The smallest tops that say all that a net's frozen part has to say."""
from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmdbs
import torchcaffe as caffe
from nets import write_solver
from torchcaffe.step import frontier
from torchcaffe.step.frontier import Value, smallest_cut

FROZEN = "param { lr_mult: 0 decay_mult: 0 } "


def layer(name, kind, *bottoms, top=None, text=""):
    reads = " ".join(f'bottom: "{bottom}"' for bottom in bottoms)
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{top or name}" {text} }}\n'


def conv(name, bottom, outputs=4, text=FROZEN * 2):
    return layer(name, "Convolution", bottom, text=f"{text} convolution_param {{ num_output: {outputs} kernel_size: 3 }}")


def scores(name, bottom, outputs=4, text=FROZEN * 2):
    return layer(name, "InnerProduct", bottom, text=f"{text} inner_product_param {{ num_output: {outputs} }}")


def against(one, other):
    """A loss that pulls the first towards the second."""
    return layer(f"{one} {other}", "EuclideanLoss", one, other, text="propagate_down: true propagate_down: false")


TEACHER = conv("t1", "data") + layer("t1_relu", "ReLU", "t1", top="t1") + conv("t2", "t1") + scores("t3", "t2")
STUDENT = conv("s1", "data", text="") + conv("s2", "s1", text="") + scores("s3", "s2", text="")


@pytest.fixture
def found(tmp_path):
    """found(net) is the frontier of a net that reads 5 images of 8x8 in batches of 2."""
    lmdbs.write_images(tmp_path / "lmdb", np.zeros((5, 1, 8, 8), np.uint8))

    def find(net, source=None):
        solver = caffe.get_solver(write_solver(tmp_path, (source or lmdbs.data_layer(tmp_path / "lmdb", 2)) + net))
        solver.fast = True
        program = solver._program(solver.net)
        return frontier.find(program.graph, program.operations, program.at_rest)
    return find


def done(found):
    return {name for op in found.done for name in op.tops}


def test_of_a_teacher_whose_scores_are_read_it_is_the_scores(found):
    result = found(TEACHER + STUDENT + against("s3", "t3"))
    assert (result.tops, result.bytes, done(result)) == (["t3"], 16, {"t1", "t2", "t3"})
    assert result.data.name == "data"


def test_of_a_teacher_with_hints_it_is_hints_and_scores(found):
    result = found(TEACHER + STUDENT + against("s1", "t1") + against("s3", "t3"))
    assert [name.split("_t1_relu")[0] for name in result.tops] == ["t1", "t3"]
    assert result.bytes == 4 * 36 * 4 + 16
    assert {"t1", "t2", "t3"} <= done(result)


def test_what_follows_without_parameters_is_computed_again_where_that_is_smaller(found):
    wide = layer("wide", "Concat", *["t3"] * 3) + scores("s4", "s2", 12, text="") + against("s4", "wide")
    assert found(TEACHER + STUDENT + wide).tops == ["t3"]
    narrow = layer("pooled", "Pooling", "t2", text="pooling_param { pool: AVE global_pooling: true }") + scores("s4", "s2", text="")
    result = found(conv("t1", "data") + conv("t2", "t1") + STUDENT + narrow + layer("s5", "Reshape", "s4", text="""
        reshape_param { shape { dim: 0 dim: 4 dim: 1 dim: 1 } }""") + against("s5", "pooled"))
    assert result.tops == ["pooled"] and done(result) == {"t1", "t2", "pooled"}


@pytest.mark.parametrize("middle", [
    layer("t2", "Dropout", "t1"), layer("t2", "BatchNorm", "t1", text=FROZEN * 3), conv("t2", "t1", text=""),
    layer("t2", "Softmax", "t1", text="softmax_param { axis: 0 }")])
def test_it_ends_where_something_is_drawn_learned_or_seen_of_the_other_items(found, middle):
    result = found(conv("t1", "data") + middle + scores("t3", "t2") + STUDENT + against("s3", "t3"))
    assert result.tops == ["t1"] and done(result) == {"t1"}


def test_there_is_none_without_frozen_work_on_a_data_layer(found):
    assert found(STUDENT + layer("loss", "SoftmaxWithLoss", "s3", "data_label")) is None
    assert found(layer("scaled", "Power", "data", text="power_param { scale: 2 }") + STUDENT.replace('"data"', '"scaled"')) is None
    inputs = layer("data", "Input", text="input_param { shape { dim: 2 dim: 1 dim: 8 dim: 8 } }")
    assert found(TEACHER + STUDENT + against("s3", "t3"), inputs) is None
    assert found(conv("t1", "data", text=FROZEN + "param { lr_mult: 1 }") + layer("loss", "EuclideanLoss", "t1", "t1")) is None


def test_what_it_computes_has_the_same_digest_under_other_names(found):
    net = TEACHER + STUDENT + against("s3", "t3")
    caffe.set_random_seed(1)
    identities = {found(net).identity(), found(net.replace('"t', '"teacher/t').replace("s3 t3", "other")).identity()}
    assert len(identities) == 1
    for change in (("num_output: 4 k", "num_output: 5 k"), ("kernel_size: 3", "kernel_size: 3 pad: 1")):
        assert found(net.replace(*change)).identity() not in identities


@settings(max_examples=200)
@given(st.data())
def test_no_other_cut_has_fewer_bytes(data):
    def maker(fixed):
        return SimpleNamespace(nodes=[SimpleNamespace(layer=SimpleNamespace(blobs=[0] if fixed else []))])
    values = [Value("0", maker(True), [], 3)]
    for i in range(1, data.draw(st.integers(1, 7))):
        bottoms = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True))
        values.append(Value(str(i), maker(data.draw(st.booleans())), bottoms, data.draw(st.integers(1, 9))))
    wanted = data.draw(st.lists(st.sampled_from(values), min_size=1, unique=True))

    def follow(cut):
        known = set()
        for value in values:
            if value in cut or (not value.is_fixed and known.issuperset(value.bottoms)):
                known.add(value)
        return known.issuperset(wanted)
    cut = smallest_cut(values, wanted)
    assert follow(cut)
    assert sum(value.bytes for value in cut) == min(sum(value.bytes for value in other) for n in range(len(values) + 1)
                                                    for other in combinations(values, n) if follow(other))
