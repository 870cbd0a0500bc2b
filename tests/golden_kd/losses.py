"""Loss cases as nets: how each method's loss is put together of stock layers and Python layers, and where a case's arrays belong in it."""
from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import torchcaffe as caffe
from hintkd.backend import caffe_pb2, write_text
from hintkd.nets import adapters
from torchcaffe.alias import installed
from torchcaffe.settings import number_type

with installed():
    from hintkd.layers.margin_relu import margins
    from hintkd.layers.self_supervision import kept

Arrays = dict[str, np.ndarray]
Shape = tuple[int, int, int]


class Bench:
    """A net that a case is computed in: add layers, place arrays, run, read results under the case's keys."""

    def __init__(self, hyper: dict[str, Any], arrays: Arrays):
        self.hyper, self.arrays = hyper, arrays
        self.param = caffe_pb2.NetParameter(name="case", force_backward=True)
        self.inputs: dict[str, str] = {}                               # key of an input -> blob
        self.places: dict[str, tuple[str, int]] = {}                   # key of a parameter -> layer, blob
        self.norms: dict[str, str] = {}                                # key of a BatchNorm -> layer
        self.blobs: dict[str, tuple[np.ndarray, ...]] = {}             # layer -> its blobs, which are no parameters of their own
        self.tops: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {}          # key of a result -> blob, as what
        self.parts: list[tuple[str, float]] = []                       # the tops and weights that make up out/losses
        self.more: Arrays = {}                                         # results that no net has to run for

    def input(self, key: str) -> str:
        """An input blob with the array of that key."""
        name = key.split("/")[-1]
        self.param.layer.add(name=name, type="Input", top=[name], input_param={"shape": [{"dim": self.arrays[key].shape}]})
        self.inputs[key] = name
        return name

    def shape(self, key: str) -> Shape:
        """Of an input, without the batch."""
        return tuple(self.arrays[key].shape[1:])  # type: ignore[return-value]

    def stock(self, key: str, layer: str, biases: bool = True) -> None:
        """A stock layer's weights are those of the key, such as param/conv."""
        self.places[f"{key}.weight"] = layer, 0
        if biases:
            self.places[f"{key}.bias"] = layer, 1

    def norm(self, key: str, bottom: str) -> None:
        """BatchNorm and Scale on the blob `bottom` are those of the key."""
        self.stock(key, bottom + "_scale")
        self.norms[key] = bottom + "_bn"

    def result(self, key: str, blob: str, as_what: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        self.tops[key] = blob, as_what

    def loss(self, name: str, module: str, layer: str, bottoms: list[str], weight: float = 1.0, **more: Any) -> None:
        adapters.python_loss(self.param, name, module, layer, bottoms, weight=weight, **more)
        self.parts.append((name, weight))

    def build(self, dtype: torch.dtype) -> Any:
        """The net with the case's parameters and inputs."""
        with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file, number_type(dtype):
            file.write(write_text(self.param))
            file.flush()
            net = caffe.Net(file.name, caffe.TRAIN)
        for key, (layer, index) in self.places.items():
            blob = net.params[layer][index]
            blob.data[...] = self.arrays[key].reshape(blob.data.shape)
        for key, layer in self.norms.items():
            mean, variance, factor = net.params[layer]
            mean.data[...], variance.data[...] = 10 * self.arrays[f"{key}.running_mean"], 10 * self.arrays[f"{key}.running_var"]
            factor.data[...] = 10
        for layer, arrays in self.blobs.items():
            for blob, array in zip(net.params[layer], arrays, strict=True):
                blob.data[...] = array
        for key, name in self.inputs.items():
            net.blobs[name].data[...] = self.arrays[key]
        return net

    def run(self, dtype: torch.dtype) -> Arrays:
        """All results of one pass forward and backward, under the case's keys."""
        net = self.build(dtype)
        loss = forward_backward(net)
        parts = [float(net.blobs[name].data.sum()) * weight for name, weight in self.parts]
        found: Arrays = {"out/loss": np.array(loss), "out/losses": np.array(parts), **self.more}
        for key, (name, as_what) in self.tops.items():
            found[key] = as_what(np.array(net.blobs[name].data, np.float64))
        for key, name in self.inputs.items():
            found["grad/" + key] = np.array(net.blobs[name].diff, np.float64)
        for key, (layer, index) in self.places.items():
            found["grad/" + key] = np.array(net.params[layer][index].diff, np.float64).reshape(self.arrays[key].shape)
        for key, layer in self.norms.items():
            mean, variance, factor = (np.array(blob.data, np.float64) for blob in net.params[layer])
            after = "after/" + key.removeprefix("param/")
            found[f"{after}.running_mean"], found[f"{after}.running_var"] = mean / factor, variance / factor
        compare_forms(net)
        return found


def forward_backward(net: Any) -> float:
    """One pass; the loss with its weights."""
    outputs = net.forward()
    for blobs in net.params.values():
        for blob in blobs:
            blob.diff[...] = 0
    net.backward()
    weights = {name: weight for node in net.graph.nodes for name, weight in zip(node.top_names, node.loss_weights, strict=True) if weight}
    return sum(float(outputs[name].sum()) * weight for name, weight in weights.items())


def compare_forms(net: Any) -> None:
    """Raise ValueError where a Python layer's torch form gives another top or other gradients than its numpy form just gave."""
    for node in net.graph.nodes:
        user = getattr(node.layer, "user", None)
        if user is not None:
            bottoms = [tensor(blob, need) for blob, need in zip(node.bottoms, node.bottom_need, strict=True)]
            blobs = [tensor(blob, need) for blob, need in zip(user.blobs, node.param_need, strict=True)]
            compare_form(node, user.forward_torch(bottoms, blobs), bottoms, blobs)


def tensor(blob: Any, need: bool) -> torch.Tensor:
    return torch.from_numpy(np.array(blob.data)).requires_grad_(need)


def compare_form(node: Any, top: torch.Tensor, bottoms: list[torch.Tensor], blobs: list[torch.Tensor]) -> None:
    """The same for one layer, given the top of its torch form."""
    close(f"{node.layer.name} in torch", top.detach().numpy(), node.tops[0].data)
    for blob in node.layer.user.blobs:
        blob.diff[...] = 0
    node.layer.backward_numpy(node.bottom_need)                # again: layers in place have written over the bottoms' diffs
    both = list(zip((*bottoms, *blobs), (*node.bottoms, *node.layer.user.blobs), strict=True))
    asked = [x for x, _ in both if x.requires_grad]
    slope = torch.from_numpy(np.array(node.tops[0].diff)).reshape(top.shape)
    given = torch.autograd.grad(top, asked, slope, allow_unused=True) if asked else ()
    for index, (got, want) in enumerate(zip(given, [blob.diff for x, blob in both if x.requires_grad], strict=True)):
        close(f"gradient {index} of {node.layer.name} in torch", np.zeros_like(want) if got is None else got.numpy(), want)


def close(what: str, got: np.ndarray, want: np.ndarray) -> None:
    wide = got.dtype == np.float64
    scale, away = float(np.abs(want).max(initial=0)), float(np.abs(got.reshape(-1) - np.asarray(want).reshape(-1)).max(initial=0))
    if not away <= (1e-8 if wide else 1e-3) * scale + (1e-12 if wide else 1e-6):
        raise ValueError(f"{what} is {away:.3g} from the numpy form, whose largest is {scale:.3g}")


# -- the methods -------------------------------------------------------------------------------------------------------------

def maps(bench: Bench) -> list[int]:
    """The numbers of the maps of a case: in/f_s0, in/f_s1 ..."""
    return sorted(int(key.removeprefix("in/f_s")) for key in bench.arrays if key.startswith("in/f_s") and key != "in/f_s")


def number(value: float) -> str:
    return repr(float(value))


def kd(bench: Bench) -> None:
    bench.loss("loss", "kl_divergence", "KLDivergence", [bench.input("in/y_s"), bench.input("in/y_t")],
               param_str=f'{{"tau": {number(bench.hyper["T"])}}}')


def fitnet(bench: Bench) -> None:
    student, teacher = bench.input("in/f_s"), bench.input("in/f_t")
    source, target = bench.shape("in/f_s"), bench.shape("in/f_t")
    fitted = adapters.rectified(bench.param, adapters.fitted(bench.param, "conv", student, source, target))
    bench.stock("param/conv", "conv")
    bench.norm("param/bn", "conv")
    bench.param.layer.add(name="loss", type="EuclideanLoss", bottom=[fitted, teacher], top=["loss"],
                          loss_weight=[2 / float(np.prod(target))], propagate_down=[True, False])
    bench.result("out/regressed", fitted)


def pairs(bench: Bench, i: int) -> tuple[str, str, tuple[int, int, int], tuple[int, int, int]]:
    """The i-th maps of student and teacher, the larger one pooled to the smaller one's size, and their shapes then."""
    student, teacher = bench.input(f"in/f_s{i}"), bench.input(f"in/f_t{i}")
    source, target = bench.shape(f"in/f_s{i}"), bench.shape(f"in/f_t{i}")
    size = min(source[1], target[1])
    return (adapters.pooled(bench.param, f"pool_s{i}", student, source, size),
            adapters.pooled(bench.param, f"pool_t{i}", teacher, target, size),
            (source[0], size, size), (target[0], size, size))


def attention(bench: Bench) -> None:
    for i in maps(bench):
        student, teacher, _, _ = pairs(bench, i)
        bench.loss(f"loss{i}", "attention", "AttentionLoss", [student, teacher], param_str=f'{{"power": {bench.hyper["p"]}}}')


def similarity(bench: Bench) -> None:
    bench.loss("loss", "similarity", "SimilarityLoss", [bench.input("in/f_s0"), bench.input("in/f_t0")])


def variational(bench: Bench) -> None:
    for i in maps(bench):
        student, teacher, source, target = pairs(bench, i)
        mu = adapters.variational_regressor(bench.param, f"vid{i}_", student, source[0], target[0])
        for index, torch_index in enumerate((0, 2, 4)):
            bench.stock(f"param/{i}.regressor.{torch_index}", f"vid{i}_{index}", biases=False)
        bench.loss(f"loss{i}", "variational", "VariationalLoss", [mu, teacher], blobs=1, learns=True,
                   param_str=f'{{"variance": {number(bench.hyper["init_pred_var"])}, "eps": {number(bench.hyper["eps"])}}}')
        bench.places[f"param/{i}.log_scale"] = f"loss{i}", 0


def relation(bench: Bench) -> None:
    bench.loss("loss", "relation", "RelationalLoss", [bench.input("in/f_s"), bench.input("in/f_t")],
               param_str=f'{{"distance": {number(bench.hyper["w_d"])}, "angle": {number(bench.hyper["w_a"])}}}')


def correlation(bench: Bench) -> None:
    bench.loss("loss", "correlation", "ProbabilisticLoss", [bench.input("in/f_s"), bench.input("in/f_t")],
               param_str=f'{{"eps": {number(bench.hyper["eps"])}}}')


def boundary(bench: Bench) -> None:
    count = len(maps(bench))
    for i in maps(bench):
        student, teacher = bench.input(f"in/f_s{i}"), bench.input(f"in/f_t{i}")
        source, target = bench.shape(f"in/f_s{i}"), bench.shape(f"in/f_t{i}")
        connected = adapters.connector(bench.param, f"connector{i}", student, source, target)
        if connected != student:
            bench.stock(f"param/connectors.{i}.conv", connected)
            bench.norm(f"param/connectors.{i}.bn", connected)
        weight = 0.003 / 2 ** (count - 1 - i)
        bench.loss(f"loss{i}", "boundary", "BoundaryLoss", [connected, teacher], weight=weight,
                   param_str=f'{{"margin": {number(bench.hyper["margin"])}}}')


def paraphrase(bench: Bench) -> None:
    teacher, target = bench.input("in/f_t"), bench.shape("in/f_t")
    factor, again = adapters.paraphraser(bench.param, teacher, target[0], bench.hyper["k"])
    for part in ("encoder", "decoder"):
        for index in range(3):
            bench.stock(f"param/{part}.{3 * index}", f"paraphraser_{part}{index}")
    bench.param.layer.add(name="loss", type="EuclideanLoss", bottom=[again, teacher], top=["loss"],
                          loss_weight=[2 / float(np.prod(target))], propagate_down=[True, False])
    bench.result("out/factor", factor)
    bench.result("out/reconstruction", again)


def factor(bench: Bench) -> None:
    student, teacher = bench.input("in/f_s"), bench.input("in/f_t")
    source, target = bench.shape("in/f_s"), bench.shape("in/f_t")
    mine = adapters.translator(bench.param, student, source[0], target[0], bench.hyper["k"])
    other = adapters.paraphraser_encoder(bench.param, teacher, target[0], bench.hyper["k"])
    for index in range(3):
        bench.stock(f"param/encoder.{3 * index}", f"translator{index}")
        bench.norm(f"param/encoder.{3 * index + 1}", f"translator{index}")
        bench.stock(f"frozen/encoder.{3 * index}", f"paraphraser_encoder{index}")
    bench.result("out/factor_s", mine)
    bench.result("out/factor_t", other)
    width, size = int(target[0] * bench.hyper["k"]), min(source[1], target[1])
    bench.loss("loss", "attention", "AttentionLoss",
               [adapters.pooled(bench.param, "pool_s", mine, (width, *source[1:]), size),
                adapters.pooled(bench.param, "pool_t", other, (width, *target[1:]), size)],
               param_str=f'{{"power": {bench.hyper["p1"]}, "norm": {bench.hyper["p2"]}}}')


def matching(bench: Bench) -> None:
    feature = bench.input("in/feat")
    head = adapters.projection_head(bench.param, "head", feature, bench.arrays["in/feat"].shape[1])
    head_of(bench, "head")
    bench.loss("loss", "self_supervision", "ViewMatching", [head])
    bench.result("out/cosine", head, view_cosines)


def head_of(bench: Bench, name: str, owner: str = "param") -> None:
    for index in range(2):
        bench.stock(f"{owner}/proj_head.{2 * index}", f"{name}{index}")


def view_cosines(projections: np.ndarray) -> np.ndarray:
    units = projections / np.linalg.norm(projections, axis=1, keepdims=True)
    upright = np.arange(len(units)) % 4 == 0
    return units[~upright] @ units[upright].T


def self_supervision(bench: Bench) -> None:
    h, classes = bench.hyper, len(bench.arrays["param/fc.weight"])
    bottoms = []
    for side, owner in (("s", "param"), ("t", "frozen")):
        feature, width = bench.input(f"in/feat_{side}"), bench.arrays[f"in/feat_{side}"].shape[1]
        bottoms.append((adapters.linear(bench.param, f"fc_{side}", feature, width, classes),
                        adapters.projection_head(bench.param, f"head_{side}", feature, width)))
        bench.stock(f"{owner}/fc", f"fc_{side}")
        head_of(bench, f"head_{side}", owner)
    (scores, projections), (other_scores, other_projections) = bottoms
    names = {"ce": "ce_weight", "kd": "kd_weight", "tf": "tf_weight", "ss": "ss_weight", "kd_tau": "kd_T", "tf_tau": "tf_T",
             "ss_tau": "ss_T", "tf_ratio": "ratio_tf", "ss_ratio": "ratio_ss"}
    bench.param.layer.add(name="loss", type="Python", top=["loss"], loss_weight=[1], propagate_down=[True, False, True, False, False],
                          bottom=[scores, other_scores, projections, other_projections, bench.input("in/target")],
                          python_param={"module": "hintkd.layers.self_supervision", "layer": "SelfSupervisedLoss",
                                        "param_str": json.dumps({name: float(h[key]) for name, key in names.items()})})
    bench.result("out/cosine_s", projections, view_cosines)
    bench.result("out/cosine_t", other_projections, view_cosines)


def overhaul(bench: Bench) -> None:
    count = len(maps(bench))
    for i in maps(bench):
        student, teacher = bench.input(f"in/f_s{i}"), bench.input(f"in/f_t{i}")
        source, target = bench.shape(f"in/f_s{i}"), bench.shape(f"in/f_t{i}")
        connected = adapters.convolution(bench.param, f"connector{i}", student, source[0], target[0], bias=False)
        adapters.normalised(bench.param, connected)
        bench.stock(f"param/{i}.0", connected, biases=False)
        bench.norm(f"param/{i}.1", connected)
        weight = 1 / (1000 * 2 ** (count - 1 - i))
        bench.param.layer.add(name=f"before{i}", type="Power", bottom=[teacher], top=[f"teacher{i}"])
        bench.norm(f"frozen/bns.{i}", adapters.normalised(bench.param, f"teacher{i}"))
        norm = bench.arrays[f"frozen/bns.{i}.weight"], bench.arrays[f"frozen/bns.{i}.bias"]
        bench.blobs[f"loss{i}"], bench.more[f"out/margin{i}"] = norm, margins(*norm)
        bench.loss(f"loss{i}", "margin_relu", "MarginLoss", [connected, f"teacher{i}"], weight=weight, blobs=2)


def overhaul_part(bench: Bench) -> None:
    source = bench.input("in/source")
    bench.loss("loss", "margin_relu", "MarginLoss", [source, bench.input("in/target")], weight=len(bench.arrays["in/source"]), blobs=2)
    rare = -bench.arrays["in/margin"].reshape(-1).astype(float) / 3              # a BatchNorm that is hardly ever negative has a margin
    bench.blobs["loss"] = rare, 10 * rare                                        # of -3 gamma


METHODS: dict[str, Callable[[Bench], None]] = {
    "KD": kd, "FitNet": fitnet, "AT": attention, "SP": similarity, "VID": variational, "RKD": relation, "PKT": correlation, "AB": boundary,
    "FT_stage1": paraphrase, "FT": factor, "SSKD_head": matching, "SSKD": self_supervision, "OH": overhaul, "OH_partial": overhaul_part}


def results(method: str, hyper: dict[str, Any], arrays: Arrays, dtype: torch.dtype) -> Arrays:
    """What the project computes for a case, under the case's keys.  Raises KeyError for a method that is not known."""
    if method == "CRD":
        return contrastive(hyper, arrays, dtype)

    def run(**changed: Any) -> Arrays:
        bench = Bench({**hyper, **changed}, arrays)
        METHODS[method](bench)
        return bench.run(dtype)
    found = run()
    if method == "RKD":
        found["out/loss_distance"], found["out/loss_angle"] = run(w_d=1, w_a=0)["out/loss"], run(w_d=0, w_a=1)["out/loss"]
    if method == "OH":
        found["out/unscaled"] = found["out/loss"] * 1000 * len(arrays["in/f_s0"])
    if method == "OH_partial":
        found["out/loss_sum"] = found["out/loss"]
    if method == "SSKD":
        names = ("ce_weight", "kd_weight", "tf_weight", "ss_weight")
        found["out/losses"] = np.array([run(**{name: float(name == one) for name in names})["out/loss"] for one in names])
        found.update(selections(hyper, arrays))
    return found


def selections(hyper: dict[str, Any], arrays: Arrays) -> Arrays:
    """Ranks of the right answers and the rows that are kept, of SSKD's teacher."""
    arrays = {key: array.astype(np.float64) if array.dtype == np.float32 else array for key, array in arrays.items()}
    feature, label = arrays["in/feat_t"], arrays["in/target"].astype(int)
    hidden = np.maximum(feature @ arrays["frozen/proj_head.0.weight"].T + arrays["frozen/proj_head.0.bias"], 0)
    cosines = view_cosines(hidden @ arrays["frozen/proj_head.2.weight"].T + arrays["frozen/proj_head.2.bias"])
    scores = (feature @ arrays["frozen/fc.weight"].T + arrays["frozen/fc.bias"])[np.arange(len(feature)) % 4 > 0]
    found = {}
    for name, values, right in (("ss", cosines, np.repeat(np.arange(len(label)), 3)), ("tf", scores, np.repeat(label, 3))):
        found[f"out/rank_{name}"] = (values > values[np.arange(len(right)), right][:, None]).sum(1)
        found[f"out/kept_{name}"] = np.flatnonzero(kept(values, right, hyper[f"ratio_{name}"]))
    return found


def contrastive(hyper: dict[str, Any], arrays: Arrays, dtype: torch.dtype) -> Arrays:
    """CRD over its steps: banks and Z carry over, parameters stay."""
    first = {key.removesuffix("@0"): array for key, array in arrays.items() if "@" not in key or key.endswith("@0")}
    bench = Bench(hyper, first)
    embedded = []
    for side in "st":
        feature, width = bench.input(f"in/f_{side}"), first[f"in/f_{side}"].shape[1]
        embedded.append(adapters.linear(bench.param, f"embed_{side}", feature, width, hyper["feat_dim"]))
        bench.stock(f"param/embed_{side}.linear", f"embed_{side}")
    said = {"samples": hyper["n_data"], "temperature": hyper["nce_t"], "momentum": hyper["nce_m"], "eps": hyper["eps"]}
    bench.loss("loss", "contrastive", "ContrastiveLoss", [*embedded, bench.input("in/contrast_idx")], blobs=3, towards=2,
               param_str="{" + ", ".join(f'"{name}": {value!r}' for name, value in said.items()) + "}")
    net, found = bench.build(dtype), {}
    (node,) = (node for node in net.graph.nodes if node.layer.name == "loss")
    for bank in range(2):
        net.params["loss"][bank].data[...] = arrays[f"state/memory_v{bank + 1}"]
    for step in range(hyper["steps"]):
        for key, name in bench.inputs.items():
            net.blobs[name].data[...] = arrays[f"{key}@{step}"]
        before = [tensor(blob, False) for blob in node.layer.user.blobs]
        found[f"out/loss@{step}"] = np.array(forward_backward(net))
        bottoms = [tensor(blob, need) for blob, need in zip(node.bottoms, node.bottom_need, strict=True)]
        compare_form(node, node.layer.user.forward_torch(bottoms, before), bottoms, before)
        for index, (moved, blob) in enumerate(zip(before, node.layer.user.blobs, strict=True)):
            close(f"blob {index} in torch", moved.numpy(), blob.data)
        banks, z = [np.array(net.params["loss"][bank].data, np.float64) for bank in range(2)], np.array(net.params["loss"][2].data)
        for bank in range(2):
            found[f"after/memory_v{bank + 1}_rows@{step}"] = banks[bank][arrays[f"in/idx@{step}"]]
            found[f"after/memory_v{bank + 1}"], found[f"after/Z_v{bank + 1}@{step}"] = banks[bank], z[bank]
        for key, name in bench.inputs.items():
            found[f"grad/{key}@{step}"] = np.array(net.blobs[name].diff, np.float64)
        for key, (layer, index) in bench.places.items():
            found[f"grad/{key}@{step}"] = np.array(net.params[layer][index].diff, np.float64)
    return found
