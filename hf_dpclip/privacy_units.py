"""Privacy units: single records, or all records that share an id, which the guarantee protects as a whole."""

from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset

from .privacy.sampling import split_by_label
from .records import kind_of


# Texts with which tables mark a missing id.
NO_IDS = ("", "na", "n/a", "nan", "none", "null")


class PrivacyUnits:
    """Which records belong to which privacy unit.

    Args:
        dataset: a map-style dataset.
        column (`str`, *optional*): the column whose values are the units; by default each record is a unit of its own.
        max_records (`int`, *optional*): the number of records with which a drawn unit takes part at most.

    Raises `ValueError` if `column` is not a column of ids.
    """

    def __init__(self, dataset: Dataset, column: str | None = None, max_records: int | None = None):
        self.dataset = dataset
        self.max_records = max_records
        self.num_records = len(dataset)
        self._records = None if column is None else _records_by_value(dataset, column)

    def __len__(self) -> int:
        """n, the number of privacy units."""
        return self.num_records if self._records is None else len(self._records)

    def records(self, units: np.ndarray, seed: int) -> np.ndarray:
        """The numbers of the records with which the given units take part, both 1-dimensional.

        Args:
            units (`np.ndarray`): the units of one microbatch.
            seed (`int`): the microbatch's, from which a uniformly random subset of a unit with more than `max_records`
                is drawn: the same on every process, and independent of other microbatches.
        """
        if self._records is None or len(units) == 0:
            return units
        of_unit = [self._records[unit] for unit in units]
        if self.max_records is not None:
            generator = np.random.default_rng(seed)
            of_unit = [_subset(records, self.max_records, generator) for records in of_unit]
        return np.concatenate(of_unit)


def records_without_unit(dataset: Dataset, column: str) -> dict[int, str]:
    """The records that no unit can be told of, by number, each with the reason. Raises `ValueError` if `column` is not
    a column of the dataset."""
    return {
        number: f"column {column!r} holds {_shown(value)}, no id of a privacy unit: give each such record that of its "
        "unit, or, if it belongs to nobody else, an id of its own"
        for number, value in enumerate(_values(dataset, column))
        if _is_missing(value) or not isinstance(value, str | int)
    }


def _shown(value: Any) -> str:
    """A text that marks a missing id, or the kind of another value."""
    return repr(value) if isinstance(value, str) else kind_of(value)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in NO_IDS


def _values(dataset: Dataset, column: str) -> list[Any]:
    """The ids of all records. Raises `ValueError` if there is no such column."""
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"privacy_unit_column={column!r} needs a datasets.Dataset, whose columns are known without reading all "
            f"records, and not a {type(dataset).__name__}: make one, or leave privacy_unit_column unset to protect "
            "single records."
        )
    names = dataset.column_names
    if column not in names:
        raise ValueError(
            f"privacy_unit_column={column!r} is not a column of the training dataset (it has {names}): name one of "
            "these, or leave privacy_unit_column unset to protect single records."
        )
    return dataset.with_format(None)[column][:]


def _records_by_value(dataset: Dataset, column: str) -> list[np.ndarray]:
    """The records that share a value of `column`, one array per value."""
    values = _values(dataset, column)
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise ValueError(
            f"record {missing[0]} (such records: {len(missing)}) has {values[missing[0]]!r} as its {column!r}, as if "
            "it had none. Records without an id do not form one unit: give each of them an id of its own."
        )
    without = [number for number, value in enumerate(values) if not isinstance(value, str | int)]
    if without:
        raise ValueError(
            f"privacy_unit_column={column!r} has values that are neither strings nor whole numbers, such as the "
            f"{type(values[without[0]]).__name__} of record {without[0]} (such records: {len(without)}; where some "
            "are missing, the others may have been read as floats): give every record the id of its unit; a record "
            "that belongs to nobody else needs an id of its own."
        )
    # Not numpy's `unique`, which ignores NUL characters at the end of texts.
    numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    unit_of_record = np.array([numbers[value] for value in values])
    return split_by_label(np.arange(len(values)), unit_of_record, len(numbers))


def _subset(records: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """A random subset of the records, or all if they are few enough."""
    return records if len(records) <= size else generator.choice(records, size=size, replace=False, shuffle=False)
