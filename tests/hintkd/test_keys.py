"""Stage keys: what changes them, what does not, and how a change is told."""
from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from data_prep import check
from hintkd.backend import caffe_pb2
from hintkd.errors import UserError
from hintkd.files import read_sealed, write_sealed
from hintkd.methods.stage import Stage, Weights
from hintkd.run import digests
from hintkd.run.keys import Keys, Numerics, differences, flatten

NUMERICS = Numerics("torchcaffe", "torchcaffe 1 numeric 1")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path)
    return tmp_path


def key(stage: Stage, numerics: Numerics = NUMERICS) -> str:
    return Keys(numerics).key(stage)


def test_how_a_run_is_watched_and_stored_does_not_matter() -> None:
    solver = tiny.solver()
    solver.display, solver.snapshot, solver.average_loss, solver.snapshot_prefix = 7, 9, 3, "elsewhere"
    solver.test_interval, solver.test_initialization = 13, False
    solver.net, solver.solver_mode = "some/net.prototxt", caffe_pb2.SolverParameter.GPU
    renamed = tiny.net()
    renamed.name = "another"
    assert key(Stage.solve("a", renamed, solver)) == key(Stage.solve("b", tiny.net(), tiny.solver()))


@pytest.mark.parametrize(("changed", "told"), [
    (Stage.solve("a", tiny.net(), tiny.solver(lr=0.5)), "solver.base_lr 0.02 -> 0.5"),
    (Stage.solve("a", tiny.net(), tiny.solver(seed=7)), "solver.random_seed 1 -> 7"),
    (Stage.solve("a", tiny.net(hidden=8), tiny.solver()), "net.hidden.inner_product_param.num_output 16 -> 8"),
    (Stage.solve("a", tiny.net(), tiny.solver(), drop=("fc",)), "drop [] -> ['fc']"),
    (replace(Stage.solve("a", tiny.net(), tiny.solver()), program="other"), "program solve -> other"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_decides_the_outcome_changes_the_key_and_is_named(changed: Stage, told: str) -> None:
    stage = Stage.solve("a", tiny.net(), tiny.solver())
    assert key(changed) != key(stage)
    known = json.loads(json.dumps(Keys(NUMERICS).parts(stage)))                  # as it comes back from a file
    assert told in differences(known, Keys(NUMERICS).parts(changed))


@pytest.mark.parametrize("changes", [{"backend": "caffe"}, {"engine": "torchcaffe 1 numeric 2"}, {"device": "gpu"}, {"threads": 2},
                                     {"precision": "bf16"}, {"together": 3}])
def test_the_setting_is_part_of_the_key(changes: dict) -> None:
    stage = Stage.solve("a", tiny.net(), tiny.solver())
    other = replace(NUMERICS, **changes)
    assert key(stage, other) != key(stage)
    assert any(name in "".join(differences(Keys(NUMERICS).parts(stage), Keys(other).parts(stage))) for name in changes)


def test_stages_of_one_kind_differ_in_seed_and_weights_alone() -> None:
    def kind(stage: Stage) -> dict:
        return Keys(NUMERICS).kind(stage)
    first = Stage.solve("first", tiny.net(), tiny.solver())
    often = tiny.solver()
    often.snapshot = 5
    assert kind(first) == kind(Stage.solve("other", tiny.net(), tiny.solver(seed=2), weights_in=(Weights(first),)))
    assert all(kind(first) != kind(Stage.solve("first", *made)) for made in (
        (tiny.net(hidden=8), tiny.solver()), (tiny.net(), tiny.solver(lr=0.5)), (tiny.net(), often)))


def test_threads_do_not_matter_on_a_gpu() -> None:
    stage, gpu = Stage.solve("a", tiny.net(), tiny.solver()), replace(NUMERICS, device="gpu")
    assert key(stage, gpu) == key(stage, replace(gpu, threads=4))


def test_the_order_of_layers_matters() -> None:
    moved = tiny.net()
    layers = list(moved.layer)
    del moved.layer[:]
    moved.layer.extend([*layers[:-2], layers[-1], layers[-2]])
    parts = [Keys(NUMERICS).parts(Stage.solve("a", net, tiny.solver())) for net in (tiny.net(), moved)]
    assert differences(*parts) == ["the order of layers"]
    assert key(Stage.solve("a", moved, tiny.solver())) != key(Stage.solve("a", tiny.net(), tiny.solver()))


def test_a_changed_upstream_stage_changes_what_starts_from_it() -> None:
    first = [Stage.solve("first", tiny.net(), tiny.solver(seed)) for seed in (1, 2)]
    second = [Stage.solve("second", tiny.net(), tiny.solver(), weights_in=(Weights(source),)) for source in first]
    assert key(second[0]) != key(second[1])
    assert differences(*(Keys(NUMERICS).parts(stage) for stage in second)) == ["the weights it starts from"]


def test_weight_files_count_by_content(workspace: Path) -> None:
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"other")):
        (workspace / name).write_bytes(content)
    a, b, c = (key(Stage.solve("x", tiny.net(), tiny.solver(), weights_in=(Weights(Path(name)),))) for name in "abc")
    assert a == b != c


def test_data_count_by_content_and_not_by_path(workspace: Path) -> None:
    before = key(Stage.solve("a", tiny.net(), tiny.solver()))
    moved = tiny.net()
    for layer in moved.layer:
        layer.data_param.source = layer.data_param.source.replace("tiny", "moved") if layer.type == "Data" else ""
        if layer.type != "Data":
            layer.ClearField("data_param")
    (workspace / "data/tiny").rename(workspace / "data/moved")
    assert key(Stage.solve("a", moved, tiny.solver())) == before
    with (workspace / "data/moved/train_lmdb/data.mdb").open("r+b") as file:
        file.seek(20_000)
        file.write(b"another record")
    assert key(Stage.solve("a", moved, tiny.solver())) != before


def describe_data(workspace: Path, **more: object) -> Path:
    """A dataset.json beside the tiny data, as `prepare` writes it."""
    folder = workspace / "data/tiny"
    write_sealed(folder / "dataset.json", {"format": 1, "name": "tiny", "seed": 0, "classes": 4, "summary": check.summary(folder),
                                           "fingerprint": check.check_dataset(folder).fingerprint, **more})
    return folder / "dataset.json"


def test_a_prepared_data_set_counts_by_its_fingerprint(workspace: Path) -> None:
    facts = describe_data(workspace)
    fingerprint = read_sealed(facts)["fingerprint"]
    parts = Keys(NUMERICS).parts(Stage.solve("a", tiny.net(), tiny.solver()))
    assert parts["net.data#2.data_param.source"] == f"data {fingerprint}/test_lmdb"
    facts.write_text("{")
    with pytest.raises(UserError, match="data/tiny/dataset.json is damaged; prepare"):
        key(Stage.solve("a", tiny.net(), tiny.solver()))


@pytest.mark.parametrize("named", [True, False], ids=["with digests of its files", "from before there were any"])
def test_a_changed_record_is_found_however_the_set_was_described(workspace: Path, named: bool) -> None:
    describe_data(workspace, **({"files": check.files(workspace / "data/tiny")} if named else {}))
    stage = Stage.solve("a", tiny.net(), tiny.solver())
    key(stage)
    change(workspace / "data/tiny/train_lmdb/data.mdb")
    with pytest.raises(UserError, match="data/tiny.*prepare .* again"):
        key(stage)


def test_bytes_that_a_disk_lost_are_found_by_samples(workspace: Path) -> None:
    describe_data(workspace, files=check.files(workspace / "data/tiny"))
    stage = Stage.solve("a", tiny.net(), tiny.solver())
    key(stage)
    change(workspace / "data/tiny/train_lmdb/data.mdb")
    checked = read_sealed(digests.CHECKED)
    stamps = digests._stamps(Path("data/tiny"), checked["data/tiny"]["facts"])
    checked["data/tiny"]["stamps"] = list(stamps)                               # as if nothing had been written
    write_sealed(digests.CHECKED, checked)
    with pytest.raises(UserError, match=r"data/tiny/train_lmdb/data.mdb is damaged at bytes 0 to 1,048,576"):
        key(stage)


def test_an_unchanged_set_is_read_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe_data(workspace, files=check.files(workspace / "data/tiny"))
    stage = Stage.solve("a", tiny.net(), tiny.solver())
    before = key(stage)
    digests._require.cache_clear()                                              # as in another process
    monkeypatch.setattr(digests, "check_all", None)
    assert key(stage) == before


def test_a_description_that_is_gone_does_not_give_another_key(workspace: Path) -> None:
    facts = describe_data(workspace, files=check.files(workspace / "data/tiny"))
    stage, told = Stage.solve("a", tiny.net(), tiny.solver()), []
    before = key(stage)
    facts.unlink()
    with pytest.raises(UserError, match="data/tiny/dataset.json is missing; move data/tiny away and prepare"):
        key(stage)
    digests.restore_descriptions([stage], told.append)
    assert told == ["data/tiny/dataset.json is missing; it is written again"] and key(stage) == before


def change(path: Path) -> None:
    """Flip a bit of the pixels of every record; where one lies, older copies of it may lie, too."""
    content, head = bytearray(path.read_bytes()), caffe_pb2.Datum(channels=1, height=8, width=8).SerializeToString()
    at = content.find(head)
    while at >= 0:
        content[at + 30] ^= 1
        at = content.find(head, at + 1)
    path.write_bytes(content)


def test_missing_data_are_a_sentence_that_names_the_command(workspace: Path) -> None:
    (workspace / "data/tiny/test_lmdb").rename(workspace / "gone")
    with pytest.raises(UserError, match=r"data/tiny/test_lmdb is missing.*hintkd prepare tiny"):
        key(Stage.solve("a", tiny.net(), tiny.solver()))


def test_the_source_of_a_python_layer_is_part_of_the_key(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(workspace))
    net = tiny.net()
    net.layer.add(name="mine", type="Python", bottom=["fc"], top=["mine"], python_param={"module": "my_layers", "layer": "Mine"})
    stage = Stage.solve("a", net, tiny.solver())
    with pytest.raises(UserError, match="my_layers is not on the path"):
        key(stage)
    (workspace / "my_layers.py").write_text("raise RuntimeError('is not imported')")
    importlib.invalidate_caches()
    before = Keys(NUMERICS).parts(stage)
    (workspace / "my_layers.py").write_text("class Mine: pass")
    assert differences(before, Keys(NUMERICS).parts(stage)) == ["the source of my_layers"]


def test_flatten_names_every_field_that_is_set() -> None:
    message = caffe_pb2.LayerParameter(name="conv", type="Convolution", param=[{}, {"lr_mult": 2}], phase="TEST",
                                       convolution_param={"num_output": 3, "kernel_size": [3, 1]})
    assert dict(flatten(message, "l")) == {
        "l.name": "conv", "l.type": "Convolution", "l.phase": "TEST", "l.param[0]": {}, "l.param[1]": {}, "l.param[1].lr_mult": 2.0,
        "l.convolution_param": {}, "l.convolution_param.num_output": 3, "l.convolution_param.kernel_size[0]": 3,
        "l.convolution_param.kernel_size[1]": 1}
