"""Records of a LevelDB, Caffe's first kind of database, read with plyvel where that is installed.

Training does not read them (`torchcaffe convert_leveldb` makes an LMDB of one); LevelDB itself writes to a folder it opens.
"""
from __future__ import annotations

import os
from collections.abc import Iterator

from torchcaffe.errors import CaffeError
from torchcaffe.extras import how_to_get


def is_leveldb(path: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a LevelDB."""
    return os.path.isfile(os.path.join(path, "CURRENT"))


def records(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values in the byte order of the keys.  Raises CaffeError where there is no LevelDB, a damaged one, or no plyvel."""
    if not is_leveldb(path):
        raise CaffeError(f"there is no LevelDB {path} (a folder with a file CURRENT in it)")
    try:
        import plyvel  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise CaffeError(f"reading the LevelDB {path} takes plyvel: {how_to_get('leveldb')}") from None
    try:
        with plyvel.DB(os.fspath(path), create_if_missing=False, paranoid_checks=True) as database:
            yield from database.iterator(verify_checksums=True)
    except (plyvel.Error, OSError) as error:
        reason = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
        raise CaffeError(f"cannot read the LevelDB {path}: {reason}") from None
