"""What losses between a student's blob and a teacher's have in common."""
from __future__ import annotations

from typing import Any, ClassVar

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers.common import parse


class PairLoss(caffe.Layer):
    """A loss of two bottoms, the student's and the teacher's, with one top of one element; write its loss_weight.

    The teacher's blob is a constant, as in the sources: its gradient is zero.  A subclass has

      DEFAULTS                what param_str, a JSON object, may say, with defaults; each becomes an entry of self.p
      check(student, teacher)     raise ValueError where the shapes do not fit
      numpy_form(s, t)        of float arrays: the loss, and its gradient for s (in any shape with as many elements)
      torch_form(s, t)        the same of tensors: the loss alone, a scalar
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) != 2 or len(top) != 1:
            raise ValueError(f"{type(self).__name__} needs two bottoms (the student's, the teacher's) and one top")
        self.p = parse(self.param_str, self.DEFAULTS)

    def reshape(self, bottom: Any, top: Any) -> None:
        student, teacher = tuple(bottom[0].shape), tuple(bottom[1].shape)
        if student[0] != teacher[0]:
            raise ValueError(f"{type(self).__name__}: the student's {student} and the teacher's {teacher} differ in batch size")
        self.check(student, teacher)
        top[0].reshape(1)

    def check(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        if student != teacher:
            raise ValueError(f"{type(self).__name__}: the student's {student} and the teacher's {teacher} differ in shape")

    def forward(self, bottom: Any, top: Any) -> None:
        loss, self.gradient = self.numpy_form(np.array(bottom[0].data), np.array(bottom[1].data))
        top[0].data[...] = loss

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        if propagate_down[0]:
            bottom[0].diff[...] = (self.gradient * top[0].diff.reshape(-1)[0]).reshape(bottom[0].diff.shape)
        if propagate_down[1]:
            bottom[1].diff[...] = 0

    def forward_torch(self, bottoms: Any, blobs: Any) -> Any:
        """The same of tensors."""
        return self.torch_form(bottoms[0], bottoms[1].detach()).reshape(1)

    def numpy_form(self, s: np.ndarray, t: np.ndarray) -> tuple[Any, np.ndarray]:
        raise NotImplementedError

    def torch_form(self, s: Any, t: Any) -> Any:
        raise NotImplementedError
