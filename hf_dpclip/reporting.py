"""What a run says of its privacy while it runs: the start-up summary, the progress bar, the stop at the target."""

import math

from torch import nn
from transformers import ProgressCallback, TrainerCallback
from transformers import trainer as hf_trainer

from .advice import advice, is_hopeless, weak_promises
from .planning import steps_per_epoch
from .privacy import PrivacySpent, PrivacyStatement, composed
from .privacy_section import NOT_PRIVATE, plan_rows


class PrivacyCallback(TrainerCallback):
    """Prepares the mechanism when training begins and stops training when the privacy budget is spent."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.prepare_mechanism()
        if state.is_world_process_zero:
            statement = self.trainer.privacy_statement()
            print(summary(statement, self.trainer.model, statement.steps + self.trainer.planned_steps))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.remaining_steps == 0:
            control.should_training_stop = True
        return control


class EpochCallback(TrainerCallback):
    """Lets a run that was resumed in the middle of an epoch go on to its end.

    With `ignore_data_skip`, the `Trainer` would begin that epoch anew. Has to be the first callback, so that others
    see the right epoch.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        plan = self.trainer.plan
        self._length = steps_per_epoch(plan.num_examples, plan.expected_batch_size)
        self._end = math.ceil(state.global_step / self._length) * self._length

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step <= self._end:
            state.epoch = state.global_step / self._length
            control.should_epoch_stop = state.global_step == self._end


class PrivacyProgressCallback(ProgressCallback):
    """The usual progress bar with ε at its end."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None:
            epsilon = f"ε={logs['epsilon']:.3g} " if "epsilon" in logs else ""
            self.training_bar.set_postfix_str(epsilon + (NOT_PRIVATE if NOT_PRIVATE in logs else ""))


def use_own_callbacks(trainer) -> None:
    """Adds those above, in the place of the `Trainer`'s progress callback where it has one."""
    trainer.callback_handler.callbacks.insert(0, EpochCallback(trainer))
    trainer.add_callback(PrivacyCallback(trainer))
    progress = hf_trainer.DEFAULT_PROGRESS_CALLBACK
    if trainer.pop_callback(progress) is not None:
        trainer.add_callback(_with_privacy(progress))


def _with_privacy(callback: type[TrainerCallback]) -> TrainerCallback:
    """Our version of a progress callback: a bar, or a table in notebooks."""
    if callback is ProgressCallback:
        return PrivacyProgressCallback()
    from .notebook import PrivacyNotebookProgressCallback

    return PrivacyNotebookProgressCallback()


def summary(statement: PrivacyStatement, model: nn.Module, total_steps: int) -> str:
    """The plan in words and figures, with a warning if it cannot work.

    `total_steps` is the number of steps taken at the end: more than planned if `train` is called again.
    """
    plan = statement.plan
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ceiling, epsilon = plan.signal_to_noise(num_parameters), plan.epsilon(total_steps)
    lines = [
        "***** Differentially private training *****",
        *(f"  {name} = {value}" for name, value in plan_rows(plan).items()),
        f"  steps T = {total_steps:,}, of which taken = {statement.steps:,}",
        f"  ε = {epsilon:.4g} after all steps at δ = {plan.target_delta:.3g} ({plan.accountant} accountant)",
        f"  trainable parameters d = {num_parameters:,}, signal-to-noise ceiling of a step = {ceiling:.3g}",
        *_earlier(statement),
        *(f"  {NOT_PRIVATE}: {reason}" for reason in statement.not_private_because),
    ]
    lines += [f"  WARNING: {weakness}" for weakness in weak_promises(plan, epsilon)]
    if is_hopeless(plan, num_parameters):
        lines.append(f"  WARNING: {advice(plan, num_parameters)}")
    return "\n".join(lines)


def search_summary(statement: PrivacyStatement) -> str:
    """What each trial of a hyperparameter search spent, and all of them together."""
    lines = ["***** Every trial spent privacy *****"]
    for number, (plan, steps) in enumerate(statement.runs):
        cost = _cost(composed([(plan, steps)]))
        mechanism = f"q = {plan.sampling_probability:.4g}, σ = {plan.noise_multiplier:.4g}"
        lines.append(f"  run {number}: {cost} ({mechanism})")
    lines.append(f"  together: {_cost(statement.spent)}; training on with what was found adds to it")
    lines += [f"  {NOT_PRIVATE}: {reason}" for reason in statement.not_private_because]
    return "\n".join(lines)


def _earlier(statement: PrivacyStatement) -> list[str]:
    earlier = [*statement.earlier_runs.values()]
    return [f"  spent before (earlier runs: {len(earlier)}): {_cost(composed(earlier))}"] if earlier else []


def _cost(spent: PrivacySpent) -> str:
    return f"ε = {spent.epsilon:.4g} at δ = {spent.delta:.3g} after {spent.steps:,} steps"
