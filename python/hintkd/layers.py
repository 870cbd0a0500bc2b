"""The losses of hint and KD training as Python layers for any pycaffe: `module: "hintkd.layers"` in a prototxt.

Each has Caffe's four methods on numpy blobs, and `forward_torch`, the same function of tensors, for engines that can use it.
What they need to know stands in `param_str`; which nets use them is the business of nets.py.
"""
from __future__ import annotations

import json
from typing import Any

import caffe  # type: ignore[import-not-found]
import numpy as np


def _log_softmax(x: np.ndarray) -> np.ndarray:
    """Of each row of x (N, C); never overflows."""
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _rows(blob: Any) -> np.ndarray:
    """A blob's data as (N, everything else)."""
    return blob.data.reshape(blob.data.shape[0], -1)


def _parse(param_str: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in param_str over the defaults.  Raises ValueError on bad JSON and on unknown names and types."""
    try:
        given = json.loads(param_str) if param_str else {}
    except ValueError as error:
        raise ValueError(f"param_str is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f'param_str must be a JSON object such as {{"tau": 3}}, not {param_str}')
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"param_str has an unknown entry '{name}'; known are {', '.join(sorted(defaults))}")
        wanted = (int, float) if isinstance(defaults[name], float) else type(defaults[name])
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(defaults[name], bool):
            raise ValueError(f"param_str: '{name}' cannot be {json.dumps(value)}")
    return dict(defaults, **given)


_DEFAULTS = {"tau": 1.0, "lambda": 1.0, "label_tau": 1.0, "tau_squared": False, "schedule": "fixed", "end": 0.0, "iterations": 0,
             "steps": [], "iter_size": 1}


class SoftenedCrossEntropy(caffe.Layer):
    """CE(labels, P_S) + lambda * CE(P_T, P_S), P = softmax(logits / tau), mean over the batch (Bae et al. 2019, equation 2).

    Bottoms: the student's logits (N, C), the teacher's logits (N, C), labels (N).  One top of one element; write its loss_weight.
    Gradients go to both logits; the labels' is zero (only force_backward asks for it).
    param_str is a JSON object; all entries have defaults:
      tau 1, lambda 1   temperature and weight of the KD term
      label_tau 1       temperature of P_S in the label term
      tau_squared       false; true multiplies the KD term by tau^2 (Hinton et al. 2015), lambda staying what it is
      schedule          "fixed"; "linear": from lambda to `end` in `iterations` training iterations, then `end`;
                        "step": from lambda to `end` in equal drops, one at each of the training iterations in `steps`
      iter_size 1       the solver's, so that iterations are counted and not forward passes
    With a schedule the layer has one blob of its own, the forward passes in the TRAIN phase so far, so that a snapshot holds it: give it
    `param { lr_mult: 0 decay_mult: 0 }`, and leave it out of what the next stage starts from.
    Raises ValueError on a wrong param_str, shapes that do not fit, and labels outside 0 .. C - 1.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 3 or len(top) != 1:
            raise ValueError("SoftenedCrossEntropy needs three bottoms (student's logits, teacher's logits, labels) and one top")
        p = _parse(self.param_str, _DEFAULTS)
        if min(p["tau"], p["label_tau"]) <= 0 or p["iter_size"] < 1:
            raise ValueError("param_str: tau, label_tau and iter_size must be above 0")
        if p["schedule"] not in ("fixed", "linear", "step"):
            raise ValueError("param_str: schedule is '{}'; it must be fixed, linear or step".format(p["schedule"]))
        if (p["schedule"] == "linear") != (p["iterations"] > 0) or (p["schedule"] == "step") != bool(p["steps"]):
            raise ValueError("param_str: a linear schedule needs iterations, a step schedule needs steps, and neither goes with another")
        self.tau, self.label_tau, self.p = p["tau"], p["label_tau"], p
        self.factor = self.tau ** 2 if p["tau_squared"] else 1.0
        if p["schedule"] != "fixed":
            self.blobs.add_blob(1)

    def reshape(self, bottom: Any, top: Any) -> None:
        student, teacher, label = (tuple(bottom[i].shape) for i in range(3))
        if student[0] != teacher[0] or bottom[0].count != bottom[1].count:
            raise ValueError(f"SoftenedCrossEntropy: the student's logits {student} and the teacher's {teacher} differ in shape")
        if label[0] != student[0] or bottom[2].count != student[0]:
            raise ValueError(f"SoftenedCrossEntropy: labels {label} are not one for each of the {student[0]} rows of logits")
        top[0].reshape(1)

    def weight(self, passes: Any) -> Any:
        """Lambda times its factor after so many training passes (a numpy scalar or a tensor, which no host has to wait for)."""
        p, iteration = self.p, passes // self.p["iter_size"]
        if p["schedule"] == "linear":
            progress = (iteration / p["iterations"]).clip(max=1)
        else:
            progress = sum((iteration >= step) * 1.0 for step in p["steps"]) / len(p["steps"])
        return self.factor * (p["lambda"] + progress * (p["end"] - p["lambda"]))

    def forward(self, bottom: Any, top: Any) -> None:
        student, teacher, label = _rows(bottom[0]), _rows(bottom[1]), bottom[2].data.reshape(-1).astype(int)
        n, classes = student.shape
        if label.min() < 0 or label.max() >= classes:
            raise ValueError(f"SoftenedCrossEntropy: labels {label.min()} to {label.max()} do not fit {classes} classes")
        self.lambda_now = self.factor * self.p["lambda"]
        if self.p["schedule"] != "fixed":
            passes = self.blobs[0].data
            self.lambda_now = self.weight(np.float64(passes[0]))
            if self.phase == caffe.TRAIN:
                passes[...] = passes + 1
        hard, soft = _log_softmax(student / self.label_tau), _log_softmax(student / self.tau)
        soft_teacher = np.exp(_log_softmax(teacher / self.tau))
        label_term = -hard[np.arange(n), label].sum() / n
        top[0].data[...] = label_term - self.lambda_now * (soft_teacher * soft).sum() / n

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        student, teacher, label = _rows(bottom[0]), _rows(bottom[1]), bottom[2].data.reshape(-1).astype(int)
        n = len(student)
        scale = top[0].diff.reshape(-1)[0] / n
        soft, soft_teacher = _log_softmax(student / self.tau), np.exp(_log_softmax(teacher / self.tau))
        if propagate_down[0]:
            hard = np.exp(_log_softmax(student / self.label_tau))
            hard[np.arange(n), label] -= 1
            gradient = hard / self.label_tau + self.lambda_now / self.tau * (np.exp(soft) - soft_teacher)
            bottom[0].diff[...] = (scale * gradient).reshape(bottom[0].diff.shape)
        if propagate_down[1]:
            mean = (soft_teacher * soft).sum(axis=1, keepdims=True)
            gradient = self.lambda_now / self.tau * soft_teacher * (mean - soft)
            bottom[1].diff[...] = (scale * gradient).reshape(bottom[1].diff.shape)
        if propagate_down[2]:
            bottom[2].diff[...] = 0

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors; counts in blobs[0] in place."""
        import torch
        from torch.nn import functional as F
        student, teacher, label = bottoms[0].flatten(1), bottoms[1].flatten(1), bottoms[2].reshape(-1).long()
        weight = self.factor * self.p["lambda"]
        if self.p["schedule"] != "fixed":
            with torch.no_grad():
                weight = self.weight(blobs[0])
                if self.phase == caffe.TRAIN:
                    blobs[0] += 1
        soft = F.softmax(teacher / self.tau, dim=1) * F.log_softmax(student / self.tau, dim=1)
        return (F.cross_entropy(student / self.label_tau, label) - weight * soft.sum() / len(student)).reshape(1)


class HintLoss(caffe.Layer):
    """sum((G - H)^2) / (2 N) for the guided layer G and the hint H, both (N, C, H, W) (Bae et al. 2019, equations 1 and 3 to 6).

    A sum over features and a mean over the batch, as Caffe's EuclideanLoss, not a mean over elements: the gradient grows with the
    feature map, which is why hint training uses a rate of 1e-4.  One top of one element; write its loss_weight.
    Raises ValueError where the shapes differ.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 2 or len(top) != 1:
            raise ValueError("HintLoss needs two bottoms (guided layer, hint layer) and one top")

    def reshape(self, bottom: Any, top: Any) -> None:
        guided, hint = (tuple(bottom[i].shape) for i in range(2))
        if guided != hint:
            raise ValueError(f"HintLoss: the guided layer {guided} and the hint layer {hint} differ in shape")
        top[0].reshape(1)

    def forward(self, bottom: Any, top: Any) -> None:
        difference = bottom[0].data - bottom[1].data
        top[0].data[...] = np.square(difference).sum() / (2 * len(difference))

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        gradient = (bottom[0].data - bottom[1].data) * (top[0].diff.reshape(-1)[0] / len(bottom[0].data))
        for i, sign in enumerate((1, -1)):
            if propagate_down[i]:
                bottom[i].diff[...] = sign * gradient

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors."""
        guided, hint = bottoms
        return ((guided - hint).square().sum() / (2 * len(guided))).reshape(1)
