"""Collating images or sounds with texts: captions, or questions and answers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Image as PILImage
from torch.utils.data import Dataset as TorchDataset
from transformers import BatchEncoding, ClapProcessor, ProcessorMixin

from .privacy.plan import is_whole
from .records import check_complete, check_image, check_text, described, first_record


@dataclass
class PairCollator:
    """The base of our collators, whose fields named `*_column` hold the dataset columns that they read."""

    @property
    def columns(self) -> list[str]:
        """The dataset columns that are read. The trainer keeps them."""
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
        return [each.name for each in fields(self) if each.name.endswith("_column")]

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
            taken before the gradient is clipped, so that more views cost time but no privacy. They multiply the rows
            of a forward batch.

    Example:
        ```python
        collator = ImageTextCollator(processor, image_column="scan", text_column="report")
        trainer = DPCLIPTrainer(model, args, collator, train_dataset)
        ```
    """

    # Its own representation takes a screen.
    processor: ProcessorMixin = field(repr=False)
    image_column: str | None = "image"
    text_column: str | None = "text"
    augmentation: Callable[[PILImage], PILImage] | None = None
    views: int = 1

    def __post_init__(self):
        if not is_whole(self.views) or self.views < 1:
            raise ValueError(f"views={self.views!r} is not possible: it must be a whole number of at least 1.")
        if self.views > 1 and self.augmentation is None:
            raise ValueError(
                f"views={self.views} without an augmentation would be the same image {self.views} times: give "
                "augmentation, a function from an image to a randomly changed one, or leave views out."
            )
        if self.augmentation is not None and not callable(self.augmentation):
            raise ValueError(
                f"augmentation is a {type(self.augmentation).__name__}: give a function from an image to an image."
            )

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        records = [record for record in records for _ in range(self.views)]
        inputs: dict[str, list[Any]] = {}
        if self.image_column is not None:
            images = [check_image(record[self.image_column], self.image_column) for record in records]
            inputs["images"] = [self._augmented(image.convert("RGB")) for image in images]
        if self.text_column is not None:
            inputs["text"] = [check_text(record[self.text_column], self.text_column) for record in records]
        return self.processor(**inputs, **text_settings(self.processor), return_tensors="pt")

    def _augmented(self, image: PILImage) -> PILImage:
        augmented = image if self.augmentation is None else self.augmentation(image)
        if not isinstance(augmented, PILImage):
            # The processor would scale values anew that are between 0 and 1 already, and see nothing but black.
            raise ValueError(
                f"the augmentation returned a {type(augmented).__name__}, not a PIL image: leave ToTensor and "
                "Normalize to the processor."
            )
        return augmented

    def unaugmented(self) -> "ImageTextCollator":
        """A collator for records that are not trained on: one view of each, without augmentation."""
        # A copy, since the constructor of a subclass may take other arguments.
        collator = copy.copy(self)
        collator.augmentation, collator.views = None, 1
        return collator

    def for_public(self, names: list[str]) -> "ImageTextCollator":
        """A collator for public records, with images or captions or both. Raises `ValueError` if they have neither."""
        image_column, text_column = (
            column if column in names else None for column in (self.image_column, self.text_column)
        )
        if image_column is None and text_column is None:
            raise ValueError(
                f"public_negatives has columns {sorted(names)}, neither {self.image_column!r} nor "
                f"{self.text_column!r}: rename them to those of the private records."
            )
        collator = self.unaugmented()
        collator.image_column, collator.text_column = image_column, text_column
        return collator

    def check_processor(self) -> None:
        """Raises `ValueError` if images are to be read, and the processor is not one of images and texts."""
        no_processor = not isinstance(self.processor, ProcessorMixin) or isinstance(self.processor, ClapProcessor)
        if self.image_column is not None and no_processor:
            raise ValueError(
                f"{type(self.processor).__name__} is no processor of images and texts: pass one, as "
                "AutoProcessor.from_pretrained gives for the model."
            )

    def check_records(self, dataset: TorchDataset) -> None:
        """Raises `ValueError` for records that cannot be collated, as far as the first one and the table tell."""
        super().check_records(dataset)
        first = first_record(dataset)
        self.check_processor()
        if self.image_column is not None:
            check_image(first[self.image_column], self.image_column)
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

    label2id: dict[str, int] = field(repr=False)
    text_column: str = "question"
    answer_column: str = "answer"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.label2id, dict):
            raise ValueError(f"label2id is a {type(self.label2id).__name__}: pass model.config.label2id.")

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(records)
        answers = [check_text(record[self.answer_column], self.answer_column) for record in records]
        if not self.label2id.keys() >= {*answers}:
            raise ValueError(
                f"an answer in column {self.answer_column!r} is none of the {len(self.label2id)} that the model can "
                "give: leave such records out, or make the model with from_clip(clip, answers=[...])."
            )
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
                f"the answer of {described(dataset, unknown[0])} (such records: {len(unknown)}) is none of the "
                f"{len(self.label2id)} answers that the model can give: leave such records out, or make the model "
                "with CLIPForVisualQuestionAnswering.from_clip(clip, answers=[...])."
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

    Raises `ValueError` for a sampling rate that is not the feature extractor's, and for texts that are not strings.

    Example:
        ```python
        collator = AudioTextCollator(ClapProcessor.from_pretrained("laion/clap-htsat-unfused"))
        ```
    """

    # Its own representation takes a screen.
    processor: ProcessorMixin = field(repr=False)
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
        texts = [check_text(record[self.text_column], self.text_column) for record in records]
        return {**encoded_texts(self.processor.tokenizer, texts), **audio}

    def check_records(self, dataset: TorchDataset) -> None:
        """Raises `ValueError` for records that cannot be collated, as far as the first one and the texts tell."""
        super().check_records(dataset)
        check_text(first_record(dataset)[self.text_column], self.text_column)
        check_complete(dataset, None, self.text_column)


def default_collator(processor: ProcessorMixin) -> PairCollator:
    """A collator for records with columns `image`, or `audio` for CLAP, and `text`."""
    return AudioTextCollator(processor) if isinstance(processor, ClapProcessor) else ImageTextCollator(processor)


def text_settings(processor: Any) -> dict[str, Any]:
    """How texts are padded: to the longest, or, for models that are not told where texts end (SigLIP), to the one
    length that they were trained on."""
    padding = True if "attention_mask" in tokenizer_of(processor).model_input_names else "max_length"
    return {"padding": padding, "truncation": True}


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, which may be a tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def encoded_texts(processor: Any, texts: list[str]) -> BatchEncoding:
    """Texts, encoded by a processor or a tokenizer."""
    return processor(text=texts, **text_settings(processor), return_tensors="pt")
