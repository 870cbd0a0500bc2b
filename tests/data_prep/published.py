"""Publishers' files in small, and a web server for them."""
from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np

TRAIN, TEST = 30, 10                           # images in the small MNIST; in the small CIFARs, TEST in every file


def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist(folder: Path, packed: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write four small files; returns images (n, 28, 28) and labels by split."""
    folder.mkdir(parents=True)
    draw, content = np.random.default_rng(0), {}
    for split, prefix, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = draw.integers(0, 10, count, dtype=np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
        content[split] = images, labels
    return content


def cifar(folder: Path, classes: tuple[int, ...], names: list[str]) -> np.ndarray:
    """Write small CIFAR files; returns all records in order, (n, label bytes + 3072)."""
    folder.mkdir(parents=True)
    draw, every = np.random.default_rng(0), []
    for name in names:
        labels = np.stack([draw.integers(0, n, TEST, dtype=np.uint8) for n in classes], axis=1)
        records = np.concatenate([labels, draw.integers(0, 256, (TEST, 3072), dtype=np.uint8)], axis=1)
        records.tofile(folder / name)
        every.append(records)
    return np.concatenate(every)


def cifar10(folder: Path) -> np.ndarray:
    return cifar(folder, (10,), [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"])


def cifar100(folder: Path) -> np.ndarray:
    return cifar(folder, (20, 100), ["train.bin", "test.bin"])


def archive(path: Path, folder: Path) -> Path:
    """`folder` as the publisher packs it."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


@contextmanager
def server(answers: dict[str, bytes], cut: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serves `answers` by path, those in `cut` only half; gives the address and the list of the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = answers.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if self.path in cut else body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
