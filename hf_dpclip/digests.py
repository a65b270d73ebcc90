"""What records are recognised by: digests of their images, sounds and numbers."""

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Audio, Dataset, Image
from datasets.fingerprint import Hasher


if TYPE_CHECKING:
    from .dataloader import MicrobatchDataset

# Records in memory at a time.
BATCH = 64
# Records whose images are looked at when training is set up: enough to find captions that share images, and seldom
# more than a minute of reading.
LOOKED_AT = 100_000
# Rows by which datasets are compared over processes: another order goes unnoticed if it leaves all of these in place.
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
        # Of what is missing, or not rectangular, the bytes are addresses.
        content = repr(numbers.tolist()).encode() if numbers.dtype == object else numbers.tobytes()
        yield hashlib.sha256(content).digest()


def column_digests(dataset: Dataset, column: str) -> Iterator[bytes | None]:
    """Those of files where there are, and else of numbers."""
    return file_digests(dataset, column) if column in file_columns(dataset) else array_digests(dataset, column)


def sampled_digest(microbatches: "MicrobatchDataset") -> bytes | str | None:
    """Of some records, spread over all of them: of a `datasets.Dataset` as they are stored, of others as they are
    collated; `None` where they are never the same twice, or cannot be told.

    Files are told apart by their content where the table holds it, and else by their names without the folders.
    """
    dataset: Any = microbatches.dataset
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED_ROWS)).astype(int).tolist()
    if not isinstance(dataset, datasets.Dataset):
        return _digest_of_what_is_collated(microbatches, rows)
    digest = hashlib.sha256()
    table = dataset.with_format("arrow").select_columns(sorted(dataset.column_names))
    for row in rows:
        # One at a time: a row may be a large image.
        (record,) = table[[row]].to_pylist()
        for value in record.values():
            digest.update(_as_bytes(value))
    return digest.digest()


def _digest_of_what_is_collated(microbatches: "MicrobatchDataset", rows: list[int]) -> str | None:
    def read() -> list[str]:
        return [Hasher.hash(microbatches[[(0, np.array([row]))]]) for row in rows]

    try:
        first, again = read(), read()
    except Exception:
        # Of a collator of the user's own that takes no single records, or makes what cannot be compared.
        return None
    return Hasher.hash(first) if first == again else None


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or os.path.basename(value["path"] or "").encode()
    return repr(value).encode()
