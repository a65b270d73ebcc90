"""Whether records for evaluation are private ones: the same in memory, or copies of such."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value
from torch.utils.data import Subset

from .digests import LOOKED_AT, column_digests, file_columns
from .record_ids import RecordIds
from .records import ENCODED, has_random_access, holds_texts


# The number of records for evaluation that are looked for among the private ones.
COMPARED = 64
# The number of private records that are looked at where images and sounds are encoded, which takes hundreds of
# kilobytes for each.
LOOKED_AT_ENCODED = 2_000


def lists_private_record(evaluated: Any, private: Any) -> bool:
    """Whether a record for evaluation is one and the same in memory as a private one."""
    if not (has_random_access(evaluated) and has_random_access(private)):
        return False
    shown, base = _unwrapped(evaluated)[0], _unwrapped(private)[0]
    if not (isinstance(shown, Dataset) and isinstance(base, Dataset)):
        return _share_records(evaluated, private)
    common = _common_columns(shown, base)
    return bool(common) and _share_records(evaluated, private, common)


def count_copies(evaluated: Any, private: Any) -> tuple[int, int]:
    """How many records for evaluation were compared with the private ones, at most `COMPARED`, and how many of them
    are copies of such; (0, 0) where there is nothing to compare them by."""
    if not (has_random_access(evaluated) and has_random_access(private)):
        return 0, 0
    (shown, rows), (base, private_rows) = _unwrapped(evaluated), _unwrapped(private)
    if not (isinstance(shown, Dataset) and isinstance(base, Dataset) and _common_columns(shown, base)):
        return 0, 0
    return _count_in_table(shown.select(rows[:COMPARED]), base.select(private_rows))


def _common_columns(first: Dataset, second: Dataset) -> list[str]:
    """Those that both have. Columns without any value would have equal ids."""
    empty = Value("null")
    return [name for name, kind in first.features.items() if name in second.column_names and kind != empty]


def _share_records(first: Any, second: Any, columns: list[str] | None = None) -> bool:
    ids = RecordIds(columns)
    # In this order, which is faster: there are fewer records for evaluation.
    return bool(np.isin(ids.of(second), ids.of(first)).any())


def _unwrapped(dataset: Any) -> tuple[Any, Sequence[int]]:
    """The dataset from which subsets of subsets were taken, and the rows that were taken."""
    rows: Sequence[int] = range(len(dataset))
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    return dataset, rows


def _count_in_table(first: Dataset, private: Dataset) -> tuple[int, int]:
    common = [name for name in first.column_names if name in private.column_names]
    texts = [name for name in common if holds_texts(first, name) and holds_texts(private, name)]
    files = [name for name in common if name in file_columns(first) and name in file_columns(private)]
    encoded = [name for name in common if name in ENCODED and name not in files]
    if not (files or encoded):
        return 0, 0
    columns = [*files, *encoded, *(name for name in common if name == "input_ids")]
    looked_at = private.select(range(min(len(private), LOOKED_AT_ENCODED if encoded else LOOKED_AT)))
    known = {*_recognised_by(looked_at, columns, texts)}
    return len(first), sum(record in known for record in _recognised_by(first, columns, texts))


def _recognised_by(dataset: Dataset, columns: list[str], texts: list[str]) -> Iterator[tuple]:
    """By what each record is compared: digests of its images, sounds and encoded inputs, and its texts."""
    digests = [column_digests(dataset, name) for name in columns]
    return zip(*digests, *(dataset.with_format(None)[name][:] for name in texts))
