"""Hyperparameter searches: every trial is a run, and the choice of the best depends on all of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import BestRun, HPSearchBackend

from . import validation
from .checkpoints import replace_statement
from .privacy import PrivacyPlan
from .reporting import search_summary
from .resuming import complete_checkpoints_in, readable_statement
from .runs import RunningTrainer


class SearchingTrainer(RunningTrainer):
    """The part of [`DPCLIPTrainer`] that searches.

    Formal guarantees:
        The results of all trials together, and models trained further with the best settings, have the privacy of the
        composition of all runs, by [`~privacy.composed`].
    """

    # Whether the plan is that of the last trial, whose steps were all taken.
    _plan_is_a_trials = False

    def _begin_first_run(self, plan: PrivacyPlan | None) -> None:
        super()._begin_first_run(plan)
        # The folders with the checkpoints of the trials, by run id.
        self._trials: dict[str, Path] = {}

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """As in the `Trainer`, one trial after another.

        Each trial spends what its arguments say: with `target_epsilon=3`, up to ε = 3. What all of them spent together
        is printed at the end. From then on it is part of `privacy_spent` and of every privacy statement, also of those
        in the checkpoints of trials. `n_trials`, and the number of steps of a trial, are treated as fixed beforehand.

        On several processes no trial is pruned, and all processes return the result.

        Raises `ValueError` for settings with which trials would not be counted, or processes would wait forever.
        """
        backend = HPSearchBackend(backend or HPSearchBackend.OPTUNA)
        validation.check_search(backend, kwargs, self.args.world_size)
        validation.check_trials_are_evaluated(self)
        if self.args.world_size > 1:
            kwargs["pruner"] = _never()
        # Other backends have their own formats for a space.
        if hp_space and backend == HPSearchBackend.OPTUNA:
            hp_space = self._of_known_arguments(hp_space)
        try:
            best = super().hyperparameter_search(
                hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
            )
        finally:
            if self.is_world_process_zero():
                self._restate_trials()
        if self.is_world_process_zero():
            print(search_summary(self.privacy_statement()))
        (best,) = broadcast_object_list([best])
        return best

    def _of_known_arguments(self, hp_space: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """The same space, which raises `ValueError` for a name that is no argument: trials would waste ε on it."""

        def checked(trial: Any) -> dict[str, Any]:
            values = hp_space(trial)
            unknown = [name for name in values if name not in vars(self.args)]
            if unknown:
                raise ValueError(
                    f"hp_space gives {unknown[0]!r}, which is no argument of {type(self.args).__name__}: correct the "
                    "name. Trials that do not differ in it would spend ε for nothing."
                )
            return values

        return checked

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:
            self.begin_run()
            self._plan_is_a_trials = True
            self._trials[self._run_id] = Path(self._get_output_dir(trial))

    def _leave_search(self) -> None:
        """As in [`RunningTrainer`]. The user may have put the best settings into the arguments by now."""
        if not self._plan_is_a_trials:
            return
        # The search leaves the trainer without a model.
        if self.model is None:
            self.model = self.model_wrapped = self.call_model_init()
            if self.place_model_on_device:
                self._move_model_to_device(self.model, self.args.device)
        self.begin_run()
        self._plan_is_a_trials = False

    def _restate_trials(self) -> None:
        """Adds all trials to the statements of their checkpoints: whichever is chosen, the choice depends on all."""
        known = self._known_runs
        for run, folder in self._trials.items():
            others = {other: runs for other, runs in known.items() if other != run}
            for checkpoint in complete_checkpoints_in(folder):
                statement = readable_statement(checkpoint)
                if statement and statement.run == run:
                    statement = dataclasses.replace(statement, steps=known[run][1], earlier_runs=others)
                    replace_statement(checkpoint, statement)


def _never() -> Any:
    """A pruner that prunes nothing, unlike optuna's default: only process 0 would know of a pruned trial."""
    from optuna.pruners import NopPruner

    return NopPruner()
