"""Linear encoders on a spiked covariance model: one private run, and the error that `docs/theory.md` predicts."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from hf_dpclip.gradients.products import added
from hf_dpclip.privacy import GaussianMechanism, PoissonSampler, PrivacyPlan, Randomness


# The model: x = mean + U z + τ ξ on both sides, with the same z ~ N(0, λ I) of r coordinates, λ = 1.
RANK = 2
TAU = 0.3
NUM_PUBLIC_PAIRS = 1000
# The descent: α of the loss, η, the sine of the angle at which the public start lies to the truth.
ALPHA = 1.0
LEARNING_RATE = 0.004
START_SINE = 0.5
# The privacy: ν = B / n, δ, and the constant of the paper's noise, which it leaves open.
SAMPLING_PROBABILITY = 0.005
DELTA = 1e-6
PAPER_CONSTANT = 1.0


@dataclass(frozen=True)
class Arm:
    """One way to make descent private.

    Args:
        name (`str`): for the table and the figure.
        color (`str`): in the figure.
        microbatch_size (`int`, *optional*): pairs clipped together; all of the batch by default.
        max_grad_norm (`float`, *optional*, defaults to 1.0): C.
        paper_noise (`bool`, *optional*, defaults to `False`): the standard deviation that the paper states, not the
            one that the accountant asks for.
    """

    name: str
    color: str
    microbatch_size: int | None = None
    max_grad_norm: float = 1.0
    paper_noise: bool = False


PAPER = Arm("per batch, the paper's noise", "tab:purple", paper_noise=True)
BATCH = Arm("per batch", "tab:red")
MICROBATCHES = Arm("microbatches of 32", "tab:blue", microbatch_size=32)
PAIRS = Arm("single pairs, public means", "tab:green", microbatch_size=1, max_grad_norm=5.0)


@dataclass(frozen=True)
class Setting:
    """One point of a sweep. ε = ∞ is the same arm without noise."""

    arm: Arm
    num_examples: int = 25_600
    epsilon: float = math.inf
    num_steps: int = 2000
    dimension: int = 10

    @property
    def without_noise(self) -> "Setting":
        return replace(self, epsilon=math.inf, arm=BATCH if self.arm.paper_noise else self.arm)

    @property
    def private(self) -> bool:
        return self.epsilon < math.inf

    @cached_property
    def plan(self) -> PrivacyPlan:
        """The contract of this run. That of the paper's noise costs far more than `epsilon`: see `plan.epsilon()`."""
        batch_size = round(SAMPLING_PROBABILITY * self.num_examples)
        fields = {
            "num_examples": self.num_examples,
            "expected_batch_size": batch_size,
            "num_microbatches": batch_size // (self.arm.microbatch_size or batch_size),
            "num_steps": self.num_steps,
            "max_grad_norm": self.arm.max_grad_norm,
            "target_delta": DELTA,
        }
        if not self.private:
            return PrivacyPlan(**fields, noise_multiplier=0.0, non_private=True)
        if not self.arm.paper_noise:
            return PrivacyPlan.calibrate(**fields, target_epsilon=self.epsilon)
        return PrivacyPlan(**fields, noise_multiplier=self.paper_noise_multiplier / 2, accountant="rdp")

    @property
    def paper_noise_multiplier(self) -> float:
        """The paper's σ, to which C is its unit; in this library's it is Δ = 2C."""
        noise = math.sqrt(self.num_steps * math.log(1 / DELTA))
        return PAPER_CONSTANT * noise / (self.num_examples * self.epsilon)


class SpikedPairs:
    """Pairs with a common latent vector, in subspaces that are to be found.

    Args:
        num_examples, dimension (`int`): n, and d of both sides.
        seed (`int`): of the subspaces, the means, the public pairs, the start and the n private pairs, in that order.
    """

    def __init__(self, num_examples: int, dimension: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        frames = [torch.linalg.qr(self._normal(dimension, 2 * RANK)).Q for _ in range(2)]
        self.subspaces = [frame[:, :RANK] for frame in frames]
        self.means = [self._normal(dimension) / math.sqrt(dimension) for _ in range(2)]
        self.public_means = [side.mean(dim=0) for side in self._draw(NUM_PUBLIC_PAIRS)]
        self.start = [self._encoder(frame) for frame in frames]
        self.pairs = self._draw(num_examples)

    def _draw(self, count: int) -> list[Tensor]:
        latent = self._normal(count, RANK)
        sides = zip(self.subspaces, self.means)
        return [mean + latent @ space.T + TAU * self._normal(count, len(space)) for space, mean in sides]

    def _encoder(self, frame: Tensor) -> Tensor:
        """Of the minimizer's size, with its rows at the angle of `START_SINE` to the truth, as after pre-training."""
        truth, elsewhere = frame.split(RANK, dim=1)
        rows = math.sqrt(1 - START_SINE**2) * truth + START_SINE * elsewhere
        return rows.T.contiguous() / math.sqrt(ALPHA)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def error(self, encoders: list[Tensor]) -> float:
        """Root mean square of the sines of the principal angles between rows and truth, over both encoders."""
        bases = [torch.linalg.qr(encoder.T).Q for encoder in encoders]
        shared = [(basis.T @ space).square().sum() / RANK for basis, space in zip(bases, self.subspaces)]
        return math.sqrt(max(0.0, 1 - float(sum(shared)) / 2))


@torch.no_grad()
def simulate(setting: Setting, seed: int) -> float:
    """The error of the encoders after T private steps."""
    plan, data = setting.plan, SpikedPairs(setting.num_examples, setting.dimension, seed)
    encoders = [Parameter(encoder) for encoder in data.start]
    randomness = Randomness(seed)
    sampler = PoissonSampler(plan, randomness.sampling())
    # One stream of noise is plenty for so few parameters.
    mechanism = GaussianMechanism(plan, encoders, randomness.noise()[:1])
    for _ in range(setting.num_steps):
        add_clipped(mechanism, microbatch_gradients(encoders, data, sampler.draw(), plan))
        mechanism.release()
        for encoder in encoders:
            encoder.sub_(LEARNING_RATE * encoder.grad)
    return data.error(encoders)


def add_clipped(mechanism: GaussianMechanism, gradients: list[Tensor]) -> None:
    norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)

    def weighted_sum(factors: Tensor, totals: list[Tensor | None]) -> list[Tensor]:
        sums = (torch.tensordot(factors, gradient, dims=1) for gradient in gradients)
        return [added(total, each) for total, each in zip(totals, sums)]

    mechanism.add(norms, weighted_sum)


def microbatch_gradients(
    encoders: list[Tensor], data: SpikedPairs, microbatches: list[np.ndarray], plan: PrivacyPlan
) -> list[Tensor]:
    """Gradients of -tr(G1 S_j G2^T) + α/2 ||G1^T G2||² for all microbatches j at once, S_j their cross-covariances.

    A single pair has no covariance of its own and is centred at public means. Returns `[k, r, d]` for each encoder,
    zero for empty microbatches.
    """
    sizes = torch.tensor([len(units) for units in microbatches])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    units = torch.from_numpy(np.concatenate(microbatches)) if microbatches else labels
    sides = [side[units] for side in data.pairs]
    if plan.one_unit_per_microbatch:
        sides = [side - mean for side, mean in zip(sides, data.public_means)]
        weights = torch.ones(len(units))
    else:
        sides = [side - _sums(side, labels, len(sizes))[labels] / sizes[labels, None] for side in sides]
        weights = 1 / (sizes[labels] - 1).clamp(min=1)
    present = (sizes > 0)[:, None, None]
    gradients = []
    for this, other in ((0, 1), (1, 0)):
        encoded = weights[:, None] * (sides[other] @ encoders[other].T)
        pull = _sums(encoded[:, :, None] * sides[this][:, None, :], labels, len(sizes))
        push = ALPHA * encoders[other] @ encoders[other].T @ encoders[this]
        gradients.append(present * (push - pull))
    return gradients


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, labels, values)


class Prediction(NamedTuple):
    """The three terms of the error, whose squares add up; `docs/theory.md` derives them."""

    optimisation: float
    statistics: float
    privacy: float

    @property
    def total(self) -> float:
        return math.hypot(*self)


def predict(setting: Setting) -> Prediction:
    """For errors far below those of random encoders, and gradients that are seldom clipped near the minimum."""
    n, plan, outside = setting.num_examples, setting.plan, setting.dimension - RANK
    start = START_SINE / math.sqrt(1 - START_SINE**2)
    sampling = 1 / n + LEARNING_RATE / (2 * plan.expected_batch_size)
    noise = plan.noise_std / plan.num_microbatches
    return Prediction(
        optimisation=start * (1 - LEARNING_RATE) ** setting.num_steps,
        statistics=math.sqrt(outside * sampling * TAU**2 * (1 + TAU**2)),
        privacy=noise * math.sqrt(outside * ALPHA * LEARNING_RATE / 2),
    )


def random_error(setting: Setting) -> float:
    """The error of encoders that know nothing of the data."""
    return math.sqrt(1 - RANK / setting.dimension)
