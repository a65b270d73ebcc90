"""Audit of a whole run by canaries in that one run (Steinke, Nasr, Jagielski 2023).

Each canary is in the run or not by a fair coin of its own. Afterwards the adversary guesses the coins of those
canaries about which it is surest, and the number of right guesses bounds ε from below.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..trainer import DPCLIPTrainer
from .bounds import one_run_lower_bound
from .mistakes import PresentUnits


# Of all canaries, about how many the adversary guesses; the best of these bounds is reported, each at its share of the
# significance.
GUESS_SHARES = (1.0, 0.5, 0.2, 0.1)
# Length of the step in weight space over which losses are compared.
DIFFERENCE = 0.01

# From a model to the loss on each canary, `[canaries]`.
Losses = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Canaries:
    """Which records are canaries, and which of these are in the run.

    Args:
        units (`np.ndarray` of shape `[canaries]`): their numbers in the training dataset.
        included (`np.ndarray` of `bool`): the coins.
    """

    units: np.ndarray
    included: np.ndarray

    @classmethod
    def toss(cls, units: np.ndarray) -> "Canaries":
        """With coins from the operating system's entropy, which nobody can know beforehand."""
        return cls(units, np.random.default_rng().random(len(units)) < 0.5)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """A trainer that is trained inside runs without the canaries whose coin says so."""
        sampler = partial(PresentUnits, missing=self.units[~self.included])
        with patch("hf_dpclip.trainer.PoissonSampler", sampler):
            yield


class WhiteBox(TrainerCallback):
    """The adversary who sees every release: how far each points along the gradient of each canary's loss.

    That is the derivative of the loss in the direction of the release, taken as a central difference, so that no
    canary's gradient has to be computed by itself.

    Args:
        losses (`Callable`): from the model to the loss on each canary.
        every (`int`, *optional*): look at one release out of so many.
    """

    def __init__(self, losses: Losses, every: int = 1):
        self.losses = losses
        self.every = every
        self.scores: Tensor | float = 0.0

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights, releases = [p.clone() for p in parameters], [p.grad for p in parameters]
        norm = nn.utils.get_total_norm(releases)
        ahead, behind = (self._losses_at(model, parameters, releases, side * DIFFERENCE / norm) for side in (1, -2))
        torch._foreach_copy_(parameters, weights)
        self.scores = self.scores + (ahead - behind) / (2 * DIFFERENCE) * norm

    def _losses_at(self, model: nn.Module, parameters: list, releases: list, distance: Tensor) -> Tensor:
        torch._foreach_add_(parameters, [release * distance for release in releases])
        return self.losses(model)


@dataclass(frozen=True)
class RunAudit:
    """What one run let out.

    Args:
        claimed_epsilon, delta (`float`): what the trainer says that the run cost.
        white_box, black_box (`float`): lower bounds on ε, from all releases and from the final losses.
        white_box_accuracy, black_box_accuracy (`float`): share of right guesses if all coins are guessed.
        confidence (`float`): of each bound.
        canaries (`int`): how many there were.
    """

    claimed_epsilon: float
    delta: float
    white_box: float
    black_box: float
    white_box_accuracy: float
    black_box_accuracy: float
    confidence: float
    canaries: int

    @property
    def refuted(self) -> bool:
        """Whether a bound exceeds the claim, which happens to a true one with a probability of at most twice what
        either confidence leaves."""
        return max(self.white_box, self.black_box) > self.claimed_epsilon


def audit_run(
    trainer: DPCLIPTrainer, canaries: Canaries, losses: Losses, confidence: float = 0.999, every: int = 1
) -> RunAudit:
    """Trains, with the canaries whose coin says so, and guesses the coins.

    Args:
        trainer ([`DPCLIPTrainer`]): not yet trained; its dataset holds all canaries, those left out too.
        canaries ([`Canaries`]): which they are.
        losses (`Callable`): from a model to the loss on each canary.
        confidence (`float`, *optional*, defaults to 0.999): of each lower bound.
        every (`int`, *optional*): the white-box adversary looks at one release out of so many.

    Raises `ValueError` where canaries are not units of their own, and for fewer than two.
    """
    if len(canaries.units) < 2:
        raise ValueError(
            f"{len(canaries.units)} canaries are too few: one is said to be in, and another out. Give at least 2."
        )
    if trainer.args.privacy_unit_column is not None:
        raise ValueError("canaries are single records: audit the run without privacy_unit_column.")
    white_box = WhiteBox(losses, every)
    trainer.add_callback(white_box)
    with torch.no_grad():
        before = losses(trainer.model)
    with canaries.planted():
        trainer.train()
    with torch.no_grad():
        black_box = before - losses(trainer.model)
    spent = trainer.privacy_spent()
    scores = white_box.scores.double().cpu().numpy(), black_box.double().cpu().numpy()
    bounds = [best_bound(each, canaries.included, spent.delta, confidence) for each in scores]
    guesses = number_of_guesses(len(canaries.units), 1)
    accuracies = [correct_guesses(each, canaries.included, guesses) / guesses for each in scores]
    return RunAudit(spent.epsilon, spent.delta, *bounds, *accuracies, confidence, len(canaries.units))


def best_bound(scores: np.ndarray, included: np.ndarray, delta: float, confidence: float) -> float:
    """The best lower bound on ε over several numbers of guesses, with joint confidence.

    Args:
        scores (`np.ndarray` of shape `[canaries]`): larger ones speak for inclusion.
        included (`np.ndarray` of `bool`): the truth.
    """
    each = 1 - (1 - confidence) / len(GUESS_SHARES)
    guesses = {number_of_guesses(len(scores), share) for share in GUESS_SHARES}
    return max(
        one_run_lower_bound(len(scores), count, correct_guesses(scores, included, count), delta, each)
        for count in guesses
    )


def number_of_guesses(num_canaries: int, share: float) -> int:
    """About a share of the canaries, of which there are two or more: as many said to be in as out, and none to be
    both."""
    return 2 * max(1, math.floor(share * num_canaries / 2))


def correct_guesses(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """How many are right if the upper half of `guesses` is said to be in, the lower half out, and the rest left."""
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(np.sum(included[order[len(order) - half :]]) + np.sum(~included[order[:half]]))
