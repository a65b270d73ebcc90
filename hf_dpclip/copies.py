"""Whether records for evaluation are private ones: the same in memory, or copies of such."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from datasets.fingerprint import Hasher
from torch.utils.data import Subset

from .collators import PairCollator
from .digests import LOOKED_AT, column_digests, file_columns
from .reading import apart
from .record_ids import RecordIds
from .records import ENCODED, has_random_access, is_text_column
from .seeding import seeded
from .silence import without_messages


# The number of records for evaluation that are looked for among the private ones.
COMPARED = 64
# The number of private records that are looked at where images and sounds are encoded, which takes hundreds of
# kilobytes for each.
LOOKED_AT_ENCODED = 2_000
# The number that is looked at where records are collated to be compared.
LOOKED_AT_COLLATED = 256
# What a record is compared by: its images and sounds, and everything else.
Content = tuple[tuple, tuple]


@dataclass(frozen=True)
class Overlap:
    """How many records for evaluation were compared with private ones, at most `COMPARED`; how many of them are copies
    of one; and how many show an image, or play a sound, of one."""

    compared: int = 0
    copies: int = 0
    sharing: int = 0


def lists_private_record(evaluated: Any, private: Any) -> bool:
    """Whether a record for evaluation is one and the same in memory as a private one."""
    if not (has_random_access(evaluated) and has_random_access(private)):
        return False
    shown, base = _unwrapped(evaluated)[0], _unwrapped(private)[0]
    if not (isinstance(shown, Dataset) and isinstance(base, Dataset)):
        return _share_records(evaluated, private)
    common = _common_columns(shown, base)
    return bool(common) and _share_records(evaluated, private, common)


def find_copies(evaluated: Any, private: Any, collator: Callable | None = None) -> Overlap:
    """Compares records for evaluation with the private ones: as they are stored, if both are in tables, and else, with
    a collator, as they are collated. Where there is nothing to compare them by, none are compared."""
    if not (has_random_access(evaluated) and has_random_access(private)):
        return Overlap()
    (shown, rows), (base, private_rows) = _unwrapped(evaluated), _unwrapped(private)
    if isinstance(shown, Dataset) and isinstance(base, Dataset):
        # The Trainer wraps a collator that is given too much.
        inner = getattr(collator, "data_collator", collator)
        columns = inner.columns if isinstance(inner, PairCollator) else None
        return _in_tables(shown.select(rows[:COMPARED]), base.select(private_rows), columns)
    return Overlap() if collator is None else _as_collated(evaluated, private, collator)


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


def _in_tables(first: Dataset, private: Dataset, read: list[str] | None) -> Overlap:
    """By the columns that are `read`, or by all that both have."""
    common = [name for name in _common_columns(first, private) if read is None or name in read]
    texts = [name for name in common if is_text_column(first, name) and is_text_column(private, name)]
    files = [name for name in common if name in file_columns(first) and name in file_columns(private)]
    encoded = [name for name in common if name in ENCODED and name not in files]
    if not (files or encoded):
        return Overlap()
    columns = [*texts, *(name for name in common if name == "input_ids")]
    looked_at = private.select(range(min(len(private), LOOKED_AT_ENCODED if encoded else LOOKED_AT)))
    both = (zip(_contents(each, [*files, *encoded]), _contents(each, columns)) for each in (first, looked_at))
    return _overlap(*both)


def _contents(dataset: Dataset, columns: list[str]) -> Iterator[tuple]:
    """What each record is compared by: its texts, and digests of its images, sounds and numbers."""
    plain = dataset.with_format(None)
    values = [plain[name][:] if is_text_column(dataset, name) else column_digests(dataset, name) for name in columns]
    return zip(*values) if columns else repeat((), len(dataset))


def _as_collated(evaluated: Any, private: Any, collator: Callable) -> Overlap:
    """Of datasets that only whoever wrote them knows how to compare, by the first records of both."""
    first = [*_inputs(evaluated, COMPARED, collator)]
    return _overlap(first, _inputs(private, LOOKED_AT_COLLATED, collator) if first else ())


def _inputs(dataset: Any, count: int, collator: Callable) -> Iterator[Content]:
    """What the model would be given of the first records; of those that cannot be read or collated, nothing."""
    dataset = apart(dataset)
    read = (_input(dataset, row, collator) for row in range(min(count, len(dataset))))
    return (content for content in read if content is not None)


def _input(dataset: Any, row: int, collator: Callable) -> Content | None:
    """Digests of the images or sounds of a record, and of its text, or of everything else."""
    # Of a random augmentation, each record draws the same, and nothing shows in the state of the generators. Datasets
    # and collators of a user's own may raise anything.
    with seeded(0), without_messages(), suppress(Exception):
        batch = collator([dataset[row]])
        shown = [name for name in ENCODED if name in batch]
        others = [name for name in batch if name not in shown and (not shown or name == "input_ids")]
        return tuple(_digest(batch[name]) for name in shown), tuple(_digest(batch[name]) for name in others)
    return None


def _digest(value: Any) -> Any:
    if not torch.is_tensor(value):
        return Hasher.hash(value)
    return hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _overlap(evaluated: Iterable[Content], private: Iterable[Content]) -> Overlap:
    known = {*private}
    known_files = {file for files, _ in known for file in files if file is not None}
    compared, copies, sharing = 0, 0, 0
    for record in evaluated:
        compared += 1
        copies += record in known
        sharing += any(file in known_files for file in record[0])
    return Overlap(compared, copies, sharing)
