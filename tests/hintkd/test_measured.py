"""Records: read and checked, kept apart where they do not belong together, and the claims judged on them."""
from __future__ import annotations

import json
from math import exp
from statistics import mean

import pytest

import synthetic
from hintkd.errors import UserError
from hintkd.results.measured import Group, read_groups
from hintkd.study.claims import Claim
from hintkd.study.table import find_table

TABLE3 = find_table("table3")


@pytest.fixture
def measured(tmp_path):
    return tmp_path / "results/measured"


def judged(groups: list[Group], claim: str, group: int = 0) -> tuple[float | None, str, str]:
    found = groups[group].judge(Claim.parse(claim), groups)
    return found.gain and round(found.gain.mean, 6), found.verdict, found.reason


def test_values_come_in_the_tables_metric(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"teacher": [0.39], "kd": [0.56, 0.57, 0.55]})
    (group,) = read_groups(measured)
    assert group.name == "table3" and group.table == TABLE3 and group.is_full
    assert group.values("kd") == pytest.approx({(1, 1): 0.56, (1, 2): 0.57, (1, 3): 0.55})
    assert group.values("kd", "best") == pytest.approx({(1, 1): 0.46, (1, 2): 0.47, (1, 3): 0.45})
    assert group.values("hint-kd") == {}


def test_in_an_error_table_the_lower_side_is_better(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.56, 0.57, 0.55], "layerwise-hint": [0.41, 0.40, 0.44]})
    groups = read_groups(measured)
    assert judged(groups, "layerwise-hint > kd") == (0.143333, "holds", "")
    assert judged(groups, "kd > layerwise-hint") == (-0.143333, "does not hold", "")
    assert judged(groups, "kd <= layerwise-hint") == (0.143333, "holds", "")


def test_what_cannot_be_judged_says_why(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"teacher": [0.39], "kd": [0.56], "layerwise-hint": [0.38]})
    groups = read_groups(measured)
    assert judged(groups, "layerwise-hint > hint-kd") == (None, "not judged", "hint-kd was not measured")
    assert judged(groups, "layerwise-hint > kd") == (0.18, "not judged", "one value only, so there is no interval")
    assert judged(groups, "layerwise-hint > table4/kd") == (None, "not judged", "table4/kd was not measured under these conditions")


def test_a_student_against_its_teacher_and_the_best_student(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"teacher": [0.39], "layerwise-hint": [0.37, 0.38, 0.42]})
    groups = read_groups(measured)
    assert judged(groups, "layerwise-hint > teacher") == (0.0, "within noise", "")
    assert judged(groups, "teacher > layerwise-hint") == (0.0, "within noise", "")
    assert judged(groups, "best layerwise-hint > teacher") == (0.02, "not judged", "one value only, so there is no interval")
    for repeat in (2, 3):
        synthetic.measure(tmp_path, TABLE3, {"teacher": [0.39], "layerwise-hint": [0.37, 0.38, 0.42]}, repeat=repeat)
    assert judged(read_groups(measured), "best layerwise-hint > teacher")[:2] == (0.02, "holds")


def test_with_replications_the_verdict_is_taken_over_them(tmp_path, measured):
    for repeat, teacher_effect in ((1, 0.2), (2, -0.2)):
        synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.5, 0.5], "hint-kd": [0.45 - teacher_effect] * 3}, repeat=repeat)
    groups = read_groups(measured)
    assert len(groups) == 1 and groups[0].repeats == [1, 2]
    assert judged(groups, "hint-kd > kd") == (0.05, "within noise", "")      # each replication alone would say otherwise


def test_claims_across_tables_need_the_same_conditions(tmp_path, measured):
    synthetic.measure(tmp_path, find_table("table5"), {"hint-kd": [91.3, 91.5, 91.4]}, scale=0.5)
    synthetic.measure(tmp_path, find_table("table1"), {"hint-kd": [91.0, 91.0, 91.0]})
    claim = "hint-kd > table1/hint-kd"
    groups = read_groups(measured)
    assert [group.name for group in groups] == ["table1", "table5-scale0.5"]
    assert judged(groups, claim, 1)[1:] == ("not judged", "table1/hint-kd was not measured under these conditions")
    synthetic.measure(tmp_path, find_table("table1"), {"hint-kd": [91.0, 91.0, 91.0]}, scale=0.5)
    assert judged(read_groups(measured), claim, 2)[:2] == (0.4, "holds")


def test_losses_are_compared_where_a_claim_says_so(tmp_path, measured):
    figure4, figure9 = find_table("figure4"), find_table("figure9")
    values = {"original": [79.0, 79.0, 79.0], "hint-kd": [80.0, 80.0, 80.0], "layerwise-hint": [88.0, 88.5, 89.0]}
    synthetic.measure(tmp_path, figure4, values)
    synthetic.measure(tmp_path, figure9, {"concurrent-hint": [80.0], "layerwise-hint": [70.0]})
    groups = read_groups(measured)
    for kind in ("training", "test"):
        gain, verdict, _ = judged(groups, f"layerwise-hint > hint-kd in {kind} loss")
        assert gain == pytest.approx(0.085, abs=0.01) and verdict == "holds"
    assert judged(groups, "layerwise-hint > original in test loss")[1:] == ("not judged", "original has no test loss")
    for pair in (1, 2, 3):                                          # the last tenth of a curve that ends near 0.3, or 0.4
        gain, verdict, _ = judged(groups, f"layerwise-hint > concurrent-hint in hint loss {pair}", 1)
        assert gain == pytest.approx(0.1, abs=0.01) and verdict == "not judged"


def test_iterations_to_a_value_count_up_to_the_first_test_that_has_it(tmp_path, measured):
    table = find_table("table1")
    synthetic.measure(tmp_path, table, {"kd": [90.8, 90.9, 91.0], "hint-kd": [91.5, 91.6, 91.7], "layerwise-hint": [80.0, 81.0, 82.0]})
    groups = read_groups(measured)

    def steps_to(aim: float, *ends: float) -> float:
        """A mean over nets with the curve of synthetic.record, which has a test after every 1,600 iterations."""
        return mean(next(1600 * k for k in range(41) if end + (10 - end) * exp(-6 * k / 40) >= aim) for end in ends)
    gain, verdict, _ = judged(groups, "hint-kd > kd in iterations to 90.5")
    assert gain == pytest.approx(steps_to(90.5, 90.8, 90.9, 91.0) - steps_to(90.5, 91.5, 91.6, 91.7))
    assert gain > 0 and verdict == "holds"
    gain, _, _ = judged(groups, "kd > layerwise-hint in iterations to 90")          # one that never gets there counts to its end
    assert gain == pytest.approx(64_000 - steps_to(90, 90.8, 90.9, 91.0))
    assert judged(groups, "kd <= layerwise-hint in iterations to 99.5")[:2] == (0, "within noise")


def test_hint_losses_of_steps_follow_each_other(tmp_path, measured):
    synthetic.measure(tmp_path, find_table("figure9"), {"concurrent-hint": [80.0], "layerwise-hint": [70.0]})
    (group,) = read_groups(measured)
    steps, together = (group.hint_losses(group.of(method)[0]) for method in ("layerwise-hint", "concurrent-hint"))
    assert [(curve[0], curve[-1][0]) for curve in steps.values()] == [((0, 1.0), 3_000), ((3_000, 1.0), 10_000), ((10_000, 1.0), 25_000)]
    assert [(curve[0], curve[-1][0]) for curve in together.values()] == [((0, 1.0), 25_000)] * 3


def test_all_methods_have_one_unit_at_a_hint_layer(tmp_path, measured):
    table = find_table("table1")
    synthetic.measure(tmp_path, table, {"hint-kd": [90.0], "hint-kd-plus": [90.0], "layerwise-hint": [90.0]})
    path = measured / "table1/layerwise-hint/net1.json"
    content = json.loads(path.read_text())
    for stage in content["stages"][:3]:                             # each of its pairs begins at half the others' loss
        stage["train"] = {name: [[at, value / 2] for at, value in curve] for name, curve in stage["train"].items()}
    path.write_text(json.dumps(content))
    (group,) = read_groups(measured)
    first = {record.method: {pair: curve[0][1] for pair, curve in group.hint_losses(record).items()} for record in group.records}
    assert first["hint-kd-plus"] == first["hint-kd"] == {"": 1.0}
    assert first["layerwise-hint"] == {"1": 1.0, "2": 1.0, "3": 0.5}        # hint-kd-plus, too, is to come near the end of the third stack


@pytest.mark.parametrize(("name", "value"), [("device", "gpu"), ("engine", "torchcaffe 1.0 numeric 0"), ("precision", "fp16")])
def test_other_conditions_are_kept_apart(name, value, tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    synthetic.measure(tmp_path, TABLE3, {"hint-kd": [0.5, 0.6, 0.7]}, provenance={**synthetic.PROVENANCE, name: value})
    groups = read_groups(measured)
    assert len(groups) == 2 and {group.apart for group in groups} == {(name,)}
    assert {group.conditions[name] for group in groups} == {synthetic.PROVENANCE[name], value}
    assert judged(groups, "hint-kd > kd")[1] == "not judged"


def test_machines_and_commits_may_differ_within_a_table(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    other = {**synthetic.PROVENANCE, "machine": "Darwin arm64", "commit": "f" * 40}
    synthetic.measure(tmp_path, TABLE3, {"hint-kd": [0.5, 0.6, 0.7]}, provenance=other)
    assert len(read_groups(measured)) == 1


def test_a_changed_table_is_read_from_beside_its_results(tmp_path, measured):
    table = TABLE3.changed({"teacher.depth": 20})
    synthetic.measure(tmp_path, table, {"kd": [0.5, 0.6, 0.7]})
    with pytest.raises(UserError, match=r"no table 'table3-teacher20'.*belongs beside its results, as .*table3-teacher20/table.yaml"):
        read_groups(measured)
    (measured / "table3-teacher20/table.yaml").write_text(table.dump(measured))
    assert read_groups(measured)[0].table == table


def test_a_damaged_record_is_named_with_its_field(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.6, 0.7]})
    path = measured / "table3/kd/net2.json"
    good = json.loads(path.read_text())
    for change, sentence in (({"net": "two"}, "not a record of a run: net: "), ({"schema": 2}, "not a record of a run: schema: "),
                             ({"metric": "top5"}, r"its metric 'top5' is not among its results \['accuracy'\]")):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=f"net2.json: {sentence}.*run `hintkd reproduce` again"):
            read_groups(measured)
    path.write_text("{")
    with pytest.raises(UserError, match="net2.json: not a record of a run: Invalid JSON"):
        read_groups(measured)


def test_nothing_measured_is_no_group(measured):
    assert read_groups(measured) == []


def test_an_ensemble_is_of_all_nets_of_a_row_and_made_when_they_are_there(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"teacher": [0.4], "kd": [0.5, 0.5], "hint-kd": [0.4, 0.4, 0.4]}, images=1000)
    assert read_groups(measured)[0].ensembles == {"hint-kd": {1: 1.0}}       # no two nets err on the same image
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.5, 0.5]}, images=1000)
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.5, 0.5]}, repeat=2, images=1000)
    assert read_groups(measured)[0].ensembles == {"hint-kd": {1: 1.0}, "kd": {1: 1.0, 2: 1.0}}
    synthetic.keep_right(measured / "table3/kd/net3.npz", 1000, 0, 1)
    synthetic.keep_right(measured / "table3/kd/net2.npz", 1000, 0, 1)        # two of three are always wrong
    assert read_groups(measured)[0].ensembles["kd"] == {1: 0.0, 2: 1.0}
    (measured / "table3/kd/net2.npz").unlink()
    assert read_groups(measured)[0].ensembles == {"hint-kd": {1: 1.0}, "kd": {2: 1.0}}


def test_nets_of_other_conditions_are_no_ensemble(tmp_path, measured):
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.5]}, images=1000)
    for net in (1, 2):
        (measured / f"table3/kd/net{net}.json").rename(measured / f"table3/kd/old{net}.json")
    synthetic.measure(tmp_path, TABLE3, {"kd": [0.5, 0.5, 0.5]}, images=1000, provenance={**synthetic.PROVENANCE, "precision": "bf16"})
    for net in (1, 2):
        (measured / f"table3/kd/old{net}.json").rename(measured / f"table3/kd/net{net}.json")
    assert [group.ensembles for group in read_groups(measured)] == [{}, {}]
