"""What values the arguments of a private training may have."""

import math
import os
from typing import TYPE_CHECKING, Any

from .privacy.accounting import ACCOUNTANTS
from .privacy.plan import CLIPPINGS, is_positive, is_whole


if TYPE_CHECKING:
    from .arguments import DPTrainingArguments

# Arguments that count something.
WHOLE_NUMBERS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "microbatch_size",
    "public_negatives_steps",
    "max_records_per_unit",
)
# Those of them that may be left unset.
OPTIONAL = ("microbatch_size", "max_records_per_unit")
# Exactly one of these says how much noise there is.
NOISE = ("target_epsilon", "noise_multiplier")
# Arguments that are True or False; names, which may be left unset.
YES_OR_NO = (
    "vectorized",
    "static_shapes",
    "public_negatives_gradient",
    "secure_noise",
    "non_private",
    "log_private_statistics",
)
NAMES = ("privacy_unit_column", "ledger_dataset")


def check_values(args: "DPTrainingArguments") -> None:
    """Raises `ValueError` for the first argument with a value that is not possible, by itself or beside the others."""
    _check_types(args)
    _check_noise(args)
    _check_mechanism(args)
    _check_length(args)
    _check_microbatch_size(args)


def _check_types(args: "DPTrainingArguments") -> None:
    """Raises `ValueError` for values of another type, such as numbers and text from a YAML file."""
    for name in YES_OR_NO:
        value = getattr(args, name)
        if not isinstance(value, bool) and not (name == "static_shapes" and value is None):
            raise ValueError(f"{name}={value!r} is not possible: it must be True or False.")
    for name in NAMES:
        value = getattr(args, name)
        if not isinstance(value, str | None):
            raise ValueError(f"{name}={value!r} is not possible: it must be text (in quotes), or left out.")
    if not isinstance(args.ledger_path, str | os.PathLike | None):
        raise ValueError(
            f"ledger_path={args.ledger_path!r} is not possible: it must be the path of a file, e.g. "
            "'ledgers/scans.jsonl', or left out."
        )


def _check_noise(args: "DPTrainingArguments") -> None:
    if args.non_private and not (args.target_epsilon is None and not args.noise_multiplier):
        raise ValueError(
            "non_private=True trains without noise, so it cannot be combined with target_epsilon or "
            "noise_multiplier: remove one or the other."
        )
    if not args.non_private and (args.target_epsilon is None) == (args.noise_multiplier is None):
        given = "neither" if args.target_epsilon is None else "both"
        raise ValueError(
            f"{given} of target_epsilon and noise_multiplier given: set exactly one, e.g. target_epsilon=3.0. "
            "(non_private=True trains without any noise.)"
        )
    for name in NOISE:
        _check_positive(name, None if args.non_private else getattr(args, name))
    if args.noise_seed is not None and not (is_whole(args.noise_seed) and args.noise_seed >= 0):
        raise ValueError(
            f"noise_seed={args.noise_seed!r} is not possible: it must be a whole number of at least 0, or, for a "
            f"private run, unset.{_type_hint(args.noise_seed)}"
        )
    if args.secure_noise and (args.non_private or args.noise_seed is not None):
        raise ValueError(
            "secure_noise=True cannot be combined with non_private=True or noise_seed, with which there is no "
            "secret noise: remove one or the other."
        )
    _check_positive("ledger_epsilon", args.ledger_epsilon)
    # The plan, which knows n, checks whether a number is small enough.
    _check_positive("target_delta", None if isinstance(args.target_delta, int | float) else args.target_delta)


def _check_mechanism(args: "DPTrainingArguments") -> None:
    if args.max_grad_norm is None:
        raise ValueError("max_grad_norm=None is not possible: it bounds the gradient of a microbatch, e.g. 1.0.")
    _check_positive("max_grad_norm", args.max_grad_norm)
    _check_positive("learning_rate", args.learning_rate)
    for name in WHOLE_NUMBERS:
        value = getattr(args, name)
        if not ((is_whole(value) and value >= 1) or (name in OPTIONAL and value is None)):
            hint = _type_hint(value)
            raise ValueError(f"{name}={value!r} is not possible: it must be a whole number of at least 1.{hint}")
    if args.max_records_per_unit is not None and args.privacy_unit_column is None:
        raise ValueError(
            "max_records_per_unit is set, but a unit is a single record: name the column of its ids with "
            "privacy_unit_column, or remove it."
        )
    for name, choices in {"clipping": CLIPPINGS, "accountant": ACCOUNTANTS}.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name}={getattr(args, name)!r} is not known: choose one of {', '.join(choices)}.")


def _check_length(args: "DPTrainingArguments") -> None:
    epochs, steps = args.num_train_epochs, args.max_steps
    if steps == 0 and is_positive(epochs):
        raise ValueError(f"max_steps=0 takes no step: set max_steps to -1 for num_train_epochs={epochs!r}.")
    if not is_whole(steps) or (steps <= 0 and not is_positive(epochs)):
        raise ValueError(
            f"num_train_epochs={epochs!r} and max_steps={steps!r} give no number of steps: set max_steps to a "
            "whole number, or num_train_epochs to a positive, finite number."
            f"{_type_hint(steps) or _type_hint(epochs)}"
        )


def _check_microbatch_size(args: "DPTrainingArguments") -> None:
    """To be called when the number of processes is known."""
    size, batch, total = args.microbatch_size, args.per_device_train_batch_size, args.expected_batch_size
    if size is None or batch % size == 0:
        return
    if size < batch:
        raise ValueError(
            f"microbatch_size={size} does not divide per_device_train_batch_size={batch}: choose a divisor of it, "
            f"or raise per_device_train_batch_size to a multiple of {size}."
        )
    if size % batch:
        raise ValueError(
            f"microbatch_size={size} is computed in chunks of per_device_train_batch_size={batch}: choose a "
            f"multiple of {batch}."
        )
    if total % size:
        passes = size // math.gcd(size, batch * args.world_size)
        raise ValueError(
            f"microbatch_size={size} does not divide the expected batch size {total}: choose a divisor of it, or "
            f"set gradient_accumulation_steps={passes} or a multiple of that."
        )


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not is_positive(value):
        hint = _type_hint(value)
        if value == 0 and name in NOISE:
            hint = " (Training without noise takes non_private=True.)"
        raise ValueError(f"{name}={value!r} is not possible: it must be positive and finite.{hint}")


def _type_hint(value: Any) -> str:
    """Says what is wrong with a value that is not a Python number, such as text or a numpy number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ""
    in_yaml = ", or 1.0e-5 in YAML, where 1e-5 is text" if isinstance(value, str) and "e-" in value else ""
    return f" (It is of type {type(value).__name__}: give a Python number{in_yaml}.)"
