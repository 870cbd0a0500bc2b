"""Exported modules and ONNX models give what Caffe gave; what cannot be exported, or would be wrong, is not written."""
from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import check
import lmdbs
import torchcaffe as caffe
from test_golden import CASES
from torchcaffe import formats
from torchcaffe.cli import main
from torchcaffe.export import export, helpers, torch_module
from torchcaffe.layers.vision import Pool

MISSING = "the extra `export` is not installed"
safetensors = pytest.importorskip("safetensors.torch", reason=MISSING)
onnxruntime = pytest.importorskip("onnxruntime", reason=MISSING)
onnx_model = pytest.importorskip("torchcaffe.export.onnx_model", reason=MISSING)

ROOT = Path(__file__).resolve().parents[2]
RESNET = "prototxt/mnist/resnet8/original/1-original.prototxt"
LEFT_OUT = {"Accuracy", "BatchReindex", "DummyData", "Embed", "Filter", "Im2col", "Input", "LSTM", "LSTMUnit", "Python", "RNN", "Silence"}
IN_TRAINING = ("layers/BatchNorm/train_", "layers/Dropout/train_", "layers/Reduction/mean_loss")
NETS = [f"nets/{name}" for name in ("branches_test", "input_shapes", "lenet_test", "old_inputs", "resnet8_test", "rules_test_deploy",
                                    "shared_permissive", "shared_siamese", "v1", "weight_used_again")]
EXPORTED = [case for case in CASES if case.startswith("layers/") and case.split("/")[1] in torch_module.WRITERS
            and not case.startswith(IN_TRAINING)] + NETS


def run(file: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of an exported file."""
    if file.suffix == ".py":
        tops = load(file)(*map(torch.from_numpy, inputs))
        return [top.detach().numpy() for top in (tops if isinstance(tops, tuple) else (tops,))]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([item.name for item in session.get_inputs()], inputs, strict=True)))


def load(file: Path) -> nn.Module:
    return runpy.run_path(str(file))["load"](file.with_suffix(".safetensors"))


def write(folder: Path, text: str, phase: int = caffe.TEST) -> caffe.Net:
    """net.prototxt, and net.caffemodel with drawn weights; the net."""
    (folder / "net.prototxt").write_text(text)
    net = caffe.Net(str(folder / "net.prototxt"), phase)
    draw = np.random.default_rng(3)
    for blobs in net.params.values():
        for blob in blobs:
            blob.data[...] = draw.uniform(0.5, 1.5, blob.shape)
    net.save(str(folder / "net.caffemodel"))
    return net


def command(*arguments: str, form: str = "py") -> tuple[str, ...]:
    return ("export", "net.prototxt", "net.caffemodel", f"out.{form}", *arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(*shape: int, name: str = "data") -> str:
    dims = " ".join(f"dim: {size}" for size in shape)
    return f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ {dims} }} }} }}\n'


def layer(name: str, kind: str, bottom: str, top: str, more: str = "") -> str:
    bottoms = " ".join(f'bottom: "{blob}"' for blob in bottom.split())
    tops = " ".join(f'top: "{blob}"' for blob in top.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} {tops} {more} }}\n'


# -- against Caffe -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["py", "onnx"])
@pytest.mark.parametrize("name", EXPORTED)
def test_gives_what_caffe_gave(name, form, golden, folder):
    case, arrays = json.loads((golden / name / "case.json").read_text()), np.load(golden / name / "data.npz")
    state = getattr(caffe, case["phase"]), case.get("level", 0), case.get("stages", ())
    source = golden / name / "net.prototxt"
    net = caffe.Net(str(source), *state)
    if (golden / name / "init.caffemodel").exists():
        net.copy_from(str(golden / name / "init.caffemodel"))
    for key, value in check.group(arrays, "param").items():
        check.param(net, key).data[...] = value
    net.save("weights.caffemodel")
    done = export(source, "weights.caffemodel", f"out.{form}", *state)
    tops = run(folder / f"out.{form}", *(arrays[f"in/{blob}"] for blob in done.inputs))
    for top, got in zip(done.outputs, tops, strict=True):
        check.compare(top, got, arrays[f"out/{top}"], case["rtol"] or 1e-6, case["atol"] or 1e-6)


def test_both_forms_know_the_same_layers_and_it_is_known_which_are_left_out():
    assert set(torch_module.WRITERS) == set(onnx_model.WRITERS)
    types = {case.split("/")[1] for case in CASES if case.startswith("layers/")}
    assert {name for name in types - set(torch_module.WRITERS) if not name.endswith("Loss")} == LEFT_OUT


@pytest.mark.parametrize("average", [False, True])
def test_pooling_modules_have_caffes_windows_for_images_of_any_size(average):
    class Writer:
        helper = staticmethod(str)
    draw = torch.Generator().manual_seed(1)
    for kernel, stride, pad, ceil in ((k, s, p, c) for k in range(1, 5) for s in range(1, 5) for p in range(k) for c in (False, True)):
        pool = Pool((kernel, 3), (stride, 2), (pad, 0 if pad == 0 else 1), ceil)
        module = eval(torch_module._pool(Writer(), pool, average), {"nn": nn, "CaffePool2d": helpers.CaffePool2d})
        for size in range(kernel, kernel + 6):
            x = torch.randn(1, 2, size, 7, generator=draw)
            want = pool.average(x) if average else pool.maximum(x)[0]
            torch.testing.assert_close(module(x), want, equal_nan=True, msg=f"{pool} on {size} x 7")


# -- the whole way ---------------------------------------------------------------------------------------------------
@pytest.fixture
def resnet(folder: Path) -> Path:
    """A workspace with hintkd's ResNet-8, which has shortcut A, after a few training batches."""
    (folder / RESNET).parent.mkdir(parents=True)
    (folder / RESNET).write_bytes((ROOT / RESNET).read_bytes())
    (folder / "data/mnist").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 28, 28), np.uint8)
    for name in ("train", "test"):
        lmdbs.write_images(folder / f"data/mnist/{name}_lmdb", images, [i % 10 for i in range(50)])
    caffe.set_random_seed(1)
    (folder / "solver.prototxt").write_text(f'net: "{RESNET}" base_lr: 0.01 lr_policy: "fixed" max_iter: 2 random_seed: 1')
    solver = caffe.SGDSolver("solver.prototxt")
    solver.step(2)
    solver.net.save("resnet8.caffemodel")
    return folder


@pytest.mark.parametrize("form", ["py", "onnx"])
def test_resnet_8_through_the_command_line(resnet, capfd, form):
    assert main(["export", RESNET, "resnet8.caffemodel", f"resnet8.{form}"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"data to fc in \d+ steps; with \w+, outputs up to \S+ differ from the net's by at most \S+$", said.strip())
    net = caffe.Net(RESNET, caffe.TEST, weights="resnet8.caffemodel")
    net.forward()
    (fc,) = run(resnet / f"resnet8.{form}", net.blobs["data"].data[:7])                # another batch size than the prototxt's
    np.testing.assert_allclose(fc, net.blobs["fc"].data[:7], rtol=1e-4, atol=1e-4)


def test_the_module_needs_torch_alone(resnet):
    export(RESNET, "resnet8.caffemodel", "resnet8.py")
    code = ("import sys\nfor name in ('torchcaffe', 'safetensors', 'onnx'): sys.modules[name] = None\n"
            "import torch, resnet8\nprint(tuple(resnet8.load()(torch.zeros(2, 1, 28, 28)).shape))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=resnet,
                          env=os.environ | {"PYTHONPATH": str(resnet)})
    assert done.stdout.strip() == "(2, 10)"


def test_the_state_dict_is_batch_norms_as_torch_has_it(resnet):
    export(RESNET, "resnet8.caffemodel", "resnet8.py")
    state, weights = safetensors.load_file("resnet8.safetensors"), dict(formats.read_weights("resnet8.caffemodel"))
    mean, variance, factor = weights["first_conv_bn"]
    np.testing.assert_allclose(state["first_conv_bn.running_mean"], mean / factor, rtol=1e-6)
    np.testing.assert_allclose(state["first_conv_bn.running_var"], variance / factor, rtol=1e-6)
    for part, array in zip(("weight", "bias"), weights["first_conv_scale"], strict=True):
        np.testing.assert_array_equal(state[f"first_conv_bn.{part}"], array)
    assert not [name for name in state if "_scale" in name]
    net = load(resnet / "resnet8.py")
    assert net.first_conv_bn.eps == 1e-5 and net.first_conv_bn.momentum == pytest.approx(0.001)
    net.load_state_dict(state)                                                          # all of it, and nothing else
    order = [name for name, _ in net.named_children()]
    assert len({path.stat().st_mode for path in resnet.glob("resnet8.*")}) == 1         # readable by whom the weights were
    assert order == [name for name in caffe.Net(RESNET, caffe.TEST).layer_dict if name in order]


def test_the_module_says_what_the_data_layer_did(resnet):
    export(RESNET, "resnet8.caffemodel", "resnet8.py")
    assert "data as layer data delivers: scale: 0.003921569" in runpy.run_path("resnet8.py")["__doc__"]


def test_the_example_of_the_document(resnet):
    text = (ROOT / "docs/export.md").read_text()
    for line in re.findall(r"^    torchcaffe (export .*)$", text, flags=re.MULTILINE):
        assert main(line.split()) == 0
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=False, cwd=resnet)
    assert done.returncode == 0, done.stderr


def test_the_document_names_every_layer_type():
    text = (ROOT / "docs/export.md").read_text()
    assert not [name for name in torch_module.WRITERS if not re.search(rf"\b{name}\b", text)]


# -- what is exported ------------------------------------------------------------------------------------------------
HEADS = data(4, 3) + data(4, name="label") + layer("ip", "InnerProduct", "data", "ip", "inner_product_param { num_output: 5 }")


@pytest.mark.parametrize(("more", "outputs"), [
    (layer("loss", "SoftmaxWithLoss", "ip label", "loss"), ["ip"]),
    (layer("prob", "Softmax", "ip", "prob"), ["prob"]),
    (layer("loss", "SoftmaxWithLoss", "ip label", "loss") + layer("prob", "Softmax", "ip", "prob"), ["ip", "prob"]),
    (layer("loss", "SoftmaxWithLoss", "ip label", "loss") + layer("twice", "Power", "loss", "twice"), ["ip"]),
    (layer("own", "Python", "ip label", "own", 'loss_weight: 1 python_param { module: "nowhere" layer: "Loss" }'), ["ip"]),
    (layer("cut", "Slice", "ip", "used unused", "slice_param { slice_point: 2 }") + layer("hush", "Silence", "unused", "")
     + layer("act", "ReLU", "used", "used"), ["used"]),
    (layer("shift", "Power", "label", "shifted") + layer("loss", "SoftmaxWithLoss", "ip shifted", "loss"), ["ip"]),
])
def test_scores_are_outputs_and_measures_are_left_out(folder, more, outputs):
    write(folder, HEADS)
    (folder / "net.prototxt").write_text(HEADS + more.replace(' top: ""', ""))
    done = export("net.prototxt", "net.caffemodel", "out.py")
    assert list(done.outputs) == outputs and done.inputs == ("data",)


def test_a_net_for_training_is_exported_as_it_infers(folder):
    net = write(folder, data(8, 3, 4, 4) + layer("bn", "BatchNorm", "data", "bn", "include { phase: TRAIN }")
                + layer("drop", "Dropout", "bn", "drop", "include { phase: TRAIN }"), caffe.TRAIN)
    assert main(command("--phase", "TRAIN")) == 0
    x = np.random.default_rng(0).standard_normal((8, 3, 4, 4)).astype(np.float32)
    mean, variance, factor = (blob.data[:, None, None] for blob in net.params["bn"])
    np.testing.assert_allclose(run(folder / "out.py", x)[0], (x - mean / factor) / np.sqrt(variance / factor + 1e-5), rtol=1e-4)


def test_stages_choose_layers(folder):
    text = data(2, 3) + "".join(layer(name, "Power", "data", name, f'include {{ stage: "{name}" }}') for name in ("one", "two"))
    write(folder, text)
    for stage in ("one", "two"):
        done = export("net.prototxt", "net.caffemodel", "out.py", stages=[stage])
        assert done.outputs == (stage,)
    assert main(command("--stage", "two")) == 0


@pytest.mark.parametrize("form", ["py", "onnx"])
def test_what_depends_on_the_batch_size_is_exported_for_that_size(folder, form):
    cut = layer("cut", "Slice", "data", "a b", "slice_param { axis: 0 }")
    net = write(folder, data(4, 3) + cut + layer("sum", "Eltwise", "a b", "sum"))
    assert main(command(form=form)) == 0
    net.forward(data=np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))
    np.testing.assert_allclose(run(folder / f"out.{form}", net.blobs["data"].data)[0], net.blobs["sum"].data, rtol=1e-6)


def test_shared_parameters_stay_shared(folder):
    shared = 'param { name: "w" } param { name: "b" } inner_product_param { num_output: 3 }'
    write(folder, data(2, 3) + layer("one", "InnerProduct", "data", "one", shared) + layer("two", "InnerProduct", "one", "two", shared))
    export("net.prototxt", "net.caffemodel", "out.py")
    net = load(folder / "out.py")
    assert net.one.weight is net.two.weight and net.one.bias is net.two.bias


NAMES = ["forward", "class", "1x1", "a b", "a_b", "self", "torch", "", "x\\n    import os; os.mkdir('broken')\\n#", '\\"\\"\\"',
         "os.mkdir('broken')", "\\u00fc"]


@pytest.mark.parametrize("form", ["py", "onnx"])
def test_names_become_identifiers_and_never_code(folder, form):
    text, blob = 'name: "x\\"\\"\\"\\nimport os; os.mkdir(\'broken\')"\n' + data(2, 3), "data"
    for i, name in enumerate(NAMES):
        kind = 'type: "Power"' if i % 2 else 'type: "InnerProduct" inner_product_param { num_output: 3 }'
        text += f'layer {{ name: "{name}" bottom: "{blob}" top: "{name or "nameless"}" {kind} }}\n'
        blob = name or "nameless"
    net = write(folder, text)
    assert main(command(form=form)) == 0
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    want = next(iter(net.forward(data=x).values()))
    np.testing.assert_allclose(run(folder / f"out.{form}", x)[0], want, rtol=1e-4)
    assert not (folder / "broken").exists()


# -- what is refused -------------------------------------------------------------------------------------------------
def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must fail with 2 says, having written nothing."""
    before = sorted(os.listdir())
    assert main(arguments) == 2
    assert sorted(os.listdir()) == before
    return capfd.readouterr().err.splitlines()[-1]


IP = layer("ip", "InnerProduct", "data", "ip", "inner_product_param { num_output: 5 }")


@pytest.mark.parametrize(("text", "words"), [
    (data(2, 3) + IP + layer("lstm", "Embed", "ip", "e", "embed_param { input_dim: 2 num_output: 2 bias_term: false }")
     + layer("own", "Python", "e", "own", 'python_param { module: "nowhere" layer: "Own" }'),
     "net.prototxt:3: layer 'lstm' (Embed) and layer 'own' (Python) cannot be exported"),
    (data(2, 3) + data(2, name="label") + layer("loss", "SoftmaxWithLoss", "data label", "loss"), "net.prototxt: nothing is left to"),
    (data(2, 3) + layer("r", "ReLU", "dato", "r"), "net.prototxt:2: layer 'r' (ReLU): unknown bottom blob 'dato'"),
    (data(2, 3) + IP.replace('"ip"', '"new"', 1), "net.caffemodel: holds no parameters for layer 'new' of net.prototxt"),
    (data(1, 1, 4, 4) + layer("p", "Pooling", "data", "y mask", "pooling_param { kernel_size: 1 stride: 2 }"),
     "net.prototxt:2: layer 'p' (Pooling) cannot be exported: it has a mask"),
])
@pytest.mark.parametrize("form", ["py", "onnx"])
def test_what_cannot_be_exported_is_named(folder, capfd, text, words, form):
    write(folder, data(2, 3) + IP)
    (folder / "net.prototxt").write_text(text)
    assert complaint(capfd, *command(form=form)).startswith(f"torchcaffe: {words}")


def test_other_kinds_of_file_are_refused(folder, capfd):
    write(folder, data(2, 3) + IP)
    assert "out.pth: ends neither in .py" in complaint(capfd, *command(form="pth"))


@pytest.mark.parametrize(("form", "writers", "wrong"), [
    ("py", torch_module.WRITERS, lambda m, s, x: m.module("nn.Identity()") + f"({x})"),
    ("py", torch_module.WRITERS, lambda m, s, x: f"{x}[:1]"),
    ("onnx", onnx_model.WRITERS, lambda g, s, x: x),
])
def test_an_export_that_disagrees_is_not_written(folder, capfd, monkeypatch, form, writers, wrong):
    write(folder, data(2, 3) + IP + layer("act", "TanH", "ip", "act"))
    assert main(command(form=form)) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setitem(writers, "TanH", wrong)
    assert f"out.{form}: is not written, because with" in complaint(capfd, *command(form=form))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("form", "package"), [("py", "safetensors.torch"), ("onnx", "onnx")])
def test_missing_packages_are_named(folder, capfd, monkeypatch, form, package):
    write(folder, data(2, 3) + IP)
    monkeypatch.setitem(sys.modules, package, None)
    assert complaint(capfd, *command(form=form)).count(f"needs the package {package}: ") == 1


def test_without_onnxruntime_onnx_checks_itself(folder, capfd, monkeypatch):
    write(folder, data(2, 3) + IP)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(command(form="onnx")) == 0
    assert "with onnx's reference evaluator, outputs" in capfd.readouterr().out
    grouped = "convolution_param { num_output: 4 kernel_size: 3 group: 2 }"             # which it gets wrong
    write(folder, data(2, 4, 5, 5) + layer("d", "Deconvolution", "data", "d", grouped))
    assert complaint(capfd, *command(form="onnx")).endswith("install onnxruntime")
