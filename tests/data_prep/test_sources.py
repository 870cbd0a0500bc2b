"""Downloading: from mirror to mirror, digests, nothing half-written."""
from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest
from rich.progress import track

import published
from data_prep import RECIPES, check_dataset, cifar, prepare, sources
from data_prep.sources import Source, fetch
from hintkd.errors import UserError

BODY = os.urandom(700_000)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def source(*mirrors: str) -> Source:
    return Source("file.gz", hashlib.md5(BODY).hexdigest(), mirrors)


def test_a_file_is_downloaded_once(tmp_path):
    with published.server({"/a/file.gz": BODY}) as (address, asked):
        for _ in range(2):
            assert fetch(source(f"{address}/a"), tmp_path / "downloads").read_bytes() == BODY
    assert asked == ["/a/file.gz"]
    assert os.listdir(tmp_path / "downloads") == ["file.gz"]


def test_mirrors_are_tried_in_turn(tmp_path):
    answers = {"/cut/file.gz": BODY, "/other/file.gz": b"other", "/good/file.gz": BODY}
    with published.server(answers, cut=("/cut/file.gz",)) as (address, asked):
        fetch(source("http://127.0.0.1:9", *(f"{address}/{name}" for name in ("missing", "cut", "other", "good"))), tmp_path)
    assert len(asked) == 4
    assert (tmp_path / "file.gz").read_bytes() == BODY


def test_when_no_mirror_serves_each_is_named_with_its_reason(tmp_path):
    with (published.server({"/cut/file.gz": BODY, "/other/file.gz": b"other"}, cut=("/cut/file.gz",)) as (address, _),
          pytest.raises(UserError) as caught):
        fetch(source(*(f"{address}/{name}" for name in ("missing", "cut", "other"))), tmp_path)
    message = str(caught.value)
    assert "file.gz" in message and "--from" in message and "\n" not in message
    assert "/missing: Not Found" in message
    assert f"/other: what it sent has MD5 {hashlib.md5(b'other').hexdigest()}, not {source().md5}" in message
    assert "/cut: " in message
    assert os.listdir(tmp_path) == []


def test_a_damaged_file_from_before_is_replaced(tmp_path):
    (tmp_path / "file.gz").write_bytes(BODY[:100])
    with published.server({"/file.gz": BODY}) as (address, _):
        fetch(source(address), tmp_path)
    assert (tmp_path / "file.gz").read_bytes() == BODY


def test_progress_counts_chunks(tmp_path):
    seen = []

    def progress(items, description, total):
        for item in items:
            seen.append((description, total, len(item)))
            yield item

    with published.server({"/file.gz": BODY}) as (address, _):
        fetch(source(address), tmp_path, progress)
    assert [s[:2] for s in seen] == [("downloading file.gz", 3)] * 3 and sum(s[2] for s in seen) == len(BODY)


def test_rich_can_show_the_progress(tmp_path):
    with published.server({"/file.gz": BODY}) as (address, _):
        fetch(source(address), tmp_path, track)


def test_prepare_downloads_into_the_data_folder(tmp_path, monkeypatch):
    for name in ("BATCH", "TRAIN", "TEST"):
        monkeypatch.setattr(cifar, name, published.TEST)
    published.cifar10(tmp_path / "cifar-10-batches-bin")
    body = published.archive(tmp_path / "cifar-10-binary.tar.gz", tmp_path / "cifar-10-batches-bin").read_bytes()
    with published.server({"/cifar-10-binary.tar.gz": body}) as (address, _):
        file = Source("cifar-10-binary.tar.gz", hashlib.md5(body).hexdigest(), (address,))
        monkeypatch.setitem(RECIPES, "cifar10", replace(RECIPES["cifar10"], files=(file,)))
        folder = prepare("cifar10", tmp_path / "data")
    assert sorted(os.listdir(tmp_path / "data")) == ["cifar10", "downloads"]
    assert check_dataset(folder).splits["train"].count == 50


@pytest.mark.parametrize("group", [sources.MNIST, sources.CIFAR10, sources.CIFAR100])
def test_published_digests_are_md5(group):
    for file in group:
        assert len(bytes.fromhex(file.md5)) == 16 and file.mirrors
