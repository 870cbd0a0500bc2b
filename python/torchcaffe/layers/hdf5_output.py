"""HDF5Output: the layer that writes what it reads, one batch, to an HDF5 file."""
from __future__ import annotations

import os
from pathlib import Path

import h5py  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from torchcaffe.formats import write_hdf5
from torchcaffe.layers.base import Layer, Shape, layer


@layer("HDF5Output")
class HDF5Output(Layer):
    """Writes its bottoms to the datasets `data` and `label`, float32 with four axes, in the first forward pass.

    The file appears whole, in the place of an older one.  Caffe aborts in a second pass, as the datasets are there already; here that is
    a CaffeError too.  Caffe: hdf5_output_layer.cpp.
    """

    bottoms, tops, needs_host = 2, 0, True

    def setup(self, data: Shape, label: Shape) -> None:
        self.file_name = self.param.hdf5_output_param.file_name
        folder = Path(self.file_name).parent
        self.require(self.file_name, "hdf5_output_param has no file_name")
        self.require(os.access(folder, os.W_OK), f"there is no writable folder {folder} for {self.file_name}; make it")

    def top_shapes(self, data: Shape, label: Shape) -> list[Shape]:
        self.require(max(len(data), len(label)) <= 4, f"writes blobs of at most four axes, not {data} and {label}")
        self.require((*data, 1)[0] == (*label, 1)[0], f"{(*data, 1)[0]} rows of data and {(*label, 1)[0]} labels; they must be as many")
        return []

    def forward(self, data: Tensor, label: Tensor) -> list[Tensor]:
        self.require(self.cursor == 0, f"{self.file_name} holds a batch already and takes no second one; run one forward pass, "
                     "with the batch_size of all you want to have")
        self.cursor += 1

        def write(file: h5py.File) -> None:
            for name, blob in (("data", data), ("label", label)):
                file[name] = blob.detach().float().cpu().reshape(blob.shape + (1,) * (4 - blob.dim())).numpy()

        write_hdf5(self.file_name, write)
        return []
