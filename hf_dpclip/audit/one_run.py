"""Audit of a whole run with canaries, in that one run (Steinke, Nasr, Jagielski 2023).

Each canary is in the run or not by a fair coin of its own. Afterwards the adversary guesses the coins of the canaries
about which it is surest, and the number of right guesses bounds ε from below.
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


# The shares of the canaries that are guessed. The best of the bounds is reported, so each gets its part of the
# significance.
GUESS_SHARES = (1.0, 0.5, 0.2, 0.1)
# Distance in weight space over which losses are compared.
DIFFERENCE = 0.01

# From a model to the loss on each canary, `[canaries]`.
Losses = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Canaries:
    """Which records are canaries, and which of them are in the run.

    Args:
        units (`np.ndarray` of shape `[canaries]`): their numbers in the training dataset.
        included (`np.ndarray` of `bool`): the coins.
    """

    units: np.ndarray
    included: np.ndarray

    @classmethod
    def toss(cls, units: np.ndarray) -> "Canaries":
        """Tosses the coins, with entropy from the operating system, so that nobody knows them beforehand."""
        return cls(units, np.random.default_rng().random(len(units)) < 0.5)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """A trainer that trains inside does so without the canaries that are not included."""
        sampler = partial(PresentUnits, missing=self.units[~self.included])
        with patch("hf_dpclip.trainer.PoissonSampler", sampler):
            yield


class WhiteBox(TrainerCallback):
    """The adversary who sees every release: how far each points along the gradient of each canary's loss.

    That is the derivative of the loss in the direction of the release, computed as a central difference, so that no
    gradient of a single canary is needed.

    Args:
        losses (`Callable`): from the model to the loss on each canary.
        every (`int`, *optional*): looks at every so-many-th release.
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
    """What one run leaked.

    Args:
        claimed_epsilon, delta (`float`): what the run cost, by the trainer itself.
        white_box, black_box (`float`): lower bounds on ε, from all releases, and from the final losses.
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
        """Whether a bound exceeds the claim. For a true claim, the probability of that is at most 2 · (1 -
        `confidence`)."""
        return max(self.white_box, self.black_box) > self.claimed_epsilon


def audit_run(
    trainer: DPCLIPTrainer, canaries: Canaries, losses: Losses, confidence: float = 0.999, every: int = 1
) -> RunAudit:
    """Trains with the canaries that are included, and guesses which they were.

    Args:
        trainer ([`DPCLIPTrainer`]): not yet trained; its dataset has all canaries, also those that are left out.
        canaries ([`Canaries`]): the canaries and their coins.
        losses (`Callable`): from a model to the loss on each canary.
        confidence (`float`, *optional*, defaults to 0.999): of each lower bound.
        every (`int`, *optional*): as in [`WhiteBox`].

    Raises `ValueError` if canaries are not privacy units of their own, and for fewer than two.
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
    """About a share of the canaries, of which there are at least two: an even number, since as many are guessed to be
    in the run as out of it."""
    return 2 * max(1, math.floor(share * num_canaries / 2))


def correct_guesses(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """How many guesses are right: the highest scores are guessed to be in the run, as many of the lowest out of it."""
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(np.sum(included[order[len(order) - half :]]) + np.sum(~included[order[:half]]))
