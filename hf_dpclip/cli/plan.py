"""`hf-dpclip plan`: the noise, the ε and the signal of a run, before any of it is spent.

```bash
hf-dpclip plan --num-examples 60000 --expected-batch-size 1024 --num-epochs 6 --num-microbatches 128 \\
    --target-epsilon 3 --target-delta 1e-5 --num-parameters 250000
```
"""

import argparse
import json
from pathlib import Path

from .tables import print_table


SUMMARY = "Noise, epsilon and signal of a run before it starts."

# ε is shown after these epochs, and after all of them.
SHOWN_EPOCHS = (1, 2, 3, 4, 5, 10, 20, 50, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--num-examples", type=int, required=True, metavar="N", help="number of privacy units, n")
    parser.add_argument(
        "--expected-batch-size", type=int, required=True, metavar="B", help="expected units per step, over all devices"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--num-epochs", type=float, metavar="EPOCHS")
    length.add_argument("--num-steps", type=int, metavar="T")
    noise = parser.add_mutually_exclusive_group(required=True)
    noise.add_argument("--target-epsilon", type=float, metavar="EPSILON", help="noise is calibrated to it")
    noise.add_argument("--noise-multiplier", type=float, metavar="SIGMA", help="noise deviation / sensitivity")
    parser.add_argument("--target-delta", type=float, metavar="DELTA", help="below 1/n (default: n**-1.1)")
    clipped = parser.add_mutually_exclusive_group()
    clipped.add_argument(
        "--num-microbatches",
        type=int,
        metavar="K",
        help="gradients clipped per step (default: 1, the whole batch; B: every unit by itself)",
    )
    clipped.add_argument("--microbatch-size", type=int, metavar="UNITS", help="the same as B / K, as in training")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, metavar="C", help="clipping norm (default: 1)")
    parser.add_argument("--accountant", default="pld", metavar="pld|rdp", help="default: pld, the tight one")
    parser.add_argument("--num-parameters", type=int, metavar="D", help="trainable parameters, for signal and advice")
    parser.add_argument("--json", action="store_true", help="print the plan and its epsilon as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="write the figure of epsilon against steps")


def run(arguments: argparse.Namespace) -> int:
    """Makes the plan and shows it. Returns 0."""
    if arguments.num_parameters is not None and arguments.num_parameters < 1:
        raise ValueError(f"--num-parameters {arguments.num_parameters} is not possible: give at least 1.")
    if arguments.num_examples < 2:
        raise ValueError(
            f"--num-examples {arguments.num_examples} is not possible: one unit among others is what is protected, so "
            "give at least 2."
        )
    if arguments.plot is not None:
        _check_plot(Path(arguments.plot))
    plan = _make_plan(arguments)
    if arguments.json:
        from ..privacy.plan import finite_or_none

        print(json.dumps({**plan.to_dict(), "epsilon": finite_or_none(plan.epsilon())}, indent=2))
    else:
        _show(plan, arguments.num_parameters)
    if arguments.plot:
        from ..figures import plot_epsilon

        plot_epsilon(plan, arguments.plot)
    return 0


def _check_plot(path: Path) -> None:
    """Raises `ValueError` for a figure that could not be written, before the plan is made."""
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: {path.parent} is no folder here: make it first, or name another.")
    if path.is_dir():
        raise ValueError(f"--plot {path} is a folder: name a file in it, e.g. {path / 'epsilon.png'}.")


def _make_plan(arguments: argparse.Namespace):
    from ..planning import steps_in
    from ..privacy import PrivacyPlan

    fields = {
        "num_examples": arguments.num_examples,
        "expected_batch_size": arguments.expected_batch_size,
        "num_microbatches": _num_microbatches(arguments),
        "num_steps": arguments.num_steps,
        "target_delta": arguments.target_delta,
        "max_grad_norm": arguments.max_grad_norm,
        "accountant": arguments.accountant,
    }
    if arguments.num_epochs is not None:
        fields["num_steps"] = steps_in(arguments.num_epochs, arguments.num_examples, arguments.expected_batch_size)
    if arguments.target_epsilon is not None:
        return PrivacyPlan.calibrate(target_epsilon=arguments.target_epsilon, **fields)
    return PrivacyPlan(noise_multiplier=arguments.noise_multiplier, **fields)


def _num_microbatches(arguments: argparse.Namespace) -> int:
    """K. Raises `ValueError` for a number or a size of microbatches that training would refuse."""
    batch_size = arguments.expected_batch_size
    if arguments.microbatch_size is not None:
        _check_divides("--microbatch-size", arguments.microbatch_size, batch_size)
        return batch_size // arguments.microbatch_size
    if arguments.num_microbatches is not None:
        _check_divides("--num-microbatches", arguments.num_microbatches, batch_size)
        return arguments.num_microbatches
    return 1


def _check_divides(option: str, number: int, batch_size: int) -> None:
    if number < 1 or batch_size % number:
        raise ValueError(
            f"{option} {number} does not divide --expected-batch-size {batch_size}: choose a positive number that "
            "does."
        )


def _show(plan, num_parameters: int | None) -> None:
    from ..advice import weak_promises
    from ..privacy_section import plan_rows

    rows = {**plan_rows(plan), **_epsilon_rows(plan)}
    if num_parameters is None:
        print_table("Privacy plan", rows)
        print("With --num-parameters (the trainable ones), it also says whether the noise leaves enough signal.")
    else:
        print_table("Privacy plan", {**rows, **_signal_rows(plan, num_parameters)})
        print(_verdict(plan, num_parameters))
    for weakness in weak_promises(plan, plan.epsilon()):
        print(f"WARNING: {weakness}")


def _epsilon_rows(plan) -> dict[str, str]:
    from ..planning import steps_per_epoch

    length = steps_per_epoch(plan.num_examples, plan.expected_batch_size)
    after = {epoch * length: f"ε after epoch {epoch:,}" for epoch in SHOWN_EPOCHS if epoch * length < plan.num_steps}
    after[plan.num_steps] = f"ε after all {plan.num_steps:,} steps ({plan.num_steps / length:.3g} epochs)"
    return {name: f"{plan.epsilon(steps):.4g} ({plan.accountant} accountant)" for steps, name in after.items()}


def _signal_rows(plan, num_parameters: int) -> dict[str, str]:
    from ..advice import total_signal_to_noise

    return {
        "trainable parameters d": f"{num_parameters:,}",
        "signal-to-noise ceiling of a step": f"{plan.signal_to_noise(num_parameters):.3g}",
        "signal-to-noise ceiling of all steps": f"{total_signal_to_noise(plan, num_parameters):.3g}",
    }


def _verdict(plan, num_parameters: int) -> str:
    from ..advice import HOPELESS_SIGNAL_TO_NOISE, advice, is_hopeless

    if is_hopeless(plan, num_parameters):
        return f"WARNING: {advice(plan, num_parameters)}"
    return (
        f"The signal ceiling of all steps is above {HOPELESS_SIGNAL_TO_NOISE:g}, below which a model hardly learns. "
        "How much it learns depends on how well the gradients agree."
    )
