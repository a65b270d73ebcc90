"""Loading, captioning and splitting datasets, and finding the records in them that cannot be trained on."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers.utils import logging

from .collators import AudioTextCollator, ImageTextCollator, PairCollator, VisualQuestionCollator
from .data_validation import check_dataset
from .digests import file_digests
from .records import check_not_blank, kind_of, listed, read, reason
from .seeding import seeded


OWN_COLLATORS = (ImageTextCollator, VisualQuestionCollator, AudioTextCollator)
# Of texts, only an empty one is missing: "None" and "N/A" are texts.
ONLY_EMPTY_IS_MISSING = {"keep_default_na": False, "na_values": [""]}
# The column into which pandas puts surplus fields of rows that have more than there are column names.
SURPLUS = "__index_level_0__"
# By file suffix: the builder of `datasets`, and its settings.
FILE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", ONLY_EMPTY_IS_MISSING),
    ".tsv": ("csv", {"sep": "\t", **ONLY_EMPTY_IS_MISSING}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def class_prompts(class_names: list[str], template: str = "a photo of a {}.") -> list[str]:
    """One caption per class: the class name put into `template` at `{}`.

    Raises `ValueError` if the template has no place for the name, since all classes would then read the same.
    """
    if "{}" not in template:
        raise ValueError(
            f"prompt template {template!r} has no {{}} for the class name: write e.g. 'a photo of a {{}}.'"
        )
    return [template.replace("{}", str(name)) for name in class_names]


def caption_by_label(dataset: Dataset, label_column: str, template: str, caption_column: str = "caption") -> Dataset:
    """Adds a column with the prompt of each record's class.

    Raises `ValueError` as [`check_labels`] does, and if there is such a column already.
    """
    check_labels(dataset, label_column)
    if caption_column in dataset.column_names:
        raise ValueError(f"the dataset has a column {caption_column!r} already: choose another caption_column.")
    prompts = class_prompts(dataset.features[label_column].names, template)
    return dataset.add_column(caption_column, [prompts[label] for label in dataset[label_column]])


def check_labels(dataset: Dataset, label_column: str) -> None:
    """Raises `ValueError` if `label_column` is not a column of class labels, or if a record has none, and names it."""
    without = unlabelled(dataset, label_column)
    if without:
        raise ValueError(
            f"record {without[0]} (such records: {len(without)}) has no label in column {label_column!r}: leave "
            "such records out, or choose a split that has labels."
        )


def unlabelled(dataset: Dataset, label_column: str) -> list[int]:
    """The numbers of the records without a label. Raises `ValueError` if the column is not one of class labels."""
    if not isinstance(dataset.features.get(label_column), ClassLabel):
        raise ValueError(
            f"label column {label_column!r} is not a ClassLabel column of the dataset ({dict(dataset.features)}): "
            f"name one, or convert it with dataset.cast_column({label_column!r}, ClassLabel(names=[...])), with names "
            "from a public list: one made of the records gives away classes that occur in few of them."
        )
    # The Hub writes -1 where labels are held back.
    return [row for row, label in enumerate(dataset[label_column]) if label is None or label < 0]


def hold_out(dataset: Dataset, column: str, share: float = 0.1) -> DatasetDict:
    """Splits a dataset into `train` and `test` by a hash of each record's value in `column`.

    If two datasets differ by the records of one value, their training splits differ by those of at most one value.
    If values are the privacy units, a guarantee for the training split is therefore one for the dataset. If they are
    larger than the units, such as images with several captions, that holds if any value is held out by its hash, as
    some nearly always are of a hundred. With `train_test_split`, one more record changes where most others go.

    Args:
        dataset (`Dataset`): all records.
        column (`str`): records that share their value of it stay together: ids of the privacy units, or images. Of
            images, the bytes of their files are looked at, or the paths where that is all there is.
        share (`float`, *optional*, defaults to 0.1): the probability with which a value goes to `test`. At least one
            value does.

    Raises `ValueError` if there is no such column of texts, numbers or images, or if nothing is left to train on.
    """
    check_dataset(dataset, "dataset")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}: make a datasets.Dataset, of whose columns one says where a "
            "record goes."
        )
    if not 0 < share < 1:
        raise ValueError(f"share={share!r} is not possible: it must be between 0 and 1, e.g. 0.1.")
    if not isinstance(dataset.features.get(column), Image | Value | ClassLabel):
        raise ValueError(
            f"{column!r} is not a column of texts, numbers or images of the dataset ({dataset.column_names}): name "
            "one of these."
        )
    is_image = isinstance(dataset.features[column], Image)
    values = file_digests(dataset, column) if is_image else map(_digest, dataset.with_format(None)[column][:])
    places = np.array([int.from_bytes((value or b"")[:7], "big") for value in values])
    # If none is below the limit, the lowest goes. One value more or less may replace it, and still moves only one.
    held_out = places <= max(int(share * 2**56), places.min())
    if held_out.all():
        raise ValueError(
            f"all {len(dataset)} records would be held out: choose a column of more values than {column!r}, a smaller "
            "share, or split the dataset yourself."
        )
    splits = {"train": ~held_out, "test": held_out}
    return DatasetDict({name: dataset.select(np.flatnonzero(rows)) for name, rows in splits.items()})


def load_pairs(name: str, image_column: str | None = "image") -> DatasetDict:
    """Loads image-text pairs by any name that `datasets` knows.

    Args:
        name (`str`): a `.parquet`, `.csv`, `.tsv`, `.json` or `.jsonl` file, a folder written by `save_to_disk`, a
            folder of Parquet files, a folder of images with a `metadata.csv`, or a dataset on the Hub.
        image_column (`str`, *optional*, defaults to `"image"`): images, the bytes of their files, or paths relative to
            the single file that names them. `None` takes the columns as they are, without images.

    Raises `FileNotFoundError` for a path that does not exist and `ValueError` for a file that cannot be read and for a
    missing image column.
    """
    path = Path(name)
    if path.suffix.lower() in FILE_FORMATS or path.is_file():
        splits = _load_file(path, image_column)
    elif Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file():
        loaded = load_from_disk(name)
        splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    elif path.is_dir():
        has_tables = any(path.rglob("*.parquet")) and not any(path.rglob("metadata.*"))
        splits = _load(name, name) if has_tables else _load("imagefolder", name, data_dir=name)
    else:
        splits = load_from_hub(name)
    columns = next(iter(splits.values())).column_names
    if image_column is not None and image_column not in columns:
        other = any(separator in columns[0] for separator in (";", "\t"))
        hint = " (Between columns there must be commas, or tabs in a file whose name ends in .tsv.)" if other else ""
        raise ValueError(f"{name} has no image column {image_column!r}, only {columns}: name one of these.{hint}")
    if _holds_bytes(next(iter(splits.values())), image_column):
        # Other libraries write images to tables in this way.
        splits = splits.cast_column(image_column, Image())
    return splits


def unusable_records(dataset: Any, collator: Callable[[list[Any]], Any]) -> dict[int, str]:
    """The records that cannot be trained on, by number, each with the reason: those that cannot be read or collated,
    and those with a blank text.

    Reads and encodes all of them, one at a time.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): with random access.
        collator (`Callable`): the one that the trainer will be given, such as an [`ImageTextCollator`].

    Raises `ValueError` for what is no dataset, and for one without the columns that the collator reads.

    Formal guarantees:
        Whether a record is among them depends on this record alone, if neither the dataset nor the collator remembers
        what it saw before. Of two datasets that differ by one record, what is left without them therefore differs by
        one record at most: a guarantee for the rest is one for the dataset. The global generators of Python, numpy and
        torch go on as if nothing had been drawn.

    Example:
        ```python
        unusable = unusable_records(train_dataset, collator)
        usable = train_dataset.select([row for row in range(len(train_dataset)) if row not in unusable])
        ```
    """
    check_dataset(dataset, "dataset")
    if isinstance(collator, PairCollator) and isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        collator.check_columns(dataset.column_names)
        if type(collator) in OWN_COLLATORS:
            # Other columns are not read in training either.
            dataset = dataset.select_columns(collator.columns)
    text_column = collator.text_column if isinstance(collator, ImageTextCollator | AudioTextCollator) else None
    unusable: dict[int, str] = {}
    for number in logging.tqdm(range(len(dataset)), desc="Checking records"):
        # Each from the same seed, so that random draws for one record do not affect the next.
        with seeded(0):
            try:
                (record,) = read(dataset, [number])
                if text_column is not None:
                    check_not_blank(record, text_column)
                collator([record])
            except Exception as error:
                # Decoders, transforms and users' own collators may raise anything.
                unusable[number] = reason(error)
    return unusable


def load_from_hub(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a dataset on the Hub. Raises `FileNotFoundError` if it does not give them."""
    try:
        return load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a dataset that the Hub gave ({error}): check the spelling."
        ) from error


def _digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


def _load_file(path: Path, image_column: str | None) -> DatasetDict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check the path (it is relative to {Path.cwd()}).")
    if path.suffix.lower() not in FILE_FORMATS:
        raise ValueError(f"{path} is in no known format: convert it to one of {', '.join(FILE_FORMATS)}.")
    kind, settings = FILE_FORMATS[path.suffix.lower()]
    dataset = _load(kind, str(path), data_files=str(path), **settings)["train"]
    if kind == "csv" and SURPLUS in dataset.column_names:
        raise ValueError(
            f"the rows of {path} have more fields than there are names of columns above them, as where a text has a "
            'comma: put such texts in double quotes, "like, this", and commas, no semicolons, between columns.'
        )
    names_images = isinstance(dataset.features.get(image_column), Value) and not _holds_bytes(dataset, image_column)
    if names_images:
        paths = _beside(path, dataset[image_column][:])
        dataset = (
            dataset.remove_columns(image_column).add_column(image_column, paths).cast_column(image_column, Image())
        )
    return DatasetDict(train=dataset)


def _holds_bytes(dataset: Dataset, column: str | None) -> bool:
    """Whether a column holds the bytes of files, alone or with their paths, as `datasets` itself stores images."""
    feature = dataset.features.get(column)
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _beside(table: Path, images: list[Any]) -> list[str | None]:
    """The paths of the images that the rows of a table name; `None` where a row names none, which the trainer refuses,
    as it does a row without a text."""
    wrong = [row for row, image in enumerate(images) if not isinstance(image, str | None)]
    if wrong:
        raise ValueError(
            f"row {wrong[0]} of {table}, counted from 0 below the names of the columns, holds "
            f"{kind_of(images[wrong[0]])} in the place of an image ({len(wrong)} in all: {listed(wrong)}): "
            "write the image's path there, or leave such rows out."
        )
    # URLs are left to `datasets`.
    return [image if image is None or "://" in image else str(table.parent / image) for image in images]


def _load(kind: str, place: str, **settings: str) -> DatasetDict:
    try:
        return load_dataset(kind, **settings)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"{place} cannot be read as {kind} ({error.__cause__ or error}): {_how_to_name(place)}"
        ) from error


def _how_to_name(place: str) -> str:
    """What to do about a file or a folder that cannot be read."""
    if Path(place).is_dir():
        return (
            "a folder must hold images with a metadata.csv (in UTF-8, with commas between columns), or images in a "
            "folder for each class, or Parquet files. Name a single table by its file; what datasets.load_dataset "
            "reads otherwise, as tar archives of WebDataset, can be written to a folder by save_to_disk."
        )
    return (
        "check the file, which must have records, text in UTF-8 and, in a table, commas between columns and double "
        "quotes around texts that have some."
    )
