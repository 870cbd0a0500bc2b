"""What frozen layers give is computed once for each input, and training ends with the same bytes whoever computed it."""
from __future__ import annotations

import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lmdbs
import torchcaffe as caffe
from nets import block, conv, parameters, write_solver
from torchcaffe.graph import work
from torchcaffe.step import dense, remembered
from torchcaffe.step.remembered import Remembered
from torchcaffe.step.table import Table

FROZEN = "param { lr_mult: 0 decay_mult: 0 } "
RECORDS, BATCH = 20, 6
WHOLE = "scale: 0.01"                                       # without windows and mirrors: as many inputs as records


def teacher(name="t"):
    """A frozen residual net with stored statistics and scores of four classes."""
    text = (conv(f"{name}1", "data", 8) + block(f"{name}2", f"{name}1", 8, 1) + block(f"{name}3", f"{name}2", 16, 2) + f"""
    layer {{ name: "{name}_pool" type: "Pooling" bottom: "{name}3" top: "{name}_pool" pooling_param {{ pool: AVE global_pooling: true }} }}
    layer {{ name: "{name}_fc" type: "InnerProduct" bottom: "{name}_pool" top: "{name}_fc"
      inner_product_param {{ num_output: 4 weight_filler {{ type: "msra" }} }} }}""")
    for kind, count in (("Convolution", 1), ("Scale", 2), ("InnerProduct", 2), ("BatchNorm", 3)):
        text = text.replace(f'type: "{kind}"', f'type: "{kind}" {FROZEN * count}')
    return text.replace('type: "BatchNorm"', 'type: "BatchNorm" batch_norm_param { use_global_stats: true }')


STUDENT = conv("s1", "data", 3) + """
    layer { name: "drop" type: "Dropout" bottom: "s1" top: "s1" }
    layer { name: "fc" type: "InnerProduct" bottom: "s1" top: "fc" inner_product_param { num_output: 4 weight_filler { type: "msra" } } }
    layer { name: "hint" type: "EuclideanLoss" bottom: "fc" bottom: "t_fc" top: "hint" loss_weight: 1
      propagate_down: true propagate_down: false }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "data_label" top: "loss" }"""
NET = teacher() + STUDENT


def make(folder, remember=True, net=NET, transform="crop_size: 8 mirror: true scale: 0.01", batch=BATCH, replay=False, weights=5,
         **settings):
    """A solver of a student and its teacher on 20 images of 9x9, in windows of 8x8 and mirrored unless told otherwise."""
    if not (folder / "lmdb").exists():
        images = np.random.default_rng(0).integers(0, 256, (RECORDS, 3, 9, 9), dtype=np.uint8)
        lmdbs.write_images(folder / "lmdb", images, [i % 4 for i in range(RECORDS)])
    own = folder / f"solver{os.getpid()}"
    own.mkdir(exist_ok=True)
    solver = caffe.get_solver(write_solver(own, lmdbs.data_layer(folder / "lmdb", batch, transform) + net, base_lr=0.02,
                                           **settings))
    solver.fast = solver.exact = True
    solver.replay, solver.remember = replay, str(folder / "memory") if remember else None
    teach(solver, weights)
    return solver


def teach(solver, seed):
    """Give the teacher other weights."""
    rng = np.random.default_rng(seed)
    for name, blobs in solver.net.params.items():
        for blob in blobs if name.startswith("t") else []:
            blob.data[...] = rng.normal(0, 0.2, blob.shape) if blob.data.ndim > 1 else rng.uniform(0.5, 1.5, blob.shape)


def trained(solver, *steps):
    for count in steps or (12,):
        solver.step(count)
    return solver


def assert_equal(one, other):
    """Both ended with the same bytes."""
    a, b = parameters(one.net), parameters(other.net)
    assert all(np.isfinite(a[k]).all() and a[k].tobytes() == b[k].tobytes() for k in a)
    for name in one.net.outputs:
        assert one.net.blobs[name].data.tobytes() == other.net.blobs[name].data.tobytes()


@pytest.fixture(autouse=True)
def one_thread():
    yield
    caffe.set_threads(1)


def tables(folder):
    return sorted((folder / "memory").glob("*.table"))


@pytest.fixture
def asked(monkeypatch):
    """The batches that frozen operations have run on for the memory, one entry each."""
    batches = []
    ask = Remembered._ask
    monkeypatch.setattr(Remembered, "_ask", lambda self, entries: (batches.append(entries.tolist()), ask(self, entries))[1])
    return batches


def said(capfd):
    """What the log says of the memory."""
    return [line.split("] ", 1)[1] for line in capfd.readouterr().err.splitlines() if "remembered.py" in line]


# -- the same bytes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [BATCH, 16, 32])           # from 16 on oneDNN computes the convolutions
@pytest.mark.parametrize("settings", [{}, {"replay": True}, {"iter_size": 2, "type": "Nesterov"}, {"iter_size": 2, "replay": True}])
def test_the_same_bytes_with_a_memory_without_one_and_with_one_half_filled(tmp_path, threads, batch, settings):
    caffe.set_threads(threads)
    plain = trained(make(tmp_path, False, batch=batch, **settings))
    trained(make(tmp_path, batch=batch, **settings), 4)
    half, full = trained(make(tmp_path, batch=batch, **settings), 5, 7), trained(make(tmp_path, batch=batch, **settings))
    assert_equal(plain, half)
    assert_equal(plain, full)
    assert len(tables(tmp_path)) == 1


@pytest.mark.parametrize("replay", [False, True])
def test_a_teacher_that_is_changed_between_steps_has_another_file(tmp_path, replay):
    plain, remembering = (make(tmp_path, remember, replay=replay) for remember in (False, True))
    for seed in (5, 6, 5):
        for solver in (plain, remembering):
            teach(solver, seed)
            solver.step(3)
    assert_equal(plain, remembering)
    assert len(tables(tmp_path)) == 2


def test_a_run_goes_on_from_a_snapshot_with_a_memory_as_without(tmp_path):
    plain = trained(make(tmp_path, False))
    first = trained(make(tmp_path), 5)
    again = make(tmp_path, weights=9)
    again.restore(first.snapshot())
    assert_equal(plain, trained(again, 7))


@pytest.mark.parametrize("remember", [False, True])
def test_a_blob_that_is_left_away_is_there_for_whoever_looks(tmp_path, remember):
    solver, plain = trained(make(tmp_path, remember), 3), trained(make(tmp_path, False), 3)
    for name in ("t1", "t2", "t3", "t_pool", "t_fc", "data"):
        np.testing.assert_array_equal(solver.net.blobs[name].data, plain.net.blobs[name].data, name)


def test_an_array_that_somebody_holds_shows_every_pass(tmp_path):
    plain, solver = (make(tmp_path, remember) for remember in (False, True))
    theirs, ours = (each.net.blobs["t3"].data for each in (plain, solver))
    for _ in range(3):
        plain.step(1)
        solver.step(1)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("replay", [False, True])
def test_solvers_side_by_side_remember_too(tmp_path, replay, asked):
    def students(remember):
        return [make(tmp_path, remember, batch=16, replay=replay, random_seed=seed) for seed in (1, 2)]
    plain, filling, full = students(False), students(True), students(True)
    for group in (plain, filling, full):
        caffe.Together(group).step(6)
    for one, two, three in zip(plain, filling, full, strict=True):
        assert_equal(one, two)
        assert_equal(one, three)
    assert {len(batch) for batch in asked} == {32}


def test_solvers_with_different_teachers_forget(tmp_path, capfd):
    students = [make(tmp_path, weights=weights, random_seed=weights) for weights in (1, 2)]
    students[1].net.params["t_fc"][0].data[0] += 1
    alone = [make(tmp_path, False, weights=weights, random_seed=weights) for weights in (1, 2)]
    alone[1].net.params["t_fc"][0].data[0] += 1
    caffe.Together(students).step(3)
    for one, other in zip(alone, students, strict=True):
        assert_equal(trained(one, 3), other)


# -- how often the teacher is asked ------------------------------------------------------------------------------------------
def test_each_input_is_computed_once(tmp_path, asked):
    trained(make(tmp_path, transform=WHOLE), 10)
    first, again, *later = asked
    assert sorted(first) == sorted(again) == list(range(BATCH)) and first != again      # the first batch, and a trial in another order
    assert [number for batch in [first, *later] for number in dict.fromkeys(batch)] == list(range(RECORDS))
    del asked[:]
    trained(make(tmp_path, transform=WHOLE), 10)
    assert asked == [first]                                  # compared with what the file says of it


def test_batches_are_full_of_what_is_missing(tmp_path, asked):
    solver = trained(make(tmp_path), 60)
    inputs = solver.net.layers[0].variants * RECORDS
    seen = {number for pass_ in range(60) for number in solver.net.layers[0].entries(pass_).tolist()}
    assert inputs == 20 * 2 * 2 * 2
    known = [number for batch in [asked[0], *asked[2:]] for number in dict.fromkeys(batch)]
    assert len(set(known)) == len(known) and set(known) >= seen                         # none twice, all that was needed
    assert len(asked) - 1 <= np.ceil(len(known) / BATCH) + 1                            # and hardly a batch that was not full


def test_a_pass_runs_no_frozen_operation(tmp_path, monkeypatch):
    solver = trained(make(tmp_path, transform=WHOLE), 8)
    program, computed = solver._program(solver.net), []
    perform = program.perform
    monkeypatch.setattr(program, "perform", lambda op, bottoms: (computed.extend(op.tops), perform(op, bottoms))[1])
    solver.step(4)
    assert computed and not [name for name in computed if name.startswith("t")]


def test_recorded_passes_wait_for_nothing(tmp_path, monkeypatch):
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func._schema.name)
            return func(*args, **(kwargs or {}))
    solver = trained(make(tmp_path, replay=True), 2)
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda labels: (0, 0))      # labels are looked at on CPUs only
    with Seen() as seen:
        solver._replays[id(solver.net)]._run()
    assert "aten::index_select" in seen.names
    assert not seen.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


# -- the file ----------------------------------------------------------------------------------------------------------------
def test_what_was_changed_on_the_disk_is_computed_again(tmp_path, asked):
    plain = trained(make(tmp_path, False, transform=WHOLE))
    trained(make(tmp_path, transform=WHOLE))
    path, = tables(tmp_path)
    content = bytearray(path.read_bytes())
    table = Table(path, content[:4096].decode().split("\n")[1], RECORDS, 2)
    rows = len(content) - 16 * RECORDS
    content[rows + 16 * 8] ^= 1                              # a bit of a value
    content[4096 + 8 * 9 + 7] ^= 128                         # a bit of a seal
    content[rows + 16 * 10:rows + 16 * 12] = content[rows + 16 * 12:rows + 16 * 14]     # rows that belong elsewhere
    content[4096 + 8 * 10:4096 + 8 * 12] = content[4096 + 8 * 12:4096 + 8 * 14]         # with their seals
    content[rows + 16 * 13:rows + 16 * 14] = bytes(16)       # a row that the disk has lost
    path.write_bytes(content)
    whole = table.read(torch.arange(RECORDS))[1]
    assert (~whole).nonzero().flatten().tolist() == [8, 9, 10, 11, 13]
    del asked[:]
    assert_equal(plain, trained(make(tmp_path, transform=WHOLE)))
    assert {8, 9, 10, 11, 13} <= {number for batch in asked for number in batch}
    assert table.read(torch.arange(RECORDS))[1].all()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"?" + data[1:], lambda data: b""])
def test_a_damaged_file_is_made_again(tmp_path, damage, capfd):
    plain = trained(make(tmp_path, False))
    trained(make(tmp_path), 2)
    path, = tables(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    capfd.readouterr()
    assert_equal(plain, trained(make(tmp_path)))
    assert said(capfd)[0] == f"{path} is damaged; it is made again"
    assert path.stat().st_size == len(whole)


def test_a_file_of_another_arithmetic_is_left_alone(tmp_path, capfd):
    plain = trained(make(tmp_path, False))
    trained(make(tmp_path), 2)
    path, = tables(tmp_path)
    content = path.read_bytes()
    _, key = content[:4096].decode().rstrip("\0").split("\n")[:2]
    solver = make(tmp_path)
    numbers = solver.net.layers[0].entries(0)
    table = Table(path, key, RECORDS * 8, 2)
    rows, _ = table.read(numbers)
    table.write(numbers, rows ^ 1)
    other = path.read_bytes()
    capfd.readouterr()
    assert_equal(plain, trained(solver))
    assert re.search("not remembered: .*other arithmetic.*delete it", said(capfd)[0])
    assert path.read_bytes() == other


def test_what_depends_on_the_place_in_a_batch_is_not_remembered(tmp_path, monkeypatch, capfd):
    plain = trained(make(tmp_path, False))
    ask, places = Remembered._ask, torch.arange(BATCH)[:, None]
    monkeypatch.setattr(Remembered, "_ask", lambda self, entries: [top + places * 1e-6 for top in ask(self, entries)])
    assert_equal(plain, trained(make(tmp_path)))
    assert "depends here on its place in the batch" in said(capfd)[0]
    assert not tables(tmp_path)


def test_what_is_too_large_is_not_remembered(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(remembered, "LIMIT", 4096 + RECORDS * 8 * 8 * 3)
    trained(make(tmp_path), 1)
    monkeypatch.setattr(remembered, "LIMIT", 4096 + RECORDS * 8 * 8 * 3 - 1)
    assert_equal(trained(make(tmp_path, False), 2), trained(make(tmp_path), 2))
    assert re.search("remembers t_fc of 6 of 160 inputs", said(capfd)[0])


def test_a_file_takes_no_more_than_half_of_the_free_disk(tmp_path, monkeypatch, capfd):
    size = Table.bytes(RECORDS * 8, 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 * size - 1}))
    assert_equal(trained(make(tmp_path, False), 2), trained(make(tmp_path), 2))
    assert "more than half of what is free on the disk" in said(capfd)[0] and not tables(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 * size}))
    trained(make(tmp_path), 2)
    assert len(tables(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capfd):
    (tmp_path / "memory").write_text("")
    assert_equal(trained(make(tmp_path, False), 3), trained(make(tmp_path), 1, 1, 1))
    assert len(said(capfd)) == 1


def test_records_of_several_shapes_are_not_remembered(tmp_path, capfd):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 9 + (i == 13), 9), dtype=np.uint8) for i in range(RECORDS)]
    lmdbs.write_images(tmp_path / "lmdb", images, [i % 4 for i in range(RECORDS)])
    assert_equal(trained(make(tmp_path, False)), trained(make(tmp_path)))
    assert "its records differ in shape" in said(capfd)[-1]


@pytest.mark.parametrize("change", [
    {"transform": "crop_size: 8 scale: 0.01"}, {"transform": "crop_size: 8 mirror: true scale: 0.02"},
    {"transform": "crop_size: 8 mirror: true scale: 0.01 mean_value: 3"}, {"weights": 6}, {"batch": 8}, {"threads": 2},
    {"precision": "bf16"}, {"net": NET.replace("pool: AVE", "pool: MAX")}, {"records": True}])
def test_what_decides_a_value_is_part_of_the_file_s_name(tmp_path, monkeypatch, change):
    for module, limit in ((work, "NUMBERS"), (dense, "LARGEST")) if "threads" in change else ():
        monkeypatch.setattr(module, limit, 0)               # as if the net were not so small that one thread computes it
    trained(make(tmp_path), 1)
    caffe.set_threads(change.pop("threads", 1))
    caffe.set_precision(change.pop("precision", "fp32"))
    if change.pop("records", False):
        os.rename(tmp_path / "lmdb", tmp_path / "other")
        images = np.random.default_rng(1).integers(0, 256, (RECORDS, 3, 9, 9), dtype=np.uint8)
        lmdbs.write_images(tmp_path / "lmdb", images, [i % 4 for i in range(RECORDS)])
    try:
        trained(make(tmp_path, **change), 1)
    finally:
        caffe.set_precision("fp32")
    assert len(tables(tmp_path)) == 2


def test_what_does_not_decide_a_value_is_not(tmp_path):
    trained(make(tmp_path), 1)
    renamed = re.sub(r'"t(\w*)"', r'"teacher/\1"', NET)
    other = make(tmp_path, net=renamed, random_seed=8)
    for name, blobs in make(tmp_path).net.params.items():
        for mine, theirs in zip(other.net.params.get(re.sub("^t", "teacher/", name), []), blobs, strict=False):
            mine.data[...] = theirs.data
    os.rename(tmp_path / "lmdb", tmp_path / "moved")
    (tmp_path / "lmdb").symlink_to(tmp_path / "moved")
    trained(other, 1)
    assert len(tables(tmp_path)) == 1


def _train_in_another_process(folder, start, dies):
    start.wait()
    solver = make(Path(folder), random_seed=os.getpid() % 1000)
    if dies:
        write = Table.write
        def killed(self, numbers, rows):
            if self.known() > 30:
                self.rows[numbers] = rows // 3               # half of the bytes are there
                self.seals[numbers[:2]] = self._seal(numbers, rows)[:2]
                os.kill(os.getpid(), 9)
            write(self, numbers, rows)
        Table.write = killed
    solver.step(20)


def test_processes_share_a_file_and_may_be_killed_over_it(tmp_path, asked):
    plain = trained(make(tmp_path, False), 20)
    context = multiprocessing.get_context("fork")
    for dies in (True, False):
        start = context.Event()
        others = [context.Process(target=_train_in_another_process, args=(str(tmp_path), start, dies)) for _ in range(2)]
        for process in others:
            process.start()
        start.set()
        for process in others:
            process.join()
        assert [process.exitcode for process in others] == [-9, -9] if dies else [0, 0]
    assert_equal(plain, trained(make(tmp_path), 20))
    assert len(tables(tmp_path)) == 1 and len(asked) < 12
