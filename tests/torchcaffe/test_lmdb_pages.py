"""The records of LMDBs, found without LMDB's own library: all of them, or a sentence, whatever has happened to the file."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

import torchcaffe as caffe
from lmdbs import data_layer, net, numbered, write_images
from torchcaffe.data.lmdb_pages import Pages
from torchcaffe.data.lmdb_reader import open_database

SIZES = [0, 1, 100, 2000, 2035, 2040, 5000, 70000]          # small values, values around the limit of a page's nodes, large ones


def fill(folder: Path, count: int, key: int, sizes: list[int], change: bool = False) -> list[tuple[bytes, bytes]]:
    """An LMDB of random records, some of them taken out and written anew; what LMDB's library then reads."""
    random = np.random.default_rng(count)
    with lmdb.open(str(folder), map_size=1 << 28, lock=False, sync=False) as environment:
        with environment.begin(write=True) as transaction:
            for _ in range(count):
                transaction.put(random.bytes(key), random.bytes(int(random.choice(sizes))))
        for _ in range(2 if change else 0):
            with environment.begin(write=True) as transaction:
                keys = list(transaction.cursor().iternext(values=False))
                for one in keys[::3]:
                    transaction.delete(one)
                for one in keys[::5]:
                    transaction.put(one, b"again" * int(random.integers(1, 2000)))
        with environment.begin() as transaction:
            return list(transaction.cursor())


@pytest.mark.parametrize("content", [
    {"count": 1, "key": 8, "sizes": [3]}, {"count": 700, "key": 12, "sizes": SIZES, "change": True},
    {"count": 5000, "key": 400, "sizes": [5]},              # few keys in a page, so that the tree is deep
])
def test_they_are_those_that_the_library_reads(tmp_path, content):
    expected = fill(tmp_path / "lmdb", **content)
    pages = Pages(str(tmp_path / "lmdb/data.mdb"), "lmdb")
    assert pages.keys == [key for key, _ in expected] and len(pages) == len(expected)
    assert [pages[i] for i in range(len(pages))] == [value for _, value in expected]


FLIPS = """
import sys
from pathlib import Path
import numpy as np
from torchcaffe.data.lmdb_pages import Pages
from torchcaffe.errors import CaffeError
path = Path(sys.argv[1])
whole = path.read_bytes()
first = Pages(str(path), "it")
expected = [(key, first[i]) for i, key in enumerate(first.keys)]
random = np.random.default_rng(0)
pages = np.arange(len(whole) // 4096) * 4096
heads = [(page + place) for page in pages[:20] for place in range(0, 64)]           # among them those of the meta pages
places = [*range(160), *range(4096, 4096 + 160), *heads, *random.integers(0, len(whole), 800)]
told = right = 0
for place in places:
    damaged = bytearray(whole)
    damaged[place] ^= 1 << int(random.integers(8))
    path.write_bytes(damaged)
    try:
        found = Pages(str(path), "it")
        records = [(key, found[i]) for i, key in enumerate(found.keys)]
    except CaffeError as error:
        assert "the LMDB it " in str(error) and "write" in str(error), error
        told += 1
        continue
    assert len(records) == len(expected), place                                     # in a key or a value one byte may differ
    differing = [(a, b) for a, b in zip(records, expected) if a != b]
    assert len(differing) <= 1, place
    for (key, value), (old_key, old) in differing:
        assert (len(key), len(value)) == (len(old_key), len(old)), place
        assert sum(a != b for a, b in zip(key + value, old_key + old)) == 1, place
    right += 1
for size in random.integers(0, len(whole), 100):
    path.write_bytes(whole[:size])
    try:
        Pages(str(path), "it")
        raise SystemExit(f"{size} bytes are taken for all")
    except CaffeError as error:
        assert "the LMDB it is only half there" in str(error), error
print(told, right)
"""


def test_flipped_bits_are_a_sentence_or_do_not_matter(tmp_path):
    fill(tmp_path / "lmdb", 120, 12, SIZES, change=True)
    program = [sys.executable, "-c", FLIPS, str(tmp_path / "lmdb/data.mdb")]
    done = subprocess.run(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert min(map(int, done.stdout.split())) > 100


def test_a_damaged_database_is_one_sentence_with_the_layer(tmp_path):
    write_images(tmp_path / "lmdb", numbered(40))
    file = tmp_path / "lmdb/data.mdb"
    content = bytearray(file.read_bytes())
    content[2 * 4096:] = b"\xff" * (len(content) - 2 * 4096)
    file.write_bytes(content)
    with pytest.raises(caffe.CaffeError, match=r"prototxt:1: layer 'data' \(Data\): the LMDB .*is damaged \(page \d+: .*write it again"):
        net(tmp_path, data_layer(tmp_path / "lmdb", 2))


def test_a_file_cut_off_while_it_is_open_is_a_sentence(tmp_path):
    write_images(tmp_path / "lmdb", numbered(40, 40, 40))
    database = open_database(tmp_path / "lmdb")
    os.truncate(tmp_path / "lmdb/data.mdb", 8192)
    with pytest.raises(caffe.CaffeError, match="has been cut off while it was open"):
        [database[i] for i in range(len(database))]


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is only half there"), (b"x" * 10000, "does not begin as an LMDB"), (None, "not a file"),
])
def test_what_is_no_database_is_said(tmp_path, content, words):
    (tmp_path / "lmdb").mkdir()
    if content is None:
        os.mkfifo(tmp_path / "lmdb/data.mdb")
    else:
        (tmp_path / "lmdb/data.mdb").write_bytes(content)
    with pytest.raises(caffe.CaffeError, match=words):
        open_database(tmp_path / "lmdb")


def test_an_empty_one_and_one_with_several_values_for_a_key_are_refused(tmp_path):
    assert fill(tmp_path / "empty", 0, 1, [1]) == []
    with pytest.raises(caffe.CaffeError, match="holds no records"):
        open_database(tmp_path / "empty")
    with lmdb.open(str(tmp_path / "many"), map_size=1 << 20, lock=False, max_dbs=1) as environment:
        environment.open_db(b"named", dupsort=True)
    with pytest.raises(caffe.CaffeError, match="damaged"):          # a database in a database is no record
        open_database(tmp_path / "many")
