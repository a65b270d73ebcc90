"""Reading records and checking them before training, so that a run does not stop at one that cannot be used."""

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Value
from PIL.Image import Image as PILImage
from torch.utils.data import Dataset, IterableDataset
from transformers import ProcessorMixin

from .digests import BATCH, image_columns
from .reading import apart
from .seeding import preserved_generators


# Columns that processors make of images and sounds.
ENCODED = ("pixel_values", "input_features")
STRINGS = ("string", "large_string")
# Pillow modes with more than 8 bits per channel. Conversion to RGB turns all values above 255 to white.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What decoders of images raise for files that are damaged.
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError)
# How many record numbers a message lists.
LISTED = 20
# Texts in memory at a time.
TEXT_BATCH = 10_000


def read_records(dataset: Dataset, numbers: list[int]) -> list[Any]:
    """The records of these numbers. Raises `ValueError` that names the first one that cannot be read."""
    try:
        return read(dataset, numbers)
    except Exception as error:
        # Decoders, transforms and users' own datasets may raise anything.
        number, cause = next(unreadable(dataset, numbers), (numbers[0], error))
        raise ValueError(
            f"{unreadable_message(dataset, number, cause)} A run that has begun goes on, with "
            "resume_from_checkpoint=True, only if it is repaired: without it, the dataset is another."
        ) from cause


def read(dataset: Dataset, numbers: list[int]) -> list[Any]:
    """The records of these numbers, or whatever error reading them raises."""
    if isinstance(dataset, datasets.Dataset):
        return dataset.__getitems__(numbers)
    return [dataset[number] for number in numbers]


def unreadable(dataset: Dataset, numbers: Iterable[int]) -> Iterator[tuple[int, Exception]]:
    """The numbers of the records that cannot be read, each with its error."""
    for number in numbers:
        try:
            read(dataset, [number])
        except Exception as error:
            yield number, error


def unreadable_message(dataset: Dataset, number: int, cause: Exception, name: str = "the dataset") -> str:
    """Says which record of the dataset of that name cannot be read, why, and what to do."""
    return (
        f"{described(dataset, number, name)} cannot be read ({reason(cause)}): repair it, or leave it out, as in "
        f"dataset.select([row for row in range(len(dataset)) if row != {number}]); hf_dpclip.data.unusable_records "
        "finds all of its kind."
    )


def has_random_access(dataset: Any) -> bool:
    """Whether records can be read by their numbers."""
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return indexed and not isinstance(dataset, IterableDataset)


@contextmanager
def naming_unreadable(dataset: Any, name: str) -> Iterator[None]:
    """Turns the error of a data loader that cannot decode a record into a `ValueError` that names the record. Other
    errors pass, and so do those of datasets without random access."""
    try:
        yield
    except UNDECODABLE as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        came_of_loading = any(module.startswith("torch.utils.data") for module in modules)
        if not came_of_loading or not has_random_access(dataset):
            raise
        number, cause = next(unreadable(dataset, range(len(dataset))), (None, error))
        if number is None:
            raise
        raise ValueError(unreadable_message(dataset, number, cause, name)) from cause


def first_record(dataset: Dataset) -> Mapping[str, Any]:
    """The first record. Raises `ValueError` if it cannot be read, or has no columns."""
    # Random draws of a transform would show in the state of the generators, which checkpoints hold.
    with preserved_generators():
        (first,) = read_records(apart(dataset), [0])
    if not isinstance(first, Mapping):
        raise ValueError(
            f"records are of type {type(first).__name__}: make them dictionaries, with the names of the columns as "
            "keys, or pass a data_collator of your own."
        )
    return first


def needs_processing(dataset: Any, processing_class: Any) -> bool:
    """Whether the records are raw images, or sounds, and texts, which the processor has yet to encode."""
    if not isinstance(processing_class, ProcessorMixin):
        return False
    # Not its columns: a transform makes others of them, and a dataset of torch has none to ask for.
    return dataset is None or not set(ENCODED) & first_record(dataset).keys()


def check_image(image: Any, column: str) -> PILImage:
    """Returns the image. Raises `ValueError` for anything else, and for one that conversion to RGB would spoil."""
    if not isinstance(image, PILImage):
        raise ValueError(
            f"column {column!r} holds {kind_of(image)} where a PIL image is expected: paths and bytes become images "
            f"with dataset.cast_column({column!r}, datasets.Image()), arrays with PIL.Image.fromarray; leave records "
            "without an image out."
        )
    if image.mode in DEEP_MODES:
        _check_values(image, column)
    return image


def _check_values(image: PILImage, column: str) -> None:
    """Raises `ValueError` if conversion to RGB would change the values."""
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 255):
        raise ValueError(
            f"column {column!r} holds an image whose values are not within 0 and 255 (mode {image.mode}), which "
            "conversion to RGB would turn to white or black areas: choose the window of values that matters and "
            "convert images to 8 bits first, as in "
            "PIL.Image.fromarray(((values - low) / (high - low) * 255).clip(0, 255).astype('uint8'))."
        )
    if image.mode == "F" and 0 < values.max() <= 1:
        raise ValueError(
            f"column {column!r} holds an image whose values are between 0 and 1, all of which conversion to RGB would "
            "make black: multiply them by 255 first, as in PIL.Image.fromarray((values * 255).astype('uint8'))."
        )


def check_text(text: Any, column: str) -> str:
    """Returns the text. Raises `ValueError` for anything else."""
    if not isinstance(text, str):
        raise ValueError(
            f"column {column!r} holds {kind_of(text)} where a text is expected: convert it with dataset.map (a file "
            "of numbers, to a Parquet file with that column as text), make one record of each of several texts, or "
            "name another column; leave records without a text out."
        )
    return text


def check_not_blank(record: Mapping[str, Any], text_column: str) -> None:
    """Raises `ValueError` if the text has no visible character."""
    text = record[text_column]
    if isinstance(text, str) and not text.strip():
        raise ValueError(f"column {text_column!r} holds a blank text: write one, or leave the record out.")


def check_complete(dataset: Dataset, image_column: str | None, text_column: str | None) -> None:
    """Raises `ValueError` if a record of a `datasets.Dataset` lacks an image or a text, has a blank text, or names an
    image file that is not there.

    Looks at the table and decodes nothing. Other datasets, and those with transforms, are not looked at.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return
    if image_column in image_columns(dataset):
        missing = _rows_where(_is_empty, dataset, image_column, BATCH)
        _check_none_missing(missing, "image", image_column, f"record[{image_column!r}]")
        _check_files_exist(dataset, image_column)
    if text_column is not None and holds_texts(dataset, text_column):
        there, missing = f"record[{text_column!r}]", _rows_where(_is_blank, dataset, text_column, TEXT_BATCH)
        _check_none_missing(missing, "text", text_column, f"{there} and {there}.strip()")


def holds_texts(dataset: Any, column: str) -> bool:
    """Whether the table of a `datasets.Dataset` without transform has texts in that column, as they will be read."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return False
    return is_text_column(dataset, column)


def is_text_column(dataset: datasets.Dataset, column: str) -> bool:
    """Whether the table has texts in that column, whatever a transform makes of them."""
    feature = dataset.features.get(column)
    return isinstance(feature, Value) and feature.dtype in STRINGS


def described(dataset: Dataset, number: int, name: str = "the dataset") -> str:
    """A record, for messages: its number, the row of the table if records were selected, and the files of its images,
    as far as the table names them."""
    return f"record {number} of {name}{whereabouts(dataset, number)}"


def whereabouts(dataset: Dataset, number: int) -> str:
    """What [`described`] adds to the number of a record, in brackets; nothing where there is nothing to add."""
    if not isinstance(dataset, datasets.Dataset):
        return ""
    details = []
    if dataset._indices is not None:
        details.append(f"row {dataset._indices.column(0)[number]} of the table that it was selected from")
    columns = image_columns(dataset)
    (row,) = dataset.with_format("arrow")[[number]].select(columns).to_pylist() if columns else [{}]
    details += [shortened(image["path"]) for image in row.values() if image and image["path"]]
    return f" ({', '.join(details)})" if details else ""


def _is_empty(images: Any) -> Any:
    """Whether images are missing: with neither the content of a file nor a path, or with empty ones."""
    sizes = (pc.binary_length(pc.struct_field(images, field)) for field in ("bytes", "path"))
    has_bytes, has_path = (pc.fill_null(pc.greater(size, 0), False) for size in sizes)
    return pc.invert(pc.or_(has_bytes, has_path))


def _is_blank(texts: Any) -> Any:
    return pc.fill_null(pc.or_(pc.equal(texts, ""), pc.utf8_is_space(texts)), True)


def _check_files_exist(dataset: datasets.Dataset, column: str):
    missing = _rows_where(_names_no_file, dataset, column, BATCH)
    if missing:
        (record,) = dataset.select_columns([column]).with_format("arrow")[missing[:1]][column].to_pylist()
        raise ValueError(
            f"record {missing[0]} (such records: {len(missing)}) names an image that is not there, "
            f"{shortened(record['path'])!r}: put the file there, correct the path, or leave such records out."
        )


def reason(error: Exception) -> str:
    """The kind of an error and its message, without memory addresses, which differ each time."""
    return f"{type(error).__name__}: {shortened(re.sub(' at 0x[0-9a-f]+', '', str(error)), 500)}"


def listed(numbers: list[int]) -> str:
    """Record numbers, separated by commas: all if there are few, else the first ones."""
    shown = ", ".join(map(str, numbers[:LISTED]))
    return shown if len(numbers) <= LISTED else f"{shown}, ..."


def shortened(text: str, length: int = 100) -> str:
    """The beginning and the end of a text, which may hold a whole image instead of a path."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def _names_no_file(images: Any) -> pa.Array:
    is_path = pc.is_null(pc.struct_field(images, "bytes"))
    paths = pc.if_else(is_path, pc.struct_field(images, "path"), None).to_pylist()
    # URLs, also of files inside archives, are left to `datasets`.
    return pa.array([path is not None and "://" not in path and not os.path.isfile(path) for path in paths])


def _rows_where(condition: Callable, dataset: datasets.Dataset, column: str, batch_size: int) -> list[int]:
    """The numbers of the records for which the condition, on an Arrow array of the column, holds."""
    # First on the table as it is stored: reading a selected or shuffled one takes a thousand times as long.
    if not pc.any(condition(dataset.data.column(column))).as_py():
        return []
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size)
    return [
        batch_size * number + row
        for number, batch in enumerate(batches)
        for row in pc.indices_nonzero(condition(batch[column])).to_pylist()
    ]


def _check_none_missing(missing: list[int], kind: str, column: str, condition: str):
    if missing:
        raise ValueError(
            f"record {missing[0]} (such records: {len(missing)}) has no {kind} in column {column!r}: leave such "
            f"records out, as in dataset.filter(lambda record: {condition})."
        )


def kind_of(value: Any) -> str:
    """How a message calls a value of an unexpected kind."""
    return "nothing (None)" if value is None else type(value).__name__
