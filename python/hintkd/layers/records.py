"""A data layer for any pycaffe that reads an LMDB as PyTorch's loaders do: shuffled in each epoch, scaled per channel, in several views."""
from __future__ import annotations

from typing import Any, ClassVar

import caffe  # type: ignore[import-not-found]
import numpy as np

from hintkd.layers import draws
from hintkd.layers.common import parse
from hintkd.layers.lmdb_records import records

_DEFAULTS = {"source": "", "batch": 0, "shuffle": True, "last": "wrapped", "border": 0, "pad": 0, "padding": "zeros", "crop": 0,
             "mirror": False, "mean": [], "std": [], "views": 1}


class ShuffledRecords(caffe.Layer):
    """Images, labels and positions of records, as (image - mean) / std in windows.

    No bottoms.  Tops: images (batch * views, channels, height, width); labels (batch,); positions among the records (batch,), in the byte
    order of their keys; the last two may be left away.  The images, all of one size, lose `border` pixels on each side and are given `pad`
    others; half of them are mirrored, and a window is cut out at random: both in TRAIN alone, in TEST the window is in the centre.  With 4
    views each image, mirrored or not, is shown upright and turned to the left by one, two and three quarters, each through a window of its
    own: rows 4 b to 4 b + 3 are image b's.
    param_str: source (the LMDB's folder) and batch, which must be given; shuffle true; last "wrapped", as in Caffe, where a batch goes on
    with the next epoch, or "kept", where the last batch of an epoch has what is left; border 0, pad 0, padding "zeros" or "reflect" (at the
    outermost pixels, which do not come twice), crop 0 (the whole), mirror false, mean [] and std [] (a value per channel, or one),
    views 1 or 4.

    What is drawn is a function of `seed` and the number of the pass, which torchcaffe keeps; a real Caffe begins at pass 0 again when it
    resumes, as its Data layer does at record 0.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = _DEFAULTS

    def setup(self, bottom: Any, top: Any) -> None:
        if len(bottom) or not 1 <= len(top) <= 3:
            raise ValueError("ShuffledRecords has no bottoms and one to three tops (images, labels, positions)")
        self.p, self.passes = parse(self.param_str, _DEFAULTS), 0
        p = self.p
        if not p["source"] or p["batch"] < 1:
            raise ValueError("param_str needs the source, an LMDB's folder, and a batch of at least 1")
        for name, allowed in (("last", ("wrapped", "kept")), ("padding", ("zeros", "reflect")), ("views", (1, 4))):
            if p[name] not in allowed:
                raise ValueError(f"param_str: {name} must be one of {', '.join(map(str, allowed))}, not {p[name]}")
        if min(p["border"], p["pad"], p["crop"]) < 0 or not all(isinstance(each, (int, float)) for each in p["mean"] + p["std"]):
            raise ValueError("param_str: border, pad and crop must not be below 0, and mean and std be lists of numbers")
        if not all(p["std"]):
            raise ValueError("param_str: std must not hold 0")

    def records(self) -> dict[str, Any]:
        """What is read, for engines that read it themselves (torchcaffe's layers/records.py)."""
        return self.p

    def reshape(self, bottom: Any, top: Any) -> None:
        positions = self._positions()
        side = 2 * (self.p["pad"] - self.p["border"])
        channels, height, width = records(self.p["source"]).image(0).shape
        height, width = (self.p["crop"] or size + side for size in (height, width))
        for blob, shape in zip(top, ((len(positions) * self.p["views"], channels, height, width), (len(positions),), (len(positions),))):
            blob.reshape(*shape)

    def forward(self, bottom: Any, top: Any) -> None:
        found, positions, train, views = records(self.p["source"]), self._positions(), self.phase == caffe.TRAIN, self.p["views"]
        stream = draws.key(draws.seed_of(self), "transform", draws.solver(caffe, "rank", 0))
        drawn = draws.uniform(stream, self.passes, (1 + 2 * views, len(positions)))
        for i, position in enumerate(positions):
            image = self._framed(found.image(position).astype(np.float32))
            if self.p["mirror"] and train and drawn[0, i] < 0.5 and views > 1:
                image = image[:, :, ::-1]
            for view in range(views):
                shown = self._window(np.rot90(image, view, (1, 2)), drawn[1 + 2 * view:3 + 2 * view, i] if train else None)
                if self.p["mirror"] and train and drawn[0, i] < 0.5 and views == 1:
                    shown = shown[:, :, ::-1]
                top[0].data[i * views + view] = self._normal(shown)
        if len(top) > 1:
            top[1].data[...] = [found.label(position) for position in positions]
        if len(top) > 2:
            top[2].data[...] = positions
        self.passes += 1

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        """Nothing to do."""

    # -- which records, and how they are shown ----------------------------------------------------------------------------
    def _positions(self) -> np.ndarray:
        """The positions of the records of the next pass."""
        count, batch, rank, solvers = len(records(self.p["source"])), self.p["batch"], 0, 1
        if self.phase == caffe.TRAIN:                        # only the first solver has test nets
            rank, solvers = draws.solver(caffe, "rank", 0), draws.solver(caffe, "count", 1)
        if self.p["last"] == "kept":
            epoch, number = divmod(self.passes * solvers + rank, -(-count // batch))
            places = epoch * count + np.arange(number * batch, min((number + 1) * batch, count))
        else:
            places = (self.passes * batch + np.arange(batch)) * solvers + rank
        epochs, places = np.divmod(places, count)
        if self.p["shuffle"]:
            for epoch in np.unique(epochs).tolist():
                places[epochs == epoch] = self._order(epoch, count)[places[epochs == epoch]]
        return places

    def _order(self, epoch: int, count: int) -> np.ndarray:
        known = getattr(self, "known", None)
        if known is None or known[0] != epoch:
            self.known = known = epoch, draws.order(draws.key(draws.seed_of(self), "order"), epoch, count)
        return known[1]

    def _framed(self, image: np.ndarray) -> np.ndarray:
        border, pad = self.p["border"], self.p["pad"]
        image = image[:, border:image.shape[1] - border, border:image.shape[2] - border]
        return np.pad(image, ((0, 0), (pad, pad), (pad, pad)), "reflect" if self.p["padding"] == "reflect" else "constant")

    def _window(self, image: np.ndarray, drawn: Any) -> np.ndarray:
        """At a random place, or in the centre where nothing is drawn."""
        crop = self.p["crop"]
        if not crop:
            return image
        room = [size - crop for size in image.shape[1:]]
        if min(room) < 0:
            raise ValueError(f"ShuffledRecords: crop {crop} is larger than images of {image.shape[1]}x{image.shape[2]}")
        top, left = ((int(part * np.float32(free + 1)) if drawn is not None else free // 2)
                     for part, free in zip(drawn if drawn is not None else (0, 0), room))
        return image[:, top:top + crop, left:left + crop]

    def _normal(self, image: np.ndarray) -> np.ndarray:
        mean, std = (np.array(self.p[name] or [neutral], np.float32)[:, None, None] for name, neutral in (("mean", 0), ("std", 1)))
        return (image - mean) / std

