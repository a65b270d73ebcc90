"""What leaves the process: logs, saved folders, the model card and the Hub.

Each states ε and holds no statistic of the private data (`docs/privacy.md`, "What leaves the process").
"""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from . import checkpoints
from .arguments import DPTrainingArguments
from .averaging import load_averages, save_averages
from .evaluating import EvaluatingTrainer
from .model_card import write_model_card
from .models.lora import check_adapters_are_there
from .privacy import STATEMENT_NAME, PrivacyPlan, PrivacyStatement
from .privacy_section import NOT_PRIVATE
from .resuming import check_settings, loading
from .silence import without_warnings
from .tokenizer_state import TokenizerState


logger = logging.get_logger(__name__)

# Statistics of the private data that the `Trainer` would log.
PRIVATE_STATISTICS = ("loss", "train_loss")


@dataclass(frozen=True)
class BestWeights:
    """The step of the weights after the best ones were loaded, and how many logs there were before."""

    step: int
    logs_before: int


class PublishingTrainer(EvaluatingTrainer):
    """The part of [`DPCLIPTrainer`] that logs, saves and publishes."""

    args: DPTrainingArguments
    model: nn.Module
    optimizer: Optimizer
    plan: PrivacyPlan | None
    # A `str` if there is a repository. Type checkers see only that the `Trainer` first sets it to `None`.
    hub_model_id: Any
    # As it was before any private record was encoded.
    _tokenizer_state: TokenizerState
    _reads_records = False
    # `None` for the weights of the last step.
    best_weights: "BestWeights | None" = None

    @property
    def output_dir(self) -> str:
        """`args.output_dir`, which is declared as optional, but never `None` once the arguments are made."""
        return self._get_output_dir(trial=None)

    @abstractmethod
    def privacy_statement(self) -> PrivacyStatement:
        """What may be claimed of the weights as they are now."""

    @abstractmethod
    def keep_changes(self) -> None:
        """If the model changed past the mechanism, keeps that as a reason why no guarantee holds."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: a count of the realised inputs would reveal the realised batch size."""
        return 0

    def log(self, logs: Mapping[str, float], *args, **kwargs) -> None:
        """As in the `Trainer`, with ε and without statistics of the private data."""
        if self.args.log_private_statistics:
            self.keep_reasons()
        elif self._reads_records and not self.args.non_private:
            raise RuntimeError(
                f"{', '.join(map(str, logs))} would be logged while gradients of private records are computed, "
                "without noise: do not call log in compute_loss, or set log_private_statistics=True on public data. "
                "What depends on the weights alone can be logged in on_step_end of a callback."
            )
        # Not in place: a hyperparameter search adds up these metrics.
        shown = self._without_private_statistics(logs) | self._privacy_figures()
        super().log(shown, *args, **kwargs)
        if isinstance(logs, dict) and "epoch" in shown:
            # The Trainer adds it in place, for whoever the metrics are returned to.
            logs["epoch"] = shown["epoch"]

    @contextmanager
    def reading_records(self) -> Iterator[None]:
        """Gradients of private records are computed inside, so that nothing may be logged, and no warning is shown."""
        self._reads_records = True
        try:
            with without_warnings():
                yield
        finally:
            self._reads_records = False

    def _without_private_statistics(self, logs: Mapping[str, float]) -> dict[str, float]:
        hidden = () if self.args.log_private_statistics else PRIVATE_STATISTICS
        return {name: value for name, value in logs.items() if name not in hidden}

    def _privacy_figures(self) -> dict[str, float]:
        if self.plan is None:
            return {}
        statement, figures = self.privacy_statement(), {}
        if statement.steps and not self.plan.non_private:
            figures["epsilon"] = statement.spent.epsilon
        if statement.not_private_because:
            figures[NOT_PRIVATE] = 1.0
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.output_dir)
        check_adapters_are_there(self.model)
        self.keep_changes()
        states_privacy = self.args.should_save and self.plan is not None
        if self.args.should_save:
            # Before the weights: whatever interrupts this, no weights lie beside the statement of others.
            if self.plan is None and Path(folder, STATEMENT_NAME).exists():
                logger.warning(
                    f"{STATEMENT_NAME} in {folder} is removed: this trainer does not know what weights cost."
                )
            Path(folder, STATEMENT_NAME).unlink(missing_ok=True)
        with self._tokenizer_state.restored():
            super()._save(output_dir, state_dict)
        if states_privacy:
            self.privacy_statement().save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            checkpoints.set_aside(checkpoint)
        self.accelerator.wait_for_everyone()
        with checkpoints.saving(checkpoint):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            checkpoints.remove_replaced(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Now only the state of training is missing from the checkpoint.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal(Path(output_dir), self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_averages(self.callback_handler.callbacks, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            settings = [set(group) for group in self.optimizer.param_groups]
            super()._load_optimizer_and_scheduler(checkpoint)
            check_settings(self.optimizer, settings)
        if checkpoint is not None:
            load_averages(self.callback_handler.callbacks, checkpoint, self.model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._remember_best_weights()

    def _remember_best_weights(self) -> None:
        """To be called when they were loaded, if they were still there."""
        checkpoint, step = self.state.best_model_checkpoint, self.state.best_global_step
        if checkpoint is not None and step is not None and any(Path(checkpoint).glob("*model*")):
            self.best_weights = BestWeights(step, len(self.state.log_history))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in the `Trainer`, with the guarantee, and without statistics of the private data.

        Takes the same arguments. `dataset_tags` and `dataset` name the dataset; by default it stays unnamed.
        """
        if self.plan is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            names = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            write_model_card(self, **names)

    def push_to_hub(self, *args, **kwargs) -> CommitInfo:
        """As in the `Trainer`. If it fails, the trained model is saved in `args.output_dir` all the same."""
        self._wait_for_upload()
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception:
            if self.plan is not None and self.privacy_statement().steps:
                # Whatever the error: the weights have cost ε, and may exist in this process only.
                self.save_model(_internal_call=True)
                logger.warning(f"The upload failed. What was trained is in {self.output_dir}.")
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            if self.args.hub_always_push:
                self._wait_for_upload()
            if self.push_in_progress is None or self.push_in_progress.is_done():
                # The Trainer copies only files that it knows from the checkpoint to the folder that it uploads.
                self.privacy_statement().save(self.output_dir)
                self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        with self._tokenizer_state.restored():
            super()._push_from_checkpoint(checkpoint_folder)

    def _wait_for_upload(self) -> None:
        """Files must not change while they are uploaded: later weights would go with an earlier ε."""
        if self.is_world_process_zero():
            self._finish_current_push()
