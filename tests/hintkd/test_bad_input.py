"""Bad input of every kind: one sentence that names what is wrong, status 2, nothing written, nothing hanging, nothing taken in silence."""
from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hintkd import cli, limits
from hintkd.errors import UserError
from hintkd.study.table import Table, load_table

NAN, INF = math.nan, math.inf
GOOD: dict[str, Any] = {
    "title": "Mine", "about": "a table", "source": "nobody", "metric": "accuracy", "nets": 3, "seed": 1, "tau": 3, "lambda": 5,
    "dataset": {"name": "images", "classes": 4, "channels": 3, "size": 8, "batch": 8, "train_lmdb": "data/i/train_lmdb",
                "test_lmdb": "data/i/test_lmdb", "test_batch": 10, "test_iter": 4, "train_size": 64, "crop": True, "mirror": False,
                "scale": 0.5, "mean_value": [1, 2, 3]},
    "teacher": {"depth": 14, "widths": [4, 4, 8], "published": 91.5}, "student": {"depth": 8, "widths": [4, 4, 8], "published": 90},
    "regressor": False, "hint_pairs": [["group1_block1_relu", "group1_block0_relu"]],
    "schedule": {"iterations": 100, "teacher_iterations": 100, "steps": [0.5, 0.75], "base_lr": 0.1, "hint_lr": 0.01, "hint_iterations": 40,
                 "layerwise_iterations": [10], "sl_iterations": 10, "momentum": 0.9, "weight_decay": 0.0001},
    "options": {"shortcut": "A", "mirror": True, "mean": "values", "label_tau": "tau", "regressor_std": 0.01, "bn_fraction": 0.99},
    "rows": [{"method": "kd", "published": [90, 91, 92], "average": 91}, {"method": "hint-kd", "tau": 4, "lambda": 3}],
    "claims": ["hint-kd > kd"], "controls": ["kd > original"], "axis": [80, 95], "window": [50, 100], "notes": ["a note"]}
Capture = pytest.CaptureFixture[str]


def complaint(capsys: Capture, *arguments: str) -> str:
    """What is said of bad input."""
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert status == 2 and out == "", (status, out, err)
    assert err.startswith("hintkd: ") and err.count("\n") == 1 and len(err) < 700, err
    assert not re.search(r"Traceback|[A-Z]\w+(Error|Exception)\b|<class|object at 0x", err), err
    return err


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------- flags

WHOLE = ["0", "-1", "1.5", "nan", "two", "", "1e3", "9" * 30, "9" * 5000, "0x2"]
REAL = ["nan", "inf", "-inf", "-1", "1e400", "half", "", "1,5"]
REPRODUCE: dict[str, list[str]] = {
    "--scale": [*REAL, "0", "101", "1e-9"],
    "--repeats": [*WHOLE, "65"], "--jobs": [*WHOLE, "257"], "--together": [*WHOLE, "65"],
    "--threads": [*WHOLE, str(len(os.sched_getaffinity(0)) + 1), "4096"],
    "--seed": ["-1", "2048", *WHOLE[2:]],
    "--nets": ["0", "-1", "99", "4", "1,2,99", "1,,2", "1,2,", ",", "", "one", "1-3", "1;2", "1.0", "\u00b2", "9" * 40, "1 2"],
    "--methods": ["", ",", "kd,", ",kd", "hint-dk", "KD", "kd;hint-kd", "\x1b[31mkd", "kd\nhint-kd", "../kd", "k" * 3000],
    "--teacher-depth": [*WHOLE, "7", "9", "21", "100000002"], "--student-depth": [*WHOLE, "7", "9", "21", "100000002"],
    "--precision": ["", "fp16", "FP32", "tf32", "64"],
    "--device": ["", "tpu", "gpu:", "gpu:-1", "gpu:x", "cpu:1", "gpu:\u00b2", "gpu:99999"],
    "--backend": ["", "caffe2", "caffe"], "--caffe-python": ["python", "nowhere/python"], "--scheduler": ["", " "],
    "--shortcut": ["", "C", "a"], "--mean": ["", "yes"], "--label-tau": ["", "0", "2", "nan", "taus", "\u00b2"],
    "--plus-tap": ["", "middle"],
    "--sl-modules": ["", "0"], "--regressor-kernel": ["0", "2", "-3", "nan", "9" * 30], "--regressor-std": [*REAL, "0", "1e9"],
    "--bn-fraction": [*REAL, "0", "1", "2"], "--mnist-scale": [*REAL, "0", "1e9"],
    "--data": ["", "nowhere", "file"], "--teacher-weights": ["nowhere", "folder", "pipe", "file"],
    "--bogus": ["1"], "--no-bogus": [""],
}
GENERATE: dict[str, list[str]] = {
    "--dataset": ["", "cifar1", "CIFAR10", "mnist,cifar10"], "--method": ["", "kkd", "teacher"], "--net": [*WHOLE, "128"],
    "--teacher-depth": ["0", "9", "100000002", "nan"], "--student-depth": ["0", "9", "100000002", "nan"],
    "--student-widths": ["", "1,2", "1,2,3,4", "0,0,0", "16,8,4", "-1,2,3", "a,b,c", "100000000,100000000,100000000", "1.5,2,3",
                         "\u00b2,\u00b2,\u00b2", "nan,1,2", "16 32 64"],
    "--teacher-widths": ["1,2", "0,0,0", "64,32,16", "5000,5000,5000"], "--bn-fraction": ["nan", "1"], "--out": ["file"],
}
CAFFE = ["nowhere/python", "folder", "file", "", "/bin/false", "/bin/true", "/usr/bin/yes"]
COMMANDS = [*(["reproduce", "demo", "--backend", "caffe", "--caffe-python", python] for python in CAFFE),
            ["frobnicate"], ["reproduce"], ["prepare"], ["status", "a", "b"], ["report", "extra"], ["demo", "--jobs", "0"],
            ["demo", "--workspace", "file"], ["reproduce", "demo", "kd"], ["status", "table5"], ["--bogus"],
            *(["prepare", name] for name in ("", "mnits", "MNIST", "imagenet", "../mnist", "m" * 5000, "mnist\n")),
            *(["prepare", "digits", "--seed", seed] for seed in ("-1", "4294967296", "nan", "1.5", "9" * 40)),
            ["prepare", "mnist", "--from", "nowhere"], ["prepare", "mnist", "--from", "file"], ["prepare", "mnist", "--from", "folder"],
            ["prepare", "cifar10", "--from", "folder"], ["prepare", "digits", "--from", "folder"], ["prepare", "digits", "--out", "file"],
            *([command, name] for command in ("reproduce", "generate")
              for name in ("", ".", "..", "/", "tabel3", "table 1", "t" * 5000, "table1\n", "\udcff", "folder.yaml", "pipe.yaml",
                           "large.yaml", "binary.yaml", "empty.yaml", "nowhere.yaml", "a\0b.yaml", "/dev/null.yaml", "-"))]
FLAGS = [*(["reproduce", "demo", flag, value] for flag, values in REPRODUCE.items() for value in values),
         *(["generate", flag, value] for flag, values in GENERATE.items() for value in values), *COMMANDS]


def name_of(arguments: list[str]) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", " ".join(argument[:20] for argument in arguments))


def test_there_are_hundreds() -> None:
    assert len(FLAGS) + len(TABLES) + len(TEXTS) > 600


@pytest.mark.parametrize("arguments", FLAGS, ids=name_of)
def test_a_flag(arguments: list[str], empty: Path, capsys: Capture) -> None:
    (empty / "folder").mkdir()
    (empty / "folder.yaml").mkdir()
    for pipe in ("pipe", "pipe.yaml"):
        os.mkfifo(pipe)
    (empty / "file").write_text("no weights")
    (empty / "large.yaml").touch()
    os.truncate("large.yaml", 2_000_000)
    (empty / "binary.yaml").write_bytes(bytes(range(256)))
    (empty / "empty.yaml").write_text("")
    before = sorted(empty.rglob("*"))
    said = complaint(capsys, *arguments)
    if len(arguments) == 4 and "--bogus" not in arguments[2] and arguments[2] in said:
        assert arguments[2] in said
    elif len(arguments) == 4:
        assert arguments[3][:20].encode("unicode_escape").decode() in said or arguments[2].strip("-").replace("-", "_") in said, said
    assert sorted(path for path in empty.rglob("*") if "runs" not in path.parts) == before


# ---------------------------------------------------------------------------------------------------------------------- tables

PERCENT, NUMBER = limits.Range(0, 100), limits.Range(-1e6, 1e6)


def wrong_for(allowed: limits.Range) -> list[Any]:
    """Values outside a range, and values of other kinds that might slip in."""
    low, high = int(allowed.low), int(allowed.high)
    found = [NAN, INF, -INF, low - 1, high + 1, -700, 1e14, 10**400, True, False, "3", "yes", [3], {"a": 3}, b"3"]
    return [value for value in [*found, *([1.5, 64000.0] if allowed.whole else []), low] if value not in allowed]


def numbers_in(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Every number and switch in a table, by its place."""
    if isinstance(content, dict):
        return [found for name, inner in content.items() for found in numbers_in(inner, (*place, name))]
    if isinstance(content, list):
        return [found for index, inner in enumerate(content) for found in numbers_in(inner, (*place, index))]
    return [(place, content)] if isinstance(content, (int, float)) else []


def range_of(place: tuple[Any, ...]) -> limits.Range:
    name = [part for part in place if isinstance(part, str)][-1]
    known = limits.COUNT if name.endswith("iterations") else limits.NUMBERS.get(name)
    return known or PERCENT


def changed(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    inner: Any = content
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    return content


def dotted(place: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


SWITCHED = ["yes", 1, 0, 2, NAN, "true", [], {}]
TABLES: list[tuple[tuple[Any, ...], Any]] = [
    *((place, value) for place, good in numbers_in(GOOD) for value in (SWITCHED if isinstance(good, bool) else wrong_for(range_of(place)))),
    *((("schedule", "steps"), value) for value in ([0.75, 0.5], [0.5, 0.5], [0, 0.5], [0.5, 1], 0.5, "0.5", [[0.5]])),
    *((("window",), value) for value in ([100, 50], [50, 50], [50], [1, 2, 3], 5)),
    *((("axis",), value) for value in ([95, 80], [80, 80], [80], "80-95")),
    *((("student", "widths"), value) for value in ([4, 4], [8, 4, 2], [4, 4, 4, 4], 4, "4,4,4", None)),
    *((("rows",), value) for value in (None, {}, "kd", ["kd"], [{}], [{"method": "kd"}, {"method": "kd"}], [{"method": "original"}],
                                       [{"method": 3}], [{"methd": "kd"}], [{"method": "teacher"}],
                                       [{"method": "kd", "published": [1, 2]}])),
    *((("claims",), value) for value in ("kd > hint-kd", ["kd >"], ["kd > nothing"], [3], [None], ["kd > hint-kd > kd"], [["kd"]])),
    *((("dataset",), value) for value in ("imagenet", "", None, 3, ["mnist"], {}, {"name": "x"}, {"nme": "x"})),
    *((("teacher",), value) for value in (None, 26, {}, {"depth": 9}, {"depth": 14, "weight": "x"}, [14])),
    *((("student",), value) for value in (None, 14, {}, {"depth": 15})),
    *((("metric",), value) for value in ("top5", "", 3, None)), *((("draw",), value) for value in (["pie"], "bars", [3])),
    *((("options", "shortcut"), value) for value in ("C", "a", 3, None, True)),
    *((("options", "label_tau"), value) for value in (2, "x", True, 1.0)), *((("options", "nothing"), value) for value in (1,)),
    *((("options", "regressor_kernel"), value) for value in (2, True, 1.0, "1")), (("nothing",), 1), (("schedule", "iteration"), 100),
    *((("title",), value) for value in (3, None, [], "two\nlines", "a\0b", "\x1b[31m")),
    *((("name",), value) for value in ("../../x", "a/b", "", ".", "x" * 300, "a b")), (("schedule",), 3), (("options",), "none"),
    *((("hint_pairs",), value) for value in ([["a"]], [["a", "b", "c"]], ["ab"], 3, [["nowhere", "group1_block0_relu"]], [[1, 2]])),
]


@pytest.mark.parametrize(("place", "value"), TABLES, ids=lambda value: dotted(value) if isinstance(value, tuple) else str(value)[:20])
def test_a_field_of_a_table(place: tuple[Any, ...], value: Any, capsys: Capture) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump(changed(place, value)))
    said = complaint(capsys, "generate", "mine.yaml", "--out", "out")
    assert ("mine" in said or "nowhere" in said) and not Path("out").exists()
    name = [part for part in place if isinstance(part, str)][-1]
    if place in [known for known, _ in numbers_in(GOOD)] and not isinstance(value, (list, dict)):
        assert name in said, said
        allowed = range_of(place)
        if isinstance(value, (int, float)) and not isinstance(changed(place, value), bool) and name in limits.NUMBERS:
            assert f"{allowed.low:,}" in said and f"{allowed.high:,}" in said, said


def test_the_table_that_they_are_made_from_is_good(capsys: Capture) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump(GOOD))
    assert cli.main(["generate", "mine.yaml", "--out", "out"]) == 0, capsys.readouterr()


DEEP = "[" * 3_000
DOUBLED = "".join(f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True))
TEXTS = [
    DEEP, DEEP + "]" * 3_000, "title: " + DEEP, "{" * 3_000, "- " * 3_000, "title: [open\nrows: 3\n", "just words", "3", "- a\n- b", "null",
    "title: x\ntitle: y\n", "a: &a [*a]", "? [a]\n: b", "1: x", "title: *nothing", "title: !!python/object:os.system x", "\t", "a: b: c",
    "%YAML 9.9\n---\na: 1", "'", '"\\q"', "title: 2024-02-31", "tau: " + "9" * 5_000, "title: !!binary x", "&a [&b [&c [*a]]]",
    "---\na: 1\n---\nb: 2", "a: &a [x,x,x,x,x,x,x,x,x]\n" + DOUBLED, "notes: &a [[x,x,x,x,x,x,x,x,x]]\n" + DOUBLED, "title: \x07",
    "\ufeffnothing", "lambda: yes", "!!set {a, b}", "title: {a: }",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_file_that_is_no_table(text: str, capsys: Capture) -> None:
    Path("mine.yaml").write_text(text)
    assert "mine.yaml" in complaint(capsys, "reproduce", "mine.yaml")


# ------------------------------------------------------------------------------------------------------------ the whole schema

names = st.sampled_from(["kd", "hint-kd", "teacher", "A", "tau", "mnist", "digits", "kd > hint-kd", 10**18, -1e-300, "1e9"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 100), st.floats(), st.text(max_size=8), names)
values = st.recursive(scalars, max_leaves=5, extend=lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)))


def places_in(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(found for part, inner in items for found in places_in(inner, (*place, part)))]


@settings(max_examples=400)
@given(st.sampled_from([place for place in places_in(GOOD) if place]), values)
def test_whatever_stands_in_a_field_is_a_table_or_a_sentence(place: tuple[Any, ...], value: Any) -> None:
    path = Path("any.yaml")
    try:
        path.write_text(yaml.safe_dump(changed(place, value), allow_unicode=True), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    try:
        table = load_table(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for x in table.experiments():
        assert all(math.isfinite(number) for number in (x.tau, x.lambda_, x.schedule.base_lr, x.schedule.momentum, x.dataset.scale))
        assert x.schedule.iterations >= 1 and list(x.schedule.steps) == sorted(set(x.schedule.steps))
    path.with_name("again.yaml").write_text(table.dump(Path()), encoding="utf-8")
    assert load_table(path.with_name("again.yaml")) == table


@settings(max_examples=200)
@given(st.sampled_from([*Table.model_fields, *GOOD["schedule"], *GOOD["dataset"], *GOOD["options"], "depth", "widths", "set"]), values)
def test_a_field_in_a_place_of_its_own(name: str, value: Any) -> None:
    try:
        limits.require_all({name: value}, "mine.yaml")
    except UserError as error:
        assert str(error).startswith("mine.yaml: ") and "\n" not in str(error)
    else:
        allowed = limits.NUMBERS.get(name)
        assert allowed is None or isinstance(value, (dict, list, type(None))) or value in allowed


def test_json_that_is_a_table_is_one() -> None:
    Path("mine.yaml").write_text(json.dumps(GOOD))
    assert load_table(Path("mine.yaml")).nets == 3
