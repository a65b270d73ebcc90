"""Collators and prompts for image-text pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin


@dataclass
class ImageTextCollator:
    """Turns records with an image and a text into a batch for a contrastive model.

    Args:
        processor ([`~transformers.ProcessorMixin`]): tokenizer and image processor.
        image_column (`str`, *optional*, defaults to `"image"`): PIL images, decoded by `datasets`.
        text_column (`str`, *optional*, defaults to `"text"`): captions.

    Example:
        ```python
        collator = ImageTextCollator(processor, image_column="scan", text_column="report")
        trainer = DPCLIPTrainer(model, args, collator, train_dataset)
        ```
    """

    processor: ProcessorMixin
    image_column: str = "image"
    text_column: str = "text"

    @property
    def columns(self) -> list[str]:
        """The dataset columns that are read, which the trainer therefore keeps."""
        return [self.image_column, self.text_column]

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self._check_columns(records[0])
        return self.processor(
            images=[record[self.image_column].convert("RGB") for record in records],
            text=[record[self.text_column] for record in records],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )

    def _check_columns(self, record: dict[str, Any]):
        missing = [column for column in self.columns if column not in record]
        if missing:
            raise ValueError(
                f"the dataset has no column {missing[0]!r} (it has {sorted(record)}): pass "
                "data_collator=ImageTextCollator(processor, image_column=..., text_column=...) with its own names."
            )


def class_prompts(class_names: list[str], template: str = "a photo of a {}.") -> list[str]:
    """One caption per class: the class name put into `template` at `{}`.

    Raises `ValueError` if the template has no place for the name, since all classes would then read the same.
    """
    if "{}" not in template:
        raise ValueError(
            f"prompt template {template!r} has no {{}} for the class name: write e.g. 'a photo of a {{}}.'"
        )
    return [template.format(name) for name in class_names]
