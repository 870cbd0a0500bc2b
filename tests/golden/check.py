#!/usr/bin/env python3
"""Run the golden vectors on any module with pycaffe's interface and say how many agree.

    python check.py [--module torchcaffe] [--only layers/Pooling nets ...] [--list first.txt] [--root DIR] [--json FILE] [--gpu] [-v]

The vectors are unpacked from the archives beside this file, or taken from --root.  A case whose layer types the module does not have
is reported as not registered.  On a GPU tolerances are at least 1e-4.  Exit status 0 when every other case agrees, apart from marked
quirks.  README.md describes the formats.
Written against pycaffe's public interface and Python 3.8, so it also runs on Caffe itself (--module caffe).
"""
from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import traceback
from pathlib import Path

import numpy as np

caffe = None                      # the module under test; whoever uses this file sets it
least_tolerance = 0.0             # of all comparisons; above 0 where sums come in another order than on Caffe's CPU
HERE = Path(__file__).resolve().parent
OUTCOMES = {"ok": "agree", "differs": "differ", "quirk": "differ where Caffe's behaviour looks like an accident",
            "unregistered": "need layer types that are not registered", "skipped": "not for this runner"}


class Mismatch(Exception):
    """What was computed is not what Caffe computed."""


def unpack(folder):
    """Write the folders of all families, packed in *.tar.xz beside this file, into `folder`."""
    for path in sorted(HERE.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(folder)


def missing_types(folder):
    """Layer types that the case's net names and the module does not have."""
    named = set()
    for path in folder.glob("*net.prototxt"):
        named.update(re.findall(r'name: "[^"]*"\s+type: "(\w+)"', path.read_text()))
    return sorted(named - set(caffe.layer_type_list()))


def compare(name, got, want, rtol, atol):
    got, want = np.asarray(got), np.asarray(want)
    if tuple(got.shape) != tuple(want.shape):
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not want.size:
        return
    got, want = got.astype(np.float64), want.astype(np.float64)
    rtol, atol = max(rtol, least_tolerance), max(atol, least_tolerance)
    with np.errstate(invalid="ignore"):
        bad = ~((np.abs(got - want) <= atol + rtol * np.abs(want)) | (np.isnan(got) & np.isnan(want)) | (got == want))
    if bad.any():
        i = np.unravel_index(np.argmax(bad), bad.shape)
        raise Mismatch(f"{name}: {int(bad.sum())} of {bad.size} differ, first at {tuple(map(int, i))}: "
                       f"{got[i]:.7g}, expected {want[i]:.7g}")


def group(arrays, prefix):
    """{'rest/of/key': array} of the keys that start with `prefix/`."""
    return {k[len(prefix) + 1:]: arrays[k] for k in arrays.files if k.startswith(prefix + "/")}


def param(net, key):
    layer, index = key.rsplit("/", 1)
    return net.params[layer][int(index)]


def set_inputs(net, inputs):
    for name, value in inputs.items():
        if tuple(net.blobs[name].shape) != value.shape:
            net.blobs[name].reshape(*value.shape)
            net.reshape()
        net.blobs[name].data[...] = value


def phase(case):
    return getattr(caffe, case["phase"])


def check_layer(case, z):
    net = caffe.Net("net.prototxt", phase(case))
    for key, value in group(z, "param").items():
        param(net, key).data[...] = value
    set_inputs(net, group(z, "in"))
    if "facts" in case:
        check_dropout_facts(net, case["facts"], z)
        return
    loss = None
    for _ in range(case["forwards"]):
        loss = net._forward(0, len(net.layers) - 1)
    tol = case["rtol"], case["atol"]
    for name, want in group(z, "out").items():
        compare(f"out/{name}", net.blobs[name].data, want, *tol)
    if "loss" in z.files:
        compare("loss", loss, z["loss"], *tol)
    after = group(z, "param_after")
    for key, before in group(z, "param").items():
        compare(f"param_after/{key}", param(net, key).data, after.get(key, before), *(tol if key in after else (0, 0)))
    if not case["backward"]:
        return
    for name, value in group(z, "topdiff").items():
        net.blobs[name].diff[...] = value
    net._backward(len(net.layers) - 1, 0)
    for name, want in group(z, "indiff").items():
        compare(f"indiff/{name}", net.blobs[name].diff, want, *tol)
    for key, want in group(z, "paramdiff").items():
        compare(f"paramdiff/{key}", param(net, key).diff, want, *tol)


def check_dropout_facts(net, facts, z):
    x, scale = z["in/x"], facts["kept_values_are_scaled_by"]
    top = net.top_names["dropout"][0]
    masks = []
    for _ in range(2):
        net.blobs["x"].data[...] = x
        net._forward(0, len(net.layers) - 1)
        masks.append(net.blobs[top].data.copy() != 0)
    mask = masks[-1]
    compare("kept values", net.blobs[top].data, np.where(mask, x * scale, 0), 1e-5, 1e-6)
    kept, n = mask.mean(), mask.size
    p = facts["keep_probability"]
    if abs(kept - p) > 5 * np.sqrt(p * (1 - p) / n) + 1e-9:
        raise Mismatch(f"keeps {kept:.4f} of {n} elements, expected {p}")
    if 0 < p < 1 and np.array_equal(*masks):
        raise Mismatch("the same mask in two forward passes")
    diff = z["topdiff/y"]
    net.blobs[top].diff[...] = diff
    net._backward(len(net.layers) - 1, 0)
    compare("backward", net.blobs["x"].diff, np.where(mask, diff * scale, 0), 1e-5, 1e-6)


def check_net(case, z):
    net = caffe.Net("net.prototxt", phase(case), level=case["level"], stages=case["stages"] or None)
    net.copy_from("init.caffemodel")
    if case["reshape"]:
        for name, value in group(z, "in").items():
            net.blobs[name].reshape(*value.shape)
        net.reshape()
    set_inputs(net, group(z, "in"))
    graph, types = json.loads(Path("graph.json").read_text()), [layer.type for layer in net.layers]
    shapes = {n: [list(b.shape) for b in blobs] for n, blobs in net.params.items()}
    for what, got, want in (
            ("layers", [list(p) for p in zip(net._layer_names, types)], graph["layers"]),
            ("blobs", [[n, list(b.shape)] for n, b in net.blobs.items()], graph["blobs"]),
            ("inputs", list(net.inputs), graph["inputs"]), ("outputs", list(net.outputs), graph["outputs"]),
            ("bottom_names", {k: list(v) for k, v in net.bottom_names.items()}, graph["bottom_names"]),
            ("top_names", {k: list(v) for k, v in net.top_names.items()}, graph["top_names"]),
            ("params", shapes, graph["params"])):
        if got != want:
            raise Mismatch(f"graph: {what} {got}, expected {want}")
    tol = case["rtol"], case["atol"]
    loss = net._forward(0, len(net.layers) - 1)
    for name, want in group(z, "out").items():
        compare(f"out/{name}", net.blobs[name].data, want, *tol)
    if "loss" in z.files:
        compare("loss", loss, z["loss"], *tol)
    for key, want in group(z, "param_after").items():
        compare(f"param_after/{key}", param(net, key).data, want, *tol)
    if case["backward"]:
        net._backward(len(net.layers) - 1, 0)
        for key, want in group(z, "paramdiff").items():
            compare(f"paramdiff/{key}", param(net, key).diff, want, *tol)
        for name, want in group(z, "blobdiff").items():
            compare(f"blobdiff/{name}", net.blobs[name].diff, want, *tol)


def check_solver(case, z):
    tol = case["rtol"], case["atol"]
    for file in ("solver.prototxt", "hdf5.prototxt"):
        solver = caffe.get_solver(file)
        solver.net.copy_from("init.caffemodel")
        set_inputs(solver.net, group(z, "in"))
        for k in range(case["iterations"] if file == "solver.prototxt" else case["snapshot"]):
            solver.step(1)
            if "loss" in z.files:
                compare(f"loss of iteration {k}", np.reshape(solver.net.blobs["loss"].data, ()), z["loss"][k], *tol)
            for key, want in group(z, f"param@{k + 1}").items():
                compare(f"param@{k + 1}/{key}", param(solver.net, key).data, want, *tol)
    for state in (f"snapshot_iter_{case['snapshot']}.solverstate", f"snapshot_iter_{case['snapshot']}.solverstate.h5"):
        if not (Path(case["folder"]) / state).exists():
            continue
        for origin in ("written by Caffe", "written here"):
            if origin == "written by Caffe":       # the run above has overwritten them: take the stored ones
                for path in Path(case["folder"]).glob("snapshot_iter_*"):
                    shutil.copy(path, ".")
            solver = caffe.get_solver("solver.prototxt")
            if origin == "written here":
                first = caffe.get_solver("hdf5.prototxt" if state.endswith(".h5") else "solver.prototxt")
                first.net.copy_from("init.caffemodel")
                set_inputs(first.net, group(z, "in"))
                first.step(case["snapshot"])
                for path in Path().glob("snapshot_iter_*"):
                    path.unlink()
                first.snapshot()
            solver.restore(state)
            if solver.iter != case["snapshot"]:
                raise Mismatch(f"restored iter {solver.iter}, expected {case['snapshot']}")
            set_inputs(solver.net, group(z, "in"))
            solver.step(case["restored_until"] - case["snapshot"])
            for key, want in group(z, f"restored@{case['restored_until']}").items():
                compare(f"restored from {state} {origin}: {key}", param(solver.net, key).data, want, *tol)


def check_data_layer(case, z):
    net = caffe.Net("net.prototxt", phase(case))
    if "facts" in case:
        check_crop_facts(net, case["facts"])
        return
    tol = case["rtol"], case["atol"]
    given = group(z, "set")
    if given:
        net.set_input_arrays(given["data"], given["label"])
    for k in range(case["batches"]):
        net._forward(0, len(net.layers) - 1)
        for name, want in group(z, f"out@{k}").items():
            compare(f"out@{k}/{name}", net.blobs[name].data, want, *tol)


def check_crop_facts(net, facts):
    """Where did each window come from?  Channel 0 of the records numbers the pixels, channel 1 the image."""
    records = np.load("records.npz")["images"].astype(np.float64)
    text = Path("net.prototxt").read_text()
    if os.path.exists("mean.binaryproto"):
        blob = caffe.proto.caffe_pb2.BlobProto()
        blob.ParseFromString(Path("mean.binaryproto").read_bytes())
        records = records - np.array(blob.data).reshape(records.shape[1:])
    records *= float((re.search(r"scale: ([0-9.]+)", text) or [0, 1])[1])
    net._forward(0, len(net.layers) - 1)
    height, width = net.blobs["data"].data.shape[2:]
    low, high = facts["offsets"]["min"], facts["offsets"]["max"]
    counts, mirrored, drawn = collections.Counter(), 0, 0
    while drawn < 3200:
        for image in net.blobs["data"].data.astype(np.float64):
            record = records[drawn % len(records)]
            found = [(h, w, m) for h in range(record.shape[1] - height + 1) for w in range(record.shape[2] - width + 1)
                     for m in (0, 1) if np.allclose(record[:, h:h + height, w:w + width][:, :, ::1 - 2 * m], image, atol=1e-4)]
            if len(found) != 1:
                raise Mismatch(f"image {drawn}: not a window of record {drawn % len(records)}")
            counts[found[0][:2]] += 1
            mirrored += found[0][2]
            drawn += 1
        net._forward(0, len(net.layers) - 1)
    p = 1 / (high - low + 1) ** 2
    for cell in [(h, w) for h in range(low, high + 1) for w in range(low, high + 1)]:
        if abs(counts[cell] - drawn * p) > 5 * np.sqrt(drawn * p * (1 - p)) + 1e-9:
            raise Mismatch(f"offset {cell} drawn {counts[cell]} times of {drawn}, expected about {drawn * p:.0f}")
    q = facts["mirror_probability"]
    if sum(counts[c] for c in counts if not low <= min(c) <= max(c) <= high) or \
            abs(mirrored - drawn * q) > 5 * np.sqrt(drawn * q * (1 - q)) + 1e-9:
        raise Mismatch(f"{mirrored} of {drawn} mirrored, expected about {drawn * q:.0f}; offsets {dict(counts)}")


def check_model(case, z):
    for file in ("model.caffemodel", "model.caffemodel.h5"):
        if os.path.exists(file):
            net = caffe.Net("net.prototxt", caffe.TEST, weights=file)
            for key, want in group(z, "param").items():
                compare(f"{file}: {key}", param(net, key).data, want, 0, 0)


FAMILIES = {"layers": check_layer, "nets": check_net, "solvers": check_solver, "data_layer": check_data_layer,
            "proto": check_model}


def run_case(folder, family):
    """'ok', 'skipped', 'unregistered: TYPES', 'quirk: DIFFERENCE', or what went wrong; the case runs in a copy of its folder."""
    case = json.loads((folder / "case.json").read_text())
    case["folder"] = str(folder)
    if family == "proto" and not (folder / "net.prototxt").exists():
        return "skipped"                                    # messages and upgrades are for tests of their own
    missing = missing_types(folder)
    if missing:
        return "unregistered: " + ", ".join(missing)
    here, path = os.getcwd(), list(sys.path)
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
        os.chdir(work)
        sys.path.insert(0, work)
        sys.modules.pop("pylayers", None)
        try:
            z = np.load("data.npz") if os.path.exists("data.npz") else None
            FAMILIES[family](case, z)
            return "ok"
        except Mismatch as error:
            return f"quirk: {error}" if case.get("quirk") else str(error)
        except Exception as error:  # noqa: BLE001          whatever the engine raises is a failed case
            trace = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({Path(trace.filename).name}:{trace.lineno})"
        finally:
            os.chdir(here)
            sys.path[:] = path


def outcome(result):
    """The key in OUTCOMES of what run_case returned."""
    word = result.split(":")[0]
    return word if word in OUTCOMES else "differs"


def main():
    global caffe, least_tolerance
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--module", default="torchcaffe")
    options.add_argument("--root", type=Path, help="a folder with the unpacked families")
    options.add_argument("--only", nargs="*", default=[])
    options.add_argument("--list", type=Path, help="a file with one case per line, added to --only")
    options.add_argument("--json", type=Path)
    options.add_argument("--gpu", action="store_true")
    options.add_argument("-v", "--verbose", action="store_true")
    args = options.parse_args()
    caffe = importlib.import_module(args.module)
    if args.gpu:
        caffe.set_mode_gpu()
        least_tolerance = 1e-4
    sys.modules.setdefault("caffe", caffe)                  # Python layers say `import caffe`
    if args.list:
        args.only += args.list.read_text().split()
    with tempfile.TemporaryDirectory() as folder:
        if args.root is None:
            unpack(folder)
        results = run_all((args.root or Path(folder)).resolve(), args.only, args.verbose)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if results and not any(outcome(result) == "differs" for result in results.values()) else 1)


def run_all(root, only, verbose):
    """{case: result} of the cases under `root` that `only` names or all; prints what differs and a summary."""
    results, table = {}, collections.defaultdict(collections.Counter)
    for file in sorted(root.glob("*/**/case.json")):
        name = str(file.parent.relative_to(root))
        if only and not any(name == o or name.startswith(o.rstrip("/") + "/") for o in only):
            continue
        results[name] = run_case(file.parent, name.split("/")[0])
        if verbose or outcome(results[name]) == "differs":
            print(f"{name}: {results[name]}", flush=True)
        table["/".join(name.split("/")[:2]) if name.startswith("layers/") else name.split("/")[0]][outcome(results[name])] += 1
    for key, counts in table.items():
        if verbose or counts["differs"]:
            print(f"{key:40s} {counts['ok']:4d} agree {counts['differs']:4d} differ")
    total = collections.Counter(map(outcome, results.values()))
    parts = [f"{total[key]} {words}" for key, words in OUTCOMES.items() if total[key] or key in ("ok", "differs")]
    print(f"{', '.join(parts)}, of {len(results)} cases")
    return results


if __name__ == "__main__":
    main()
