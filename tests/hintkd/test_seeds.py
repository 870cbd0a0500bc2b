"""Seeds of roles: none has another's, and no net begins with another role's weights."""
from __future__ import annotations

import hashlib
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchcaffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.methods.method import stages_of
from hintkd.methods.stage import Stage
from hintkd.seeds import NETS, REPEATS, ROLES, SEEDS, TABLE_SEEDS, role_seed
from hintkd.study.table import find_table, table_names

numbers = st.tuples(st.sampled_from(ROLES), st.integers(0, SEEDS - 1), st.integers(0, TABLE_SEEDS - 1), st.integers(1, REPEATS),
                    st.integers(0, NETS - 1))


@given(numbers, numbers)
def test_two_roles_have_two_seeds(one, other):
    first_teachers = all(role == "teacher" and repeat == 1 and net == 0 for role, _, _, repeat, net in (one, other))
    same = one[1] == other[1] if first_teachers else one == other      # tables share the first replication's teacher
    assert (role_seed(*one) == role_seed(*other)) == same
    assert 0 <= role_seed(*one) < 2**31


def test_the_first_teachers_seed_is_100_times_the_runs():
    assert [role_seed("teacher", seed, table_seed=4) for seed in (1, 2)] == [100, 200]


@pytest.mark.parametrize(("wrong", "complaint"), [
    ({"seed": -1}, "seed is -1; it must be from 0 to 2047"), ({"seed": 2048}, "seed is 2048"), ({"net": 128}, "net is 128"),
    ({"repeat": 65}, "repeat is 65; it must be from 1 to 64"), ({"table_seed": 16}, "the table's seed is 16")])
def test_numbers_without_room_are_refused(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        role_seed("net", **{"seed": 1, **wrong})


def fed(stage: Stage) -> caffe_pb2.NetParameter:
    """The stage's net in TRAIN, with inputs in the place of records, cut above the last layer with weights of its own."""
    net = caffe_pb2.NetParameter()
    for layer in stage.net.layer:
        if layer.type == "Data" and layer.include[0].phase == caffe_pb2.TRAIN:
            channels, size = (1, 28) if "mnist" in layer.data_param.source else (3, 32)
            net.layer.add(name="data", type="Input", top=["data"], input_param={"shape": [{"dim": [1, channels, size, size]}]})
        elif layer.type not in ("Data", "Python", "SoftmaxWithLoss", "Accuracy", "Silence"):
            net.layer.add().CopyFrom(layer)
    return net


def drawn(stage: Stage, folder: Path) -> dict[str, str]:
    """Layer -> digest of the random weights that it learns from, of the layers that the stage does not take over from another."""
    path = folder / "net.prototxt"
    path.write_text(write_text(fed(stage)))
    torchcaffe.set_random_seed(stage.solver.random_seed)
    net = torchcaffe.Net(str(path), torchcaffe.TRAIN)
    return {name: hashlib.sha256(blobs[0].data.tobytes()).hexdigest() for name, blobs in net.params.items()
            if not name.startswith("teacher/") and blobs[0].data.std() > 0}


@pytest.mark.slow
def test_no_net_of_any_table_begins_with_the_weights_of_another_role(tmp_path):
    tables = [table for table in map(find_table, table_names()) if len(table.rows) < 20]             # the zoo's are one table many times
    stages = {stage for table in tables for x in table.experiments(scale=1) for stage in stages_of(x)}
    seen: dict[str, set[int]] = defaultdict(set)
    built: set[tuple[int, str]] = set()
    for stage in stages:
        weights = (stage.solver.random_seed, hashlib.sha256(write_text(fed(stage)).encode()).hexdigest())
        if weights not in built:
            built.add(weights)
            for digest in drawn(stage, tmp_path).values():
                seen[digest].add(stage.solver.random_seed)
    assert len(built) > 50
    assert [seeds for seeds in seen.values() if len(seeds) > 1] == []


def test_a_student_of_stage_1_does_not_begin_as_its_teacher(tmp_path):
    for name, method in product(("table1", "table3"), ("hint-kd", "layerwise-hint")):
        table = find_table(name)
        teacher, student = (stages_of(table.experiments(rows=[method], nets=[1])[i])[0] for i in (0, 1))
        assert not set(drawn(teacher, tmp_path).values()) & set(drawn(student, tmp_path).values())
