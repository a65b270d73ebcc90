"""What several runs on the same records spend together."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import accounting
from .plan import PrivacyPlan, PrivacySpent


# Several runs on the same records: each run's plan and the steps that it took.
Runs = Sequence[tuple[PrivacyPlan, int]]
# The same, by run id.
NamedRuns = Mapping[str, tuple[PrivacyPlan, int]]


@dataclass(frozen=True)
class RunRecord:
    """What a ledger knows of one run, with all calls of `train` that continued it.

    Args:
        run (`str`): its id, which is in the `privacy.json` of its checkpoints too.
        time (`str`): when it began, ISO 8601.
        datasets (`tuple[str | None]`): the user's names for the records it was trained on; `None` if there was none.
        fingerprints (`tuple[str]`): of the datasets; equal for the same records.
        plan (`dict`): [`PrivacyPlan.to_dict`].
        not_private_because (`tuple[str]`): reasons why no guarantee holds.
        steps (`int`): noisy releases, or, after a crash, at most one block more than there were.
        reserved (`int`): steps that are still planned in a call of `train` that has not ended.
    """

    run: str
    time: str
    datasets: tuple[str | None, ...]
    fingerprints: tuple[str, ...]
    plan: dict[str, Any]
    not_private_because: tuple[str, ...]
    steps: int
    reserved: int

    @property
    def mechanism(self) -> tuple[float, float]:
        """(q, σ) of every step."""
        return self.plan["sampling_probability"], self.plan["noise_multiplier"]

    @property
    def epsilon(self) -> float:
        """ε of this run alone, at its own δ and by its own accountant; infinite if it was not private."""
        if self.not_private_because:
            return math.inf
        return accounting.epsilon(*self.mechanism, self.steps, self.plan["target_delta"], self.plan["accountant"])


@dataclass(frozen=True)
class Total:
    """What all runs on the same records spent together.

    Args:
        runs (`tuple` of [`RunRecord`]): the runs.
        delta (`float`): δ of the composition.
        epsilon_of_private_runs (`float`): ε of the steps of all private runs, composed by privacy loss distributions.
            Infinite if their privacy units differ, for which there is no common ε.

    Formal guarantees:
        The outputs of the private runs together are (ε, δ)-differentially private in the records: each step is a
        Poisson-subsampled Gaussian, and learning rates, models and the like may be chosen by looking at earlier runs.
        σ, q and the number of steps of each run are treated as fixed beforehand: where results decided on them, only
        the sum of ε at shares of δ ([`~privacy.composed`]) is proven.
    """

    runs: tuple[RunRecord, ...]
    delta: float
    epsilon_of_private_runs: float

    @property
    def dataset(self) -> str:
        """The name, or names, of the dataset."""
        names = dict.fromkeys(name for run in self.runs for name in run.datasets)
        return ", ".join(name or "(unnamed)" for name in names)

    @property
    def not_private_runs(self) -> tuple[RunRecord, ...]:
        """Runs whose output no ε bounds."""
        return tuple(run for run in self.runs if run.not_private_because)

    @property
    def epsilon(self) -> float:
        """ε of everything that was released: infinite as soon as one run was not private."""
        return math.inf if self.not_private_runs else self.epsilon_of_private_runs

    @property
    def privacy_units(self) -> tuple[str, ...]:
        """The privacy units of the private runs. Different ones have no common ε."""
        return _privacy_units(self.runs)


def composed(runs: Runs) -> PrivacySpent:
    """What several runs on the same records cost together.

    If all runs have one mechanism (σ and q), it is taken as fixed beforehand, and they compose as their steps do.
    Otherwise results of the earlier runs may have decided on it: each run then gets an equal share of δ, the smallest
    of all, and the values of ε are added up, which holds for mechanisms chosen that way too. Raises `ValueError` for
    different privacy units, which have no common ε.

    Reference: Rogers et al., Privacy Odometers and Filters: Pay-as-you-Go Composition (2016).
    """
    runs = [(plan, steps) for plan, steps in runs if steps] or runs[-1:]
    plans, total = [plan for plan, _ in runs], sum(steps for _, steps in runs)
    units = {plan.privacy_unit for plan in plans}
    if len(units) > 1:
        raise ValueError(f"runs with different privacy units, {' and '.join(sorted(units))}, have no common ε.")
    delta = min(plan.target_delta for plan in plans)
    if len({(plan.sampling_probability, plan.noise_multiplier, plan.accountant) for plan in plans}) == 1:
        return PrivacySpent(_epsilon(plans[0], total, delta), delta, total)
    return PrivacySpent(sum(_epsilon(plan, steps, delta / len(runs)) for plan, steps in runs), delta, total)


def _epsilon(plan: PrivacyPlan, steps: int, delta: float) -> float:
    """ε at a share of δ: by RDP where that is too small for privacy loss distributions."""
    accountant = plan.accountant if delta >= accounting.smallest_pld_delta(steps) else "rdp"
    return accounting.epsilon(plan.sampling_probability, plan.noise_multiplier, steps, delta, accountant)


def merge_runs(*several: NamedRuns) -> dict[str, tuple[PrivacyPlan, int]]:
    """All runs, each once, with the largest number of steps that any of the mappings has for it."""
    runs: dict[str, tuple[PrivacyPlan, int]] = {}
    for some in several:
        for run, (plan, steps) in some.items():
            _, before = runs.get(run, (plan, 0))
            runs[run] = plan, max(before, steps)
    return runs


def totals(runs: Iterable[RunRecord], delta: float | None = None) -> list[Total]:
    """One total for the runs on each dataset, at `delta` (*optional*, defaults to the smallest δ of these runs).

    Runs are on the same dataset if they share a name, a fingerprint, or the lack of a name, directly or through other
    runs: when in doubt, they add up. Raises `ValueError` unless δ is between 0 and 1.
    """
    if delta is not None and not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} is not possible: it must be between 0 and 1, e.g. 1e-5.")
    return [_total(group, delta) for group in _by_dataset(runs)]


def _total(runs: Sequence[RunRecord], delta: float | None) -> Total:
    delta = delta or min(run.plan["target_delta"] for run in runs)
    steps: Counter[tuple[float, float]] = Counter()
    for run in runs:
        if not run.not_private_because:
            steps[run.mechanism] += run.steps
    epsilon = math.inf if len(_privacy_units(runs)) > 1 else accounting.composed_epsilon(steps, delta)
    return Total(tuple(runs), delta, epsilon)


def _privacy_units(runs: Iterable[RunRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.plan["privacy_unit"] for run in runs if not run.not_private_because))


def _by_dataset(runs: Iterable[RunRecord]) -> list[list[RunRecord]]:
    groups: list[list[RunRecord]] = []
    for run in runs:
        joined = [group for group in groups if any(_same_records(run, other) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(other for group in joined for other in group), run])
    return groups


def _same_records(first: RunRecord, second: RunRecord) -> bool:
    return not set(first.datasets).isdisjoint(second.datasets) or not set(first.fingerprints).isdisjoint(
        second.fingerprints
    )
