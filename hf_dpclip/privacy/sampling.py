"""Who takes part in a step: Poisson sampling and microbatch labels."""

import numpy as np

from .plan import PrivacyPlan


class PoissonSampler:
    """Draws the microbatches of one step after another.

    Args:
        plan ([`PrivacyPlan`]): gives n, q and K.
        generator (`np.random.Generator`): the run's sampling stream. Processes that hold the same stream draw the same
            microbatches.

    Formal guarantees:
        Every unit joins a step independently of all others with probability q, and gets a uniform label in {1..K}
        independently of all others. Adding or removing one unit therefore changes neither the law of who else is drawn
        nor their labels, and units stand in ascending order, which stays that of the others: exactly one microbatch
        differs. Cutting the batch by position instead would shift all later microbatches, and sensitivity would grow
        with K.
    """

    def __init__(self, plan: PrivacyPlan, generator: np.random.Generator):
        self.plan = plan
        self.generator = generator

    def draw(self) -> list[np.ndarray]:
        """The microbatches of one step: ascending arrays of unit numbers in [0, n), some of them possibly empty.

        K arrays, or one array of length 1 per drawn unit where a microbatch is one unit by construction. Time and
        memory are O(batch) for any n.
        """
        units = self._draw_units()
        if self.plan.one_unit_per_microbatch:
            return list(units[:, None])
        labels = self.generator.integers(self.plan.num_microbatches, size=len(units))
        return split_by_label(units, labels, self.plan.num_microbatches)

    def draw_seeds(self, count: int) -> list[int]:
        """One seed per microbatch of a step, for whatever its model and data pipeline draw at random (dropout,
        augmentation). Given all seeds, the gradient of a microbatch depends on its own records only."""
        return self.generator.integers(2**32, size=count).tolist()

    def _draw_units(self) -> np.ndarray:
        """n independent coin flips of probability q, as a Binomial(n, q) count and a uniform subset of that size."""
        count = self.generator.binomial(self.plan.num_examples, self.plan.sampling_probability)
        units = self.generator.choice(self.plan.num_examples, size=count, replace=False, shuffle=False)
        # The set is uniform, but the order in which numpy finds it depends on n: a loss that looks at the order of its
        # records would tell of a unit that was not even drawn.
        return np.sort(units)


def split_by_label(values: np.ndarray, labels: np.ndarray, num_labels: int) -> list[np.ndarray]:
    """The values of each label from 0 to `num_labels` - 1, in the order in which they come."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=num_labels))
    return np.split(values[order], ends[:-1])
