"""Reading a few records before training."""

import copy
from typing import Any

import datasets
from torch.utils.data import ConcatDataset, Subset


def apart(dataset: Any) -> Any:
    """The dataset, to be read before training: if it is a user's own, a copy, so that a file that it opens with the
    first record is not open in the dataset itself, whose worker processes would share its position."""
    if isinstance(dataset, datasets.Dataset | list | tuple):
        return dataset
    copied = copy.copy(dataset)
    if isinstance(dataset, Subset):
        copied.dataset = apart(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        copied.datasets = [apart(part) for part in dataset.datasets]
    return copied
