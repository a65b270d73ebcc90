"""From training arguments and a dataset size to the privacy plan of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .privacy import PrivacyPlan


if TYPE_CHECKING:
    # The command line plans too, and need not wait for transformers.
    from .arguments import DPTrainingArguments


def make_plan(args: DPTrainingArguments, num_examples: int) -> PrivacyPlan:
    """The plan of a run on `num_examples` privacy units. Raises `ValueError` as [`PrivacyPlan`] does."""
    fields: dict[str, Any] = {
        "num_examples": num_examples,
        "expected_batch_size": args.expected_batch_size,
        "num_microbatches": args.num_microbatches,
        "num_steps": num_steps(args, num_examples),
        "max_grad_norm": args.max_grad_norm,
        "target_delta": args.target_delta,
        "accountant": args.accountant,
        "clipping": args.clipping,
        "privacy_unit": args.privacy_unit_column or "record",
    }
    if args.target_epsilon is not None:
        return PrivacyPlan.calibrate(target_epsilon=args.target_epsilon, **fields)
    return PrivacyPlan(noise_multiplier=args.noise_multiplier or 0.0, non_private=args.non_private, **fields)


# The arguments that determine a plan, other than those for the number of steps.
PLANNED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "microbatch_size",
    "max_grad_norm",
    "clipping",
    "target_epsilon",
    "noise_multiplier",
    "non_private",
    "target_delta",
    "accountant",
    "privacy_unit_column",
    "max_records_per_unit",
)


def planned_values(args: DPTrainingArguments) -> dict[str, Any]:
    """The values of `PLANNED`."""
    return {name: getattr(args, name) for name in PLANNED}


def steps_per_epoch(num_examples: int, expected_batch_size: int) -> int:
    """Steps in which as many units as the dataset has are drawn, in expectation."""
    return math.ceil(num_examples / expected_batch_size)


def steps_in(num_epochs: float, num_examples: int, expected_batch_size: int) -> int:
    """T of `num_epochs` epochs, by the rule of the `Trainer`. Raises `ValueError` for no positive, finite number of
    epochs or steps."""
    if expected_batch_size < 1:
        raise ValueError(
            f"expected_batch_size={expected_batch_size!r} is not possible: expected a whole number of at least 1."
        )
    if not (num_epochs > 0 and num_epochs * num_examples < math.inf):
        raise ValueError(f"num_epochs={num_epochs:g} is not possible: it must be positive and finite.")
    return math.ceil(num_epochs * steps_per_epoch(num_examples, expected_batch_size))


def num_steps(args: DPTrainingArguments, num_examples: int) -> int:
    """T, by `max_steps` or by the number of epochs."""
    if args.max_steps > 0:
        return args.max_steps
    return steps_in(args.num_train_epochs, num_examples, args.expected_batch_size)
