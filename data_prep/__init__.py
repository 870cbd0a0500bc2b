"""Data sets as Caffe reads them: publishers' files, or the digits that come with scikit-learn, to LMDBs and mean files.

    prepare("cifar10")                      downloads, checks, writes data/cifar10
    prepare("cifar10", source="folder")     the same from files that are already there
    check_dataset("folder")                 what a folder with LMDBs and means holds, one's own included

Training is not its work.
"""
from data_prep.check import DatasetInfo, SplitInfo, check_dataset
from data_prep.prepare import RECIPES, prepare

__all__ = ["RECIPES", "DatasetInfo", "SplitInfo", "check_dataset", "prepare"]
