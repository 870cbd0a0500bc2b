"""ImageData: images from files that a text file lists, read without a database.  What is done to them is Data's transformation."""
from __future__ import annotations

import numpy as np
from torch import Tensor

from torchcaffe.data.images import Images, read_file, read_list
from torchcaffe.data.transformer import Transformer
from torchcaffe.glog import warning
from torchcaffe.layers.base import Shape, layer
from torchcaffe.layers.data import Source
from torchcaffe.proto import caffe_pb2


@layer("ImageData")
class ImageData(Source):
    """Images and labels from the lines `file label` of `source`, in their order, or in one drawn for each pass over all (`shuffle`).

    Tops: (batch_size, channels, height, width) after resizing to new_height x new_width and transform_param, and (batch_size,).
    Images may differ in size where crop_size, new_height and new_width or a batch_size of 1 make that possible; with the last the
    top takes the size of each image.  rand_skip draws how many images are passed over at the start.  Images are not dealt out to
    solvers that train together: each reads all of them, in an order or from a start of its own.  Caffe: image_data_layer.cpp.
    """

    tops = 2

    def setup(self) -> None:
        param = self.param.image_data_param
        self.batch = param.batch_size
        self.require(param.source, "image_data_param has no source")
        self.require(self.batch > 0, "image_data_param has no batch_size")
        self.require(bool(param.new_height) == bool(param.new_width), "new_height and new_width go together; write both or neither")
        with self.naming_errors():
            self.transform = Transformer(self.param.transform_param, self.phase == caffe_pb2.TRAIN)
            self.lines = read_list(param.source)
            self.images = Images(len(self.lines), self._read_one)
        self.varies = self.batch == 1 and not self.transform.crop and not param.new_height
        rank, count = self.context.share
        if count > 1 and rank == 0 and self.phase == caffe_pb2.TRAIN and not (param.shuffle or param.rand_skip):
            warning(f"layer '{self.name}' (ImageData): all {count} solvers read the same images; set shuffle or rand_skip",
                    "image_data_layer.cpp:0")
        self.skipped = 0
        if param.rand_skip:
            self.skipped = int(self.context.streams.numpy("skip", self.name).integers(param.rand_skip))
            self.require(self.skipped < len(self.lines), f"rand_skip {param.rand_skip} may pass over all {len(self.lines)} images")

    def _read_one(self, position: int) -> tuple[np.ndarray, int]:
        param = self.param.image_data_param
        name, label = self.lines[position]
        return read_file(param.root_folder + name, param.is_color, param.new_height, param.new_width), label

    def top_shapes(self) -> list[Shape]:
        with self.naming_errors():
            return [(self.batch, *self.transform.output_shape(self.images.shape)), (self.batch,)]

    def forward(self) -> list[Tensor]:
        now = self.cursor
        positions = self._order(self.skipped + self.start() + np.arange(self.batch))
        with self.naming_errors():
            images, labels = self.images.read(positions)
        return [self.transformed(self.transform, images, now), self.tensor(labels)]

    def _order(self, places: np.ndarray) -> np.ndarray:
        """Which lines stand at `places` of the endless sequence."""
        epochs, lines = np.divmod(places, len(self.lines))
        if self.param.image_data_param.shuffle:
            for epoch in np.unique(epochs).tolist():
                order = self.context.streams.numpy("shuffle images", self.name, epoch).permutation(len(self.lines))
                lines[epochs == epoch] = order[lines[epochs == epoch]]
        return lines
