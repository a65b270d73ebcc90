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
# What it adds to ε goes with the square of its width relative to the deviation of one step's loss.
WIDEST_INTERVAL, NARROWEST_INTERVAL = 1e-3, 1e-4
INTERVALS_PER_DEVIATION = 40

# Privacy losses up to which a distribution of them is computed: beyond, it takes minutes and gigabytes, and ε is near
# a thousand or beyond it.
LARGEST_LOSS = 500

# δ below which what rounding adds to a distribution of privacy losses shows, at all and for each of its steps: its ε
# would be too small.
SMALLEST_PLD_DELTA, SMALLEST_PLD_DELTA_PER_STEP = 1e-9, 1e-13

# Calibration accepts any σ whose ε lands in this share of the target, never above it.
ACCEPTED_SHARE = (0.992, 1.0)
AIMED_SHARE = 0.997
MAX_EVALUATIONS = 100
# Noise so large that all of RDP's ε comes from δ.
NOISE_AT_THE_FLOOR = 1e4


def dp_event(sampling_probability: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """The event that `steps` optimizer steps amount to, for any accountant of `dp_accounting`."""
    one_step = dp_accounting.PoissonSampledDpEvent(
        sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    return dp_accounting.SelfComposedDpEvent(one_step, steps)


def typical_loss(sampling_probability: float, noise_multiplier: float, steps: int) -> float:
    """How large the privacy loss gets, about: that of one step for a record that is drawn, and the mean of all steps.

    The mean is at most q times that of a step without sampling, and at most the chi-square divergence of a step.
    """
    drawn = 0.5 / noise_multiplier / noise_multiplier
    return drawn + steps * min(sampling_probability * drawn, _chi_square(sampling_probability, noise_multiplier))


def smallest_pld_delta(steps: int) -> float:
    """δ down to which distributions of privacy losses give an upper bound on ε, in float64: 1e-9 for 10,000 steps, and
    in proportion for more. Found by comparison with the exact ε of T Gaussians without sampling."""
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
        interval (`float`, *optional*): grid width of the privacy loss distribution; by default one whose cost in ε is
            below 0.1 %, where the narrowest allows that. `"rdp"` has none.
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

    All steps are composed by privacy loss distributions, on the finest grid that any of them asks for; for δ below
    [`smallest_pld_delta`] by RDP.
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

    RDP finds the neighbourhood, PLD on the widest grid narrows it, and one or two evaluations of the PLD that also
    reports ε, the only one that decides, finish. Raises `ValueError` if no σ can be found.
    """

    def solve(name: str, interval: float | None, target: float, start: float, slope: float) -> tuple[float, float]:
        def epsilon_of(sigma: float) -> float:
            return epsilon(sampling_probability, sigma, steps, target_delta, name, interval)

        return _solve(epsilon_of, target, start, slope)

    if accountant == "rdp":
        return solve("rdp", None, target_epsilon, 1.0, -1.5)[0]
    # RDP does not get below a floor, which grows as δ falls.
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
    """The chi-square divergence of one step, q² (exp(1/σ²) - 1), as far as floating point goes."""
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
    """`sigma` if it lies in the bracket, which ends at four times its beginning where it is open; else a number that
    does."""
    limit = 4 * low if high == math.inf else high
    if low < sigma < limit:
        return sigma
    if high == math.inf:
        return limit
    return math.sqrt(low * high) if low > 0 else high / 4


@contextmanager
def _without_order_warnings():
    """RDP may leave out orders that do not converge, which only makes ε larger; absl warns of each, by name."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
