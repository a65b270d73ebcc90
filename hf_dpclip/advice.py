"""Whether a plan leaves enough signal to learn from, and what to change where it does not."""

import math

from .privacy import PrivacyPlan


# If the signal of all steps together is below this share of their noise, training is mostly a random walk.
HOPELESS_SIGNAL_TO_NOISE = 0.3
# Beyond these, a guarantee says little.
LARGE_EPSILON, LARGE_DELTA = 10, 1e-3
# Sizes of a microbatch to advise, best first: fewer pairs have hardly any negatives, more have little signal.
ADVISED_SIZES = (8, 7, 6, 5, 4)


def total_signal_to_noise(plan: PrivacyPlan, num_parameters: int) -> float:
    """Ceiling of the signal-to-noise ratio of all steps: aligned signals grow by T, independent noise only by √T."""
    return plan.signal_to_noise(num_parameters) * math.sqrt(plan.num_steps)


def is_hopeless(plan: PrivacyPlan, num_parameters: int) -> bool:
    """Whether a model of `num_parameters` trainable parameters will hardly learn under this plan."""
    return total_signal_to_noise(plan, num_parameters) < HOPELESS_SIGNAL_TO_NOISE


def weak_promises(plan: PrivacyPlan, epsilon: float) -> list[str]:
    """Warnings about an (ε, δ) that guarantees little."""
    if plan.non_private:
        return []
    weak, unit = [], plan.privacy_unit
    if epsilon > LARGE_EPSILON:
        weak.append(
            f"ε = {epsilon:.4g} promises little: with it, what an attacker knows of one {unit} may change by a "
            "factor of e^ε. Up to 8 is usual, and below 1 is strong."
        )
    if plan.target_delta > LARGE_DELTA:
        weak.append(
            f"δ = {plan.target_delta:.3g} is the probability with which nothing is promised to one {unit}. "
            f"{plan.num_examples:,} privacy units are few; set target_delta to 1e-5, say, or gather more."
        )
    return weak


def advice(plan: PrivacyPlan, num_parameters: int) -> str:
    """What to change if noise drowns the signal, with the factor that each change gains."""
    gains = []
    size = _smaller_microbatch(plan.microbatch_size)
    if size is not None:
        gains.append(f"microbatch_size={size} (signal × {plan.microbatch_size / size:.3g})")
    if num_parameters > 1_000_000:
        gains.append(f"LoRA with 300,000 parameters (noise ÷ {math.sqrt(num_parameters / 3e5):.2g})")
    if plan.expected_batch_size < plan.num_examples:
        gains.append("a larger batch with the same microbatch_size (signal grows with it)")
    return (
        "noise drowns the signal in this plan; the model will hardly learn. Try "
        f"{', '.join(gains) or 'a larger ε, or gather more records'}."
    )


def _smaller_microbatch(size: float) -> int | None:
    """For microbatches larger than any of `ADVISED_SIZES`, one into which they can be divided. Training accepts it."""
    return next((smaller for smaller in ADVISED_SIZES if size > max(ADVISED_SIZES) and size % smaller == 0), None)
