"""From Poisson draws to collated microbatches: the training data loader of [`DPCLIPTrainer`]."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, Sampler

from .privacy import PoissonSampler


# The records of one forward batch, microbatch by microbatch.
ForwardBatch = list[np.ndarray]


class PrivacyUnits:
    """Which records belong to which privacy unit.

    Args:
        dataset: a map-style dataset.
        column (`str`, *optional*): the column whose values are the units; by default each record is a unit of its own.
    """

    def __init__(self, dataset: Dataset, column: str | None = None):
        self.num_records = len(dataset)
        self._records = None if column is None else _records_by_value(dataset, column)

    def __len__(self) -> int:
        """n, the number of privacy units."""
        return self.num_records if self._records is None else len(self._records)

    def records(self, units: np.ndarray) -> np.ndarray:
        """All records of the given units."""
        if self._records is None or len(units) == 0:
            return units
        return np.concatenate([self._records[unit] for unit in units])


class ForwardBatchSampler(Sampler[ForwardBatch]):
    """Deals the microbatches of every step out to processes and forward passes.

    Microbatch j goes to process j mod W, and there to forward pass (j div W) mod A. Every process yields A forward
    batches per step whatever was drawn, some of them possibly empty.

    Args:
        sampler ([`~privacy.PoissonSampler`]): the same draws on every process.
        units ([`PrivacyUnits`]): the records behind the drawn units.
        steps (`int`): optimizer steps in one epoch.
        forward_passes (`int`): A, the gradient accumulation steps.
        process, num_processes (`int`): rank and W.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        units: PrivacyUnits,
        steps: int,
        forward_passes: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        self.sampler = sampler
        self.units = units
        self.steps = steps
        self.forward_passes = forward_passes
        self.process = process
        self.num_processes = num_processes

    def __len__(self) -> int:
        return self.steps * self.forward_passes

    def __iter__(self) -> Iterator[ForwardBatch]:
        for _ in range(self.steps):
            own = self.sampler.draw()[self.process :: self.num_processes]
            for forward_pass in range(self.forward_passes):
                drawn = own[forward_pass :: self.forward_passes]
                yield [self.units.records(units) for units in drawn if len(units)]


class MicrobatchDataset(Dataset):
    """Turns a forward batch of record numbers into collated microbatches.

    Each microbatch is collated by itself, so that nothing in it, not even its padding, depends on the records of
    another one.
    """

    def __init__(self, dataset: Dataset, collator: Callable[[list[Any]], dict[str, Any]]):
        self.dataset = dataset
        self.collator = collator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, forward_batch: ForwardBatch) -> list[dict[str, Any]]:
        return [dict(self.collator(self._fetch(records.tolist()))) for records in forward_batch]

    def _fetch(self, records: list[int]) -> list[Any]:
        if isinstance(self.dataset, datasets.Dataset):
            return self.dataset.__getitems__(records)
        return [self.dataset[record] for record in records]


def _records_by_value(dataset: Dataset, column: str) -> Sequence[np.ndarray]:
    """The records that share a value of `column`, one array per value."""
    names = dataset.column_names if isinstance(dataset, datasets.Dataset) else []
    if column not in names:
        raise ValueError(
            f"privacy_unit_column={column!r} is not a column of the training dataset (it has {names or 'none'}): "
            "name one of its columns, or leave privacy_unit_column unset to protect single records."
        )
    _, unit_of_record = np.unique(np.asarray(dataset.with_format(None)[column][:]), return_inverse=True)
    order = np.argsort(unit_of_record, kind="stable")
    return np.split(order, np.cumsum(np.bincount(unit_of_record))[:-1])
