"""A data set, nets and stages so small that a test can train them: 8x8 images of four classes, one hidden layer.

The TRAIN net crops at random and drops out, so that a run shows whether every draw and the data cursor are continued.
"""
from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np

from hintkd.backend import caffe_pb2
from hintkd.methods.stage import Stage, Weights

CLASSES, TRAIN, TEST = 4, 64, 40


def write_data(workspace: Path) -> None:
    """data/tiny/train_lmdb and test_lmdb."""
    rng = np.random.default_rng(0)
    for name, count in (("train", TRAIN), ("test", TEST)):
        folder = workspace / f"data/tiny/{name}_lmdb"
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
            for i in range(count):
                image = (rng.integers(0, 60, (1, 8, 8)) + i % CLASSES * 50).astype(np.uint8)
                datum = caffe_pb2.Datum(channels=1, height=8, width=8, data=image.tobytes(), label=i % CLASSES)
                transaction.put(f"{i:08d}".encode(), datum.SerializeToString())


def net(hidden: int = 16, tested: bool = True, prefix: str = "", scale: float = 1 / 128) -> caffe_pb2.NetParameter:
    """Data, a hidden layer of `hidden` units, class scores; with `tested`, a TEST phase; with a prefix, a frozen hidden layer beside."""
    made = caffe_pb2.NetParameter(name="tiny")
    for phase, batch in [("TRAIN", 8), ("TEST", 10)][:1 + tested]:
        made.layer.add(name="data", type="Data", top=["data", "label"], include=[{"phase": phase}],
                       transform_param={"scale": scale, "crop_size": 6},
                       data_param={"source": f"data/tiny/{phase.lower()}_lmdb", "backend": "LMDB", "batch_size": batch})
    if prefix:
        made.layer.add(name=prefix + "hidden", type="InnerProduct", bottom=["data"], top=[prefix + "hidden"], include=[{"phase": "TRAIN"}],
                       param=[{"lr_mult": 0, "decay_mult": 0}] * 2, inner_product_param={"num_output": hidden})
        made.layer.add(name=prefix + "silence", type="Silence", bottom=[prefix + "hidden"], include=[{"phase": "TRAIN"}])
    made.layer.add(name="hidden", type="InnerProduct", bottom=["data"], top=["hidden"],
                   inner_product_param={"num_output": hidden, "weight_filler": {"type": "msra"}})
    made.layer.add(name="relu", type="ReLU", bottom=["hidden"], top=["hidden"])
    made.layer.add(name="drop", type="Dropout", bottom=["hidden"], top=["hidden"])
    made.layer.add(name="fc", type="InnerProduct", bottom=["hidden"], top=["fc"],
                   inner_product_param={"num_output": CLASSES, "weight_filler": {"type": "msra"}})
    made.layer.add(name="loss", type="SoftmaxWithLoss", bottom=["fc", "label"], top=["loss"])
    made.layer.add(name="accuracy", type="Accuracy", bottom=["fc", "label"], top=["accuracy"], include=[{"phase": "TEST"}])
    return made


def solver(seed: int = 1, iterations: int = 60, lr: float = 0.02, tested: bool = True) -> caffe_pb2.SolverParameter:
    made = caffe_pb2.SolverParameter(type="SGD", base_lr=lr, momentum=0.9, lr_policy="step", gamma=0.1, stepsize=40, max_iter=iterations,
                                     random_seed=seed, display=10, snapshot=20)
    if tested:
        made.test_iter.append(TEST // 10)
        made.test_interval = 20
    return made


def stages() -> list[Stage]:
    """A first stage and two that start from its hidden layer."""
    first = Stage.solve("first", net(), solver())
    return [first, *(Stage.solve("second", net(), solver(seed), weights_in=(Weights(first, layers=("hidden",)),)) for seed in (2, 3))]
