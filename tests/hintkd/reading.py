"""Small LMDBs, nets and solvers with a data layer that shuffles, for tests."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

import torchcaffe as caffe
from torchcaffe.io import array_to_datum

COUNT, SIZE = 22, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
LABELS = np.arange(COUNT) % 5


def write(folder: Path, images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> str:
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            transaction.put(b"%06d" % i, array_to_datum(image, int(label)).SerializeToString())
    return str(folder)


def layer(source: str, batch: int = 6, tops: str = "data label index", **more: Any) -> str:
    told = json.dumps({"source": source, "batch": batch, **more}).replace('"', '\\"')
    return (f'layer {{ name: "data" type: "Python" {" ".join(f"""top: "{top}" """ for top in tops.split())} '
            f'python_param {{ module: "hintkd.layers.records" layer: "ShuffledRecords" param_str: "{told}" }} }}\n')


def net(folder: Path, text: str, phase: int = caffe.TRAIN, seed: int = 1) -> Any:
    (folder / "net.prototxt").write_text(text)
    caffe.set_random_seed(seed)
    return caffe.Net(str(folder / "net.prototxt"), phase)


def batches(net: Any, count: int) -> list[dict[str, np.ndarray]]:
    found = []
    for _ in range(count):
        net.forward()
        found.append({name: np.array(blob.data) for name, blob in net.blobs.items()})
    return found


def solver(folder: Path, text: str, fast: bool = True, replay: bool = False, remember: bool = False, seed: int = 3) -> Any:
    (folder / "net.prototxt").write_text(text)
    (folder / "solver.prototxt").write_text(
        f'net: "{folder}/net.prototxt" base_lr: 0.01 lr_policy: "fixed" momentum: 0.9 max_iter: 20 random_seed: {seed} '
        f'snapshot_prefix: "{folder}/snap" snapshot_format: BINARYPROTO')
    made = caffe.get_solver(str(folder / "solver.prototxt"))
    made.fast, made.exact, made.replay = fast, True, replay
    if remember:
        made.remember = str(folder / "memory")
    return made


def weights(solver: Any) -> dict[str, np.ndarray]:
    return {f"{name}{i}": np.array(blob.data) for name, blobs in solver.net.params.items() for i, blob in enumerate(blobs)}
