"""prepare: from a data set's name to its folder under data/."""
from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep import sources
from data_prep.check import DESCRIPTION, check_dataset, describe
from data_prep.cifar import read_cifar10, read_cifar100
from data_prep.digits import read_digits
from data_prep.mnist import read_mnist
from data_prep.split import Progress, Split, silent
from data_prep.write import FORMAT, storage_errors, write_dataset
from hintkd import limits
from hintkd.errors import UserError
from hintkd.files import new_folder


@dataclass(frozen=True)
class Recipe:
    """How one data set is made.  `read` takes the folder with the publisher's files, or nothing where there are no `files`."""
    read: Callable[..., dict[str, Split]]
    files: tuple[sources.Source, ...]
    classes: int
    padding: int                               # zeros on each side of training images
    mean_of: str = "train"                     # the split whose mean is subtracted in training and testing


RECIPES = {
    "mnist": Recipe(read_mnist, sources.MNIST, classes=10, padding=0),
    "cifar10": Recipe(read_cifar10, sources.CIFAR10, classes=10, padding=4),
    "cifar100": Recipe(read_cifar100, sources.CIFAR100, classes=100, padding=4),
    "digits": Recipe(read_digits, (), classes=10, padding=1, mean_of="teacher"),
}


def prepare(dataset: str, out: str | os.PathLike[str] = "data", source: str | os.PathLike[str] | None = None, seed: int = 0,
            progress: Progress = silent, say: Callable[[str], None] = print) -> Path:
    """Write `dataset` (mnist, cifar10, cifar100, digits) to `out`/`dataset` and return that folder; nothing if it is there already.

    `source` is a folder with the publisher's files, whose structure is checked; without it they are downloaded to
    `out`/downloads and their digests are checked.  All but the test records are shuffled once with `seed` and padded; test
    records keep the published order.  A folder whose LMDBs are damaged is written anew.  `progress` wraps iterables, as
    rich.progress.track does.  Raises UserError, and leaves everything as it was, for any file, folder or disk that does not serve.
    """
    if dataset not in RECIPES:
        near = difflib.get_close_matches(dataset, RECIPES, n=1)
        raise UserError(f"unknown data set '{dataset}'" + (f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(RECIPES)}"))
    limits.require("--seed", seed, limits.SHUFFLE)
    recipe, out = RECIPES[dataset], Path(out)
    if source is not None and not recipe.files:
        raise UserError(f"{dataset} comes with scikit-learn and is not read from files; leave --from away")
    if source is not None and not Path(source).is_dir():
        raise UserError(f"--from {source} is not a folder; name the one with the publisher's files")
    folder = out / dataset
    with storage_errors(folder):
        if not _is_there(folder, dataset, seed):
            with _only_one(out):
                if not _is_there(folder, dataset, seed):               # another process may have made it meanwhile
                    return _make(folder, recipe, source, seed, progress, say)
    say(f"{folder} is already prepared")
    return folder


def _make(folder: Path, recipe: Recipe, source: str | os.PathLike[str] | None, seed: int, progress: Progress,
          say: Callable[[str], None]) -> Path:
    """Read, shuffle, pad and write a data set that is missing or damaged."""
    if folder.exists():
        say(f"{folder} is damaged and is written anew")
    splits = _read(recipe, folder.parent, source, progress)
    mean = splits[recipe.mean_of].padded(recipe.padding).mean()
    splits = {name: split if name == "test" else split.padded(recipe.padding).shuffled(seed) for name, split in splits.items()}
    about = {"name": folder.name, "seed": seed, "classes": recipe.classes, "padding": recipe.padding, "mean_of": recipe.mean_of}
    write_dataset(folder, splits, mean, about, progress)
    say(f"{folder} is prepared: " + ", ".join(f"{len(split):,} {name} images" for name, split in splits.items()))
    return folder


def _read(recipe: Recipe, out: Path, source: str | os.PathLike[str] | None, progress: Progress) -> dict[str, Split]:
    if not recipe.files:
        return recipe.read()
    if source is not None:
        return recipe.read(Path(source))
    downloads = out / "downloads"
    with new_folder(downloads):
        for file in recipe.files:
            sources.fetch(file, downloads, progress)
    return recipe.read(downloads)


def _is_there(folder: Path, dataset: str, seed: int) -> bool:
    """Whether it is prepared and whole; UserError where `folder` must not be replaced."""
    if not folder.exists() and not folder.is_symlink():
        return False
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} exists but is no prepared data set ({DESCRIPTION} is missing); move it away "
                        "or name another folder with --out")
    try:
        about = describe(folder)
    except UserError:
        if is_ours(folder):
            return False
        raise
    if about["name"] != dataset:
        raise UserError(f"{folder} holds the data set {about['name']}; move it away or name another folder with --out")
    if (about["seed"], about["format"]) != (seed, FORMAT):
        raise UserError(f"{folder} was prepared with seed {about['seed']} in format {about['format']}, not with seed {seed} "
                        f"in format {FORMAT}; remove it or name another folder with --out")
    try:
        check_dataset(folder)
        return True
    except UserError:
        return False


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what `prepare` writes and nothing else, by the names, so that it may be written anew."""
    names = {path.name for path in folder.iterdir()}
    known = {name for name in names if name == DESCRIPTION or name.endswith(("_lmdb", "_mean.binaryproto"))}
    return {"train_lmdb", "test_lmdb"} <= names == known


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the folder `out` for this process; the lock ends with it, however it ends."""
    with new_folder(out):
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is preparing data in {out}; wait until it is done") from None
            yield
        finally:
            os.close(descriptor)
