"""Caffe's binary files, against bytes encoded by hand, h5py's view of them, and damage of every kind."""
import os
import struct

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchcaffe import formats
from torchcaffe.errors import CaffeError
from torchcaffe.proto import caffe_pb2

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ARRAYS = hnp.arrays(st.sampled_from([np.float32, np.float64]), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))


def net(*layers: tuple[str, list[np.ndarray]], diffs: bool = False) -> caffe_pb2.NetParameter:
    message = caffe_pb2.NetParameter(name="n")
    for name, blobs in layers:
        message.layer.add(name=name).blobs.extend(formats.array_to_blob(blob, -blob if diffs else None) for blob in blobs)
    return message


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 3


# -- blobs ---------------------------------------------------------------------------------------------------------
def test_a_blob_encoded_by_hand():
    """Field 7 (shape) holds field 1 (dims), field 5 the packed floats; then the same with every float on its own."""
    shape = bytes([7 << 3 | 2, 4, 1 << 3 | 2, 2, 1, 2])
    packed = bytes([5 << 3 | 2, 8]) + struct.pack("<2f", 1.5, -2)
    for data in (packed, b"".join(bytes([5 << 3 | 5]) + struct.pack("<f", x) for x in (1.5, -2))):
        np.testing.assert_array_equal(formats.blob_to_array(caffe_pb2.BlobProto.FromString(shape + data)), np.float32([[1.5, -2]]))


def test_legacy_dims_win_over_the_shape():
    blob = caffe_pb2.BlobProto(data=[1, 2], channels=2, num=1, height=1, width=1, shape=caffe_pb2.BlobShape(dim=[2]))
    assert formats.blob_to_array(blob).shape == (1, 2, 1, 1)
    blob.ClearField("width")                                        # then its default, 0, counts
    with pytest.raises(CaffeError, match=r"shape \(1, 2, 1, 0\) but 2 elements"):
        formats.blob_to_array(blob)


@QUICK
@given(ARRAYS)
def test_arrays_survive_with_their_diff(array):
    blob = caffe_pb2.BlobProto.FromString(formats.array_to_blob(array, array + 1).SerializeToString())
    for found, wanted in ((formats.blob_to_array(blob), array), (formats.blob_to_array(blob, diff=True), array + 1)):
        assert found.dtype == wanted.dtype or not wanted.size
        np.testing.assert_array_equal(found, wanted)
    assert [*blob.double_data, *blob.data] == pytest.approx(array.ravel().tolist(), nan_ok=True)


@pytest.mark.parametrize("dims", [[3], [2**62, 4], [-1, -2], [2**31, 2**31, 2**31], [1] * 40 + [2]])
def test_absurd_shapes_are_refused(dims):
    with pytest.raises(CaffeError, match="but 2 elements"):
        formats.blob_to_array(caffe_pb2.BlobProto(data=[1, 2], shape=caffe_pb2.BlobShape(dim=dims)))


# -- weights -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["w.caffemodel", "w.caffemodel.h5"])
def test_weights_are_read_back(tmp_path, name):
    layers = [("conv", [ramp(2, 3, 1, 1), ramp(2)]), ("plain", []), ("scalar", [ramp()]), ("teacher/a", [ramp(1)]),
              ("teacher/b/c", [ramp(4).astype(float)])]
    formats.write_weights(tmp_path / name, net(*layers))
    found = formats.read_weights(tmp_path / name)
    assert [layer for layer, _ in found] == [layer for layer, _ in layers]
    for (_, blobs), (_, wanted) in zip(found, layers, strict=True):
        assert [blob.dtype for blob in blobs] == [blob.dtype for blob in wanted]
        for blob, want in zip(blobs, wanted, strict=True):
            np.testing.assert_array_equal(blob, want)
    assert os.listdir(tmp_path) == [name]


def test_the_form_is_told_by_content(tmp_path):
    formats.write_weights_hdf5(tmp_path / "w.caffemodel", net(("a", [ramp(2)])))
    np.testing.assert_array_equal(formats.read_weights(tmp_path / "w.caffemodel")[0][1][0], ramp(2))


def test_hdf5_weights_lie_where_caffe_puts_them(tmp_path):
    message = net(("a", [ramp(2, 2), ramp(2)]), ("b", [ramp(2, 2), ramp(3)]), ("relu", []), diffs=True)
    message.layer[0].param.add(name="shared")
    message.layer[1].param.add(name="shared")
    formats.write_weights_hdf5(tmp_path / "w.h5", message)
    with h5py.File(tmp_path / "w.h5") as file:
        found = {}
        file.visititems(lambda name, item: found.update({name: item[()] if isinstance(item, h5py.Dataset) else None}))
    assert set(found) == {"data", "data/a", "data/a/0", "data/a/1", "data/b", "data/b/1", "data/relu",
                          "diff", "diff/a", "diff/a/0", "diff/a/1", "diff/b", "diff/b/0", "diff/b/1", "diff/relu"}
    np.testing.assert_array_equal(found["diff/b/1"], -ramp(3))
    assert found["data/a/0"].dtype == np.float32
    weights = dict(formats.read_weights(tmp_path / "w.h5"))
    assert weights["b"][0] is None and weights["b"][1].shape == (3,)


def test_old_layers_are_read(tmp_path):
    old = caffe_pb2.NetParameter()
    old.layers.add(name="ip").blobs.add(data=[1, 2], num=1, channels=1, height=1, width=2)
    (tmp_path / "v1").write_bytes(old.SerializeToString())
    old.layers[0].ClearField("blobs")
    old.layers[0].layer.CopyFrom(caffe_pb2.V0LayerParameter(name="ip", type="innerproduct", blobs=[formats.array_to_blob(ramp(2))]))
    (tmp_path / "v0").write_bytes(old.SerializeToString())
    assert [formats.read_weights(tmp_path / f)[0][1][0].shape for f in ("v1", "v0")] == [(1, 1, 1, 2), (2,)]


# -- solver states -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["s.solverstate", "s.solverstate.h5"])
def test_states_are_read_back(tmp_path, name):
    state = formats.State(7, "päth_iter_7.caffemodel", 2, [ramp(2, 3), ramp(), *(ramp(1) + i for i in range(10))])
    formats.write_state(tmp_path / name, state)
    found = formats.read_state(tmp_path / name)
    assert (found.iter, found.learned_net, found.current_step) == (state.iter, state.learned_net, state.current_step)
    for array, wanted in zip(found.history, state.history, strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_hdf5_states_have_caffes_types(tmp_path):
    formats.write_state(tmp_path / "s.h5", formats.State(7, "w", 2, [ramp(2)]))
    with h5py.File(tmp_path / "s.h5") as file:
        assert (file["iter"].shape, file["iter"].dtype, file["current_step"].dtype) == ((1,), np.int32, np.int32)
        assert (file["learned_net"].shape, file["learned_net"].dtype) == ((), np.dtype("S2"))
        assert file["history/0"].dtype == np.float32


# -- means ---------------------------------------------------------------------------------------------------------
def test_means_have_the_legacy_dims(tmp_path):
    formats.write_mean(tmp_path / "m", ramp(3, 2, 4))
    blob = caffe_pb2.BlobProto.FromString((tmp_path / "m").read_bytes())
    assert (blob.num, blob.channels, blob.height, blob.width, blob.HasField("shape")) == (1, 3, 2, 4, False)
    np.testing.assert_array_equal(formats.read_mean(tmp_path / "m"), ramp(3, 2, 4))
    (tmp_path / "m").write_bytes(formats.array_to_blob(ramp(2, 2)).SerializeToString())
    with pytest.raises(CaffeError, match="a mean image has channels, height and width"):
        formats.read_mean(tmp_path / "m")


# -- what is wrong with files --------------------------------------------------------------------------------------
READERS = [formats.read_weights, formats.read_state, formats.read_mean]


@pytest.fixture(params=["w.caffemodel", "w.caffemodel.h5", "s.solverstate", "s.solverstate.h5", "mean.binaryproto"])
def good_file(tmp_path, request):
    path = tmp_path / request.param
    if path.name.startswith("w"):
        formats.write_weights(path, net(("conv", [ramp(2, 3), ramp(2)]), ("t/ip", [ramp(4)])))
    elif path.name.startswith("s"):
        formats.write_state(path, formats.State(3, "w.caffemodel", 1, [ramp(2, 3), ramp(2)]))
    else:
        formats.write_mean(path, ramp(3, 4, 4))
    return path


def test_the_wrong_kind_of_file_is_refused(good_file):
    wrong = {"w": 0, "s": 1, "m": 2}[good_file.name[0]]
    for reader in READERS[:wrong] + READERS[wrong + 1:]:
        with pytest.raises(CaffeError) as caught:
            reader(good_file)
        assert str(caught.value).startswith(f"{good_file}: ")


def test_missing_and_unreadable_files(tmp_path):
    for reader in READERS:
        with pytest.raises(CaffeError, match="none: cannot be read"):
            reader(tmp_path / "none")
        with pytest.raises(CaffeError, match="directory"):
            reader(tmp_path)
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(CaffeError):
            reader(tmp_path / "empty")


@QUICK
@given(data=st.data())
def test_damaged_files_raise_nothing_but_caffe_error(good_file, data):
    content = bytearray(good_file.read_bytes())
    start, end = sorted((data.draw(st.integers(0, len(content))), data.draw(st.integers(0, len(content)))))
    content[start:end] = data.draw(st.one_of(st.just(b""), st.binary(min_size=min(end - start, 8), max_size=min(end - start, 8))))
    damaged = good_file.with_name("damaged")
    damaged.write_bytes(content)
    for reader in READERS:
        try:
            reader(damaged)
        except CaffeError as error:
            assert str(error).startswith(f"{damaged}: ") and "\n" not in str(error)


def test_hdf5_shapes_beyond_the_file_and_links_out_of_it(tmp_path):
    def refused(words: str) -> None:
        with pytest.raises(CaffeError, match=words):
            formats.read_weights(tmp_path / "w.h5")

    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_dataset("data/a/0", shape=(10**6, 10**6), dtype=np.float32, chunks=(1, 10))
    refused("more than the file can hold")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["data/a/weight"] = ramp(2)
    refused("holds 'weight' where the number of a blob is expected")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["data/a/0"] = "text"
    refused("not a plain array of numbers")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data/a/0"] = ramp(2)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["data"] = h5py.ExternalLink("other.h5", "data")
    refused("has no group 'data'")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.h5"
    formats.write_weights(path, net(("a", [ramp(2)])))
    before = path.read_bytes()
    with pytest.raises(CaffeError, match=r"w.h5: cannot be written .*exists"):
        formats.write_weights(path, net(("a", [ramp(2)]), ("a", [ramp(2)])))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.h5"]
    with pytest.raises(CaffeError, match=r"none/w.caffemodel: cannot be written \(No such file"):
        formats.write_weights(tmp_path / "none" / "w.caffemodel", net(("a", [])))
