"""Runs: counting planned, taken and spent steps, over several calls of `train` and over resumptions."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from . import validation
from .dataloader import MicrobatchDataset
from .digests import sampled_digest
from .guard import StepGuard
from .model_history import is_distrusted, remember_steps
from .planning import num_steps, planned_values
from .privacy import PrivacyPlan, PrivacySpent, PrivacyStatement
from .privacy.composition import NamedRuns, merge_runs
from .process_failures import explaining_process_failures
from .publishing import PublishingTrainer
from .resuming import (
    check_adapters,
    check_resumable,
    differences,
    last_complete_checkpoint,
    loading,
    warn_of_unfinished_run,
)
from .spending import flag, new_run_id, recorded


logger = logging.get_logger(__name__)

CHANGED = "the model, or its loss, changed past the mechanism in a step of training"


class RunningTrainer(PublishingTrainer):
    """The part of [`DPCLIPTrainer`] that counts steps, over several calls of `train` and resumed runs.

    Formal guarantees:
        Weights to which several runs led have the privacy of their composition, by [`~privacy.composed`].
    """

    # None without a training dataset, as in a trainer that only evaluates.
    plan: PrivacyPlan
    # The arguments that the plan was made from.
    _planned_values: dict[str, Any]
    # Made when training begins.
    _guard: StepGuard | None = None

    @abstractmethod
    def begin_run(self) -> None:
        """Makes a new plan from the arguments as they are now. Earlier runs still count."""

    @abstractmethod
    def _leave_search(self) -> None:
        """Begins a new run if the plan is that of the last trial of a search."""

    @abstractmethod
    def _draw_randomness(self) -> None:
        """Makes fresh streams for the steps to come."""

    @abstractmethod
    def _microbatch_dataset(self) -> MicrobatchDataset:
        """The records with the columns that are read, and their collator."""

    def _begin_first_run(self, plan: PrivacyPlan | None) -> None:
        self._earlier_runs: NamedRuns = {}
        # Reasons that stay; others follow from the arguments as they are now.
        self._not_private_because: tuple[str, ...] = ()
        # Those that the ledger was told, each with the run.
        self._flagged: set[tuple[str, str]] = set()
        self._start_counting(plan)

    def _begin_run(self, plan: PrivacyPlan) -> None:
        others = {earlier.privacy_unit for earlier, _ in self._known_runs.values()} - {plan.privacy_unit}
        if others:
            raise ValueError(
                f"privacy_unit_column makes the privacy unit {plan.privacy_unit!r}, and steps were taken with "
                f"{min(others)!r}: there is no ε for both together. Set it as it was, or begin with the model as it "
                "was before, in a new trainer."
            )
        self._earlier_runs = self._known_runs
        self._not_private_because = self._reasons
        self._start_counting(plan)

    def _start_counting(self, plan: PrivacyPlan | None) -> None:
        self.plan, self._steps_taken, self._run_id = plan, 0, new_run_id()
        self._steps_ahead = plan.num_steps if plan else 0

    # ---- What was spent ----

    @property
    def remaining_steps(self) -> float:
        """Steps left until the target ε would be exceeded; infinite where no target was promised."""
        self._check_has_plan()
        if self.plan.target_epsilon is None:
            return math.inf
        return max(self.plan.num_steps - self._steps_taken, 0)

    def privacy_spent(self) -> PrivacySpent:
        """(ε, δ) of the steps taken so far, in all calls of `train` and in the run that was resumed."""
        return self.privacy_statement().spent

    def privacy_statement(self) -> PrivacyStatement:
        """What may be claimed of the weights as they are now. Raises `ValueError` if there is no training dataset."""
        self._check_has_plan()
        return PrivacyStatement(
            self.plan, self._steps_taken, self._reasons, run=self._run_id, earlier_runs=self._earlier_runs
        )

    @property
    def _known_runs(self) -> NamedRuns:
        """All runs that took steps, by id."""
        own = {self._run_id: (self.plan, self._steps_taken)} if self._steps_taken else {}
        return merge_runs(self._earlier_runs, own)

    def keep_reasons(self) -> None:
        """As in [`EvaluatingTrainer`]."""
        self._keep(self.args.not_private_because)

    def _keep(self, reasons: tuple[str, ...]) -> None:
        """Keeps reasons why no guarantee holds. The ledger may not have them yet: they come up in a run, or after its
        end, when private records are evaluated."""
        self._not_private_because = tuple(dict.fromkeys(self._not_private_because + reasons))
        # By run: another one may have been begun, or resumed, since.
        new = {(self._run_id, reason) for reason in reasons} - self._flagged
        if new:
            self._flagged |= new
            flag(self, [*self._earlier_runs, self._run_id], reasons)

    @property
    def _reasons(self) -> tuple[str, ...]:
        """Why no guarantee holds, by arguments of the past or of now."""
        return tuple(dict.fromkeys(self._not_private_because + self.args.not_private_because))

    def _check_has_plan(self):
        if self.plan is None:
            raise ValueError("there is no privacy plan without a train_dataset: pass it to DPCLIPTrainer.")

    # ---- A run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs,
    ) -> TrainOutput:
        """As in the `Trainer`, within the plan.

        A second call composes with the first. Resuming continues the count of the checkpoint with fresh randomness;
        `True`, also as text, takes the last complete one. Raises `ValueError` if the checkpoint's plan is not this
        one, or if only one of checkpoint and model has adapters.
        """
        self._check_has_plan()
        validation.check_best_metric(self)
        if trial is None:
            self._leave_search()
        # As text, from the command line of a script.
        if str(resume_from_checkpoint) in ("True", "true"):
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if not resume_from_checkpoint and trial is None and self.is_world_process_zero():
            warn_of_unfinished_run(self.args.output_dir, self._run_id)
        self._steps_ahead = self._take_over(resume_from_checkpoint) if resume_from_checkpoint else self.plan.num_steps
        if trial is None and self.planned_steps == 0:
            self._check_unchanged()
            return self._finished(resume_from_checkpoint)
        with explaining_process_failures():
            output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval, **kwargs)
        loss = output.training_loss if self.args.log_private_statistics else math.nan
        metrics = self._without_private_statistics(output.metrics)
        # As the Trainer's callbacks leave them.
        metrics.pop("total_flos", None)
        return TrainOutput(output.global_step, loss, metrics)

    def _take_over(self, checkpoint: str) -> int:
        """Continues the count of a checkpoint. Returns how many planned steps its run has left."""
        statement = check_resumable(checkpoint, self.plan)
        with loading(checkpoint):
            check_adapters(checkpoint, self.model)
        run = statement.run or new_run_id()
        # Earlier steps of this trainer count as an earlier run, unless they belong to the run that is resumed.
        runs = merge_runs(self._known_runs, statement.earlier_runs, {run: (statement.plan, statement.steps)})
        self._run_id, (self.plan, self._steps_taken) = run, runs.pop(run)
        self._earlier_runs = runs
        # If the steps before were not private, the run stays so.
        self._not_private_because += statement.not_private_because
        self.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        # The file has the values of the process that wrote it.
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        return max(self.plan.num_steps - self.state.global_step, 0)

    def _finished(self, checkpoint: str | None) -> TrainOutput:
        """Ends a run whose steps were all taken: the loop of the `Trainer` would take one more."""
        target_is_spent = self.remaining_steps == 0
        why = f"target_epsilon={self.plan.target_epsilon} is spent" if target_is_spent else f"{checkpoint} is the end"
        logger.warning(
            f"{why}: no further step can be taken. To spend more, change the arguments and call trainer.begin_run()."
        )
        if checkpoint:
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self._load_from_checkpoint(best or checkpoint)
            if best:
                self._remember_best_weights()
        return TrainOutput(self.state.global_step, math.nan, {})

    def _load_from_checkpoint(self, checkpoint: str, *args, **kwargs) -> None:
        with loading(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)

    @property
    def planned_steps(self) -> int:
        """The number of steps that this call of `train` takes at most."""
        return min(self._steps_ahead, self.remaining_steps)

    def _inner_training_loop(self, *args, **kwargs):
        # Here, since only now a trial of a search has its own plan.
        self._check_unchanged()
        self._agree_on_run()
        self._draw_randomness()
        self.best_weights = None
        self._last_step = self._steps_taken + self.planned_steps
        with (
            recorded(self, self._run_id, self.planned_steps) as self._before_release,
            self._model_followed(),
        ):
            return super()._inner_training_loop(*args, **kwargs)

    @contextmanager
    def _model_followed(self) -> Iterator[None]:
        """Training takes place inside. However it ends, weights that changed past the mechanism are not private, and
        another trainer that is given the model knows that it was trained."""
        self._guard = None
        try:
            yield
        finally:
            remember_steps(self.model, self._run_id, self._steps_taken)
            self.keep_changes()

    def keep_changes(self) -> None:
        """As in [`PublishingTrainer`]."""
        changed = self._guard is not None and self._guard.distrust_if_changed()
        if changed or is_distrusted(self.model):
            self._keep((CHANGED,))

    def _check_unchanged(self) -> None:
        """Raises `ValueError` if arguments were changed after the plan was made, and would have no effect, or if they
        now ask for more steps than were planned, and recorded in the ledger."""
        now = planned_values(self.args)
        changed = [name for name, value in self._planned_values.items() if value != now[name]]
        if changed:
            raise ValueError(
                f"{changed[0]} was {self._planned_values[changed[0]]!r} when the privacy plan was made, and is "
                f"{now[changed[0]]!r}: call trainer.begin_run() after changing arguments, so that they count."
            )
        asked = num_steps(self.args, self.plan.num_examples)
        if asked > self.plan.num_steps:
            raise ValueError(
                f"{asked} steps are asked for, and {self.plan.num_steps} were planned when the trainer was made: call "
                "trainer.begin_run() after changing arguments that say how many there are."
            )

    def _agree_on_run(self) -> None:
        """Gives all processes one run id. Raises `ValueError`, on all of them, if their plans or records differ."""
        (self._run_id,) = broadcast_object_list([self._run_id])
        plans = gather_object([self.plan])
        apart = [name for plan in plans for name in differences(plans[0], plan)]
        if apart:
            raise ValueError(
                f"the processes planned different runs: {apart[0]}. Give all of them the same dataset and arguments, "
                "and in a search an hp_space in which everything comes from the trial."
            )
        if self.args.world_size == 1:
            return
        digests = {*gather_object([sampled_digest(self._microbatch_dataset())])}
        if None not in digests and len(digests) > 1:
            raise ValueError(
                "the processes have different training records, or the same in another order, so that one record "
                "would be drawn as if it were several: give shuffle, train_test_split and the like a seed=..., or let "
                "one process save the dataset with save_to_disk and all of them load it."
            )
