"""Evaluation by the trainer: on records that are not private, without augmentation."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from . import data_validation
from .arguments import DPTrainingArguments
from .collators import ImageTextCollator
from .held_out import check_evaluation_data
from .records import naming_unreadable


class EvaluatingTrainer(Trainer):
    """The part of [`DPCLIPTrainer`] that evaluates and predicts."""

    args: DPTrainingArguments
    # Datasets that were checked and hold no private records.
    _held_out: list[Any]

    @abstractmethod
    def keep_reasons(self) -> None:
        """Keeps the reasons for which no guarantee holds now, even if arguments are changed back later."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in the `Trainer`. Raises `ValueError` for the private training dataset, and for records that cannot be
        collated."""
        self._check_evaluated(eval_dataset, "eval_dataset")
        with self._without_augmentation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in the `Trainer`. Raises `ValueError` for the private training dataset, and for records that cannot be
        collated."""
        self._check_evaluated(test_dataset, "test_dataset")
        with self._without_augmentation():
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in the `Trainer`. Raises `ValueError` that names a record that cannot be read."""
        # An overridden loader may be any iterable of batches.
        with naming_unreadable(getattr(dataloader, "dataset", None), "the evaluation dataset"):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _check_evaluated(self, dataset: Any, name: str) -> None:
        if self.args.log_private_statistics:
            self.keep_reasons()
        # A name means one of the trainer's own datasets.
        own: Any = self.eval_dataset
        if isinstance(dataset, str):
            if not isinstance(own, dict) or dataset not in own:
                names = ", ".join(own) if isinstance(own, dict) else "without names"
                raise ValueError(
                    f"{dataset!r} is none of the trainer's evaluation datasets ({names}): name one of them."
                )
            own = own[dataset]
        is_own = dataset is None or isinstance(dataset, str) or dataset is own
        self._check_held_out(own if is_own else dataset, name)
        # The trainer's own datasets were checked when it was made.
        if not is_own:
            data_validation.check_records(self.data_collator, dataset, name)

    def _check_held_out(self, evaluated: Any, name: str) -> None:
        """Raises `ValueError` as the loaders do. Each dataset is checked once, since that reads the private one."""
        if self.args.log_private_statistics:
            return
        for dataset in evaluated.values() if isinstance(evaluated, dict) else [evaluated]:
            if not any(dataset is known for known in self._held_out):
                unit_column = self.args.privacy_unit_column
                with self._without_augmentation():
                    collator = self._get_collator_with_removed_columns(self.data_collator)
                    check_evaluation_data(self.train_dataset, dataset, unit_column, name, collator)
                self._held_out.append(dataset)

    @contextmanager
    def _without_augmentation(self) -> Iterator[None]:
        """Views and augmentation are for training only."""
        collator = self.data_collator
        if isinstance(collator, ImageTextCollator):
            self.data_collator = collator.unaugmented()
        try:
            yield
        finally:
            self.data_collator = collator
