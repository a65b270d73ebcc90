"""Loading, captioning and collating images with texts: captions, or questions and answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from PIL.Image import Image as PILImage
from transformers import BatchEncoding, ProcessorMixin


FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class ImageTextCollator:
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

    @property
    def columns(self) -> list[str]:
        """The dataset columns that are read, which the trainer therefore keeps."""
        return [column for column in (self.image_column, self.text_column) if column is not None]

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        records = [record for record in records for _ in range(self.views)]
        inputs = {}
        if self.image_column is not None:
            inputs["images"] = [self._augmented(record[self.image_column].convert("RGB")) for record in records]
        if self.text_column is not None:
            inputs["text"] = [record[self.text_column] for record in records]
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

    def check_columns(self, names: list[str]) -> None:
        """Raises `ValueError` unless both columns are among `names`."""
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise ValueError(
                f"the dataset has no column {missing[0]!r} (it has {sorted(names)}): pass "
                f"data_collator={type(self).__name__}(processor, {self._arguments}) with its own names."
            )

    @property
    def _arguments(self) -> str:
        return "image_column=..., text_column=..."


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
        collator = VisualQuestionCollator(processor, label2id=model.config.label2id)
        trainer = DPCLIPTrainer(model, args, collator, train_dataset)
        ```
    """

    label2id: dict[str, int]
    text_column: str = "question"
    answer_column: str = "answer"

    @property
    def columns(self) -> list[str]:
        """As in [`ImageTextCollator`]."""
        return [*super().columns, self.answer_column]

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(records)
        labels = [self.label2id[record[self.answer_column]] for record in records for _ in range(self.views)]
        batch["labels"] = torch.tensor(labels)
        return batch

    def check_answers(self, dataset: Dataset) -> None:
        """Raises `ValueError` if a record's answer has no label, and names the record, not the answer."""
        unknown = [row for row, answer in enumerate(dataset[self.answer_column]) if answer not in self.label2id]
        if unknown:
            raise ValueError(
                f"the answer of record {unknown[0]} ({len(unknown)} such records) is none of the {len(self.label2id)} "
                "answers that the model can give: leave such records out, or make the model with "
                "CLIPForVisualQuestionAnswering.from_clip(clip, answers=[...])."
            )

    @property
    def _arguments(self) -> str:
        return "label2id=..., image_column=..., text_column=..., answer_column=..."


def text_settings(processor: Any) -> dict[str, Any]:
    """How texts are filled up: to the longest, or, for models that are not told where texts end (SigLIP), to the one
    length that they were trained on."""
    tokenizer = getattr(processor, "tokenizer", processor)
    padding = True if "attention_mask" in tokenizer.model_input_names else "max_length"
    return {"padding": padding, "truncation": True}


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
    return [template.format(name) for name in class_names]


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


def load_pairs(name: str, image_column: str = "image") -> DatasetDict:
    """Image-text pairs by any name that `datasets` knows.

    Args:
        name (`str`): a `.parquet`, `.csv` or `.json` file, a folder written by `save_to_disk`, a folder of images with
            a `metadata.csv`, or a dataset on the Hub.
        image_column (`str`, *optional*, defaults to `"image"`): images, or paths relative to the file that names them.

    Raises `FileNotFoundError` for a path that does not exist and `ValueError` for a missing image column.
    """
    path = Path(name)
    if path.suffix in FILE_FORMATS:
        splits = _load_file(path, image_column)
    elif Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file():
        loaded = load_from_disk(name)
        splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    elif path.is_dir():
        splits = load_dataset("imagefolder", data_dir=name)
    else:
        splits = load_from_hub(name)
    columns = next(iter(splits.values())).column_names
    if image_column not in columns:
        raise ValueError(f"{name} has no image column {image_column!r}, only {columns}: name one of these.")
    return splits


def load_from_hub(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a dataset on the Hub. Raises `FileNotFoundError` if it does not give them."""
    try:
        return load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a dataset that the Hub gave ({error}): check the spelling."
        ) from error


def _load_file(path: Path, image_column: str) -> DatasetDict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check the path (it is relative to {Path.cwd()}).")
    splits = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path))
    dataset = splits["train"]
    if isinstance(dataset.features.get(image_column), Value):
        paths = [str(path.parent / image) for image in dataset[image_column]]
        dataset = (
            dataset.remove_columns(image_column).add_column(image_column, paths).cast_column(image_column, Image())
        )
    return DatasetDict(train=dataset)
