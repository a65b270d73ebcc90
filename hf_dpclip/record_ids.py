"""Ids of records, by their places in memory: equal for a record that a dataset lists twice."""

from typing import Any

import datasets
import numpy as np
from torch.utils.data import ConcatDataset, Subset


# More rows than any chunk of a column has; and an odd number with which the ids of all columns are mixed, in 64 bits:
# among a hundred million different records, two get the same id with a probability of some 3 in 10,000.
MAX_ROWS = 2**40
MIXER = np.uint64(0x9E3779B97F4A7C15)


class RecordIds:
    """Gives records ids that are equal for those that are one and the same in memory.

    Oversampling, repeating and splitting a dataset copy no record: the same one is listed again, under another number.
    Records that were read or made twice have different ids, even if they are equal.

    Args:
        columns (`list[str]`, *optional*): the columns to compare, at least one, which all tables have; by default all
            columns of each.
    """

    def __init__(self, columns: list[str] | None = None):
        self.columns = columns
        self._known: dict[Any, int] = {}

    def of(self, dataset: Any) -> np.ndarray:
        """`[records]`, uint64, for a map-style dataset."""
        if isinstance(dataset, Subset):
            rows = [int(number) for number in dataset.indices]
            if isinstance(dataset.dataset, Subset | ConcatDataset | datasets.Dataset | list | tuple):
                return self.of(dataset.dataset)[rows]
            # Other datasets inside a subset need neither a length nor rows that are counted from 0.
            return np.array(rows, dtype=np.int64).astype(np.uint64) + self._start(id(dataset.dataset))
        if isinstance(dataset, ConcatDataset):
            return np.concatenate([self.of(part) for part in dataset.datasets])
        if isinstance(dataset, datasets.Dataset):
            return self._of_table(dataset)
        if isinstance(dataset, list | tuple):
            return np.array([id(record) for record in dataset], dtype=np.uint64)
        return self._rows(id(dataset), len(dataset))

    def _of_table(self, dataset: datasets.Dataset) -> np.ndarray:
        ids = np.zeros(dataset.data.num_rows, dtype=np.uint64)
        for name in self.columns or sorted(dataset.column_names):
            chunks = [np.empty(0, dtype=np.uint64), *map(self._of_chunk, dataset.data.column(name).chunks)]
            ids = ids * MIXER + np.concatenate(chunks)
        return ids if dataset._indices is None else ids[dataset._indices.column(0).to_numpy()]

    def _of_chunk(self, chunk: Any) -> np.ndarray:
        """By its buffers, which tables share with those that they were concatenated from, or cut out of."""
        addresses = tuple(buffer.address for buffer in chunk.buffers() if buffer is not None)
        return self._rows(addresses, len(chunk), chunk.offset)

    def _rows(self, owner: Any, count: int, first: int = 0) -> np.ndarray:
        return np.arange(first, first + count, dtype=np.uint64) + self._start(owner)

    def _start(self, owner: Any) -> np.uint64:
        return np.uint64(self._known.setdefault(owner, len(self._known)) * MAX_ROWS)
