"""Runs: what is planned, taken, recorded and spent, from the first step to the last, resumed or searched."""

import dataclasses
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import BestRun, HPSearchBackend, TrainOutput
from transformers.utils import logging

from . import validation
from .checkpoints import restate
from .dataloader import MicrobatchDataset
from .faults import explained
from .planning import num_steps, planned_values
from .privacy import PrivacyPlan, PrivacySpent, PrivacyStatement
from .privacy.composition import Runs
from .publishing import PublishingTrainer
from .records import sampled_digest
from .reporting import search_summary
from .resuming import (
    check_resumable,
    differences,
    fitting,
    last_complete_checkpoint,
    readable_statement,
    warn_of_unfinished_run,
    whole_checkpoints_in,
)
from .spending import new_run, recorded


logger = logging.get_logger(__name__)


class RunningTrainer(PublishingTrainer):
    """The part of [`DPCLIPTrainer`] that counts: several calls of `train`, resumed runs, the trials of a search.

    Formal guarantees:
        Whoever sees the results of all trials, or trains on with the best of their settings, has seen the composition
        of all runs: what [`~privacy.composed`] makes of them.
    """

    # None where there is no training dataset, as in a trainer that only evaluates.
    plan: PrivacyPlan
    # What it was made of.
    _planned_values: dict[str, Any]

    # Whether the plan is that of the last trial, whose steps are taken.
    _plan_is_a_trials = False

    @abstractmethod
    def begin_run(self) -> None:
        """Makes a plan from the arguments as they are now. What was spent before counts on."""

    @abstractmethod
    def _draw_randomness(self) -> None:
        """Fresh streams for the steps to come."""

    @abstractmethod
    def _microbatch_dataset(self) -> MicrobatchDataset:
        """The records with the columns that are read, and their collator."""

    def _begin_first_run(self, plan: PrivacyPlan | None) -> None:
        self.plan, self._steps_taken, self._run = plan, 0, new_run()
        self._earlier_runs: Runs = ()
        # The trials of searches: by the run's id, where its checkpoints are and which of all runs it is.
        self._trials: dict[str, tuple[Path, int]] = {}
        # Reasons of the past; those of today follow from the arguments.
        self._not_private_because: tuple[str, ...] = ()

    def _begin_run(self, plan: PrivacyPlan) -> None:
        statement = self.privacy_statement()
        if statement.steps and plan.privacy_unit != self.plan.privacy_unit:
            raise ValueError(
                f"privacy_unit_column makes the privacy unit {plan.privacy_unit!r}, and steps were taken with "
                f"{self.plan.privacy_unit!r}: there is no ε for both together. Set it as it was, or begin with the "
                "model as it was before, in a new trainer."
            )
        if statement.steps:
            self._earlier_runs = statement.runs
        self._not_private_because = statement.not_private_because
        self.plan, self._steps_taken, self._run = plan, 0, new_run()
        self._steps_ahead = plan.num_steps

    # ---- What was spent ----

    @property
    def remaining_steps(self) -> float:
        """Steps left until the target ε would be exceeded; infinite where no target was promised."""
        if self.plan.target_epsilon is None:
            return math.inf
        return max(self.plan.num_steps - self._steps_taken, 0)

    def privacy_spent(self) -> PrivacySpent:
        """(ε, δ) of the steps taken so far, in all calls of `train` and in the run that was resumed."""
        return self.privacy_statement().spent

    def privacy_statement(self) -> PrivacyStatement:
        """What may be claimed of the weights as they are now. Raises `ValueError` if there is no training dataset."""
        self._check_planned()
        return PrivacyStatement(
            self.plan, self._steps_taken, self._reasons, run=self._run, earlier_runs=self._earlier_runs
        )

    def keep_reasons(self) -> None:
        """As in [`EvaluatingTrainer`]."""
        self._not_private_because = self._reasons

    @property
    def _reasons(self) -> tuple[str, ...]:
        """Why no guarantee holds, in the past or by the arguments of today."""
        return tuple(dict.fromkeys(self._not_private_because + self.args.not_private_because))

    def _check_planned(self):
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

        A second call composes with the first. Resuming continues the count of the checkpoint with fresh randomness.
        Raises `ValueError` if the checkpoint's plan is not this one.
        """
        self._check_planned()
        validation.check_best_metric(self)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if not resume_from_checkpoint and trial is None and self.is_world_process_zero():
            warn_of_unfinished_run(self.args.output_dir, self._run)
        self._steps_ahead = self._take_over(resume_from_checkpoint) if resume_from_checkpoint else self.plan.num_steps
        has_own_plan = trial is None and not self._plan_is_a_trials
        if has_own_plan and self.planned_steps == 0:
            return self._finished(resume_from_checkpoint)
        with explained():
            output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval, **kwargs)
        loss = output.training_loss if self.args.log_private_statistics else math.nan
        metrics = self._without_private_statistics(output.metrics)
        # As the Trainer's callbacks leave them.
        metrics.pop("total_flos", None)
        return TrainOutput(output.global_step, loss, metrics)

    def _take_over(self, checkpoint: str) -> int:
        """Continues the count of a checkpoint. Returns how many steps its run has left."""
        statement, own = check_resumable(checkpoint, self.plan), self.privacy_statement()
        if statement.run == self._run:
            self._steps_taken = max(own.steps, statement.steps)
        else:
            # Another run's checkpoint: what this trainer did before was not part of that run, and counts beside it.
            self._steps_taken = statement.steps
            self._earlier_runs = (*(own.runs if own.steps else own.earlier_runs), *statement.earlier_runs)
            # They are others in the list now.
            self._trials = {}
        self.plan = statement.plan
        self._run = statement.run or self._run
        # What the resumed steps lost, the steps to come cannot restore.
        self._not_private_because += statement.not_private_because
        self.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        # In the file they are those of the process that wrote it.
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        return max(self.plan.num_steps - self.state.global_step, 0)

    def _finished(self, checkpoint: str | None) -> TrainOutput:
        """The end of a run whose steps have all been taken. The loop of the `Trainer` would take one more."""
        target_is_spent = self.remaining_steps == 0
        why = f"target_epsilon={self.plan.target_epsilon} is spent" if target_is_spent else f"{checkpoint} is the end"
        logger.warning(f"{why}: no further step can be taken.")
        if checkpoint:
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self._load_from_checkpoint(best or checkpoint)
        return TrainOutput(self.state.global_step, math.nan, {})

    def _load_from_checkpoint(self, checkpoint: str, *args, **kwargs) -> None:
        with fitting(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)

    @property
    def planned_steps(self) -> int:
        """Steps that this call of `train` is going to take at most."""
        return min(self._steps_ahead, self.remaining_steps)

    def _inner_training_loop(self, *args, **kwargs):
        # Not before a trial of a search has a plan of its own.
        self._check_unchanged()
        self._agree()
        self._draw_randomness()
        self._last_step = self._steps_taken + self.planned_steps
        with recorded(self, self._run, self.planned_steps) as self._before_release:
            return super()._inner_training_loop(*args, **kwargs)

    def _check_unchanged(self) -> None:
        """Raises `ValueError` if arguments were changed since the plan was made of them, and would have no effect, or
        if they ask for more steps than were planned, and than a ledger allowed."""
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

    def _agree(self) -> None:
        """One run on all processes. Raises `ValueError`, on all of them, if they planned different ones."""
        (self._run,) = broadcast_object_list([self._run])
        plans = gather_object([self.plan])
        apart = [name for plan in plans for name in differences(plans[0], plan)]
        if apart:
            raise ValueError(
                f"the processes planned different runs: {apart[0]}. Give all of them the same dataset and arguments, "
                "and in a search an hp_space in which everything comes from the trial."
            )
        if self.args.world_size == 1:
            return
        if len({*gather_object([sampled_digest(self._microbatch_dataset().dataset)])}) > 1:
            raise ValueError(
                "the processes have different training records, or the same in another order, so that one record "
                "would be drawn as if it were several: give shuffle, train_test_split and the like a seed=..., or let "
                "one process save the dataset with save_to_disk and all of them load it."
            )

    # ---- A search ----

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> BestRun | list[BestRun]:
        """As in the `Trainer`, one trial after another.

        Each trial spends what its arguments say: with `target_epsilon=3`, up to ε = 3. What all of them spent together
        is printed at the end and, from then on, part of `privacy_spent` and of what is saved with any weights, and of
        what the checkpoints of the trials say. `n_trials`, and how many steps a trial has, are treated as fixed
        beforehand.

        On several processes no trial is pruned, and all of them get the result.

        Raises `ValueError` for settings with which trials would not see one another, or processes lose one another.
        """
        kwargs["backend"] = HPSearchBackend(kwargs.get("backend") or HPSearchBackend.OPTUNA)
        validation.check_search(kwargs, self.args.world_size)
        if self.args.world_size > 1:
            kwargs["pruner"] = _never()
        try:
            best = super().hyperparameter_search(*args, **kwargs)
        finally:
            if self.is_world_process_zero():
                self._restate_trials()
        if self.is_world_process_zero():
            print(search_summary(self.privacy_statement()))
        (best,) = broadcast_object_list([best])
        return best

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None or self._plan_is_a_trials:
            self.begin_run()
        self._plan_is_a_trials = trial is not None
        if trial is not None:
            self._trials[self._run] = Path(self._get_output_dir(trial)), len(self._earlier_runs)

    def _restate_trials(self) -> None:
        """Whichever trial's checkpoint is chosen, the choice saw what all of them found."""
        runs = self.privacy_statement().runs
        for run, (folder, number) in self._trials.items():
            (_, steps), others = runs[number], (*runs[:number], *runs[number + 1 :])
            for checkpoint in whole_checkpoints_in(folder):
                statement = readable_statement(checkpoint)
                if statement and statement.run == run:
                    restate(checkpoint, dataclasses.replace(statement, steps=steps, earlier_runs=others))


def _never() -> Any:
    """A pruner that prunes nothing, where optuna's default would: only process 0 would know of it."""
    from optuna.pruners import NopPruner

    return NopPruner()
