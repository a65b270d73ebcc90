"""From an adversary's guesses to lower bounds on ε, each with a stated confidence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from scipy import stats


@dataclass(frozen=True)
class ErrorBounds:
    """Upper confidence bounds on how often the adversary is wrong.

    Args:
        false_positive (`float`): of guesses that the canary is present when it is absent.
        false_negative (`float`): of guesses that it is absent when it is present.
    """

    false_positive: float
    false_negative: float

    def epsilon(self, delta: float) -> float:
        """Lower bound on ε of any mechanism (Kairouz, Oh, Viswanath 2015): with an (ε, δ)-private one, no adversary
        has 1 - δ - FNR > e^ε · FPR, nor the same with FPR and FNR exchanged."""
        sides = (self.false_positive, self.false_negative), (self.false_negative, self.false_positive)
        odds = max((1 - delta - missed) / alarms for alarms, missed in sides)
        return math.log(max(odds, 1.0))

    def gaussian_epsilon(self, delta: float) -> float:
        """The same if a Gaussian mechanism is claimed (Nasr et al. 2023): such a mechanism of signal-to-noise ratio
        μ has Φ⁻¹(1 - FPR) - Φ⁻¹(FNR) ≤ μ for every adversary, and μ has an ε at every δ (Dong, Roth, Su 2022)."""
        mu = -stats.norm.ppf(self.false_positive) - stats.norm.ppf(self.false_negative)
        return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def upper_bound(events: int, trials: int, significance: float) -> float:
    """Clopper and Pearson's one-sided upper confidence bound on a probability.

    Args:
        events, trials (`int`): how often the event happened, in how many independent trials.
        significance (`float`): the probability that the bound is too low.
    """
    return 1.0 if events >= trials else float(stats.beta.ppf(1 - significance, events + 1, trials - events))


def lower_bounds(
    present: np.ndarray, absent: np.ndarray, thresholds: Sequence[float], delta: float, confidence: float
) -> tuple[float, float]:
    """Lower bounds on ε from the scores of independent plays: for any mechanism, and for a Gaussian one.

    Args:
        present, absent (`np.ndarray` of shape `[plays]`): scores; larger ones speak for the canary's presence.
        thresholds (`Sequence[float]`): above which the adversary guesses presence; chosen before the plays.
        delta (`float`): δ of the claim.
        confidence (`float`): with which all bounds hold together.

    Returns (Clopper-Pearson, Gaussian-DP), each at its best threshold.
    """
    significance = (1 - confidence) / (2 * len(thresholds))  # two error rates each
    errors = [
        ErrorBounds(
            upper_bound(int(np.sum(absent > threshold)), len(absent), significance),
            upper_bound(int(np.sum(present <= threshold)), len(present), significance),
        )
        for threshold in thresholds
    ]
    return max(each.epsilon(delta) for each in errors), max(each.gaussian_epsilon(delta) for each in errors)


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Probability of so many correct guesses if the run is (ε, δ)-private (Steinke, Nasr, Jagielski 2023, Corollary
    5.4): their number is dominated by Binomial(guesses, e^ε / (1 + e^ε)), up to a term for δ.

    Args:
        canaries (`int`): records, each of which was in the run or not by a fair coin of its own.
        guesses (`int`): canaries about which the adversary did not abstain.
        correct (`int`): guesses that were right.
    """
    law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    shortfall = np.arange(1, correct + 1)
    # P(correct - i ≤ Binomial < correct) / i, at its largest
    inflation = np.max((law.cdf(correct - 1) - law.cdf(correct - 1 - shortfall)) / shortfall, initial=0.0)
    return min(1.0, float(law.sf(correct - 1) + 2 * canaries * delta * inflation))


def one_run_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest ε that so many correct guesses refute with the given confidence; 0 if there is none.

    Arguments as for `one_run_p_value`.
    """

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
