"""Hyperparameter search under privacy: every trial is a run on the same records, and all of them spend."""

from typing import Any

from transformers.trainer_utils import BestRun, HPSearchBackend

from . import validation
from .publishing import PublishingTrainer
from .reporting import search_summary


class SearchingTrainer(PublishingTrainer):
    """The part of [`DPCLIPTrainer`] that gives every trial a privacy plan of its own.

    Formal guarantees:
        Whoever sees the results of all trials, or trains on with the best of their settings, has seen the composition
        of all runs: what [`~privacy.composed`] makes of them.
    """

    # Whether the plan is that of the last trial, whose steps are taken.
    _plan_is_a_trials = False

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> BestRun | list[BestRun]:
        """As in the `Trainer`, one trial after another.

        Each trial spends what its arguments say: with `target_epsilon=3`, up to ε = 3. What all of them spent together
        is printed at the end and, from then on, part of `privacy_spent` and of what is saved with any weights.
        """
        kwargs["backend"] = HPSearchBackend(kwargs.get("backend") or HPSearchBackend.OPTUNA)
        validation.check_search(kwargs)
        best = super().hyperparameter_search(*args, **kwargs)
        if self.is_world_process_zero():
            print(search_summary(self.privacy_statement()))
        return best

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None or self._plan_is_a_trials:
            self.begin_run()
        self._plan_is_a_trials = trial is not None

    def begin_run(self) -> None:
        """Makes a plan from the arguments as they are now. What was spent before counts on."""
        raise NotImplementedError
