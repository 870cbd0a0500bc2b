"""Methods as lists of stages: which, how long, from which seed and weights; and that every stage trains."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import torchcaffe
from experiments import METHODS, experiment
from hintkd.backend import caffe_pb2, read_weights, write_text
from hintkd.errors import UserError
from hintkd.experiment import DATASETS, Dataset, Experiment, Trained
from hintkd.methods.hint_2019 import SCHEDULES, Options, Schedule, kd_stage
from hintkd.methods.method import Method, method, stages_of, teacher_stages
from hintkd.methods.papers import paper
from hintkd.methods.stage import Stage, Weights
from hintkd.nets.resnet import ResNet
from hintkd.run.folders import test_net as published_net
from tiny_data import write_dataset

TITLES = {
    "teacher": ["teacher"], "original": ["original"], "kd": ["kd"], "kd-equal-iterations": ["kd"], "hint-kd": ["hint", "kd"],
    "hint-kd-plus": ["hint", "kd"], "layerwise-hint": ["hint1", "hint2", "hint3", "kd"], "concurrent-hint": ["hint", "kd"],
    "sl-resnet": ["sl1", "sl2", "sl3", "finetune"], "sl-resnet-kd": ["sl1", "sl2", "sl3", "kd"],
}
ITERATIONS = {
    "teacher": [64_000], "original": [64_000], "kd": [64_000], "kd-equal-iterations": [89_000], "hint-kd": [25_000, 64_000],
    "hint-kd-plus": [25_000, 64_000], "layerwise-hint": [3_000, 7_000, 15_000, 64_000], "concurrent-hint": [25_000, 64_000],
    "sl-resnet": [12_000] * 3 + [64_000], "sl-resnet-kd": [12_000] * 3 + [64_000],
}


def losses(stage: Stage) -> dict[str, list[str]]:
    """Bottoms of the hint losses by name."""
    return {layer.name: list(layer.bottom) for layer in stage.net.layer if layer.type == "Python"}


@pytest.mark.parametrize("method", TITLES)
def test_stages_and_their_lengths(method: str) -> None:
    stages = stages_of(experiment(method))
    assert [stage.title for stage in stages] == TITLES[method]
    assert [stage.solver.max_iter for stage in stages] == ITERATIONS[method]
    assert stages == stages_of(experiment(method))


def test_every_method_is_tested() -> None:
    assert set(paper("hint_2019").methods) == set(TITLES)


@pytest.mark.parametrize("method", TITLES)
def test_each_stage_starts_from_the_teacher_if_it_needs_one_and_from_the_stage_before(method: str) -> None:
    stages = stages_of(experiment(method))
    for before, stage in zip([None, *stages], stages, strict=False):
        needs_teacher = any(layer.name.startswith("teacher/") for layer in stage.net.layer)
        expected = [(teacher_stages(experiment(method))[-1], "teacher/")] * needs_teacher + ([(before, "")] if before else [])
        assert [(w.source, w.prefix) for w in stage.weights_in] == expected
        assert not needs_teacher or not stage.keeps("teacher/fc")


def test_rates_fall_at_half_and_three_quarters_or_stay() -> None:
    hint, kd = stages_of(experiment("hint-kd"))
    assert (kd.solver.lr_policy, list(kd.solver.stepvalue)) == ("multistep", [32_000, 48_000])
    assert [kd.solver.gamma, kd.solver.base_lr] == pytest.approx([0.1, 0.1])
    assert (hint.solver.lr_policy, hint.solver.base_lr) == ("fixed", pytest.approx(1e-4))
    assert list(stages_of(experiment("kd-equal-iterations"))[0].solver.stepvalue) == [44_500, 66_750]
    sl = stages_of(experiment("sl-resnet"))[0].solver
    assert (sl.lr_policy, sl.base_lr) == ("fixed", pytest.approx(0.1))


@pytest.mark.parametrize("method", TITLES)
def test_nets_share_stage_1_and_differ_in_all_that_is_their_own(method: str) -> None:
    runs = [stages_of(experiment(method, net=k)) for k in (1, 2, 3)]
    for same in zip(*runs, strict=True):
        shared = same[0].title.startswith(("hint", "teacher"))
        assert len(set(same)) == (1 if shared else 3)
        assert len({stage.solver.random_seed for stage in same}) == (1 if shared else 3)


def test_sl_pretraining_is_shared_between_its_two_methods() -> None:
    assert stages_of(experiment("sl-resnet"))[:3] == stages_of(experiment("sl-resnet-kd"))[:3]


def test_pairs_are_the_ends_of_the_stacks() -> None:
    x = experiment("layerwise-hint", teacher=ResNet(26))
    expected = [{f"hint{g + 1}_loss": [f"group{g}_block0_sum", f"teacher/group{g}_block3_sum"]} for g in range(3)]
    assert [losses(stage) for stage in stages_of(x)[:3]] == expected
    concurrent = losses(stages_of(experiment("concurrent-hint", teacher=ResNet(26)))[0])
    assert concurrent == {name: bottoms for step in expected for name, bottoms in step.items()}


@pytest.mark.parametrize(("depth", "module"), [
    (8, "group1_block0"), (14, "group1_block0"), (20, "group1_block1"), (26, "group1_block1"), (32, "group1_block2")])
def test_the_middle_layer_is_module_3n_over_2(depth: int, module: str) -> None:
    hint = stages_of(experiment("hint-kd", teacher=ResNet(depth), student=ResNet(depth)))[0]      # modules 2, 3, 5, 6, 8
    assert losses(hint) == {"hint_loss": [module + "_sum", f"teacher/{module}_sum"]}


def test_hint_kd_plus_taps_before_or_after_the_pooling() -> None:
    assert losses(stages_of(experiment("hint-kd-plus"))[0]) == {"hint_loss": ["group2_block0_sum", "teacher/group2_block1_sum"]}
    after = stages_of(experiment("hint-kd-plus", options=Options(plus_tap="after")))[0]
    assert losses(after) == {"hint_loss": ["global_avg_pool", "teacher/global_avg_pool"]}


def test_pairs_by_hand_take_the_place_of_the_papers() -> None:
    by_hand = (("group0_block0_relu", "first_conv_relu"),)
    assert losses(stages_of(experiment("hint-kd", hint_pairs=by_hand))[0]) == {"hint_loss": ["first_conv", "teacher/group0_block0_sum"]}
    assert list(losses(stages_of(experiment("concurrent-hint", hint_pairs=by_hand * 2))[0])) == ["hint1_loss", "hint2_loss"]
    with pytest.raises(UserError, match="compares one pair of layers, and 2 were named"):
        stages_of(experiment("hint-kd", hint_pairs=by_hand * 2))
    with pytest.raises(UserError, match="2 pairs of layers but 3 layerwise_iterations"):
        stages_of(experiment("layerwise-hint", hint_pairs=by_hand * 2))


def test_regressors_stay_behind() -> None:
    for stage in stages_of(experiment("layerwise-hint", teacher=ResNet(14, (32, 64, 128)), regressor=True))[:3]:
        regressors = [layer.name for layer in stage.net.layer if layer.name.startswith("regressor")]
        assert len(regressors) == 1 and not stage.keeps(regressors[0])


def test_sl_steps_add_a_module_and_leave_their_fc_behind() -> None:
    steps = stages_of(experiment("sl-resnet", student=ResNet(14)))
    assert [sum(layer.name.endswith("_sum") for layer in stage.net.layer) for stage in steps] == [1, 2, 3, 4, 5, 6, 6]
    assert [stage.keeps("fc") for stage in steps] == [False] * 5 + [True] * 2
    assert all(stage.keeps("first_conv") for stage in steps)


def test_sl_modules_can_be_frozen() -> None:
    stage = stages_of(experiment("sl-resnet", options=Options(sl_modules="frozen")))[1]
    still = {layer.name for layer in stage.net.layer if layer.type in ("Convolution", "Scale") and any(s.lr_mult == 0 for s in layer.param)}
    assert "first_conv" in still and "group0_block0_conv1_scale" in still and "group1_block0_conv0" not in still


def test_a_scaled_run_is_short_in_everything() -> None:
    hint, kd = stages_of(experiment("hint-kd", scale=0.05))
    assert (hint.solver.max_iter, kd.solver.max_iter, list(kd.solver.stepvalue)) == (1_250, 3_200, [1_600, 2_400])
    fractions = {layer.batch_norm_param.moving_average_fraction for layer in kd.net.layer if layer.type == "BatchNorm"}
    assert list(fractions) == [pytest.approx(0.98)]


@pytest.mark.parametrize(("dataset", "scale", "tests"), [
    ("cifar10", 1, 40), ("cifar10", 0.05, 10), ("mnist", 1, 40), ("mnist", 0.05, 2), ("mnist", 0.001, 1), ("digits", 1, 4),
    ("digits", 0.01, 1)])
def test_curves_have_points_enough_and_tests_see_the_whole_set_but_a_fifth_of_all_images(dataset: str, scale: float, tests: int) -> None:
    x = experiment("hint-kd", dataset=DATASETS[dataset], schedule=SCHEDULES[dataset], scale=scale)
    for stage in stages_of(x):
        solver = stage.solver
        assert solver.max_iter < 100 or 100 <= solver.max_iter / solver.display < 110
        if solver.test_iter:
            assert solver.test_iter[0] * x.dataset.test_batch == x.dataset.test_size
            assert solver.max_iter // solver.test_interval == tests
            tested, trained = tests * x.dataset.test_size, solver.max_iter * x.dataset.batch
            assert tests == 1 or tested <= (tested + trained) / 5
        assert bool(solver.test_iter) == any(rule.phase == caffe_pb2.TEST for layer in stage.net.layer for rule in layer.include)


def test_an_external_teacher_is_not_trained() -> None:
    x = experiment("kd", teacher=Trained(Path("mine.caffemodel"), network=ResNet(14)))
    assert [(w.source, w.prefix) for w in stages_of(x)[0].weights_in] == [(Path("mine.caffemodel"), "teacher/")]
    assert stages_of(x)[0].net == stages_of(experiment("kd"))[0].net
    with pytest.raises(UserError, match="name the pairs"):
        stages_of(experiment("hint-kd", teacher=Trained(Path("mine.caffemodel"), Path("mine.prototxt"))))


@method
def distilled_twice(x: Experiment) -> list[Stage]:
    """KD from a teacher."""
    return [kd_stage(x)]


def test_any_methods_result_can_be_a_teacher_with_seeds_of_its_own() -> None:
    top = experiment("kd", teacher=ResNet(26)).teacher
    assert isinstance(top, Experiment)
    middle = Experiment(METHODS["hint-kd"], DATASETS["cifar10"], ResNet(14), replace(top, generation=2, student=ResNet(20)), generation=1,
                        schedule=Schedule(), options=Options())
    (kd,) = stages_of(experiment("kd", teacher=middle))
    (taught,) = kd.sources
    assert taught == stages_of(middle)[-1] and [stage.title for stage in taught.sources] == ["teacher", "hint"]
    assert {layer.name for layer in taught.net.layer if layer.name.startswith("teacher/group")} > {"teacher/group0_block2_conv0"}
    plain, own = taught.sources[0], stages_of(experiment("hint-kd", teacher=middle))
    seeds = [stage.solver.random_seed for stage in (plain, taught, taught.sources[1], *own)]
    assert len(set(seeds)) == len(seeds) == 5
    assert not any(name.startswith("teacher/teacher/") for name in (layer.name for layer in kd.net.layer))


def test_a_teacher_for_its_pupil_knows_it() -> None:
    seen = []

    def friendly(x: Experiment) -> list[Stage]:
        seen.append(x.pupil)
        return METHODS["original"](x)
    teacher = experiment("kd", student=ResNet(8), teacher=ResNet(14)).teacher
    assert isinstance(teacher, Experiment)
    stages_of(experiment("kd", teacher=replace(teacher, method=Method("friendly", friendly, needs_teacher=False))))
    assert set(seen) == {ResNet(8)}


def test_a_method_says_its_name_and_what_it_needs() -> None:
    assert distilled_twice.name == "distilled-twice" and distilled_twice.about == "KD from a teacher."
    for name, each in METHODS.items():
        if each.needs_teacher:
            with pytest.raises(UserError, match=f"{name} needs a teacher"):
                stages_of(experiment(name, teacher=None))
        else:
            assert stages_of(experiment(name, teacher=None))


def test_stages_of_a_file_of_ones_own_are_signed_with_it_and_the_teachers_are_not() -> None:
    own = replace(METHODS["hint-kd"], source="mine.py")
    x = experiment("hint-kd")
    hint, kd = stages_of(replace(x, method=own))
    assert (hint.source, kd.source) == ("mine.py", "mine.py") and kd.weights_in[1].source == hint
    assert kd != stages_of(x)[-1] and kd.sources[0] == stages_of(x)[-1].sources[0]
    assert Weights(hint) in kd.weights_in


# -- training ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("workspace")
    return folder, write_dataset("digits", folder)


def small(method: str, dataset: Dataset, **changed: object) -> Experiment:
    """Nets of 4, 8 and 16 filters on 8x8 images, four iterations each."""
    schedule = Schedule(iterations=4, teacher_iterations=4, hint_iterations=4, layerwise_iterations=(4, 4, 4), sl_iterations=4)
    return experiment(method, **{"dataset": dataset, "student": ResNet(8, (4, 8, 16)), "teacher": ResNet(14, (4, 8, 16)),  # type: ignore[arg-type]
                                 "schedule": schedule, "options": Options(bn_fraction=0.9), **changed})


class Trainer:
    """Trains stages in the current directory, each once."""

    def __init__(self, fast: bool):
        self.fast, self.weights = fast, dict[Stage, dict[str, list[np.ndarray]]]()

    def train(self, stage: Stage) -> dict[str, list[np.ndarray]]:
        """The weights out, after checking that the teacher has not moved."""
        if stage not in self.weights:
            given = {w.prefix + name: blobs for w in stage.weights_in if isinstance(w.source, Stage)
                     for name, blobs in self.train(w.source).items()}
            name = f"{stage.title}-{stage.digest[:8]}-{self.fast:d}"
            Path(name + ".net").write_text(write_text(stage.net))
            message = caffe_pb2.SolverParameter()
            message.CopyFrom(stage.solver)
            message.net, message.snapshot_prefix = name + ".net", name
            Path(name).write_text(write_text(message))
            solver = torchcaffe.get_solver(name)
            solver.fast = self.fast
            for layer, blobs in given.items():
                if layer in solver.net.params:
                    for blob, value in zip(solver.net.params[layer], blobs, strict=True):
                        blob.data[...] = value
            solver.solve()
            after = dict(read_weights(f"{name}_iter_{stage.solver.max_iter}.caffemodel"))
            teacher = {layer: blobs for layer, blobs in after.items() if layer.startswith("teacher/") and blobs}
            moving = [layer.name for layer in stage.net.layer if layer.type == "BatchNorm" and not layer.batch_norm_param.use_global_stats]
            assert all(np.array_equal(a, b) for layer, blobs in teacher.items() if layer not in moving
                       for a, b in zip(blobs, given[layer], strict=True))
            assert all(not np.array_equal(teacher[layer][0], given[layer][0]) for layer in moving if layer in teacher)
            assert all(np.isfinite(blob).all() for blobs in after.values() for blob in blobs)
            self.weights[stage] = {layer: blobs for layer, blobs in after.items() if blobs and stage.keeps(layer)}
        return self.weights[stage]


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "by layer"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return Trainer(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_trains_and_leaves_the_teacher_as_it_was(method: str, trainer: Trainer, workspace: tuple[Path, Dataset],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace[0])
    final = trainer.train(stages_of(small(method, workspace[1]))[-1])
    assert "fc" in final and not any(name.startswith(("teacher/", "regressor", "kd_loss")) for name in final)


VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "shortcut B": ("layerwise-hint", {"options": Options(shortcut="B", bn_fraction=0.9)}),
    "regressor": ("concurrent-hint", {"regressor": True, "teacher": ResNet(8, (8, 16, 32)),
                                      "options": Options(regressor_kernel=3, bn_fraction=0.9)}),
    "after pooling": ("hint-kd-plus", {"options": Options(plus_tap="after", bn_fraction=0.9)}),
    "frozen modules": ("sl-resnet", {"options": Options(sl_modules="frozen", bn_fraction=0.9)}),
    "teacher on batches": ("kd", {"options": Options(teacher_statistics="batch", bn_fraction=0.9)}),
    "lambda falls": ("hint-kd", {"lambda_schedule": "linear", "options": Options(label_tau="tau", tau_squared=True, bn_fraction=0.9)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_train(variant: str, trainer: Trainer, workspace: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace[0])
    method, changed = VARIANTS[variant]
    stages = stages_of(small(method, workspace[1], **changed))
    final = trainer.train(stages[-1])
    assert "fc" in final and "kd_loss" not in final
    if variant == "frozen modules":
        first, second = (trainer.train(stage) for stage in stages[:2])
        still = ("first_conv", "group0_block0_conv1", "group0_block0_conv1_scale")
        assert all(np.array_equal(first[name][0], second[name][0]) for name in still)


def test_the_loss_on_the_test_set_is_equation_2(trainer: Trainer, workspace: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace[0])
    stage = stages_of(small("kd", workspace[1], test_loss=True))[-1]
    trainer.train(stage)
    name = f"{stage.title}-{stage.digest[:8]}-{trainer.fast:d}"
    net = torchcaffe.Net(name + ".net", torchcaffe.TEST)
    net.copy_from(f"{name}_iter_4.caffemodel")

    def log_softmax(scores: np.ndarray) -> np.ndarray:
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    for _ in range(workspace[1].test_iter):
        found = float(net.forward()["kd_loss"].item())
        student, teacher = (net.blobs[blob].data.reshape(8, -1).astype(np.float64) for blob in ("fc", "teacher/fc"))
        labels = net.blobs["label"].data.reshape(-1).astype(int)
        hard = -log_softmax(student)[np.arange(8), labels].mean()
        soft = -(np.exp(log_softmax(teacher / 3)) * log_softmax(student / 3)).sum(axis=1).mean()
        assert found == pytest.approx(hard + 5 * soft, rel=1e-5)


def test_a_loss_on_the_test_set_changes_the_stages_alone_that_have_it() -> None:
    plain, tested = stages_of(experiment("layerwise-hint")), stages_of(experiment("layerwise-hint", test_loss=True))
    assert plain[:-1] == tested[:-1] and plain[-1] != tested[-1]
    assert stages_of(experiment("original")) == stages_of(experiment("original", test_loss=True))
    published = published_net(tested[-1])
    assert published == published_net(plain[-1]) and not any(layer.name.startswith(("teacher/", "kd_loss")) for layer in published.layer)


@pytest.mark.parametrize("method", ["kd", "concurrent-hint"])
def test_both_ways_to_run_agree(method: str, workspace: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace[0])
    schedule = Schedule(iterations=4, teacher_iterations=4, hint_iterations=4, base_lr=0.01)     # a small rate: float32 drifts apart at 0.1
    stage = stages_of(small(method, workspace[1], schedule=schedule))[-1]
    ways = [Trainer(fast).train(stage) for fast in (True, False)]
    assert ways[0].keys() == ways[1].keys()
    for name in ways[0]:
        for a, b in zip(ways[0][name], ways[1][name], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3, err_msg=name)
