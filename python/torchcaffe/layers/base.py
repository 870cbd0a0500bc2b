"""What a layer is: its parameters, the shapes of its tops, and one differentiable function from bottoms to tops.

Everything else (blobs, diffs, backward, sharing, the training step) is derived from these by net.py and step/
A layer registers itself under Caffe's type name:

    @layer("Sigmoid")
    class Sigmoid(Layer):
        bottoms, tops = 1, 1
        def top_shapes(self, x): return [x]
        def forward(self, x): return torch.sigmoid(x)
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcaffe.errors import CaffeError
from torchcaffe.graph.blob import Blob, check_shape
from torchcaffe.graph.vectors import BlobVec
from torchcaffe.layers.fillers import Fill, filler
from torchcaffe.proto import caffe_pb2
from torchcaffe.streams import Streams

Shape = tuple[int, ...]
Kind = type[CaffeError]
Count = int | tuple[int, int | None]                    # how many blobs: a number, or least and most
LAYERS: dict[str, type[Layer]] = {}


def layer(type_name: str) -> Callable[[type[Layer]], type[Layer]]:
    """Register a class as the implementation of Caffe's layer type `type_name`."""
    def register(cls: type[Layer]) -> type[Layer]:
        cls.type = type_name
        LAYERS[type_name] = cls
        return cls
    return register


@dataclass
class Context:
    """What a net gives to each of its layers."""
    phase: int                                  # caffe_pb2.TRAIN or TEST
    streams: Streams
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"                     # of whole iterations, settings.set_precision
    share: tuple[int, int] = (0, 1)             # (r, n): of n solvers that train together, this is number r
    traced: bool = False                        # a pass is being traced (step/compiled.py): its values are not there to be looked at


class Layer:
    """One layer of a net.

    Class attributes say what Caffe's LayerSetUp would check:
      bottoms, tops     a number, or (least, most) with None for no limit
      same_count        as many tops as bottoms (Caffe: EqualNumBottomTopBlobs)
      auto_tops         missing tops are made up by the net, as for loss layers
      in_place          False where Caffe refuses a top that is also a bottom, or overwrites what it still has to read
      no_force          bottoms that force_backward does not reach (Caffe: AllowForceBackward)
      not_differentiable  bottoms to which Caffe aborts when asked to propagate ("all" for every one)
      in_place_gradient(y, dy)  a method of layers whose backward in Caffe reads the overwritten bottom when they work in place: what
                        Caffe then computes for the bottom, from what the blob holds at that time and its diff
      ticks             every forward pass calls tick(), for what it draws or reads
      needs_host        a forward pass reads, writes or draws on the host, or waits for a result, so that no CUDA graph can hold it
      reshapes_itself   top_shapes is called before every forward pass, not only when a bottom has changed (Python layers)
    Instance attributes:
      param, name, phase, context     the LayerParameter and where it is used
      params            tensors of the parameters, in the order they were declared; made by the net, shared or not
      blobs             the same parameters as blobs
      cursor            how many forward passes have drawn or read something; the whole state of a data or dropout layer
      clock             the cursor in device memory, in a pass that step/capture.py runs
      ticked            how many passes have ticked since step/capture.py began to run some
      state             tensors that a pass leaves for the next one, for layers that carry something on (recurrent ones)
      varies            the tops may have another shape in each pass, although the bottoms have not (images read one by one)
    """

    type: ClassVar[str] = ""
    bottoms: ClassVar[Count] = 1
    tops: ClassVar[Count] = 1
    same_count: ClassVar[bool] = False
    auto_tops: ClassVar[bool] = False
    in_place: ClassVar[bool] = True
    no_force: ClassVar[frozenset[int]] = frozenset()
    not_differentiable: frozenset[int] | str = frozenset()
    reshapes_itself: ClassVar[bool] = False
    ticks: bool = False
    needs_host: bool = False

    def __init__(self, param: caffe_pb2.LayerParameter, context: Context):
        self.param = param
        self.name: str = param.name
        self.context = context
        self.phase: int = param.phase if param.HasField("phase") else context.phase
        self.params: list[Tensor] = []
        self.blobs = BlobVec(device=context.device, dtype=context.dtype)
        self.declared: list[tuple[Shape, Fill]] = []
        self.cursor = 0
        self.clock: Tensor | None = None
        self.ticked = 0
        self.state: list[Tensor] = []
        self.varies = False

    @classmethod
    def made(cls, param: caffe_pb2.LayerParameter, context: Context) -> Layer:
        """The layer that a message of this type stands for."""
        return cls(param, context)

    # -- what a subclass writes (with a named argument for each bottom; *Any, **Any lets mypy accept that) --------------
    def setup(self, *bottoms: Any, **named: Any) -> None:
        """Read and check the message, and declare the parameters; once, with the shapes of the bottoms at that time."""

    def top_shapes(self, *bottoms: Any, **named: Any) -> Sequence[Shape]:
        """Shapes of the tops; called whenever a bottom's shape has changed.  Checks what depends on shapes."""
        raise NotImplementedError

    def forward(self, *bottoms: Any, **named: Any) -> Tensor | Sequence[Tensor]:
        """Tops from bottoms and self.params, differentiable by autograd.  Never changes a bottom.

        Tensors may be channels-last in memory; results may be too.  Parameters that the forward pass itself changes
        (BatchNorm's statistics) are written in place under torch.no_grad().
        """
        raise NotImplementedError

    def reshape(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Give the tops the shapes that follow from the bottoms', as a net does before each forward pass (pycaffe's Layer.reshape)."""
        for blob, shape in zip(top, self.top_shapes(*(b.shape for b in bottom)), strict=True):
            blob.reshape(*shape)

    def attach(self, bottoms: list[Blob], tops: list[Blob]) -> None:
        """Called before setup with the blobs themselves, for layers that work on them (Python, DummyData)."""

    # -- what the net uses ----------------------------------------------------------------------------------------
    @property
    def is_loss(self) -> bool:
        """Whether the first top counts as a loss with weight 1 unless loss_weight is written."""
        return self.type.endswith("Loss")

    def bind(self, needs_gradient: Sequence[bool]) -> None:
        """Make `params` the tensors of `blobs`, each a leaf of its own that takes a gradient or not."""
        self.params = [blob.data_slot.value().detach().requires_grad_(need)
                       for blob, need in zip(self.blobs, needs_gradient, strict=True)]

    def rebind(self) -> None:
        """Make `params` tensors of whatever blobs are in `blobs` now, of the shapes they had when the net was built."""
        self.require(len(self.blobs) >= len(self.params), f"computes with {len(self.params)} parameters, and {len(self.blobs)} are left")
        for i, (blob, old) in enumerate(zip(self.blobs, self.params, strict=False)):
            new = blob.data_slot.value().detach()
            self.require((new.numel(), new.device, new.dtype) == (old.numel(), old.device, old.dtype),
                         f"computes with a parameter {i} of shape {tuple(old.shape)}, {old.dtype} on {old.device}; put a blob like that in "
                         f"its place, not one of shape {blob.shape}, {new.dtype} on {new.device}")
            self.params[i] = new.reshape(old.shape).requires_grad_(old.requires_grad)

    # -- what a subclass uses -------------------------------------------------------------------------------------
    def tick(self) -> int | Tensor:
        """The number of this pass, from 0, and count it."""
        if self.clock is not None:
            now = self.clock.clone()
            self.clock.add_(1)
            self.ticked += 1
            return now
        self.cursor += 1
        return self.cursor - 1

    def declare(self, shape: Sequence[int], values: caffe_pb2.FillerParameter) -> None:
        """Add a parameter whose first values are as the message says."""
        dims = self.possible(shape, f"parameter {len(self.declared)}")
        self.declared.append((dims, self.filler(values, dims)))

    def possible(self, shape: Sequence[int], what: str) -> Shape:
        """blob.check_shape with this layer's name in its error: before anything of that size is made."""
        try:
            return check_shape(shape, f"layer '{self.name}' ({self.type}), {what}")
        except CaffeError as error:
            raise CaffeError(str(error), layer=self.name) from None

    def filler(self, values: caffe_pb2.FillerParameter, shape: Sequence[int]) -> Fill:
        """fillers.filler with this layer's name in its errors."""
        try:
            return filler(values, shape)
        except CaffeError as error:
            raise CaffeError(f"layer '{self.name}' ({self.type}): {error}", layer=self.name) from None

    def require(self, condition: Any, message: str, kind: Kind = CaffeError) -> None:
        """Raise CaffeError, or a subclass, naming this layer unless `condition` holds."""
        if not condition:
            raise kind(f"layer '{self.name}' ({self.type}): {message}", layer=self.name)

    def axis(self, axis: int, ndim: int) -> int:
        """Caffe's CanonicalAxisIndex: -ndim <= axis < ndim, counted from the front."""
        self.require(-ndim <= axis < ndim, f"axis {axis} is out of range for a blob with {ndim} axes")
        return axis % ndim if ndim else 0
