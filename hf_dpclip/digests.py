"""Digests of images, sounds and numbers, by which records are recognised."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Audio, Dataset, Image
from datasets.fingerprint import Hasher

from .reading import apart


if TYPE_CHECKING:
    from .dataloader import MicrobatchDataset

# Records in memory at a time.
BATCH = 64
# Records whose images are looked at when training is set up: enough to find captions that share images, and seldom
# more than a minute of reading.
LOOKED_AT = 100_000
# Rows by which processes compare their datasets. A different order goes unnoticed if all of these stay in place.
SAMPLED_ROWS = 64


def image_columns(dataset: Dataset) -> list[str]:
    """The columns that hold images, encoded or as paths."""
    return [name for name, feature in dataset.features.items() if isinstance(feature, Image)]


def file_columns(dataset: Dataset) -> list[str]:
    """The columns that hold images or sounds, encoded or as paths."""
    return [name for name, feature in dataset.features.items() if isinstance(feature, Image | Audio)]


def file_digests(dataset: Dataset, column: str) -> Iterator[bytes | None]:
    """For each record, a digest of its image's or sound's file, or of the file's path where the dataset holds no more
    than that; `None` where there is none."""
    for batch in dataset.select_columns([column]).with_format("arrow").iter(BATCH):
        for image in batch[column].to_pylist():
            file = image and (image["bytes"] or (image["path"] or "").encode())
            yield hashlib.sha256(file).digest() if file else None


def array_digests(dataset: Dataset, column: str) -> Iterator[bytes]:
    """For each record, a digest of the numbers in a column."""
    for value in dataset.select_columns([column]).with_format("numpy")[column]:
        numbers = np.asarray(value)
        # The bytes of object arrays, for missing or ragged values, would be addresses.
        content = repr(numbers.tolist()).encode() if numbers.dtype == object else numbers.tobytes()
        yield hashlib.sha256(content).digest()


def column_digests(dataset: Dataset, column: str) -> Iterator[bytes | None]:
    """For each record, a digest of its image or sound in a column of such, or of its numbers in another."""
    return file_digests(dataset, column) if column in file_columns(dataset) else array_digests(dataset, column)


def sampled_digest(microbatches: "MicrobatchDataset") -> bytes | str | None:
    """A digest of some records, spread evenly: as they are stored in a `datasets.Dataset`, and collated for others.
    `None` if collating gives another result each time, or none that can be compared.

    Of a file, it covers the content if the table holds it, and else the name without folders.
    """
    dataset: Any = microbatches.dataset
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED_ROWS)).astype(int).tolist()
    if not isinstance(dataset, datasets.Dataset):
        return _collated_digest(microbatches, rows)
    digest = hashlib.sha256()
    table = dataset.with_format("arrow").select_columns(sorted(dataset.column_names))
    for row in rows:
        # One at a time: a row may be a large image.
        (record,) = table[[row]].to_pylist()
        for value in record.values():
            digest.update(_as_bytes(value))
    return digest.digest()


def _collated_digest(microbatches: "MicrobatchDataset", rows: list[int]) -> str | None:
    apart_from_training = replace(microbatches, dataset=apart(microbatches.dataset))

    def read() -> list[str]:
        return [Hasher.hash(apart_from_training[[(0, np.array([row]))]]) for row in rows]

    try:
        first, again = read(), read()
    except Exception:
        # A user's own collator may not take single records, or return what cannot be compared.
        return None
    return Hasher.hash(first) if first == again else None


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or os.path.basename(value["path"] or "").encode()
    return repr(value).encode()
