"""Student-friendly teachers: phase 1 against the same in plain torch, what it leaves behind, and who is taught by whom."""
from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

import torchcaffe as caffe
from hintkd import cli
from hintkd.backend import caffe_pb2, write_text
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Experiment, Network
from hintkd.methods.method import stages_of
from hintkd.methods.papers import paper
from hintkd.methods.sftn import SCHEDULES, Options, friendly_net
from hintkd.methods.stage import Stage
from hintkd.nets.branches import BRANCH
from hintkd.nets.resnet import ResNet
from hintkd.nets.titles import network
from hintkd.results.measured import read_groups
from hintkd.study.table import find_table
from torchcaffe.settings import number_type

SFTN = paper("sftn")
TEACHER, STUDENT, OTHER = ResNet(14, (4, 8, 16)), ResNet(8, (2, 4, 8)), ResNet(8, (4, 8, 8))


def teacher(pupil: Network | None = STUDENT, **changes: object) -> Experiment:
    """A teacher to be trained in phase 1, on 8x8 digits; `changes` are options."""
    return Experiment(SFTN.methods["student-friendly"], DATASETS["digits"], TEACHER, generation=1, pupil=pupil,
                      schedule=SCHEDULES["digits"], options=Options(**{"mean": "none", **changes}))  # type: ignore[arg-type]


def built(message: caffe_pb2.NetParameter, folder: Path, batch: int = 6, phase: int = caffe.TRAIN) -> caffe.Net:
    """The net in float64, with Input layers in place of its data layers, and weights that are not those of a beginning."""
    fed = caffe_pb2.NetParameter(name=message.name)
    fed.layer.add(name="data", type="Input", top=["data", "label"], input_param={"shape": [{"dim": [batch, 1, 8, 8]}, {"dim": [batch]}]})
    fed.layer.extend(layer for layer in message.layer if layer.name != "data")
    (folder / "net.prototxt").write_text(write_text(fed))
    caffe.set_random_seed(3)
    with number_type(torch.float64):
        net = caffe.Net(str(folder / "net.prototxt"), phase)
    draw = np.random.default_rng(5)
    for name, blobs in net.params.items():
        if not name.endswith(("_bn", "_proj")):              # statistics, and the shortcut's frozen ones
            for blob in blobs:
                blob.data[...] += 0.3 * draw.standard_normal(blob.data.shape)
    net.blobs["data"].data[...] = draw.standard_normal((batch, 1, 8, 8))
    net.blobs["label"].data[...] = draw.integers(0, 10, batch)
    return net


class Reference:
    """Teacher and branches as the paper draws them, in torch and float64, on the weights of a Caffe net."""

    def __init__(self, net: caffe.Net):
        self.weights = {(name, i): torch.tensor(np.array(blob.data), requires_grad=True)
                        for name, blobs in net.params.items() if not name.endswith("_bn") for i, blob in enumerate(blobs)}
        self.images, self.labels = (torch.tensor(np.array(net.blobs[name].data)) for name in ("data", "label"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return x * self.weights[name + "_scale", 0].view(1, -1, 1, 1) + self.weights[name + "_scale", 1].view(1, -1, 1, 1)

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.weights[name, 0]
        return self.norm(name, F.conv2d(x, weight, self.weights.get((name, 1)), stride, weight.shape[-1] // 2))

    def stage(self, prefix: str, group: int, blocks: int, x: torch.Tensor) -> torch.Tensor:
        for block in range(blocks):
            name, stride = f"{prefix}group{group}_block{block}", 2 if group and not block else 1
            inner = self.conv(name + "_conv1", F.relu(self.conv(name + "_conv0", x, stride)))
            shortcut = x[:, :, ::stride, ::stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, inner.shape[1] - shortcut.shape[1]))
            x = F.relu(inner + shortcut)
        return x

    def scores(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.mean((2, 3)), self.weights[prefix + "fc", 0], self.weights[prefix + "fc", 1])

    def losses(self, students: list[ResNet], tau: float, detached: bool, relu: bool = True) -> dict[str, torch.Tensor]:
        """By the names that Caffe's have."""
        x, ends, labels = F.relu(self.conv("first_conv", self.images)), [], self.labels.long()
        for group in range(3):
            x = self.stage("", group, TEACHER.n, x)
            ends.append(x)
        q = self.scores("", x)
        found = {"loss": F.cross_entropy(q, labels)}
        for student in students:
            for begin in (1, 2):
                name = f"{BRANCH}{student.title}/{begin}"
                y = self.conv(name + "/transform", ends[begin - 1])
                y = F.relu(y) if relu else y
                for group in range(begin, 3):
                    y = self.stage(name + "/", group, student.n, y)
                r = self.scores(name + "/", y)
                p, s = torch.softmax((q.detach() if detached else q) / tau, 1), torch.softmax(r / tau, 1)
                found[name + "/loss"] = F.cross_entropy(r, labels)
                found[name + "/kl"] = (p * (p / s).log()).sum() / len(p)
        return found


@pytest.mark.parametrize(("changes", "students", "weights"), [
    ({}, [STUDENT], (1, 3, 1)),
    ({"branch_gradient": "both"}, [STUDENT], (1, 3, 1)),
    ({"branch_tau": 2.0, "lambda_kl": 0.75, "lambda_ce": 1.5, "lambda_teacher": 0.5, "transform": "conv-bn", "branch_gradient": "both"},
     [STUDENT], (0.5, 0.75, 1.5)),
    ({"branches": (STUDENT.title, OTHER.title), "branch_loss": "mean"}, [STUDENT, OTHER], (1, 3 / 4, 1 / 4)),
], ids=["stopped", "flowing", "weighed", "several"])
def test_phase_1_has_the_losses_and_gradients_of_the_papers_equation(changes: dict[str, object], students: list[ResNet],
                                                                    weights: tuple[float, float, float], tmp_path: Path) -> None:
    x = teacher(**changes)
    net = built(friendly_net(x), tmp_path)
    reference = Reference(net)
    found = reference.losses(students, float(changes.get("branch_tau", 1)), detached="branch_gradient" not in changes,  # type: ignore[arg-type]
                             relu=x.options.transform == "conv-bn-relu")  # type: ignore[attr-defined]
    out = net.forward()
    tau = x.options.branch_tau  # type: ignore[attr-defined]
    own = {name: value.item() / (tau ** 2 if name.endswith("/kl") else 1) for name, value in out.items() if name in found}
    assert own == pytest.approx({name: value.item() for name, value in found.items()}, rel=1e-9) and len(found) == 1 + 4 * len(students)
    net.backward()
    total = sum(value * weights[0 if name == "loss" else 1 if name.endswith("/kl") else 2] for name, value in found.items())
    assert isinstance(total, torch.Tensor)
    total.backward()
    for (name, i), weight in reference.weights.items():
        if name.endswith("_proj"):                           # no part of the function but a frozen copy
            continue
        expected = np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
        np.testing.assert_allclose(net.params[name][i].diff, expected, atol=1e-9, rtol=1e-6, err_msg=name)


def test_a_stopped_gradient_leaves_the_teachers_own_classifier_to_its_labels(tmp_path: Path) -> None:
    """Whatever weight the divergence has, if its gradient goes into the branch alone."""
    def of_fc(**changes: object) -> np.ndarray:
        net = built(friendly_net(teacher(**changes)), tmp_path)
        net.forward()
        net.backward()
        return np.array(net.params["fc"][0].diff)
    plain, stopped, flowing = of_fc(lambda_kl=0.0), of_fc(), of_fc(branch_gradient="both")
    np.testing.assert_allclose(stopped, plain, rtol=1e-12)
    assert np.abs(flowing - plain).max() > 1e-3


def test_the_teacher_that_comes_out_is_a_plain_one(tmp_path: Path) -> None:
    (stage,) = stages_of(teacher())
    (plain,) = SFTN.methods["original"](replace(teacher(), method=SFTN.methods["original"]))
    names = {layer.name for layer in stage.net.layer}
    assert {layer.name for layer in plain.net.layer} == {name for name in names if stage.keeps(name)}
    assert any(name.startswith(BRANCH) for name in names) and stage.solver == plain.solver
    tested = built(stage.net, tmp_path, phase=caffe.TEST)
    assert set(tested.params) == set(built(plain.net, tmp_path, phase=caffe.TEST).params)


def test_phase_1_may_begin_with_the_plain_teacher() -> None:
    before, stage = stages_of(teacher(start="teacher"))
    assert [before] == stages_of(replace(teacher(start="teacher"), method=SFTN.methods["original"]))
    assert [w.source for w in stage.weights_in] == [before] and stage.net == stages_of(teacher())[0].net


def test_branches_are_the_students_that_are_named_or_the_one_that_is_taught() -> None:
    def titles(x: Experiment) -> set[str]:
        return {layer.name.split("/")[1] for layer in stages_of(x)[-1].net.layer if layer.name.startswith(BRANCH)}
    assert titles(teacher()) == {STUDENT.title} and titles(teacher(branches=(OTHER.title,))) == {OTHER.title}
    assert titles(teacher(branches=(OTHER.title, STUDENT.title))) == {OTHER.title, STUDENT.title}
    assert titles(teacher(pupil=None, branches=(OTHER.title,))) == {OTHER.title}
    with pytest.raises(UserError, match="make it the teacher's method, or name branches"):
        stages_of(teacher(pupil=None))
    with pytest.raises(UserError, match="there is no network 'resent8'"):
        teacher(branches=("resent8",))
    with pytest.raises(UserError, match="the teacher has 3 where vgg8 has 4"):
        stages_of(teacher(pupil=network("vgg8")))


def test_a_transform_is_left_out_where_it_is_not_needed() -> None:
    def transforms(**changes: object) -> int:
        return sum(layer.name.endswith("/transform") for layer in stages_of(teacher(OTHER, **changes))[0].net.layer)
    assert (transforms(), transforms(transform="where-needed")) == (2, 0)


PAIRS = (("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("resnet56", "resnet20"), ("resnet110", "resnet20"), ("resnet110", "resnet32"),
         ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("ResNet50", "MobileNetV2"), ("ResNet50", "vgg8"),
         ("resnet32x4", "ShuffleV1"), ("resnet32x4", "ShuffleV2"), ("wrn_40_2", "ShuffleV1"))


@pytest.mark.parametrize(("big", "small"), PAIRS)
def test_every_published_pair_has_a_phase_1_whose_shapes_fit(big: str, small: str, tmp_path: Path) -> None:
    from torchcaffe.settings import shapes_only
    x = replace(teacher(network(small)), dataset=DATASETS["cifar100-zoo"], student=network(big), schedule=SCHEDULES["cifar100"])
    fed = caffe_pb2.NetParameter(name="fed")
    fed.layer.add(name="data", type="Input", top=["data", "label"], input_param={"shape": [{"dim": [2, 3, 32, 32]}, {"dim": [2]}]})
    fed.layer.extend(layer for layer in friendly_net(x).layer if layer.name != "data")
    (tmp_path / "net.prototxt").write_text(write_text(fed))
    with shapes_only():
        net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    stages = 4 if "vgg" in small or "Mobile" in small else 3
    assert sum(name.endswith("/kl") for name in net.blobs) == stages - 1


# -- tables --------------------------------------------------------------------------------------------------------------------
def test_a_row_is_a_method_of_the_zoo_and_how_its_teacher_was_trained() -> None:
    plain, friendly = (find_table("sftn").experiment(f"wrn_16_2-by-wrn_40_2-{name}") for name in ("at", "friendly-at"))
    (alone,), (beside,) = stages_of(plain), stages_of(friendly)
    assert alone.net == beside.net and alone.solver == beside.solver
    assert [stage.title for stage in (*alone.sources, *beside.sources)] == ["teacher", "student-friendly"]
    assert stages_of(find_table("sftn").experiment("wrn_40_2-for-wrn_16_2")) == list(beside.sources)


@pytest.mark.parametrize(("name", "zoos", "many"), [("sftn", "crd-table1", 80), ("sftn-mixed", "crd-table2", 30)])
def test_the_published_values_are_those_of_the_zoos_tables(name: str, zoos: str, many: int) -> None:
    ours, theirs = find_table(name), find_table(zoos)
    shared = [name for name in ours.names if name in theirs.names]
    assert len(shared) > many and all(ours.published_mean(name) == theirs.published_mean(name) for name in shared)
    assert all(ours.published_mean(name) is None for name in ours.names if "friendly" in name)


def test_students_that_phase_1_did_not_see_have_a_teacher_of_others() -> None:
    seen, unseen, several, pretrained = (stages_of(find_table("sftn-variations").experiment(name))[-1].sources[0]
                                         for name in ("friendly", "unseen", "several", "pretrained"))
    def branches(stage: Stage) -> set[str]:
        return {layer.name.split("/")[1] for layer in stage.net.layer if layer.name.startswith(BRANCH)}
    assert [branches(stage) for stage in (seen, unseen, several)] == [{"wrn_16_2"}, {"wrn_40_1"}, {"wrn_16_2", "wrn_40_1"}]
    assert [stage.title for stage in pretrained.sources] == ["teacher"] and pretrained.net == seen.net


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_judges_its_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(cli.__file__).parents[2] / "results/paper", "demo/results/paper")
    table = Path("demo/results/paper/demo-sftn.yaml")
    table.write_text(yaml.safe_dump({**yaml.safe_load(table.read_text()), "nets": 2,
                                     "schedule": {"iterations": 3, "teacher_iterations": 2, "first_iterations": 2}}))
    assert cli.main(["demo", "sftn", "--jobs", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    (group,) = read_groups(tmp_path / "demo/results/measured", "demo-sftn")
    assert {record.name for record in group.records} == set(find_table("demo-sftn").names)
    assert "in iterations to" in out and "not judged friendly" not in out
