"""Rows that set what they have otherwise, rows with several numbers, teachers of all kinds: what a table of another paper may hold."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import synthetic
from hintkd.errors import UserError
from hintkd.experiment import Experiment
from hintkd.files import write_sealed
from hintkd.methods.method import stages_of
from hintkd.nets.resnet import ResNet
from hintkd.results import report
from hintkd.results.export import as_data
from hintkd.results.measured import read_groups
from hintkd.study.table import Table, load_table

BASE: dict[str, Any] = {"title": "Mine", "source": "me", "dataset": "cifar10", "teacher": {"depth": 26}, "student": {"depth": 14},
                        "nets": 1}
EXITS: dict[str, Any] = {
    **BASE, "columns": {"1/2": "accuracy1", "2/2": "accuracy", "ensemble": "accuracy_together"},
    "rows": [{"name": "exits", "method": "kd", "published": {"1/2": 67.85, "2/2": [78.64], "ensemble": 79.67}}, {"method": "hint-kd"}]}


def table(tmp_path: Path, **content: Any) -> Table:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**BASE, **content}))
    return load_table(path)


def test_a_row_sets_any_field_of_an_experiment(tmp_path: Path) -> None:
    found = table(tmp_path, rows=[
        {"method": "hint-kd"},
        {"name": "falling", "method": "hint-kd", "set": {"lambda_schedule": "linear", "lambda_end": 2, "tau": 4}},
        {"name": "wide", "method": "hint-kd", "set": {"student.widths": [32, 64, 128], "shortcut": "B", "hint_iterations": 7}},
        {"name": "small", "method": "hint-kd", "set": {"dataset": "mnist", "dataset.batch": 5, "teacher.depth": 32, "regressor": True}}])
    plain, falling, wide, small = (found.experiment(row.title) for row in found.rows)
    assert (falling.lambda_schedule, falling.lambda_end, falling.tau, falling.row) == ("linear", 2.0, 4.0, "falling")
    assert (wide.student, wide.options.shortcut, wide.schedule.counts()["hint_iterations"]) == (ResNet(14, (32, 64, 128)), "B", 7)
    assert (small.dataset.name, small.dataset.batch, small.regressor) == ("mnist", 5, True)
    assert isinstance(small.teacher, Experiment) and small.teacher.student == ResNet(32)
    assert small.schedule.iterations == 36_000               # the data set's
    assert (plain.tau, plain.options.shortcut, plain.student, plain.dataset.batch) == (3.0, "A", ResNet(14), 128)
    assert stages_of(plain)[0] == stages_of(falling)[0] and stages_of(plain)[1] != stages_of(falling)[1]


def test_a_teacher_may_be_trained_by_any_method_and_have_a_teacher(tmp_path: Path) -> None:
    found = table(tmp_path, rows=[
        {"method": "kd"}, {"name": "distilled", "method": "kd", "set": {"teacher.method": "hint-kd", "teacher.teacher": {"depth": 32}}}])
    (plain,), (taught,) = (stages_of(found.experiment(name)) for name in ("kd", "distilled"))
    assert [stage.title for stage in (*plain.sources, *taught.sources)] == ["teacher", "kd"]
    assert [stage.title for stage in taught.sources[0].sources] == ["teacher", "hint"]
    assert found.experiment("distilled").teacher.pupil == ResNet(14)  # type: ignore[union-attr]


@pytest.mark.parametrize(("row", "sentence"), [
    ({"method": "kd", "set": {"lamda": 3}}, "rows[0].set.lamda: unknown; did you mean 'lambda'?"),
    ({"method": "kd", "set": {"student.dpeth": 8}}, "student.dpeth: unknown field; did you mean 'depth'?"),
    ({"method": "kd", "set": {"tau": "warm"}}, "tau: warm will not do"), ({"method": "kd", "set": {"hint_pairs": 3}}, "hint_pairs"),
    ({"method": "kd", "set": {"teacher.method": "kd"}}, "kd needs a teacher"), ({"method": "kd", "name": "a/b"}, "cannot name a folder"),
    ({"method": "kd", "set": {"teacher": None}}, "needs a teacher; add one"),
    ({"method": "kd", "published": {"1/3": 5}}, "the table has no column '1/3'"),
    ({"method": "kd", "published": {"1/2": 500}}, "500 is no percentage"),
])
def test_a_wrong_row_is_a_sentence(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        stages_of(table(tmp_path, columns=EXITS["columns"], rows=[row]).experiment("kd"))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_several_numbers_of_a_row_are_published_measured_and_compared(tmp_path: Path) -> None:
    found = table(tmp_path, **EXITS)
    assert [found.published_mean("exits", column) for column in ("1/2", "2/2", "ensemble", "")] == [67.85, 78.64, 79.67, 79.67]
    assert found.published_mean("hint-kd", "1/2") is None
    synthetic.measure(tmp_path, found, {"exits": [79.6], "hint-kd": [75.0]})
    folder = tmp_path / "results/measured/mine"
    (folder / "table.yaml").write_text(found.dump(folder))
    content = json.loads((folder / "exits/net1.json").read_text())
    content["last"] = {"accuracy1": 0.679, "accuracy": 0.75, "accuracy_together": 0.796}
    write_sealed(folder / "exits/net1.json", {name: value for name, value in content.items() if name != "sha256"})
    (group,) = groups = read_groups(tmp_path / "results/measured")
    values = [group.values("exits", column=column)[1, 1] for column in ("1/2", "2/2", "ensemble", "")]
    assert values == pytest.approx([67.9, 75.0, 79.6, 79.6])
    assert group.values("hint-kd") == {(1, 1): pytest.approx(75.0)} and group.values("hint-kd", column="1/2") == {}
    text = report.render(groups, {})
    assert "| exits | 1/2 | published | 1 |" in text and "| exits | 2/2 | published | 1 | 78.64 | 78.64 |" in text
    assert [report.is_reproduced(group, "exits", column) for column in found.columns] == [True, False, True]
    assert [row["column"] for row in as_data(groups)[0]["rows"] if row["row"] == "exits"] == ["1/2", "2/2", "ensemble"]
    assert load_table(folder / "table.yaml") == found


def test_a_claim_may_compare_a_column_of_its_own(tmp_path: Path) -> None:
    rows = [EXITS["rows"][0], {"name": "other", "method": "kd", "published": {"1/2": 67.5, "ensemble": 80.0}}, {"method": "hint-kd"}]
    claims = ["exits > other in column 1/2", "exits > other", "exits > hint-kd in column 1/2"]
    found = table(tmp_path, **{**EXITS, "rows": rows, "claims": claims, "nets": 2})
    assert [report.published_gain(claim, found) for claim in found.claims[:2]] == pytest.approx([0.35, -0.33])
    assert report.published_gain(found.claims[2], found) is None
    synthetic.measure(tmp_path, found, {"exits": [79.6, 79.7], "other": [78.0, 78.2], "hint-kd": [75.0, 75.2]})
    folder = tmp_path / "results/measured/mine"
    (folder / "table.yaml").write_text(found.dump(folder))
    for net in (1, 2):
        for name, lower, upper in (("exits", 0.60 + net / 1000, 0.796), ("other", 0.70, 0.78 + net / 1000)):
            content = json.loads((folder / f"{name}/net{net}.json").read_text())
            content["last"] = {"accuracy1": lower, "accuracy": upper, "accuracy_together": upper}
            write_sealed(folder / f"{name}/net{net}.json", {each: value for each, value in content.items() if each != "sha256"})
    (group,) = groups = read_groups(tmp_path / "results/measured")
    lower, last, missing = (group.judge(claim, groups) for claim in group.table.claims)
    assert lower.gain and last.gain and (lower.gain.mean, last.gain.mean) == pytest.approx((-9.85, 1.45))
    assert missing.verdict == "not judged" and missing.reason == "hint-kd has no column 1/2"
    with pytest.raises(UserError, match="claims\\[0\\]: the table has no column '1/3'; did you mean '1/2'"):
        table(tmp_path, **{**EXITS, "claims": ["exits > hint-kd in column 1/3"]})


def test_rows_that_differ_in_what_they_set_stand_in_one_table(tmp_path: Path) -> None:
    found = table(tmp_path, rows=[{"method": "kd"}, {"name": "b", "method": "kd", "set": {"shortcut": "B", "lambda_schedule": "linear"}}])
    synthetic.measure(tmp_path, found, {"kd": [90.0], "b": [91.0]})
    folder = tmp_path / "results/measured/mine"
    (folder / "table.yaml").write_text(found.dump(folder))
    (group,) = read_groups(tmp_path / "results/measured")
    assert {record.name: record.method for record in group.records} == {"kd": "kd", "b": "kd"}


def test_rows_with_teachers_and_batches_of_their_own_stand_in_one_table(tmp_path: Path) -> None:
    found = table(tmp_path, rows=[{"method": "kd"}, {"name": "taught", "method": "kd", "set": {"teacher.method": "hint-kd",
                                                                                               "teacher.teacher": {"depth": 32}}},
                                  {"name": "few", "method": "kd", "set": {"dataset.batch": 32}}])
    synthetic.measure(tmp_path, found, {"kd": [90.0], "taught": [91.0], "few": [92.0]})
    folder = tmp_path / "results/measured/mine"
    (folder / "table.yaml").write_text(found.dump(folder))
    assert len(read_groups(tmp_path / "results/measured")) == 1


def test_an_option_that_came_after_a_record_has_its_default(tmp_path: Path) -> None:
    found = table(tmp_path, rows=[{"method": "kd"}, {"method": "hint-kd"}])
    synthetic.measure(tmp_path, found, {"kd": [90.0], "hint-kd": [91.0]})
    folder = tmp_path / "results/measured/mine"
    (folder / "table.yaml").write_text(found.dump(folder))
    content = json.loads((folder / "kd/net1.json").read_text())
    del content["options"]["teacher_statistics"]
    write_sealed(folder / "kd/net1.json", {name: value for name, value in content.items() if name != "sha256"})
    (group,) = read_groups(tmp_path / "results/measured")
    assert group.conditions["teacher_statistics"] == "stored"


def test_the_table_in_the_documents_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text().partition("## What a table may hold")[2]
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    found = load_table(tmp_path / "mine.yaml")
    wide, kd = (found.experiment(name) for name in ("wide", "kd"))
    assert wide.student == ResNet(14, (32, 64, 128)) and (wide.tau, wide.schedule.iterations, wide.options.shortcut) == (4, 30_000, "B")
    assert found.published_mean("kd") == pytest.approx(91.6) and found.output == "accuracy"
    for x in (wide, kd, found.experiment("from-a-hint")):
        assert isinstance(x.teacher, Experiment) and isinstance(x.teacher.teacher, Experiment) and stages_of(x)
