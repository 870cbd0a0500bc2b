"""The loop: order of tests, displays and snapshots; files; exact continuation."""
import json
import re

import numpy as np
import pytest

import torchcaffe as caffe
from nets import MLP, feed, parameters, resnet8, write_solver


def equal(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def run(path, iterations, exact=False, fast=True):
    solver = caffe.get_solver(path)
    solver.fast, solver.exact = fast, exact
    feed(solver.net, classes=3)
    for net in solver.test_nets:
        feed(net, classes=3)
    solver.step(iterations)
    return solver


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    path = write_solver(tmp_path, MLP)
    assert equal(parameters(run(path, 10).net), parameters(run(path, 10).net))


def test_another_seed_gives_other_weights(tmp_path):
    a = parameters(run(write_solver(tmp_path, MLP), 1).net)
    b = parameters(run(write_solver(tmp_path, MLP, random_seed=8), 1).net)
    assert not equal(a, b)


@pytest.mark.parametrize("kind", ["BINARYPROTO", "HDF5"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_run_continued_from_its_snapshot_ends_with_the_same_bytes(tmp_path, kind, fast):
    path = write_solver(tmp_path, MLP, snapshot_format=kind, lr_policy="multistep", gamma=0.1, stepvalue=[3, 7])
    whole = run(path, 12, exact=True, fast=fast)
    first = run(path, 5, exact=True, fast=fast)
    state = first.snapshot()
    second = caffe.get_solver(path)
    second.fast, second.exact = fast, True
    feed(second.net, classes=3)
    second.restore(state)
    assert second.iter == 5
    second.step(7)
    assert equal(parameters(whole.net), parameters(second.net))


RECURRENT = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 6 dim: 5 } } }
layer { name: "cont" type: "Input" top: "cont" input_param { shape { dim: 2 dim: 6 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 dim: 6 dim: 4 } } }
layer { name: "lstm" type: "LSTM" bottom: "data" bottom: "cont" top: "lstm"
  recurrent_param { num_output: 4 weight_filler { type: "uniform" min: -0.5 max: 0.5 } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "lstm" bottom: "label" top: "loss" }
"""


def test_what_a_recurrent_layer_carries_from_pass_to_pass_is_continued(tmp_path):
    path = write_solver(tmp_path, RECURRENT)

    def begin():
        solver = caffe.get_solver(path)
        solver.fast = solver.exact = True
        feed(solver.net)
        solver.net.blobs["cont"].data[...] = 1
        return solver

    whole, first, second = begin(), begin(), begin()
    whole.step(7)
    first.step(3)
    second.restore(first.snapshot())
    second.step(4)
    assert equal(parameters(whole.net), parameters(second.net))


def test_restoring_without_exact_starts_the_draws_again_as_caffe_does(tmp_path):
    path = write_solver(tmp_path, MLP)
    state = run(path, 5, exact=True).snapshot()
    plain = caffe.get_solver(path)
    plain.fast = True
    plain.restore(state)
    assert plain.net.layer_dict["drop"].cursor == 0


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: f.unlink(), "missing"),
    (lambda f: f.write_text("{"), "damaged"),
    (lambda f: f.write_text(json.dumps({**json.loads(f.read_text()), "digest": "0"})), "another snapshot"),
    (lambda f: f.write_text(f.read_text().replace('"threads": 1', '"threads": 64')), "threads 64"),
])
def test_a_sidecar_that_does_not_fit_is_refused_with_the_reason(tmp_path, damage, message):
    path = write_solver(tmp_path, MLP)
    caffe.set_threads(1)
    state = run(path, 3, exact=True).snapshot()
    damage(tmp_path / "snap_iter_3.sidecar.json")
    solver = caffe.get_solver(path)
    solver.fast, solver.exact = True, True
    with pytest.raises(caffe.SidecarError, match=message):
        solver.restore(state)


def test_the_log_reads_like_caffe_s(tmp_path, capsys):
    path = write_solver(tmp_path, resnet8(), display=2, max_iter=4, test_iter=1, test_interval=2, snapshot=2)
    run(path, 0).solve()
    lines = [re.sub(r"^I\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \S+:\d+\] ", "", line) for line in capsys.readouterr().err.splitlines()]
    shape = [re.sub(r"[-\d.e+]+(?= \(\*)|(?<== )[-\d.e+]+|\([\d.e+-]+ iter/s, [\d.e-]+s/2 iters\)|(?<=file ).*snap", "~", x) for x in lines]
    tested = ["    Test net output #0: accuracy = ~", "    Test net output #1: loss = ~ (* 1 = ~ loss)"]
    assert shape[2:12] == [
        "Iteration 0, Testing net (#0)", *tested,
        "Iteration 0 ~, loss = ~", "    Train net output #0: accuracy = ~", "    Train net output #1: loss = ~ (* 1 = ~ loss)",
        "Iteration 0, lr = ~", "Snapshotting to binary proto file ~_iter_2.caffemodel",
        "Snapshotting solver state to binary proto file ~_iter_2.solverstate", "Iteration 2, Testing net (#0)"]
    assert shape[-5:] == ["Iteration 4, loss = ~", "Iteration 4, Testing net (#0)", *tested, "Optimization Done."]


def test_a_state_of_another_net_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    state = run(write_solver(tmp_path / "a", MLP), 1).snapshot()
    other = caffe.get_solver(write_solver(tmp_path / "b", resnet8()))
    with pytest.raises(caffe.CaffeError, match="belongs to another net"):
        other.restore(state)


@pytest.mark.parametrize(("fields", "message"), [
    ({"type": "Magic"}, "solver type 'Magic' is not registered"),
    ({"lr_policy": "magic"}, "lr_policy 'magic' is not one of"),
    ({"test_iter": 1}, "test_interval must be above 0"),
    ({"lr_policy": "step"}, "needs a stepsize"), ({"lr_policy": "sigmoid"}, "needs a stepsize"),
    *(({"lr_policy": policy, "gamma": -0.5, "stepsize": 2}, f"'{policy}' needs a gamma of at least 0, not -0.5")
      for policy in ("step", "exp", "inv", "multistep", "sigmoid")),
    ({"snapshot": 5, "snapshot_prefix": "gone/snap"}, "snapshot_prefix 'gone/snap': there is no writable folder gone"),
    ({"train_net": "other.prototxt"}, "exactly one of net"),
])
def test_a_solver_that_cannot_run_is_refused_with_the_file_s_name(tmp_path, fields, message):
    path = write_solver(tmp_path, MLP, **fields)
    with pytest.raises(caffe.CaffeError, match=message) as caught:
        caffe.get_solver(path)
    assert str(caught.value).startswith(path)


def test_a_gamma_that_no_policy_uses_may_be_anything(tmp_path):
    assert caffe.get_solver(write_solver(tmp_path, MLP, lr_policy="fixed", gamma=-1)).lr == pytest.approx(0.01)


def test_a_run_that_will_end_in_a_snapshot_needs_its_folder_when_it_begins(tmp_path):
    solver = run(write_solver(tmp_path, MLP, snapshot_prefix=str(tmp_path / "gone/snap"), max_iter=3), 1)      # takes none by then
    with pytest.raises(caffe.CaffeError, match="there is no writable folder .*gone; make it"):
        solver.solve()
    with pytest.raises(caffe.CaffeError, match="there is no writable folder .*gone; make it"):
        caffe.solve_together([solver])
    assert solver.iter == 1
    solver.param.snapshot_after_train = False
    solver.solve()
    assert solver.iter == 3


def test_callbacks_run_before_and_in_every_iteration(tmp_path):
    solver, seen = caffe.get_solver(write_solver(tmp_path, MLP)), []
    solver.add_callback(lambda: seen.append(("start", solver.iter)), lambda: seen.append(("ready", solver.iter)))
    solver.step(2)
    assert seen == [("start", 0), ("ready", 0), ("start", 1), ("ready", 1)]


def test_a_run_asked_to_stop_ends_after_its_iteration(tmp_path):
    solver = caffe.get_solver(write_solver(tmp_path, MLP))
    solver.add_callback(lambda: solver.request("stop") if solver.iter == 2 else None, lambda: None)
    solver.step(10)
    assert solver.iter == 3
