"""The zoo's methods: their weights, their nets for every published pair, what they hand on, and where they refuse."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Experiment, Trained
from hintkd.methods.method import stages_of
from hintkd.methods.papers import paper
from hintkd.methods.stage import Stage
from hintkd.nets import surgery
from hintkd.nets.titles import network
from hintkd.study.table import find_table
from torchcaffe.settings import shapes_only

ZOO = paper("zoo")
METHODS = [name for name, method in ZOO.methods.items() if method.needs_teacher and not method.is_shared]
PAIRS = (                                    # of CRD's tables 1 and 2
    ("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("resnet56", "resnet20"), ("resnet110", "resnet20"), ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("ResNet50", "MobileNetV2"), ("ResNet50", "vgg8"),
    ("resnet32x4", "ShuffleV1"), ("resnet32x4", "ShuffleV2"), ("wrn_40_2", "ShuffleV1"))
WEIGHTS = {                                  # (labels, softened scores, the method's own, summed over its losses)
    "kd": (0.1, 0.9, 0), "fitnet": (1, 0, 100), "at": (1, 0, 3 * 1000), "sp": (1, 0, 3000), "vid": (1, 0, 3), "ab": (1, 0, 0),
    "ft": (1, 0, 200), "oh": (1, 0, (1 + 1 / 2 + 1 / 4) / 1000), "rkd": (1, 0, 1), "pkt": (1, 0, 30000),
    "crd": (1, 0, 0.8), "crd-kd": (1, 1, 0.8)}


def experiment(method: str, teacher: str = "wrn_40_2", student: str = "wrn_16_2", schedule: Any = None, **options: Any) -> Experiment:
    shared: dict[str, Any] = {"dataset": DATASETS["cifar100-zoo"], "schedule": schedule or ZOO.schedule(), "tau": 4.0,
                              "options": ZOO.options(**options)}
    taught = Experiment(ZOO.methods["original"], student=network(teacher), generation=1, pupil=network(student), **shared)
    return Experiment(ZOO.methods[method], student=network(student), teacher=taught, **shared)


def weights(stage: Stage) -> dict[str, float]:
    """Of every loss of the TRAIN phase, a mean over features as in the sources."""
    known = surgery.shapes(stage.net.layer, (3, 32, 32))
    found = {}
    for layer in stage.net.layer:
        weight = layer.loss_weight[0] if layer.loss_weight else 1 if layer.type == "SoftmaxWithLoss" else None
        if weight is not None:
            found[layer.name] = weight * (np.prod(known[layer.bottom[0]]) / 2 if layer.type == "EuclideanLoss" else 1)
    return found


@pytest.mark.parametrize("method", WEIGHTS)
def test_weights_are_those_of_the_protocol(method: str) -> None:
    found = weights(stages_of(experiment(method))[-1])
    labels, scores = found.pop("loss"), found.pop("kd_loss", 0)
    assert (labels, scores, sum(found.values())) == pytest.approx(WEIGHTS[method])


def test_first_stages_weigh_as_the_sources_do() -> None:
    boundaries, paraphraser = (stages_of(experiment(method))[0] for method in ("ab", "ft"))
    assert weights(boundaries) == pytest.approx({"ab0_loss": 0.003 / 4, "ab1_loss": 0.003 / 2, "ab2_loss": 0.003})
    assert weights(paraphraser) == pytest.approx({"paraphraser_loss": 1})
    assert [stage.solver.max_iter for stage in (boundaries, paraphraser)] == [30 * 782] * 2
    assert [round(stage.solver.base_lr, 6) for stage in (boundaries, paraphraser)] == [0.05, 0.01]


@pytest.mark.parametrize(("student", "lr"), [("wrn_16_2", 0.05), ("vgg8", 0.05), ("MobileNetV2", 0.01), ("ShuffleV1", 0.01)])
def test_light_students_learn_at_a_smaller_rate_and_their_teachers_do_not(student: str, lr: float) -> None:
    x = experiment("kd", teacher="vgg13" if student == "MobileNetV2" else "wrn_40_2", student=student)
    (last,), (taught,) = stages_of(x), stages_of(x.teacher)  # type: ignore[arg-type]
    assert (last.solver.base_lr, taught.solver.base_lr) == pytest.approx((lr, 0.05))
    assert stages_of(replace(x, method=ZOO.methods["original"]))[0].solver.base_lr == pytest.approx(lr)
    assert list(last.solver.stepvalue) == [117_300, 140_760, 164_220] and last.solver.max_iter == 187_680


def test_tables_hold_what_was_published_for_every_pair_and_method() -> None:
    found = {}
    for name, size in (("crd-table1", 5), ("crd-table2", 3)):
        table = find_table(name)
        for row in table.rows:
            x = table.experiment(row.title)
            assert x.options.as_dict().get("bn_fraction") == 0.9 and table.nets == size
            if isinstance(x.teacher, Experiment) and not x.method.is_shared and x.method.name != "original":
                found[x.teacher.student.title, x.student.title, x.method.name] = row.average
                assert row.title == f"{x.student.title}-by-{x.teacher.student.title}-{x.method.name}"
    assert set(found) == {(*pair, method) for pair in PAIRS for method in METHODS if method not in ("oh", "sskd")}
    assert (found["wrn_40_2", "wrn_16_2", "kd"], found["resnet110", "resnet20", "at"], found["wrn_40_2", "ShuffleV1", "ft"],
            found["vgg13", "MobileNetV2", "pkt"]) == (74.92, 70.22, 72.03, 67.13)
    sskd = find_table("sskd")
    assert sskd.row("vgg8-by-vgg13-rkd").average == 73.72 and sskd.row("resnet32x4").average == 79.63
    assert weights(stages_of(sskd.experiment("vgg8-by-vgg13-rkd"))[0])["kd_loss"] == 1
    assert {sskd.experiment(row.title).options.as_dict()["alpha"] for row in sskd.rows if row.method == "sskd"} == {0.9}
    overhaul = stages_of(find_table("overhaul").experiment("wrn_28_2-oh"))[0]
    assert '"padding": "reflect"' in overhaul.net.layer[0].python_param.param_str
    assert overhaul.solver.type == "Nesterov" and list(overhaul.solver.stepvalue) == [39_100, 58_650]


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_every_method_makes_nets_of_known_shapes_for_every_published_pair(pair: tuple[str, str]) -> None:
    for method in METHODS:
        for stage in stages_of(experiment(method, *pair)):
            known = surgery.shapes(stage.net.layer, (3, 32, 32))
            for layer in stage.net.layer:
                if layer.type == "EuclideanLoss" or layer.python_param.module in ("hintkd.layers.boundary", "hintkd.layers.margin_relu"):
                    assert known[layer.bottom[0]] == known[layer.bottom[1]], f"{method}: {layer.name}"
            assert caffe_pb2.NetParameter.FromString(stage.net.SerializeToString()) == stage.net


def build(stage: Stage, folder: Path) -> Any:
    """The stage's TRAIN net, two images at a time, with shapes and no numbers."""
    net = caffe_pb2.NetParameter(name=stage.net.name)
    for layer in stage.net.layer:
        if layer.bottom:
            net.layer.add().CopyFrom(layer)
    data = next(layer for layer in stage.net.layer if not layer.bottom)
    rows = 8 if '"views": 4' in data.python_param.param_str else 2
    net.layer.insert(0, caffe_pb2.LayerParameter(name="data", type="Input", top=data.top, input_param={
        "shape": [{"dim": [rows, 3, 32, 32]}, {"dim": [2]}, {"dim": [2]}][:len(data.top)]}))
    path = folder / "net.prototxt"
    path.write_text(write_text(net))
    with shapes_only():
        return caffe.Net(str(path), caffe.TRAIN)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_every_net_of_every_published_pair_is_one_that_can_be_built(pair: tuple[str, str], tmp_path: Path) -> None:
    for method in METHODS:
        for stage in stages_of(experiment(method, *pair)):
            assert any(name.endswith("loss") for name in build(stage, tmp_path).outputs), f"{method}: {stage.title}"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_handed_on_is_the_student_alone(method: str) -> None:
    last, (plain,) = stages_of(experiment(method))[-1], stages_of(experiment("original"))
    kept = {layer.name for layer in last.net.layer if last.keeps(layer.name)}
    assert {layer.name for layer in plain.net.layer} <= kept
    assert all(re.search("_tap_", name) for name in kept - {layer.name for layer in plain.net.layer})
    tested = [layer for layer in last.net.layer if not layer.include or layer.include[0].phase == caffe.TEST]
    assert {layer.name for layer in tested} == {layer.name for layer in plain.net.layer}
    assert not [layer for layer in last.net.layer if "propagate_down" in str(layer) and layer.name.startswith(surgery.TEACHER)]


def test_a_margin_has_the_parameters_of_the_teachers_batch_norm(tmp_path: Path) -> None:
    for teacher, student in (("wrn_10_2", "wrn_10_1"), ("resnet8x4", "resnet8"), ("vgg13", "vgg8"), ("ResNet50", "vgg8"),
                             ("MobileNetV2", "vgg8")):
        (stage,) = stages_of(experiment("oh", teacher, student))
        net = build(stage, tmp_path)
        owners = {node.layer.name: node.owners for node in net.graph.nodes}
        for i, layer in enumerate(layer for layer in stage.net.layer if layer.python_param.layer == "MarginLoss"):
            (scale,) = {name for name, owned in owners.items() if name != layer.name and name.endswith("_scale") and "_tap" not in name
                        and owned == owners[layer.name]} or {name for name, owned in owners.items() if owned == owners[layer.name]
                                                              and "tap_scale" in name}
            assert scale.startswith("teacher/"), f"{teacher}: {i}"
    with pytest.raises(UserError, match="comes from none"):
        stages_of(experiment("oh", "ShuffleV2", "resnet20"))


def test_options_choose_between_sources() -> None:
    hint, then = stages_of(experiment("fitnet", fitnet_stages="two"))
    assert (hint.title, then.title) == ("hint", "kd") and not hint.keeps("regressor") and weights(then)["kd_loss"] == pytest.approx(0.9)
    for variances, learns in (("learned", True), ("fixed", False)):
        (stage,) = stages_of(experiment("vid", vid_variances=variances))
        assert all((not layer.param or layer.param[0].lr_mult > 0) == learns for layer in stage.net.layer if layer.name.endswith("0_loss"))
    assert weights(stages_of(experiment("at", alpha=1.0, beta=500.0, gamma=0.5))[0]) == pytest.approx(
        {"loss": 0.5, "kd_loss": 1, **dict.fromkeys(("at0_loss", "at1_loss", "at2_loss"), 500)})
    taught = [layer for layer in stages_of(experiment("ab", ab_statistics="batch"))[0].net.layer if layer.name == "teacher/block1_0_bn1_bn"]
    assert [layer.batch_norm_param.use_global_stats for layer in taught] == [False]


def test_what_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(UserError, match="wrn_16_2 has 3 stages where vgg13 has 4"):
        stages_of(experiment("at", "vgg13"))
    with pytest.raises(UserError, match="needs the schedule of paper zoo"):
        stages_of(replace(experiment("kd"), schedule=paper("hint_2019").schedule()))
    own = Trained(Path("own.caffemodel"), network=network("wrn_40_2"))
    assert stages_of(replace(experiment("kd"), teacher=own))[0].weights_in[0].source == Path("own.caffemodel")
