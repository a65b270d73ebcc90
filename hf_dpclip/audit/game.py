"""The distinguishing game on one step: was the canary present or absent, judging by what the real trainer releases?

A game has a model whose gradient on each record can be chosen, so that the canary is a worst-case record.
`DPCLIPTrainer` trains it, one step per play, with its own sampler, gradients, clipping, noise and optimizer; before
each step the weights are reset, which makes all plays alike. The adversary sees the weights.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..arguments import DPTrainingArguments
from ..privacy import GaussianMechanism
from ..trainer import DPCLIPTrainer
from .bounds import lower_bounds
from .mistakes import PresentUnits


DELTA = 0.01
CONFIDENCE = 0.999
# Where Linux keeps files in memory: the ledgers of so many runs need not be on a disk.
MEMORY = "/dev/shm"


class ChosenGradients(nn.Module):
    """A model whose gradient on a microbatch is the sum of its records' `vector`s.

    Args:
        sizes (`Sequence[int]`): coordinates of each parameter tensor, together as many as those of a `vector`.
    """

    def __init__(self, *sizes: int):
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])

    def forward(self, vector):
        return {"loss": (vector @ torch.cat([*self.tensors])).sum()}


class ContrastiveTemperature(nn.Module):
    """CLIP's loss on given embeddings of images and texts. Only the temperature is trained."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(1))

    def forward(self, image, text):
        logits = self.logit_scale.exp() * image @ text.T
        own = torch.arange(len(logits))
        return {"loss": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2}


@dataclass(frozen=True)
class Game:
    """Records, some of which are canaries, and how the adversary scores a release.

    Args:
        model (`Callable`): makes the model.
        records (`list[dict]`): all records, the canaries among them.
        score (`Callable`): from the released sums of clipped gradients, `[plays, coordinates]`, to one number for each
            play; larger ones speak for the canary's presence.
        thresholds (`Sequence[float]`): above which the adversary guesses that it is present.
        plays (`int`): of each kind, with the canary and without it.
        canaries (`Sequence[int]`, *optional*, defaults to the last record): the records that are present or absent.
            Several canaries make one step several plays, if each has a coordinate for itself.
        settings (`dict`, *optional*): training arguments; by default every record takes part in every step, σ = 1.
        steps (`int`, *optional*, defaults to 1): steps of one play, whose releases the adversary adds up.
        resumed (`bool`, *optional*): whether the run is resumed from a checkpoint before the last of these steps.
        knows_noise (`bool`, *optional*): whether the adversary, who knows all other records and the seed, repeats the
            run without the canary and subtracts its release.
        delta (`float`, *optional*, defaults to 0.01): δ at which ε is claimed and bounded; with a small one, most of
            the claim is about events too rare to be seen in the plays.
    """

    model: Callable[[], nn.Module]
    records: list[dict[str, Tensor]]
    score: Callable[[Tensor], Tensor]
    thresholds: tuple[float, ...]
    plays: int
    canaries: tuple[int, ...] = (-1,)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    resumed: bool = False
    knows_noise: bool = False
    delta: float = DELTA

    def missing(self, present: bool) -> list[int]:
        """The units that are absent."""
        return [] if present else [canary % len(self.records) for canary in self.canaries]

    def arguments(self, folder: str, max_steps: int, accountant: str) -> DPTrainingArguments:
        """Plain gradient descent with learning rate 1, so that the weights show the release itself."""
        defaults = {
            "output_dir": folder,
            "max_steps": max_steps,
            "accountant": accountant,
            "target_delta": self.delta,
            "per_device_train_batch_size": len(self.records),
            "noise_multiplier": 1.0,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return DPTrainingArguments(**{**defaults, **self.settings})


@dataclass(frozen=True)
class Mechanism:
    """A mechanism to be audited, and the game by which it is.

    Args:
        name (`str`): for the command line.
        description (`str`): what it does.
        game ([`Game`]): has an adversary made for this mechanism.
        mechanism, sampler, trainer (`type`, *optional*): the parts that differ from the honest code.
    """

    name: str
    description: str
    game: Game
    mechanism: type[GaussianMechanism] = GaussianMechanism
    sampler: type[PresentUnits] = PresentUnits
    trainer: type[DPCLIPTrainer] = DPCLIPTrainer

    @property
    def honest(self) -> bool:
        parts = self.mechanism, self.sampler, self.trainer
        return parts == (GaussianMechanism, PresentUnits, DPCLIPTrainer)


@dataclass(frozen=True)
class StepAudit:
    """What the game showed.

    Args:
        mechanism (`str`): its name.
        claimed_epsilon (`float`): ε of one play by the trainer itself.
        clopper_pearson, gaussian_dp (`float`): lower bounds on ε, which hold jointly with the stated confidence.
        confidence, delta (`float`): of the bounds.
        plays (`int`): of each kind.
        gaussian (`bool`): whether the claim is that of a Gaussian mechanism without sampling, which the second bound
            refutes.
    """

    mechanism: str
    claimed_epsilon: float
    clopper_pearson: float
    gaussian_dp: float
    confidence: float
    delta: float
    plays: int
    gaussian: bool

    @property
    def epsilon_lower_bound(self) -> float:
        """The larger of the bounds that apply."""
        return max(self.clopper_pearson, self.gaussian_dp) if self.gaussian else self.clopper_pearson

    @property
    def refuted(self) -> bool:
        """Whether the claim is refuted."""
        return self.epsilon_lower_bound > self.claimed_epsilon

    def to_dict(self) -> dict[str, Any]:
        """What `hf-dpclip audit step --json` prints."""
        names = ("mechanism", "claimed_epsilon", "epsilon_lower_bound", "confidence", "delta")
        return {name: getattr(self, name) for name in names}


def audit_step(mechanism: Mechanism, confidence: float = CONFIDENCE) -> StepAudit:
    """Plays a mechanism's game.

    Args:
        mechanism ([`Mechanism`]): for example one of [`MECHANISMS`].
        confidence (`float`, *optional*, defaults to 0.999): with which the lower bounds hold.
    """
    game = mechanism.game
    present, absent = scores(mechanism, True), scores(mechanism, False)
    claim = claimed(mechanism)
    clopper_pearson, gaussian_dp = lower_bounds(present, absent, game.thresholds, game.delta, confidence)
    return StepAudit(
        mechanism.name,
        claim.privacy_spent().epsilon,
        clopper_pearson,
        gaussian_dp,
        confidence,
        game.delta,
        len(present),
        gaussian=claim.privacy_statement().plan.sampling_probability == 1,
    )


def claimed(mechanism: Mechanism) -> DPCLIPTrainer:
    """A trainer after one play without the canary, which knows what the play cost."""
    return _train(mechanism, False, mechanism.game.steps, accountant="pld")[1]


def scores(mechanism: Mechanism, present: bool) -> np.ndarray:
    """The adversary's scores, `[plays]`, with the canaries or without them."""
    game = mechanism.game
    rounds = game.plays // len(game.canaries)
    releases = _releases(mechanism, present, rounds * game.steps)
    if game.knows_noise:
        releases -= _releases(mechanism, False, rounds * game.steps)
    seen = releases.view(rounds, game.steps, -1).sum(dim=1)
    return game.score(seen).flatten().double().numpy()


def _releases(mechanism: Mechanism, present: bool, steps: int) -> Tensor:
    """`[steps, coordinates]`. A run that stops early released that, and a new one is started."""
    seen = []
    while len(seen) < steps:
        seen += _train(mechanism, present, steps - len(seen))[0]
    return torch.stack(seen)


def _train(
    mechanism: Mechanism, present: bool, steps: int, accountant: str = "rdp"
) -> tuple[list[Tensor], DPCLIPTrainer]:
    """The releases of one run, and its trainer."""
    game, recorder = mechanism.game, ReleaseRecorder()
    memory = MEMORY if os.path.isdir(MEMORY) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, planted(mechanism, game.missing(present)), quiet():
        args = game.arguments(folder, steps, accountant)
        trainer = mechanism.trainer(game.model(), args, train_dataset=game.records, callbacks=[recorder])
        try:
            trainer.train()
        except FloatingPointError:
            recorder.releases.append(torch.full_like(recorder.weights(trainer.model), torch.nan))
        if not game.resumed:
            return recorder.releases, trainer
        resumed = mechanism.trainer(game.model(), args, train_dataset=game.records, callbacks=[recorder])
        # Repeats the last step from the checkpoint before it, and drops the first attempt.
        del recorder.releases[-1]
        resumed.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{steps - 1}")))
        return recorder.releases, resumed


@contextmanager
def planted(mechanism: Mechanism, missing: list[int]) -> Iterator[None]:
    """Replaces the parts of `DPCLIPTrainer` by those of a mechanism, inside."""
    parts = {
        "GaussianMechanism": mechanism.mechanism,
        "PoissonSampler": partial(mechanism.sampler, missing=missing),
    }
    with patch.multiple("hf_dpclip.trainer", **parts):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the summaries and warnings of thousands of runs, inside."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class ReleaseRecorder(TrainerCallback):
    """Reads each step's release off the weights, and resets them to zero, where they began."""

    def __init__(self):
        self.releases: list[Tensor] = []

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        # Gradient descent subtracted the release divided by K.
        self.releases.append(-args.num_microbatches * self.weights(model))
        for parameter in model.parameters():
            parameter.zero_()

    @staticmethod
    def weights(model: nn.Module) -> Tensor:
        """All weights, as one vector."""
        return nn.utils.parameters_to_vector(model.parameters()).detach()
