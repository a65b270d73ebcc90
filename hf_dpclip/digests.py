"""What records are recognised by: digests of their images, sounds and numbers."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
from datasets import Audio, Dataset, Image
from datasets.fingerprint import Hasher
from PIL.Image import Image as PILImage

from .seeding import seeded


# Records in memory at a time.
BATCH = 64
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
        yield hashlib.sha256(value.tobytes()).digest()


def sampled_digest(dataset: Any) -> bytes | str | None:
    """Of some rows, spread over all of a dataset: of a `datasets.Dataset` as they are stored, of others as they are
    read; `None` for those that are never read the same twice.

    Files are told apart by their content where the table holds it, and else by their names without the folders.
    """
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED_ROWS)).astype(int).tolist()
    if not isinstance(dataset, datasets.Dataset):
        first, again = _digest_of_what_is_read(dataset, rows), _digest_of_what_is_read(dataset, rows)
        return first if first == again else None
    digest = hashlib.sha256()
    table = dataset.with_format("arrow").select_columns(sorted(dataset.column_names))
    for row in rows:
        # One at a time: a row may be a large image.
        (record,) = table[[row]].to_pylist()
        for value in record.values():
            digest.update(_as_bytes(value))
    return digest.digest()


def _digest_of_what_is_read(dataset: Any, rows: list[int]) -> str:
    with seeded(0):
        return Hasher.hash([Hasher.hash(_without_file(dataset[row])) for row in rows])


def _without_file(value: Any) -> Any:
    """A record in which images are what they show, wherever they were read from."""
    if isinstance(value, PILImage):
        return value.mode, value.size, value.tobytes()
    if isinstance(value, Mapping):
        return {name: _without_file(each) for name, each in value.items()}
    return [_without_file(each) for each in value] if isinstance(value, list | tuple) else value


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or os.path.basename(value["path"] or "").encode()
    return repr(value).encode()
