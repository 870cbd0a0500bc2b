"""The paper's tables as data: what is printed, what they turn into, and what is said about a wrong file."""
from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Experiment, Trained
from hintkd.methods.hint_2019 import SCHEDULES
from hintkd.methods.method import stages_of
from hintkd.nets.resnet import ResNet
from hintkd.results.report import published_gain
from hintkd.study.claims import Claim, Operand
from hintkd.study.table import find_table, load_table, table_names
from tiny_data import write_lmdb

NAMES = [name for name in table_names() if "byot" not in name]        # its tables are test_byot.py's

# Per table: dataset, teacher (depth, widths, value), student (depth, widths, value), then the printed averages.
BASE, WIDE = (16, 32, 64), (64, 128, 256)
PRINTED = {
    "table1": ("cifar10", (26, BASE, 91.75), (14, BASE, 90.79),
               {"kd": "90.76", "hint-kd": "91.15", "hint-kd-plus": "90.63", "layerwise-hint": "91.70"}),
    "table2": ("cifar100", (26, WIDE, 74.65), (8, WIDE, 69.51),
               {"kd": "70.83", "hint-kd": "71.74", "hint-kd-plus": "71.39", "layerwise-hint": "72.82"}),
    "table3": ("mnist", (32, BASE, 0.39), (8, BASE, 0.60),
               {"kd": "0.56", "hint-kd": "0.506", "hint-kd-plus": "0.57", "layerwise-hint": "0.416"}),
    "table4": ("mnist", (32, BASE, 0.39), (8, BASE, 0.60),
               {"kd": "0.573", "hint-kd": "0.56", "sl-resnet": "0.496", "sl-resnet-kd": "0.456", "layerwise-hint": "0.39"}),
    "table5": ("cifar10", (26, (32, 64, 128), 93.36), (14, BASE, 90.79), {"hint-kd": "91.21", "layerwise-hint": "92.01"}),
    "table6": ("cifar100", (14, (80, 160, 320), 73.49), (8, WIDE, 69.51), {"hint-kd": "72.13", "layerwise-hint": "73.11"}),
    "figure4": ("cifar10", (14, BASE, 90.79), (8, BASE, 88.09), {}),
    "figure5": ("cifar100", (20, WIDE, 74.43), (8, WIDE, 69.51), {}),
    "figure7": ("cifar10", (14, BASE, 90.79), (8, BASE, 88.09), {}),
    "figure8": ("cifar10", (26, BASE, 91.75), (8, BASE, 88.09), {}),
    "figure9": ("cifar10", (26, BASE, 91.75), (8, BASE, 88.09), {}),
    "figure10": ("cifar100", (14, WIDE, None), (8, WIDE, 69.51), {"hint-kd": "71.85", "layerwise-hint": "72.65"}),
}


def test_all_tables_are_found_in_the_papers_order():
    folder = Path(__file__).parents[2] / "results/paper"
    assert sorted(table_names()) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert table_names()[:6] == [f"table{k}" for k in range(1, 7)]
    assert [name for name in NAMES if name.startswith("figure")] == [f"figure{k}" for k in (4, 5, 7, 8, 9, 10)]


@pytest.mark.parametrize("name", PRINTED)
def test_networks_are_the_papers(name):
    table = find_table(name)
    dataset, teacher, student, averages = PRINTED[name]
    assert table.dataset == DATASETS[dataset]
    assert table.teacher and (table.teacher.network("teacher"), table.teacher.published) == (ResNet(*teacher[:2]), teacher[2])
    assert (table.student.network("student"), table.student.published) == (ResNet(*student[:2]), student[2])
    assert {row.method: row.average for row in table.rows if row.average is not None} == {m: float(text) for m, text in averages.items()}


@pytest.mark.parametrize(("name", "method", "text"), [(n, m, text) for n, entry in PRINTED.items() for m, text in entry[3].items()])
def test_nets_have_the_printed_average_when_it_is_truncated(name, method, text):
    row = find_table(name).row(method)
    if row.published:
        decimals = len(text.split(".")[1])
        mean = sum(Fraction(str(value)) for value in row.published) / 3
        assert Fraction(int(mean * 10 ** decimals), 10 ** decimals) == Fraction(text)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_own_numbers_support_its_claims_and_imply_the_orders(name):
    table = find_table(name)
    for claim in (*table.claims, *table.orders):
        gain = published_gain(claim, table)
        assert gain is None or gain > 0, claim.text
    drawn_alone = name == "figure7"                          # its bars have no printed values
    assert drawn_alone or all(published_gain(order, table) is not None for order in table.orders)


@pytest.mark.parametrize("name", PRINTED)
def test_a_claim_of_the_paper_says_what_and_where_the_paper_says_it(name):
    table = find_table(name)
    assert all(claim.words and claim.section for claim in table.claims)
    said = [claim.text for claim in table.claims]
    assert not {claim.text for claim in table.orders} & set(said) and len(set(said)) == len(said)
    for claim in (*table.claims, *table.orders, *table.controls):
        for side in (claim.left, claim.right):
            assert side.method in (find_table(side.table) if side.table else table).names


@pytest.mark.parametrize("name", [name for name in NAMES if find_table(name).paper == "hint_2019"])
def test_schedules_are_those_of_the_data_set(name):
    table = find_table(name)
    assert {x.schedule for x in table.experiments()} == {SCHEDULES[table.dataset.name]}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("table")])
def test_every_table_has_the_control(name):
    assert "kd-equal-iterations" in find_table(name).names


def test_nets_and_methods_become_experiments():
    table = find_table("table4")
    experiments = table.experiments(scale=0.5, seed=3)
    assert [x.name for x in experiments[:4]] == ["teacher", "original", "original", "original"]
    assert len(experiments) == 1 + 3 * (len(table.rows) + 1)
    assert {x.scale for x in experiments} == {0.5} and {x.seed for x in experiments} == {3} and {x.table for x in experiments} == {"table4"}
    assert {x.name: x.lambda_ for x in experiments} == {**dict.fromkeys(table.names, 5.0), "sl-resnet-kd": 3.0}


def test_chosen_methods_bring_the_teacher_they_need():
    table = find_table("table4")
    assert [(x.name, x.net) for x in table.experiments(rows=["kd"], nets=[2])] == [("teacher", 1), ("kd", 2)]
    assert {x.name for x in table.experiments(rows=["sl-resnet", "original"])} == {"sl-resnet", "original"}
    with pytest.raises(UserError, match="table4 has no row 'hint-kdd'; did you mean 'hint-kd'"):
        table.experiments(rows=["hint-kdd"])


def test_a_replication_has_seeds_of_its_own():
    runs = [find_table("table3").experiments(seed=2, repeat=r)[-1] for r in (1, 2, 3)]
    assert len({seed for x in runs for seed in (x.teacher.net_seed, x.shared_seed, x.net_seed)}) == 9


def test_table_4_is_other_runs_of_what_it_shares_with_table_3_but_for_teacher_and_original():
    third, fourth = ({(x.name, x.net): x for x in find_table(name).experiments()} for name in ("table3", "table4"))
    for key in third.keys() & fourth.keys():
        same = stages_of(third[key])[-1] == stages_of(fourth[key])[-1]
        assert same == (key[0] in ("teacher", "original")), key


def test_figure_4_and_the_choice_behind_it_ask_for_the_test_loss_and_no_other_table_does():
    assert [name for name in NAMES if find_table(name).experiments()[-1].test_loss] == ["choices-tau", "figure4"]


@pytest.mark.parametrize("name", [name for name in NAMES if "lambda" in name])
def test_a_study_of_the_teachers_weight_is_rows_that_share_all_but_the_last_stage(name):
    rows = {x.name: stages_of(x) for x in find_table(name).experiments(nets=[2]) if x.method.name == "hint-kd"}
    assert list(rows) == ["fixed", "linear-to-1", "linear-to-0", "steps-to-1"]
    assert len({stages[0] for stages in rows.values()}) == 1 and len({stages[-1] for stages in rows.values()}) == 4
    steps = find_table(name).experiment("fixed").schedule
    for row, schedule in (("linear-to-1", {"schedule": "linear", "end": 1.0, "iterations": steps.iterations}),
                          ("linear-to-0", {"schedule": "linear", "end": 0.0, "iterations": steps.iterations}),
                          ("steps-to-1", {"schedule": "step", "end": 1.0, "steps": [steps.iterations // 2, steps.iterations * 3 // 4]})):
        (loss,) = (layer for layer in rows[row][-1].net.layer if layer.name == "kd_loss")
        assert json.loads(loss.python_param.param_str) == {"tau": 3.0, "lambda": 5.0, **schedule}


def test_the_study_of_the_teachers_weight_begins_with_nets_of_tables_1_to_3():
    for study, known in (("lambda-cifar10", "table1"), ("lambda-cifar100", "table2"), ("lambda-mnist", "table3"), ("demo-lambda", "demo")):
        assert stages_of(find_table(study).experiment("fixed", net=3)) == stages_of(find_table(known).experiment("hint-kd", net=3))


def test_regressor_and_the_demos_teacher_data_reach_the_experiment():
    assert {x.regressor for x in find_table("table5").experiments()} == {True}
    demo = find_table("demo").experiments()[0]
    assert isinstance(demo.teacher, Experiment) and demo.teacher.dataset == DATASETS["digits-teacher"]
    assert demo.dataset == DATASETS["digits"] and demo.options.bn_fraction == 0.95


def test_other_networks_get_a_name_and_lose_the_published_numbers():
    table = find_table("table3").changed({"teacher.depth": 20, "student.depth": 14})
    assert table.name == "table3-teacher20-student14"
    x = table.experiments()[-1]
    assert isinstance(x.teacher, Experiment) and (x.teacher.student, x.student) == (ResNet(20), ResNet(14))
    assert all(table.published_mean(name) is None for name in table.names)
    assert table.claims == find_table("table3").claims


def test_an_option_gets_a_name_and_keeps_the_published_numbers():
    table = find_table("table3").changed({"shortcut": "B", "mirror": True})
    assert (table.name, table.options) == ("table3-shortcut-B", {"shortcut": "B"})
    assert table.published("kd") == (0.56, 0.57, 0.55)
    with pytest.raises(UserError, match="shortcutt: unknown; did you mean 'shortcut'"):
        table.changed({"shortcutt": "B"})
    with pytest.raises(UserError, match="shortcut is 'C'"):
        table.changed({"shortcut": "C"})


def test_nothing_changed_is_the_same_table():
    table = find_table("table1")
    same = table.changed({"teacher.depth": 26, "student.depth": 14, "shortcut": "A", "lambda": 5, "hint_iterations": 25_000})
    assert same == table and same.name == "table1"


def test_a_teacher_of_ones_own_is_not_trained():
    table = find_table("table1").changed({"teacher.weights": "mine/big.caffemodel", "teacher.prototxt": "mine/big.prototxt"})
    assert table.name == "table1-big" and "teacher" not in table.names
    x = table.experiments(rows=["kd"])[0]
    assert x.name == "kd" and x.teacher == Trained(Path("mine/big.caffemodel"), Path("mine/big.prototxt"), ResNet(26))
    with pytest.raises(UserError, match="without its weights"):
        find_table("table1").changed({"teacher.prototxt": "mine/big.prototxt"})


def write_sets(folder: Path, test: int) -> Path:
    """Two training images and so many to test, of 32x32 pixels."""
    for name, count in (("train_lmdb", 2), ("test_lmdb", test)):
        write_lmdb(folder / name, np.zeros((count, 3, 32, 32), np.uint8), np.zeros(count, int))
    return folder


def test_data_of_ones_own(tmp_path):
    with pytest.raises(UserError, match="has no train_lmdb"):
        find_table("table1").changed(data=tmp_path)
    folder = write_sets(tmp_path / "birds", test=100)
    table = find_table("table1").changed(data=folder)
    assert table.name == "table1-birds" and table.published_mean("kd") is None
    assert (table.dataset.train_lmdb, table.dataset.test_mean) == (str(folder / "train_lmdb"), str(folder / "test_mean.binaryproto"))
    (folder / "dataset.json").write_text('{"name": "cifar10"}')
    assert find_table("table1").changed(data=folder).name == "table1"


@pytest.mark.parametrize(("count", "batch", "batches"), [(100, 100, 1), (250, 50, 5), (130, 65, 2), (97, 97, 1), (101, 1, 101)])
def test_a_test_set_of_ones_own_is_looked_at_once_and_whole(count, batch, batches, tmp_path):
    dataset = find_table("table1").changed(data=write_sets(tmp_path / "birds", count)).dataset
    assert (dataset.test_batch, dataset.test_iter, dataset.test_size, dataset.train_size) == (batch, batches, count, 2)


def test_a_folder_whose_lmdb_is_none_is_refused(tmp_path):
    for name in ("train_lmdb", "test_lmdb"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="there is no LMDB .*train_lmdb"):
        find_table("table1").changed(data=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_read_back_as_it_was_written(name, tmp_path):
    own = {"student.depth": 20, "tau_squared": True, "label_tau": "tau"}
    changes = own if find_table(name).paper == "hint_2019" else {"alpha": 0.5}
    for table in (find_table(name), find_table(name).changed(changes)):
        path = tmp_path / "table.yaml"
        path.write_text(table.dump(tmp_path))
        again = load_table(path)
        assert again.experiments() == table.experiments() and again.name == table.name
        assert again.rows == table.rows and again.claims == table.claims


@pytest.mark.parametrize(("change", "sentence"), [
    ({"metrik": "error"}, "metrik: unknown field; did you mean 'metric'?"),
    ({"rows": [{"metod": "kd"}]}, "rows[0].metod: unknown field; did you mean 'method'?"),
    ({"rows": [{"method": "hint-kdd"}]}, "rows[0].method: 'hint-kdd' is not a method; did you mean 'hint-kd'?"),
    ({"rows": [{"method": "kd"}, {"method": "kd"}]}, "rows[1].method: 'kd' is there already; give the row a name of its own"),
    ({"rows": [{"method": "kd", "published": [1, 2]}]}, "rows[0].published: 2 values for 3 nets; give one for each"),
    ({"rows": [{"method": "kd", "published": [1, 2, 300]}]}, "rows[0].published[2]: 300 will not do; give a number from 0 to 100"),
    ({"schedule": {"iteration": 3}}, "schedule.iteration: unknown field; did you mean 'iterations'?"),
    ({"options": {"shortcutt": "B"}}, "options.shortcutt: unknown field; did you mean 'shortcut'?"),
    ({"options": {"shortcut": "C"}}, "shortcut is 'C'; it must be one of 'A', 'B'"),
    ({"student": {"depth": 9}}, "student: a ResNet of depth 9 does not exist"),
    ({"student": None}, "student: "),
    ({"dataset": "cifar"}, "dataset: 'cifar' is not a data set; did you mean 'cifar10'?"),
    ({"dataset": {"name": "birds", "sise": 3}}, "dataset.sise: unknown field; did you mean 'size'?"),
    ({"teacher": None}, "rows[0].method: 'kd' needs a teacher; add one"),
    ({"claims": ["kd beats original"]}, "claims[0]: 'kd beats original' is not a claim"),
    ({"claims": ["kd > sl-resnet"]}, "claims[0]: the table has no row 'sl-resnet'"),
    ({"orders": ["kd > sl-resnet"]}, "orders[0]: the table has no row 'sl-resnet'"),
    ({"claims": [{"text": "kd is better"}]}, "claims[0]: {'text': 'kd is better'} is not a claim; write 'A > B', or a mapping"),
    ({"claims": [{"claim": "kd > original", "were": "3"}]}, "claims[0]: unknown field 'were'; a claim has claim, text, section"),
    ({"claims": ["kd > original in test loss"]}, "claims[0]: 'kd > original in test loss' needs `test_loss: true` in the table"),
    ({"name": "../elsewhere"}, "name: '../elsewhere'"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_table_is_refused_with_a_sentence(change, sentence, tmp_path):
    good = {"title": "Mine", "source": "me", "dataset": "mnist", "rows": [{"method": "kd"}], "teacher": {"depth": 14},
            "student": {"depth": 8}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(good))
    assert load_table(path).name == "mine"
    path.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(UserError) as error:
        load_table(path)
    assert str(error.value).startswith(f"{path}: ") and sentence in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_table_is_refused_with_its_place(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: [open\nrows: 3\n")
    with pytest.raises(UserError, match=r"mine.yaml:2:5: not YAML"):
        load_table(path)
    path.write_text("just words")
    with pytest.raises(UserError, match="a table is a YAML mapping"):
        load_table(path)
    with pytest.raises(UserError, match="No such file"):
        find_table(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="no table 'tabel3'; did you mean 'table3'"):
        find_table("tabel3")


def test_a_claim_is_a_formula_or_a_mapping_with_the_papers_words(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("""{title: Mine, source: me, dataset: mnist, rows: [{method: kd}], teacher: {depth: 14}, student: {depth: 8}, claims: [
        kd > original, {claim: kd > original, text: KD helps, section: "3.2"}]}""")
    plain, said = load_table(path).claims
    assert plain == Claim.parse("kd > original") and (plain.words, plain.section) == ("", "")
    assert (said.text, said.left, said.words, said.section) == ("kd > original", Operand("kd"), "KD helps", "3.2")
    path.write_text(load_table(path).dump(tmp_path))
    assert load_table(path).claims == (plain, said)


def test_claims_are_parsed():
    claim = Claim.parse("best layerwise-hint > table1/hint-kd in hint loss 2")
    assert (claim.left, claim.better, claim.right) == (Operand("layerwise-hint", best=True), True, Operand("hint-kd", "table1"))
    assert (claim.aim, Claim.parse("kd > original in iterations to 67.5").aim) == (None, 67.5)
    assert claim.measure == "hint loss 2" and Claim.parse("kd <= original").better is False
