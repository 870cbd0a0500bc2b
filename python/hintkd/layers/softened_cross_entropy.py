"""The loss of knowledge distillation."""
from __future__ import annotations

from typing import Any

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers.common import log_softmax, parse, rows

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
        p = parse(self.param_str, _DEFAULTS)
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
        student, teacher, label = rows(bottom[0]), rows(bottom[1]), bottom[2].data.reshape(-1).astype(int)
        n, classes = student.shape
        if label.min() < 0 or label.max() >= classes:
            raise ValueError(f"SoftenedCrossEntropy: labels {label.min()} to {label.max()} do not fit {classes} classes")
        self.lambda_now = self.factor * self.p["lambda"]
        if self.p["schedule"] != "fixed":
            passes = self.blobs[0].data
            self.lambda_now = self.weight(np.float64(passes[0]))
            if self.phase == caffe.TRAIN:
                passes[...] = passes + 1
        hard, soft = log_softmax(student / self.label_tau), log_softmax(student / self.tau)
        soft_teacher = np.exp(log_softmax(teacher / self.tau))
        label_term = -hard[np.arange(n), label].sum() / n
        top[0].data[...] = label_term - self.lambda_now * (soft_teacher * soft).sum() / n

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        student, teacher, label = rows(bottom[0]), rows(bottom[1]), bottom[2].data.reshape(-1).astype(int)
        n = len(student)
        scale = top[0].diff.reshape(-1)[0] / n
        soft, soft_teacher = log_softmax(student / self.tau), np.exp(log_softmax(teacher / self.tau))
        if propagate_down[0]:
            hard = np.exp(log_softmax(student / self.label_tau))
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
