"""Evaluation in the course of training: on records that are not private, and not augmented."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from . import data_validation
from .arguments import DPTrainingArguments
from .collators import ImageTextCollator


class EvaluatingTrainer(Trainer):
    """The part of [`DPCLIPTrainer`] that evaluates and predicts."""

    args: DPTrainingArguments

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in the `Trainer`. Raises `ValueError` for the private training dataset, and for records that cannot be
        collated."""
        self._check_evaluated(eval_dataset, "eval_dataset")
        with self._images_as_they_are():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in the `Trainer`. Raises `ValueError` for the private training dataset."""
        self._check_evaluated(test_dataset, "test_dataset")
        with self._images_as_they_are():
            return super().get_test_dataloader(test_dataset)

    def _check_evaluated(self, dataset: Any, name: str) -> None:
        if not self.args.log_private_statistics:
            # By a name, one of those of the trainer is meant.
            candidates = self.eval_dataset if dataset is None or isinstance(dataset, str) else dataset
            unit_column = self.args.privacy_unit_column
            data_validation.check_evaluation_data(self.train_dataset, candidates, unit_column, name)
        # What the trainer was made with was checked then.
        if dataset is not self.eval_dataset and not isinstance(dataset, str):
            data_validation.check_records(self.data_collator, dataset)

    @contextmanager
    def _images_as_they_are(self) -> Iterator[None]:
        """Views and augmentation are for training."""
        collator = self.data_collator
        if isinstance(collator, ImageTextCollator):
            self.data_collator = collator.unaugmented()
        try:
            yield
        finally:
            self.data_collator = collator
