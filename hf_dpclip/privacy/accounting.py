"""From a noise multiplier to ε and back: a thin layer over `dp_accounting`.

One optimizer step is one Poisson-subsampled Gaussian mechanism, and T steps are its T-fold adaptive composition under
add-or-remove-one adjacency (`docs/privacy.md`, "The theorem").
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import lru_cache

import dp_accounting
from dp_accounting import pld, rdp


ADJACENCY = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
ACCOUNTANTS = ("pld", "rdp")

# Grid width of the privacy loss distribution. Every width gives an upper bound; a wider grid is faster and looser.
# What it adds to ε grows with the square of its width, relative to the standard deviation of one step's loss.
WIDEST_INTERVAL, NARROWEST_INTERVAL = 1e-3, 1e-4
INTERVALS_PER_DEVIATION = 40

# The largest privacy loss for which a distribution is computed. Beyond, that takes minutes and gigabytes, and ε is
# about a thousand or more.
LARGEST_LOSS = 500

# δ below which rounding errors in the privacy loss distribution make its ε too small: for any number of steps, and per
# step.
SMALLEST_PLD_DELTA, SMALLEST_PLD_DELTA_PER_STEP = 1e-9, 1e-13

# Calibration accepts any σ whose ε lands in this share of the target, never above it.
ACCEPTED_SHARE = (0.992, 1.0)
AIMED_SHARE = 0.997
MAX_EVALUATIONS = 100
# Noise so large that RDP's ε is its floor, which depends on δ alone.
NOISE_AT_THE_FLOOR = 1e4


def dp_event(sampling_probability: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """`steps` optimizer steps as an event that any accountant of `dp_accounting` can compose."""
    one_step = dp_accounting.PoissonSampledDpEvent(
        sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    return dp_accounting.SelfComposedDpEvent(one_step, steps)


def typical_loss(sampling_probability: float, noise_multiplier: float, steps: int) -> float:
    """About how large the privacy loss gets: one step in which the record is drawn, plus the mean of all steps.

    The mean of a step is at most q times that of a step without sampling, and at most its chi-square divergence.
    """
    drawn = 0.5 / noise_multiplier / noise_multiplier
    return drawn + steps * min(sampling_probability * drawn, _chi_square(sampling_probability, noise_multiplier))


def smallest_pld_delta(steps: int) -> float:
    """The smallest δ at which float64 privacy loss distributions give an upper bound on ε: 1e-9 up to 10,000 steps,
    and in proportion for more. Found by comparison with the exact ε of T Gaussians without sampling."""
    return max(SMALLEST_PLD_DELTA, SMALLEST_PLD_DELTA_PER_STEP * steps)


@lru_cache(maxsize=1024)
def epsilon(
    sampling_probability: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    interval: float | None = None,
) -> float:
    """Upper bound on ε after `steps` steps.

    Args:
        sampling_probability (`float`): q, in (0, 1].
        noise_multiplier (`float`): σ = noise standard deviation / sensitivity. 0 costs ε = ∞ from the first step on.
        steps (`int`): number of noisy releases; 0 costs nothing.
        delta (`float`): δ, in (0, 1).
        accountant (`str`): `"pld"` (tight, for δ of at least [`smallest_pld_delta`]) or `"rdp"`.
        interval (`float`, *optional*): grid width of the privacy loss distribution, which `"rdp"` does not use. By
            default it adds less than 0.1 % to ε, unless that took a width below `NARROWEST_INTERVAL`.
    """
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    interval = interval or _grid_width(sampling_probability, noise_multiplier)
    account = _account(accountant, interval)
    with _without_order_warnings():
        account.compose(dp_event(sampling_probability, noise_multiplier, steps))
        return float(account.get_epsilon(delta))


def composed_epsilon(steps: Mapping[tuple[float, float], int], delta: float) -> float:
    """Upper bound on ε of several runs on the same privacy units, whose plans may differ.

    Args:
        steps (`Mapping`): from (q, σ) to the number of steps that were taken with them.
        delta (`float`): δ of all runs together, in (0, 1).

    All steps are composed by privacy loss distributions, on the finest grid that any of them needs, or, for δ below
    [`smallest_pld_delta`], by RDP.
    """
    steps = {mechanism: count for mechanism, count in steps.items() if count > 0}
    if not steps:
        return 0.0
    if any(noise_multiplier == 0 for _, noise_multiplier in steps):
        return math.inf
    interval = min(_grid_width(*mechanism) for mechanism in steps)
    account = _account("pld" if delta >= smallest_pld_delta(sum(steps.values())) else "rdp", interval)
    with _without_order_warnings():
        for mechanism, count in steps.items():
            account.compose(dp_event(*mechanism, count))
        return float(account.get_epsilon(delta))


def calibrate_noise_multiplier(
    target_epsilon: float, target_delta: float, sampling_probability: float, steps: int, accountant: str = "pld"
) -> float:
    """A noise multiplier σ whose ε after `steps` steps lands in [0.992, 1.0] of `target_epsilon`.

    RDP gives a first σ, PLD on the widest grid a better one, and one or two evaluations of the PLD by which ε is also
    reported the last one. Raises `ValueError` if no σ can be found.
    """

    def solve(name: str, interval: float | None, target: float, start: float, slope: float) -> tuple[float, float]:
        def epsilon_of(sigma: float) -> float:
            return epsilon(sampling_probability, sigma, steps, target_delta, name, interval)

        return _solve(epsilon_of, target, start, slope)

    if accountant == "rdp":
        return solve("rdp", None, target_epsilon, 1.0, -1.5)[0]
    # RDP's ε has a floor, which rises as δ falls.
    floor = epsilon(sampling_probability, NOISE_AT_THE_FLOOR, steps, target_delta, "rdp")
    noise_multiplier, slope = solve("rdp", None, max(target_epsilon, 2 * floor), 1.0, -1.5)
    noise_multiplier, slope = solve("pld", WIDEST_INTERVAL, target_epsilon, noise_multiplier, slope)
    return solve("pld", None, target_epsilon, noise_multiplier, slope)[0]


def _account(accountant: str, interval: float) -> dp_accounting.PrivacyAccountant:
    if accountant == "rdp":
        return rdp.RdpAccountant(neighboring_relation=ADJACENCY)
    return pld.PLDAccountant(ADJACENCY, value_discretization_interval=interval)


def _grid_width(sampling_probability: float, noise_multiplier: float) -> float:
    """For a step's privacy loss log(1 - q + q exp((2x - 1) / 2σ²)), whose deviation is about q √(exp(1/σ²) - 1)."""
    deviation = math.sqrt(_chi_square(sampling_probability, noise_multiplier))
    return min(max(deviation / INTERVALS_PER_DEVIATION, NARROWEST_INTERVAL), WIDEST_INTERVAL)


def _chi_square(sampling_probability: float, noise_multiplier: float) -> float:
    """The chi-square divergence of one step, q² (exp(1/σ²) - 1), with 1/σ² capped so that it does not overflow."""
    return sampling_probability**2 * math.expm1(min(1 / noise_multiplier / noise_multiplier, 100.0))


def _solve(epsilon_of: Callable[[float], float], target: float, start: float, slope: float) -> tuple[float, float]:
    """Root search in log-log scale, where ε falls almost linearly in σ: secant steps, kept inside a bracket.

    Returns σ, and the slope for the next search.
    """
    low, high = 0.0, math.inf  # ε(low) is too large, ε(high) too small
    sigma, previous = start, None
    for _ in range(MAX_EVALUATIONS):
        value = max(epsilon_of(sigma), 1e-12)
        if previous is not None and math.isfinite(value) and previous[1] != value:
            slope = min(math.log(value / previous[1]) / math.log(sigma / previous[0]), -0.3)
        if ACCEPTED_SHARE[0] * target <= value <= ACCEPTED_SHARE[1] * target:
            return sigma, slope
        low, high = (sigma, high) if value > target else (low, sigma)
        if high < low * (1 + 1e-9):
            break
        previous = (sigma, value)
        sigma = _inside(low, high, sigma * (AIMED_SHARE * target / value) ** (1 / slope))
    raise ValueError(
        f"no noise_multiplier reaches target_epsilon={target:g} with these settings (last tried σ={sigma:.3g}). "
        "Choose a target_epsilon between 0.01 and 100, fewer steps, or set noise_multiplier yourself."
    )


def _inside(low: float, high: float, sigma: float) -> float:
    """`sigma` if it lies in the bracket, and else another number that does. A bracket without an upper end is taken to
    end at four times its lower one."""
    limit = 4 * low if high == math.inf else high
    if low < sigma < limit:
        return sigma
    if high == math.inf:
        return limit
    return math.sqrt(low * high) if low > 0 else high / 4


@contextmanager
def _without_order_warnings():
    """Silences absl, which warns of each order of RDP that does not converge. Leaving those out only raises ε."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
