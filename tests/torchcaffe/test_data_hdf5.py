"""HDF5Data: rows across files and passes, shuffling, and lists or files that do not serve."""
from __future__ import annotations

import h5py
import numpy as np
import pytest

from lmdbs import batches, net
from torchcaffe.errors import CaffeError

LENGTHS = (3, 1, 4)


def layer(source, batch: int, extra: str = "", tops: tuple[str, ...] = ("data", "row")) -> str:
    names = " ".join(f'top: "{top}"' for top in tops)
    return f'layer {{ name: "in" type: "HDF5Data" {names} hdf5_data_param {{ source: "{source}" batch_size: {batch} {extra} }} }}'


@pytest.fixture
def source(tmp_path):
    """Three files; dataset `row` numbers all rows."""
    start, names = 0, []
    for i, length in enumerate(LENGTHS):
        with h5py.File(tmp_path / f"part{i}.h5", "w") as file:
            rows = np.arange(start, start + length)
            file["row"] = rows
            file["data"] = np.random.default_rng(i).standard_normal((length, 2, 3)) + rows[:, None, None]
        names.append(str(tmp_path / f"part{i}.h5"))
        start += length
    (tmp_path / "files.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "files.txt"


def test_rows_go_on_from_file_to_file_and_start_again(tmp_path, source):
    model = net(tmp_path, layer(source, 3))
    assert model.blobs["data"].shape == (3, 2, 3) and model.blobs["row"].shape == (3,)
    np.testing.assert_array_equal(batches(model, 7, "row").ravel(), np.arange(21) % 8)


def test_a_batch_may_cover_all_files_twice(tmp_path, source):
    np.testing.assert_array_equal(batches(net(tmp_path, layer(source, 20)), 1, "row")[0], np.arange(20) % 8)


def test_all_tops_are_shuffled_alike_and_completely(tmp_path, source):
    model = net(tmp_path, layer(source, 8, "shuffle: true"))
    epochs = batches(model, 6, "row").astype(int)
    for epoch in epochs:
        assert sorted(epoch) == list(range(8))
        files = np.repeat(range(3), LENGTHS)[epoch]
        assert (np.diff(files) != 0).sum() == 2                # rows of a file stay together
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({tuple(dict.fromkeys(np.repeat(range(3), LENGTHS)[epoch].tolist())) for epoch in epochs}) > 1
    in_order = batches(net(tmp_path, layer(source, 8)), 1)[0]
    np.testing.assert_array_equal(model.blobs["data"].data, in_order[epochs[-1]])


def test_the_cursor_is_the_whole_state_of_a_shuffled_layer(tmp_path, source):
    whole = batches(net(tmp_path, layer(source, 3, "shuffle: true")), 9)
    resumed = net(tmp_path, layer(source, 3, "shuffle: true"))
    resumed.layers[0].cursor = 4
    np.testing.assert_array_equal(batches(resumed, 5), whole[4:])


def test_what_does_not_serve_is_named(tmp_path, source):
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["data"], file["row"] = np.zeros((2, 2, 2)), np.zeros(2)
        file["short"], file["text"], file["empty"] = np.zeros(1), np.array([b"a", b"b"]), np.zeros((0, 2))
    (tmp_path / "junk.h5").write_bytes(b"junk")
    part = tmp_path / "part0.h5"
    lists = {"none": " \n", "gone": "gone.h5", "junk": str(tmp_path / "junk.h5"), "odd": str(tmp_path / "odd.h5"),
             "both": f"{part}\n{tmp_path / 'odd.h5'}"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    for name, tops, reason in (("missing", ("row",), "cannot read the list.*missing"), ("none", ("row",), "lists no HDF5 file"),
                               ("gone", ("row",), "cannot read the HDF5 file gone.h5"), ("junk", ("row",), "cannot read.*junk.h5"),
                               ("odd", ("rows",), "has no dataset 'rows'.*it has data, empty, row, short, text"),
                               ("odd", ("data", "short"), "data, short.*have 2, 1 rows"), ("odd", ("text",), "rows of numbers"),
                               ("odd", ("empty",), "rows of numbers"), ("both", ("data",), r"shape \(2, 2\) in .*odd.h5, but \(2, 3\)")):
        with pytest.raises(CaffeError, match=rf"layer 'in' \(HDF5Data\).*{reason}"):
            net(tmp_path, layer(tmp_path / name, 2, tops=tops))


def test_transformations_are_refused(tmp_path, source):
    with pytest.raises(CaffeError, match="take transform_param out"):
        net(tmp_path, layer(source, 2).replace("hdf5_data_param", "transform_param { scale: 2 } hdf5_data_param"))
