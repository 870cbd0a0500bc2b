"""The report: what it shows of full and of shortened runs, where its numbers come from, and that it is always the same."""
from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from rich.console import Console

import synthetic
from hintkd.errors import UserError
from hintkd.methods.hint_2019 import CHOICES, Options
from hintkd.results import report
from hintkd.results.measured import read_groups
from hintkd.results.summary import summary
from hintkd.study.table import find_table

TABLE1, TABLE3 = find_table("table1"), find_table("table3")


def rendered(root) -> str:
    return report.render(read_groups(root / report.MEASURED), {})


def rows(text: str, label: str) -> list[list[str]]:
    """The cells of the Markdown rows that have a cell with this text."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in found if label in cells]


def test_nothing_measured_says_so(tmp_path):
    path = report.write_report(tmp_path)
    assert path == tmp_path / "results/report.md"
    assert "Nothing was measured yet" in path.read_text()


def test_full_runs_are_compared_cell_by_cell(tmp_path):
    synthetic.measure(tmp_path, TABLE1, {"kd": [90.87, 90.78, 90.24], "layerwise-hint": [91.0, 91.1, 91.2]})
    text = rendered(tmp_path)
    kd, layerwise = rows(text, "difference")
    assert kd == ["", "difference", "1", "+0.10", "+0.00", "-0.50", "-0.13", "reproduced"]
    assert layerwise[3:] == ["-0.66", "-0.70", "-0.44", "-0.60", "not reproduced"]
    assert ["kd", "published", "1", "90.77", "90.78", "90.74", "90.76", "0.02"] in rows(text, "published")
    assert ["", "measured", "1", "90.87", "90.78", "90.24", "90.63", "0.34"] in rows(text, "measured")
    assert ["", "best test", "1", "90.97", "90.88", "90.34", "90.73", "0.34"] in rows(text, "best test")
    assert ["`layerwise-hint > kd-equal-iterations`", "", "", "", "", "**not judged**: kd-equal-iterations was not measured"] in rows(
        text, "`layerwise-hint > kd-equal-iterations`")
    assert "Not measured: teacher, original, kd-equal-iterations, hint-kd, hint-kd-plus." in text


def test_shortened_runs_say_so_in_every_row_and_are_not_compared(tmp_path):
    synthetic.measure(tmp_path, TABLE1, {"kd": [90.8, 90.8, 90.8], "layerwise-hint": [91.7, 91.7, 91.7]}, scale=0.05)
    text = rendered(tmp_path)
    assert not rows(text, "difference") and "reproduced |" not in text.replace("means reproduced |", "")
    measured = rows(text, "measured") + rows(text, "best test")
    assert len(measured) == 4 and {cells[2] for cells in measured} == {"0.05"}
    assert "## Table 1, scale 0.05" in text and "not comparable" in text
    assert "plain training and Stage 2 3,200, teacher 3,200, Stage 1 at once 1,250, pair by pair 150 + 350 + 750" in text


def test_an_error_table_counts_a_twentieth(tmp_path):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.60, 0.61, 0.60], "hint-kd": [0.60, 0.60, 0.60]})
    differences = rows(rendered(tmp_path), "difference")
    assert [cells[-2:] for cells in differences] == [["+0.043", "reproduced"], ["+0.093", "not reproduced"]]


def test_claims_stand_with_their_intervals_and_verdicts(tmp_path):
    synthetic.measure(tmp_path, TABLE1, {"original": [90.9, 90.7, 90.8], "kd": [90.8, 90.8, 90.8], "hint-kd": [91.1, 91.2, 91.3]})
    text = rendered(tmp_path)
    assert rows(text, "`hint-kd > kd`") == [["`hint-kd > kd`", "+0.39", "+0.40", "+0.15 to +0.65", "3", "**holds**"]]
    assert rows(text, "`kd <= original`") == [["`kd <= original`", "KD alone is no better than training without a teacher (table 1)",
                                                "+0.03", "+0.00", "-0.25 to +0.25", "3", "**within noise**"]]
    assert "understates the noise" in text and "What the printed numbers imply beside that:" in text


def test_a_verdict_at_a_shortened_schedule_is_none_on_the_paper_and_counted_apart(tmp_path):
    values = {"kd": [90.8, 90.8, 90.8], "hint-kd": [91.1, 91.2, 91.3], "layerwise-hint": [92.0, 92.0, 92.0]}
    for scale in (1, 0.05):
        synthetic.measure(tmp_path, TABLE1, values, scale=scale)
    text = rendered(tmp_path)
    (full,), (short,) = rows(text, "Table 1"), rows(text, "Table 1, scale 0.05")
    assert full[-2:] == ["holds: 2, not judged: 3", ""] and short[-2:] == ["", "holds: 2, not judged: 3"]
    assert [cells[-1] for cells in rows(text, "`layerwise-hint > kd`")] == ["**holds**", "**holds at scale 0.05**"]
    assert "What is claimed, tried at scale 0.05:" in text


def test_the_best_of_three_is_said_to_be_favoured(tmp_path):
    table = find_table("table4")
    for repeat in (1, 2):
        synthetic.measure(tmp_path, table, {"teacher": [0.39], "layerwise-hint": [0.37, 0.38, 0.42]}, repeat=repeat)
    (cells,) = rows(rendered(tmp_path), "`best layerwise-hint > teacher`")
    assert cells[-2:] == ["2", "**holds**: the best net is the one that does best on this very test set, which favours it"]


def test_replications_have_rows_of_their_own(tmp_path):
    for repeat, value in ((1, 91.0), (2, 92.0)):
        synthetic.measure(tmp_path, TABLE1, {"kd": [value] * 3}, repeat=repeat)
    text = rendered(tmp_path)
    assert [cells[3:7] for cells in rows(text, "measured, replication 2")] == [["92.00"] * 4]
    assert rows(text, "measured, over replications") == [["", "measured, over replications", "1", "", "", "", "91.50", "0.71"]]
    assert rows(text, "difference")[0][-2:] == ["+0.74", "not reproduced"]


def test_evidence_goes_with_every_result(tmp_path):
    synthetic.measure(tmp_path, TABLE1, {"layerwise-hint": [91.0, 91.1, 91.2]})
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]}, scale=0.5, provenance={**synthetic.PROVENANCE, "dirty": True})
    text = rendered(tmp_path)
    assert ("    table1/layerwise-hint/net2  91.10 % last (91.20 % best)  3,000 + 7,000 + 15,000 + 64,000 iterations, scale 1, fp32, "
            "seed 1, Linux x86_64, a processor, 1 thread, 12 s, torch 2.13.0, commit 0123456\n") in text
    assert re.search(r"    table3-scale0.5/kd/net3  0.70 % error last \(0.60 % error best\)  18,000 it.*0123456 with changes\n", text)
    assert len(re.findall(r"^    table", text, flags=re.MULTILINE)) == 6


def test_the_open_points_are_listed_with_what_was_used(tmp_path):
    own = [field.name for field in fields(Options) if field.name in Options.__annotations__]
    assert [option.name for option in Options.open_points()] == own
    table = TABLE3.changed({"shortcut": "B"})
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    synthetic.measure(tmp_path, table, {"kd": [0.5, 0.6, 0.7]})
    (tmp_path / "results/measured/table3-shortcut-B/table.yaml").write_text(table.dump(tmp_path))
    text = rendered(tmp_path)
    assert rows(text, "shortcut")[0][-2:] == ["A", "A, B"]
    assert "## Table 3 (table3-shortcut-B)" in text and "Options: shortcut B (default A)." in text
    assert all(rows(text, choice.point) for choice in CHOICES)


def test_an_option_is_listed_where_it_has_a_meaning(tmp_path):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    used = {cells[0]: cells[-1] for option in Options.open_points() for cells in rows(rendered(tmp_path), option.name)}
    assert used["mnist_scale"] == "0.00392157" and used["plus_tap"] == "before"
    assert all(used[name] == "" for name in ("mirror", "mean", "sl_modules", "regressor_kernel", "regressor_std"))
    synthetic.measure(tmp_path, find_table("table5"), {"hint-kd": [90.0, 91.0, 92.0]})
    used = {cells[0]: cells[-1] for option in Options.open_points() for cells in rows(rendered(tmp_path), option.name)}
    assert (used["mirror"], used["mean"], used["regressor_kernel"]) == ("on", "file", "1")


def test_what_an_older_engine_measured_says_so_and_stands_alone(tmp_path):
    old = {**synthetic.PROVENANCE, "engine": "torchcaffe 0.1.0 numeric 0"}
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]}, provenance=old)
    synthetic.measure(tmp_path, TABLE3, {"hint-kd": [0.4, 0.5, 0.6]})
    text = rendered(tmp_path)
    assert "## Table 3, measured by numeric 0\n" in text and "**Measured by numeric 0 of the engine, whose numeric is another today" in text
    assert "## Table 3, engine " + synthetic.PROVENANCE["engine"] in text
    assert "hint-kd > kd" in text and not re.search(r"`hint-kd > kd`.*\*\*(holds|within)", text)


def test_what_was_taken_back_is_told(tmp_path):
    measured = tmp_path / report.MEASURED
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    assert "History" not in report.write_report(tmp_path).read_text()
    (measured / "history.yaml").write_text("[{retired: 2020-01-02, records: table 1, why: a mistake}, "
                                           "{retired: 2021-01-02, records: table 2, why: another}]")
    text = report.write_report(tmp_path).read_text()
    assert "## History" in text and text.index("| 2021-01-02 | table 2 | another |") < text.index("| 2020-01-02 | table 1 | a mistake |")
    (measured / "history.yaml").write_text("[{retired: 2020-01-02, records: table 1}]")
    with pytest.raises(UserError, match="history.yaml: 0.why: Field required; write a list"):
        report.write_report(tmp_path)


def test_groups_that_do_not_belong_together_have_sections_that_say_why(tmp_path):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    synthetic.measure(tmp_path, TABLE3, {"hint-kd": [0.5]}, provenance={**synthetic.PROVENANCE, "device": "gpu", "gpu": "NVIDIA X"})
    text = rendered(tmp_path)
    assert "## Table 3, device cpu\n" in text and "## Table 3, device NVIDIA X\n" in text


def test_the_same_records_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        values = {"teacher": [91.7], "kd": [90.8, 90.8, 90.9], "layerwise-hint": [91.7, 91.6, 91.7]}
        synthetic.measure(tmp_path / name, TABLE1, values, images=1000)
        report.write_report(tmp_path / name)
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one/results").rglob("*") if path.suffix in (".md", ".png")}
    assert {path.name for path in files} == {"report.md", "table1-bars.png", "table1-curves.png", "table1-hint-losses.png"}
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    text = (tmp_path / "one/results/report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(shown) == 3 and all((tmp_path / "one/results" / path).is_file() for path in shown)
    assert re.search(r"Nets 1, 2 and 3 of a row together, by the mean of their class probabilities \(accuracy, %\): kd [\d.]+, lay", text)


def test_without_matplotlib_the_report_says_that_it_has_no_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    synthetic.measure(tmp_path, TABLE1, {"kd": [90.8, 90.8, 90.9]})
    assert "pip install 'hintkd[report]'" in report.write_report(tmp_path).read_text()
    assert not (tmp_path / "results/figures").exists()


def shown(root, name: str) -> list[str]:
    """What the terminal shows when it is redirected."""
    console = Console(width=80, file=io.StringIO())
    for line in summary(name, root):
        console.print(line, soft_wrap=True)
    return console.file.getvalue().splitlines()


def test_the_terminals_table(tmp_path):
    synthetic.measure(tmp_path, TABLE1, {"kd": [90.87, 90.78, 90.24], "hint-kd": [91.1, 91.2, 91.3]})
    text = "\n".join(shown(tmp_path, "table1"))
    assert re.search(r"^kd +90.76 +90.87 +90.78 +90.24 +90.63 +0.34 +90.73 +reproduced$", text, re.MULTILINE)
    assert re.search(r"^  within noise +\+0.57 \[-0.51, \+1.65\] n=3 hint-kd > kd$", text, re.MULTILINE)
    assert re.search(r"^  not judged +layerwise-hint > hint-kd: layerwise-hint was not measured$", text, re.MULTILINE)
    assert "understates the noise" in " ".join(text.split()) and shown(tmp_path, "table2") == ["table2: nothing was measured yet"]


@pytest.mark.parametrize("name", ["table1", "table3"])
def test_the_terminals_table_has_eighty_columns(name, tmp_path):
    for scale in (1, 0.05):
        table = find_table(name)
        synthetic.measure(tmp_path, table, {**synthetic.published(table), "kd-equal-iterations": [0.7, 0.8, 0.9]}, scale=scale)
    for folder in (name, f"{name}-scale0.05"):
        lines = shown(tmp_path, folder)
        assert max(map(len, lines)) <= 80
        assert sum("n=3 " in line for line in lines) == sum(map(len, (table.claims, table.orders, table.controls)))


def test_matplotlib_is_imported_for_drawing_alone():
    code = "import sys, hintkd.results.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode == 0
