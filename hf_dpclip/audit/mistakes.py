"""What published code gets wrong (`docs/privacy.md`, "Pitfalls"): variants of the mechanism, sampler and trainer.

Each is the honest code with one mistake, for the games of `zoo` and the tests to catch.
"""

import dataclasses
from collections.abc import Collection
from contextlib import contextmanager

import numpy as np
import torch

from ..privacy import GaussianMechanism, PoissonSampler, PrivacyStatement, clip_
from ..trainer import DPCLIPTrainer


# ---- Variants of the mechanism ----


class NoiseRelativeToC(GaussianMechanism):
    """σC on whole batches, whose sensitivity is 2C."""

    def _add_noise_(self, tensors):
        for values in tensors:
            values.add_(torch.empty_like(values).normal_(0, self.plan.noise_std / 2, generator=self.generators[0]))


class ClipsEachTensor(GaussianMechanism):
    """Every parameter tensor to norm C: the whole gradient has norm up to C·√P."""

    @contextmanager
    def microbatch(self):
        yield
        self._sum = self._take_gradients()
        for gradient in self._sum:
            clip_([gradient], self.plan)


class PublishedRecipe(NoiseRelativeToC, ClipsEachTensor):
    """The code of the Dp-CLIP paper: both of the above."""


class DividesByRealisedCount(GaussianMechanism):
    """Takes the mean over the microbatches that were drawn."""

    realised = 0

    def _take_gradients(self):
        gradients = super()._take_gradients()
        self.realised += any(gradient is not None for gradient in gradients)
        return gradients

    def release(self):
        super().release()
        for parameter in self.parameters:
            parameter.grad.mul_(self.plan.num_microbatches / max(self.realised, 1))
        self.realised = 0


class SkipsEmptyBatches(GaussianMechanism):
    """Adds no noise if there is no gradient."""

    def release(self):
        if any(total is not None for total in self._sum):
            super().release()
        else:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)


class LetsNaNPass(GaussianMechanism):
    """Clips without checking that the gradient is finite."""

    @contextmanager
    def microbatch(self):
        yield
        self._sum = self._take_gradients()
        for gradient in self._sum:
            gradient.mul_(self.plan.max_grad_norm / gradient.norm().clamp(min=self.plan.max_grad_norm))


class StopsOnNaN(LetsNaNPass):
    """Ends the run at bad data, which everyone sees."""

    def release(self):
        if any(total.isnan().any() for total in self._sum):
            raise FloatingPointError("the gradient is not a number")
        super().release()


class ReusesGeneratorState(GaussianMechanism):
    """The noise of each tensor starts from the same state."""

    def _add_noise_(self, tensors):
        state = self.generators[0].get_state()
        for values in tensors:
            self.generators[0].set_state(state)
            values.add_(torch.empty_like(values).normal_(0, self.plan.noise_std, generator=self.generators[0]))


class HalfPrecisionNoise(GaussianMechanism):
    """Noise in bfloat16, which has 128 values between two powers of two."""

    def _add_noise_(self, tensors):
        for values in tensors:
            noise = torch.empty_like(values, dtype=torch.bfloat16)
            values.copy_(values.bfloat16() + noise.normal_(0, self.plan.noise_std, generator=self.generators[0]))


class ScaledLoss(GaussianMechanism):
    """Noise is added to the gradients of a scaled loss: 1/1024 of it is left after unscaling."""

    scale = 1024

    def release(self):
        self._sum = [None if total is None else total * self.scale for total in self._sum]
        super().release()
        for parameter in self.parameters:
            parameter.grad.div_(self.scale)


class GlobalGenerator(GaussianMechanism):
    """Noise from the generator that `transformers` seeds with 42."""

    def _add_noise_(self, tensors):
        for values in tensors:
            values.add_(torch.randn_like(values), alpha=self.plan.noise_std)


class NoNoise(GaussianMechanism):
    """Neither target_epsilon nor noise_multiplier was given, which meant σ = 0; the claimed ε is that of the plan."""

    def _add_noise_(self, tensors):
        pass


# ---- Variants of the sampler ----


class PresentUnits(PoissonSampler):
    """The honest sampler on a dataset that lacks some of the plan's units.

    They are drawn as if they were present, and left out: the distribution of all other draws is that of a dataset
    without them, while n, q and everything else that is public stays the same.

    Args:
        missing (collection of `int`, *optional*): the units that are absent.
    """

    def __init__(self, plan, generator, missing: Collection[int] = ()):
        super().__init__(plan, generator)
        self.missing = list(missing)

    def _draw_units(self):
        return self._without_missing(super()._draw_units())

    def _without_missing(self, units: np.ndarray) -> np.ndarray:
        return units[~np.isin(units, self.missing)]


class PositionalMicrobatches(PresentUnits):
    """The batch cut into K equal pieces: one inserted record shifts all later ones."""

    def draw(self):
        return np.array_split(self._draw_units(), self.plan.num_microbatches)


class ShuffledFixedSize(PresentUnits):
    """The next B records of a shuffled epoch: a present record takes the place of another."""

    def _draw_units(self):
        present = self._without_missing(np.arange(self.plan.num_examples))
        return self.generator.permutation(present)[: self.plan.expected_batch_size]


class SameSeedOnEveryRank(PresentUnits):
    """Each of K ranks draws its share of the batch from all records, and all draw with the same random numbers."""

    def draw(self):
        probability = self.plan.sampling_probability / self.plan.num_microbatches
        drawn = np.flatnonzero(self.generator.random(self.plan.num_examples) < probability)
        return [self._without_missing(drawn)] * self.plan.num_microbatches


# ---- Variants of the trainer ----


class NoiseInEveryMicroStep(DPCLIPTrainer):
    """Releases once per forward pass and adds the releases up: more noise than ε says."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        held = [p.grad for p in self._mechanism.parameters]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._mechanism.release()
        for parameter, gradient in zip(self._mechanism.parameters, held):
            parameter.grad = parameter.grad if gradient is None else parameter.grad + gradient
        return loss

    def _clip_grad_norm(self, model):
        self._steps_taken += 1


class CountsMicroSteps(DPCLIPTrainer):
    """Each forward pass is accounted as a step on a batch of its own, but all of a step share one draw of noise."""

    def privacy_statement(self) -> PrivacyStatement:
        statement, passes = super().privacy_statement(), self.args.gradient_accumulation_steps
        shares = ("expected_batch_size", "num_microbatches")
        plan = dataclasses.replace(
            statement.plan, **{name: getattr(statement.plan, name) // passes for name in shares}
        )
        return dataclasses.replace(statement, plan=plan, steps=statement.steps * passes)


class ForgetsOnResume(DPCLIPTrainer):
    """The count is in an object that is made anew for every run, after the checkpoint was read."""

    def _draw_randomness(self):
        super()._draw_randomness()
        self._steps_taken = 0
