"""Refusals of evaluation data: private records, which metrics would tell of."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
from transformers.utils import logging

from .copies import find_copies, lists_private_record
from .data_validation import check_not_empty


logger = logging.get_logger(__name__)


def check_evaluation_data(
    train_dataset: Any,
    evaluated: Any,
    unit_column: str | None,
    name: str = "eval_dataset",
    collator: Callable | None = None,
) -> None:
    """Raises `ValueError` if metrics would be computed on private records, on others of the same units, or on none.

    Warns where some are copies of private records, or show images of such. Records that are not in tables are compared
    as they are collated, given a `collator`.
    """
    check_not_empty(evaluated, name)
    if train_dataset is not None and evaluated is train_dataset:
        raise ValueError(
            f"{name} is the private training dataset, so its metrics would be raw statistics of private records: "
            "hold records out with hf_dpclip.data.hold_out, or set log_private_statistics=True on public data."
        )
    overlap = find_copies(evaluated, train_dataset, collator)
    if lists_private_record(evaluated, train_dataset) or 0 < overlap.copies == overlap.compared:
        raise ValueError(
            f"the records of {name} are among those of the private training dataset, so its metrics would be raw "
            "statistics of private records: hold records out with hf_dpclip.data.hold_out, or set "
            "log_private_statistics=True on public data."
        )
    shared = _num_shared_units(train_dataset, evaluated, unit_column)
    if shared:
        raise ValueError(
            f"{shared} records of {name} have the {unit_column!r} of records of the private training dataset, which "
            f"the guarantee protects as a whole: split with hf_dpclip.data.hold_out(dataset, {unit_column!r}), number "
            "the units of both apart if they are others, or set log_private_statistics=True on public data."
        )
    # Without their number: a tracker may record the console by now.
    if overlap.copies:
        logger.warning(
            f"some of the first {overlap.compared} records of {name} are copies of records of the private training "
            "dataset, so its metrics tell of those: leave them out, or hold records out of one dataset with "
            "hf_dpclip.data.hold_out."
        )
    elif overlap.sharing:
        logger.warning(
            f"some of the first {overlap.compared} records of {name} have an image or a sound of the private training "
            "dataset, so its metrics tell of those: keep all records of an image on one side, with "
            "hf_dpclip.data.hold_out and the column of images."
        )


def _num_shared_units(private: Any, evaluated: Any, column: str | None) -> int:
    """How many records for evaluation belong to a privacy unit that has private records."""
    both = (private, evaluated)
    if column is None or not all(isinstance(each, datasets.Dataset) and column in each.column_names for each in both):
        return 0
    units = _as_texts(private, column)
    return sum(unit in units for unit in _as_texts(evaluated, column).elements())


def _as_texts(dataset: datasets.Dataset, column: str) -> Counter[str]:
    """The values of a column as texts, so that 7 and "7" are the same."""
    return Counter(str(unit) for unit in dataset.with_format(None)[column][:] if isinstance(unit, str | int))
