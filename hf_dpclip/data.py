"""Loading, captioning and collating images or sounds with texts: captions, or questions and answers."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL.Image import Image as PILImage
from torch.utils.data import Dataset as TorchDataset
from transformers import BatchEncoding, ClapProcessor, ProcessorMixin

from .records import check_complete, check_picture, check_text, first_record


# By the end of a file's name: the builder of `datasets`, and its settings.
FILE_FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


@dataclass
class PairCollator:
    """What all collators of ours know: the dataset columns that they read, which their `*_column` fields name."""

    @property
    def columns(self) -> list[str]:
        """The dataset columns that are read, which the trainer therefore keeps."""
        return [getattr(self, name) for name in self._column_fields if getattr(self, name) is not None]

    def check_columns(self, names: list[str]) -> None:
        """Raises `ValueError` unless all columns are among `names`."""
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise ValueError(
                f"the dataset has no column {missing[0]!r} (it has {sorted(names)}): pass "
                f"data_collator={type(self).__name__}(processor, {self._arguments}) with its own names."
            )

    def check_records(self, dataset: TorchDataset) -> None:
        """Raises `ValueError` for records that cannot be collated, as far as the first one tells."""
        self.check_columns([*first_record(dataset)])

    @property
    def _column_fields(self) -> list[str]:
        return [field.name for field in fields(self) if field.name.endswith("_column")]

    @property
    def _arguments(self) -> str:
        return ", ".join(f"{name}=..." for name in self._column_fields)


@dataclass
class ImageTextCollator(PairCollator):
    """Turns records with an image and a text into a batch for a contrastive model.

    Args:
        processor ([`~transformers.ProcessorMixin`]): tokenizer and image processor.
        image_column (`str`, *optional*, defaults to `"image"`): PIL images, decoded by `datasets`.
        text_column (`str`, *optional*, defaults to `"text"`): captions.
        augmentation (`Callable`, *optional*): from an image to a randomly changed one.
        views (`int`, *optional*, defaults to 1): differently augmented images of each record. The loss is their mean,
            taken before the gradient is clipped, so that more views cost time but no privacy. A forward batch has as
            many times its number of rows.

    Example:
        ```python
        collator = ImageTextCollator(processor, image_column="scan", text_column="report")
        trainer = DPCLIPTrainer(model, args, collator, train_dataset)
        ```
    """

    processor: ProcessorMixin
    image_column: str | None = "image"
    text_column: str | None = "text"
    augmentation: Callable[[PILImage], PILImage] | None = None
    views: int = 1

    def __post_init__(self):
        if not isinstance(self.views, int) or self.views < 1:
            raise ValueError(f"views={self.views!r} is not possible: it must be a whole number of at least 1.")
        if self.augmentation is not None and not callable(self.augmentation):
            raise ValueError(
                f"augmentation is a {type(self.augmentation).__name__}: give a function from an image to an image."
            )

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        records = [record for record in records for _ in range(self.views)]
        inputs: dict[str, list[Any]] = {}
        if self.image_column is not None:
            pictures = [check_picture(record[self.image_column], self.image_column) for record in records]
            inputs["images"] = [self._augmented(picture.convert("RGB")) for picture in pictures]
        if self.text_column is not None:
            inputs["text"] = [check_text(record[self.text_column], self.text_column) for record in records]
        return self.processor(**inputs, **text_settings(self.processor), return_tensors="pt")

    def _augmented(self, image: PILImage) -> PILImage:
        return image if self.augmentation is None else self.augmentation(image)

    def for_public(self, names: list[str]) -> "ImageTextCollator":
        """For records that may lack images or captions, as they are. Raises `ValueError` if they lack both."""
        image_column, text_column = (
            column if column in names else None for column in (self.image_column, self.text_column)
        )
        if image_column is None and text_column is None:
            raise ValueError(
                f"public_negatives has columns {sorted(names)}, neither {self.image_column!r} nor "
                f"{self.text_column!r}: rename them to those of the private records."
            )
        return replace(self, image_column=image_column, text_column=text_column, augmentation=None, views=1)

    def check_records(self, dataset: TorchDataset) -> None:
        """Raises `ValueError` for records that cannot be collated, as far as the first one and the table tell."""
        super().check_records(dataset)
        first = first_record(dataset)
        if self.image_column is not None and not isinstance(self.processor, ProcessorMixin):
            raise ValueError(
                f"{type(self.processor).__name__} is no processor of images and texts: pass one, as "
                "AutoProcessor.from_pretrained gives for the model."
            )
        if self.image_column is not None:
            check_picture(first[self.image_column], self.image_column)
        if self.text_column is not None:
            check_text(first[self.text_column], self.text_column)
        check_complete(dataset, self.image_column, self.text_column)


@dataclass(kw_only=True)
class VisualQuestionCollator(ImageTextCollator):
    """Turns records with an image, a question and its answer into a batch with `labels`.

    Args:
        processor ([`~transformers.ProcessorMixin`]): tokenizer and image processor.
        label2id (`dict[str, int]`): the label of each answer, `model.config.label2id`.
        image_column (`str`, *optional*, defaults to `"image"`): PIL images, decoded by `datasets`.
        text_column (`str`, *optional*, defaults to `"question"`): questions.
        answer_column (`str`, *optional*, defaults to `"answer"`): answers, as strings.

    Example:
        ```python
        model = CLIPForVisualQuestionAnswering.from_clip(clip, answers=["yes", "no"])
        collator = VisualQuestionCollator(processor, label2id=model.config.label2id)
        trainer = DPCLIPTrainer(model, args, collator, train_dataset)
        ```
    """

    label2id: dict[str, int]
    text_column: str = "question"
    answer_column: str = "answer"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.label2id, dict):
            raise ValueError(f"label2id is a {type(self.label2id).__name__}: pass model.config.label2id.")

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(records)
        answers = [check_text(record[self.answer_column], self.answer_column) for record in records]
        labels = [self.label2id[answer] for answer in answers for _ in range(self.views)]
        batch["labels"] = torch.tensor(labels)
        return batch

    def check_records(self, dataset: TorchDataset) -> None:
        """As in [`ImageTextCollator`]; looks at the answers of a `datasets.Dataset` too."""
        super().check_records(dataset)
        if isinstance(dataset, Dataset):
            self.check_answers(dataset)

    def check_answers(self, dataset: Dataset) -> None:
        """Raises `ValueError` if a record's answer has no label, and names the record, not the answer."""
        answers = [check_text(answer, self.answer_column) for answer in dataset[self.answer_column]]
        unknown = [row for row, answer in enumerate(answers) if answer not in self.label2id]
        if unknown:
            raise ValueError(
                f"the answer of record {unknown[0]} ({len(unknown)} such records) is none of the {len(self.label2id)} "
                "answers that the model can give: leave such records out, or make the model with "
                "CLIPForVisualQuestionAnswering.from_clip(clip, answers=[...])."
            )

    @property
    def _arguments(self) -> str:
        return f"label2id=..., {super()._arguments}"


@dataclass
class AudioTextCollator(PairCollator):
    """Turns records with a sound and a text into a batch for a contrastive model.

    Args:
        processor ([`~transformers.ProcessorMixin`]): tokenizer and feature extractor.
        audio_column (`str`, *optional*, defaults to `"audio"`): sounds, decoded by `datasets`: an `array` and its
            `sampling_rate` in Hz.
        text_column (`str`, *optional*, defaults to `"text"`): captions.

    Raises `ValueError` for a sampling rate that is not the feature extractor's.

    Example:
        ```python
        collator = AudioTextCollator(ClapProcessor.from_pretrained("laion/clap-htsat-unfused"))
        ```
    """

    processor: ProcessorMixin
    audio_column: str = "audio"
    text_column: str = "text"

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        extractor, sounds = self.processor.feature_extractor, [record[self.audio_column] for record in records]
        rate = extractor.sampling_rate
        wrong = [sound["sampling_rate"] for sound in sounds if sound["sampling_rate"] != rate]
        if wrong:
            raise ValueError(
                f"a sound in column {self.audio_column!r} has {wrong[0]} samples per second, the model needs {rate}: "
                f"use dataset.cast_column({self.audio_column!r}, datasets.Audio(sampling_rate={rate}))."
            )
        audio = extractor([sound["array"] for sound in sounds], sampling_rate=rate, return_tensors="pt")
        texts = encoded_texts(self.processor.tokenizer, [record[self.text_column] for record in records])
        return {**texts, **audio}


def default_collator(processor: ProcessorMixin) -> PairCollator:
    """For records with an image, or a sound, and a text, in columns of these names."""
    return AudioTextCollator(processor) if isinstance(processor, ClapProcessor) else ImageTextCollator(processor)


def text_settings(processor: Any) -> dict[str, Any]:
    """How texts are filled up: to the longest, or, for models that are not told where texts end (SigLIP), to the one
    length that they were trained on."""
    padding = True if "attention_mask" in tokenizer_of(processor).model_input_names else "max_length"
    return {"padding": padding, "truncation": True}


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def encoded_texts(processor: Any, texts: list[str]) -> BatchEncoding:
    """Texts alone, by a processor or a tokenizer."""
    return processor(text=texts, **text_settings(processor), return_tensors="pt")


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

    Raises `ValueError` as [`check_labels`] does.
    """
    check_labels(dataset, label_column)
    prompts = class_prompts(dataset.features[label_column].names, template)
    return dataset.add_column(caption_column, [prompts[label] for label in dataset[label_column]])


def check_labels(dataset: Dataset, label_column: str) -> None:
    """Raises `ValueError` if `label_column` is not a column of class labels, or if a record has none, and names it."""
    if not isinstance(dataset.features.get(label_column), ClassLabel):
        raise ValueError(
            f"label column {label_column!r} is not a ClassLabel column of the dataset ({dict(dataset.features)}): "
            f"name one, or convert it with dataset.class_encode_column({label_column!r})."
        )
    # The Hub writes -1 where labels are held back.
    unlabelled = [row for row, label in enumerate(dataset[label_column]) if label is None or label < 0]
    if unlabelled:
        raise ValueError(
            f"record {unlabelled[0]} ({len(unlabelled)} such records) has no label in column {label_column!r}: leave "
            "such records out, or choose a split that has labels."
        )


def load_pairs(name: str, image_column: str | None = "image") -> DatasetDict:
    """Image-text pairs by any name that `datasets` knows.

    Args:
        name (`str`): a `.parquet`, `.csv`, `.tsv` or `.json` file, a folder written by `save_to_disk`, a folder of
            images with a `metadata.csv`, or a dataset on the Hub.
        image_column (`str`, *optional*, defaults to `"image"`): images, or paths relative to the file that names them.
            `None` takes the columns as they are, without images.

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
        splits = _load("imagefolder", name, data_dir=name)
    else:
        splits = load_from_hub(name)
    columns = next(iter(splits.values())).column_names
    if image_column is not None and image_column not in columns:
        hint = " (Between columns there must be commas.)" if len(columns) == 1 and ";" in columns[0] else ""
        raise ValueError(f"{name} has no image column {image_column!r}, only {columns}: name one of these.{hint}")
    return splits


def load_from_hub(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a dataset on the Hub. Raises `FileNotFoundError` if it does not give them."""
    try:
        return load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a dataset that the Hub gave ({error}): check the spelling."
        ) from error


def _load_file(path: Path, image_column: str | None) -> DatasetDict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check the path (it is relative to {Path.cwd()}).")
    if path.suffix.lower() not in FILE_FORMATS:
        raise ValueError(f"{path} is in no known format: convert it to one of {', '.join(FILE_FORMATS)}.")
    kind, settings = FILE_FORMATS[path.suffix.lower()]
    dataset = _load(kind, str(path), data_files=str(path), **settings)["train"]
    if image_column is not None and isinstance(dataset.features.get(image_column), Value):
        paths = [_beside(path, row, image) for row, image in enumerate(dataset[image_column])]
        dataset = (
            dataset.remove_columns(image_column).add_column(image_column, paths).cast_column(image_column, Image())
        )
    return DatasetDict(train=dataset)


def _beside(table: Path, row: int, image: Any) -> str:
    """The path of an image that row `row` of a table names."""
    if not isinstance(image, str):
        raise ValueError(
            f"row {row} of {table} names no image ({image!r}): write the image's path there, or leave the row out."
        )
    return str(table.parent / image)


def _load(kind: str, place: str, **settings: str) -> DatasetDict:
    try:
        return load_dataset(kind, **settings)
    except (DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{place} cannot be read as {kind} ({reason}): check the file or folder, which must have records, and "
            "text in UTF-8."
        ) from error
