"""From Poisson draws to collated microbatches: the training data loader of [`DPCLIPTrainer`]."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, Sampler

from .arguments import DPTrainingArguments
from .gradients import Microbatch
from .privacy import PoissonSampler
from .privacy_units import PrivacyUnits
from .records import described, read_records
from .seeding import preserved_generators, seed_generators
from .silence import without_messages


# The seed of a microbatch's randomness, and its record numbers.
DrawnMicrobatch = tuple[int, np.ndarray]
# What is loaded for one forward pass: collated microbatches, or, where chunks are read later, drawn ones.
ForwardBatch = list[Microbatch] | list[DrawnMicrobatch]


@dataclass(eq=False, repr=False)
class ForwardBatchSampler(Sampler[list[DrawnMicrobatch]]):
    """Deals the microbatches of every step out to processes and forward passes.

    Each microbatch goes to one process and there to one forward pass, in such a way that all have about equally many
    records: processes with less wait for the others, and the largest forward batch has to fit into memory. Where a
    microbatch is computed does not change its gradient. Every process yields A forward batches per step whatever was
    drawn, some of them possibly empty.

    A microbatch that spans the processes goes to all of them instead: each gets every W-th of its records, possibly
    none, since all processes take part in its computation.

    Args:
        sampler ([`~privacy.PoissonSampler`]): the same draws on every process.
        units ([`PrivacyUnits`]): the records behind the drawn units.
        steps (`int`): optimizer steps in one epoch.
        forward_passes (`int`): A, the gradient accumulation steps.
        process, num_processes (`int`): rank and W.
        spanning (`bool`): whether every microbatch spans all processes.
    """

    sampler: PoissonSampler
    units: PrivacyUnits
    steps: int
    forward_passes: int
    process: int = 0
    num_processes: int = 1
    spanning: bool = False

    def __len__(self) -> int:
        return self.steps * self.forward_passes

    def __iter__(self) -> Iterator[list[DrawnMicrobatch]]:
        for _ in range(self.steps):
            drawn = self.sampler.draw()
            seeds = self.sampler.draw_seeds(len(drawn))
            yield from self._own([(seed, self.units.records(units, seed)) for seed, units in zip(seeds, drawn)])

    def _own(self, microbatches: list[DrawnMicrobatch]) -> Iterator[list[DrawnMicrobatch]]:
        """This process's share of a step, one forward batch after another."""
        if self.spanning:
            every = slice(self.process, None, self.num_processes)
            for forward_batch in dealt_out(microbatches, self.forward_passes):
                yield [(seed, records[every]) for seed, records in forward_batch]
            return
        own = dealt_out(microbatches, self.num_processes)[self.process]
        for forward_batch in dealt_out(own, self.forward_passes):
            yield [(seed, records) for seed, records in forward_batch if len(records)]


def draws_samples(dataloader: Any) -> bool:
    """Whether a loader is the training data loader, which draws Poisson samples."""
    return isinstance(getattr(dataloader, "sampler", None), ForwardBatchSampler)


def dealt_out(microbatches: list[DrawnMicrobatch], num_shares: int) -> list[list[DrawnMicrobatch]]:
    """Splits microbatches into shares of equally many, but for a remainder, and of nearly equally many records: shares
    differ by no more records than the largest microbatch has."""
    if num_shares == 1:
        return [microbatches]
    shares: list[list[DrawnMicrobatch]] = [[] for _ in range(num_shares)]
    num_records = [0] * num_shares
    largest_first = sorted(microbatches, key=_size, reverse=True)
    for first in range(0, len(largest_first), num_shares):
        # One more for each share, the largest to the share with the fewest records so far.
        least_first = sorted(range(num_shares), key=num_records.__getitem__)
        for share, microbatch in zip(least_first, largest_first[first : first + num_shares]):
            shares[share].append(microbatch)
            num_records[share] += _size(microbatch)
    return shares


def _size(microbatch: DrawnMicrobatch) -> int:
    """The number of its records."""
    return len(microbatch[1])


@dataclass(eq=False, repr=False)
class MicrobatchDataset(Dataset):
    """Turns a forward batch of record numbers into collated microbatches.

    Each microbatch is collated by itself and with random numbers of its own, so that nothing in it, neither its
    padding nor its augmentation, depends on the records of another one. What libraries would warn of is not shown.

    Args:
        dataset (`Dataset`): the records.
        collator (`Callable`): makes a batch of them.
        longest_text (`int`, *optional*): the number of tokens that the model reads of a text at most, where known.

    Items raise `ValueError` for records that cannot be read or collated, and for longer texts.
    """

    dataset: Dataset
    collator: Callable[[list[Any]], dict[str, Any]]
    longest_text: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, forward_batch: list[DrawnMicrobatch]) -> list[Microbatch]:
        microbatches = []
        with preserved_generators(), without_messages():
            fetched = self._fetched_together(forward_batch)
            for (seed, numbers), records in zip(forward_batch, fetched):
                seed_generators(seed)
                records = records or read_records(self.dataset, numbers.tolist())
                microbatches.append((seed, self._collated(records, numbers)))
        return microbatches

    def _collated(self, records: list[Any], numbers: np.ndarray) -> dict[str, Any]:
        try:
            batch = self.collator(records)
        except (ValueError, RuntimeError) as error:
            hint = self._hint(records, numbers)
            if isinstance(error, RuntimeError) and not hint:
                raise
            raise ValueError(f"{error}{hint}") from error
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"the data_collator returned a {type(batch).__name__}: return a dictionary of the model's inputs."
            )
        self._check_text_length(batch.get("input_ids"))
        return dict(batch)

    def _check_text_length(self, input_ids: Any) -> None:
        # Without the length that was found, which is that of a private record.
        if self.longest_text is not None and torch.is_tensor(input_ids) and input_ids.shape[-1] > self.longest_text:
            raise ValueError(
                f"texts were encoded to more than the {self.longest_text} tokens that the model reads: call the "
                f"tokenizer with truncation=True, max_length={self.longest_text} (in the data_collator, or where "
                "records are encoded), or pass an ImageTextCollator, which cuts them off."
            )

    def _hint(self, records: list[Any], numbers: np.ndarray) -> str:
        """Names the record that cannot be collated even alone, or says that there is none such."""
        for record, number in zip(records, numbers.tolist()):
            try:
                self.collator([record])
            except ValueError:
                return f" (Found in {described(self.dataset, number)}.)"
            except Exception:
                # Another error: the collator does not take single records.
                return ""
        return (
            " (Each record alone can be collated. If encoded texts differ in length, encode them with "
            "padding='max_length', or pass a data_collator that pads.)"
        )

    def _fetched_together(self, forward_batch: list[DrawnMicrobatch]) -> list[list[Any] | None]:
        """The records of each microbatch, read in one access; `None` where that could make microbatches depend on one
        another: transforms draw random numbers, and other formats choose one dtype for all that is read together."""
        separable = isinstance(self.dataset, datasets.Dataset) and self.dataset.format["type"] is None
        if not separable or not forward_batch:
            return [None] * len(forward_batch)
        sizes = [len(numbers) for _, numbers in forward_batch]
        everyone = np.concatenate([numbers for _, numbers in forward_batch]).tolist()
        records = iter(read_records(self.dataset, everyone))
        return [[*itertools.islice(records, size)] for size in sizes]


@dataclass(eq=False, repr=False)
class RecordNumbers(Dataset):
    """Passes record numbers on as they are, for microbatches that are read later, in chunks."""

    num_records: int

    def __len__(self) -> int:
        return self.num_records

    def __getitem__(self, forward_batch: list[DrawnMicrobatch]) -> list[DrawnMicrobatch]:
        return forward_batch


class LoadedChunks:
    """The collated chunks of one microbatch, each with a seed of its own. Every iteration reads them anew, unless an
    accelerator computes, which leaves the host's memory to keep them in.

    Args:
        dataset ([`MicrobatchDataset`]): where the records are.
        seed (`int`): the microbatch's. Chunk seeds follow from it, so that every reading draws the same.
        records (`np.ndarray`): the microbatch's record numbers, this process's share of them.
        args ([`DPTrainingArguments`]): the expected size of a chunk, the rank, and how data is loaded.
    """

    def __init__(self, dataset: MicrobatchDataset, seed: int, records: np.ndarray, args: DPTrainingArguments):
        # Rounded, so that a sample a little larger than expected makes chunks larger, as it does forward batches of
        # whole microbatches, instead of adding a small one.
        count = max(1, round(len(records) / args.per_device_train_batch_size))
        # If it spans the processes, each draws for its own share. If not, the rank must not matter, since the sizes of
        # all microbatches decide which process computes this one.
        share = 1 + args.process_index if args.microbatch_spans_processes else 0
        seeds = np.random.SeedSequence([seed, share, 1]).generate_state(count).tolist()
        chunks = [[(seed, piece)] for seed, piece in zip(seeds, np.array_split(records, count)) if len(piece) > 0]
        self.loader = make_dataloader(dataset, chunks, args, keeps=True)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for forward_batch in self.loader:
            yield from forward_batch


class _DeviceLoader(DataLoader[ForwardBatch]):
    """Moves what it loads to the device at once, as Accelerate's loaders do.

    Args:
        device (`torch.device`): where batches go.
        keeps (`bool`): whether all batches stay in the host's memory too, and are loaded only once.
    """

    def __init__(self, device: torch.device, keeps: bool, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.device = device
        self.keeps = keeps
        self._kept: list[ForwardBatch] = []

    def __iter__(self) -> Iterator[ForwardBatch]:
        # Other accelerators may still read host memory after it was freed.
        non_blocking = self.device.type == "cuda"
        for forward_batch in self._kept or self._loaded():
            yield send_to_device(forward_batch, self.device, non_blocking=non_blocking)

    def _loaded(self) -> Iterator[ForwardBatch]:
        loaded = []
        for forward_batch in super().__iter__():
            if self.keeps:
                loaded.append(forward_batch)
            yield forward_batch
        self._kept = loaded


def make_dataloader(
    dataset: MicrobatchDataset | RecordNumbers,
    sampler: Iterable[list[DrawnMicrobatch]],
    args: DPTrainingArguments,
    keeps: bool = False,
) -> DataLoader[ForwardBatch]:
    """A loader with the workers and pinned memory that `args` ask for. One item is one forward batch, on the device.

    With `keeps`, pinned batches stay in the host's memory for further iterations.
    """
    pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    return _DeviceLoader(
        args.device,
        keeps and pin_memory,
        dataset,
        sampler=sampler,
        batch_size=None,
        collate_fn=_identity,
        num_workers=args.dataloader_num_workers,
        pin_memory=pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _identity(value: Any) -> Any:
    return value
