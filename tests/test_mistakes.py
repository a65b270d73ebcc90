"""Every mistake that published code makes, planted in a double, and the check that catches it.

Each check passes on the honest code beside it, so that neither can rot unnoticed.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from checks import (
    Given,
    check_binomial,
    check_bounded,
    check_independent_labels,
    check_noise_law,
    check_poisson_batches,
    check_resolution,
    check_uncorrelated,
    one_update,
    vectors,
)
from factories import arguments, pairs, tiny_clip

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments
from hf_dpclip.privacy import GaussianMechanism, PoissonSampler, PrivacyPlan, Randomness, clip_


LOUD = 30.0


# ---- Doubles of the mechanism ----


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


class DividesByRealisedCount(GaussianMechanism):
    """The mean over the microbatches that happened to be there."""

    realised = 0

    def _take_gradients(self):
        gradients = super()._take_gradients()
        self.realised += any(gradient is not None for gradient in gradients)
        return gradients

    def release(self):
        super().release()
        for parameter in self.parameters:
            parameter.grad.mul_(self.plan.num_microbatches / max(self.realised, 1))


class SkipsEmptyBatches(GaussianMechanism):
    """No noise where there is no gradient."""

    def release(self):
        if any(total is not None for total in self._sum):
            super().release()
        else:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)


class LetsNaNPass(GaussianMechanism):
    """Clips without looking whether the gradient is finite."""

    @contextmanager
    def microbatch(self):
        yield
        self._sum = self._take_gradients()
        for gradient in self._sum:
            gradient.mul_(self.plan.max_grad_norm / gradient.norm().clamp(min=self.plan.max_grad_norm))


class StopsOnNaN(LetsNaNPass):
    """Ends the run where the data is bad, for everyone to see."""

    def release(self):
        if any(total.isnan().any() for total in self._sum):
            raise AssertionError("the run stopped")


class ReusesGeneratorState(GaussianMechanism):
    """Each tensor starts from the same state."""

    def _add_noise_(self, tensors):
        state = self.generators[0].get_state()
        for values in tensors:
            self.generators[0].set_state(state)
            values.add_(torch.empty_like(values).normal_(0, self.plan.noise_std, generator=self.generators[0]))


class HalfPrecisionNoise(GaussianMechanism):
    """Noise in bfloat16, which knows 128 values between two powers of two."""

    def _add_noise_(self, tensors):
        for values in tensors:
            noise = torch.empty_like(values, dtype=torch.bfloat16)
            values.copy_(values.bfloat16() + noise.normal_(0, self.plan.noise_std, generator=self.generators[0]))


class ScaledLoss(GaussianMechanism):
    """Noise before a loss scaler divides by its scale: 1/1024 of it is left."""

    def release(self):
        super().release()
        for parameter in self.parameters:
            parameter.grad.div_(1024)


class GlobalGenerator(GaussianMechanism):
    """Noise from the generator that `transformers` seeds with 42."""

    def _add_noise_(self, tensors):
        for values in tensors:
            values.add_(torch.randn_like(values), alpha=self.plan.noise_std)


def plant(monkeypatch, double):
    monkeypatch.setattr("hf_dpclip.trainer.GaussianMechanism", double)


def scale_is_right(tmp_path):
    update, trainer = one_update(tmp_path, noise_multiplier=LOUD)
    check_noise_law(update * trainer.plan.num_microbatches, LOUD * 2)


def clipped_norm_is_bounded(tmp_path):
    update, _ = one_update(tmp_path, non_private=True, max_grad_norm=1e-3)
    check_bounded(update, 1e-3)


def empty_batches_look_like_others(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: [np.arange(0)] * 4)
        update, _ = one_update(tmp_path, noise_multiplier=LOUD, microbatch_size=2)
    check_noise_law(update * 4, LOUD * 2)


def bad_records_look_like_others(tmp_path):
    rows = vectors(*[[float("nan")] * 2000] * 8)
    update, _ = one_update(tmp_path, Given(2000), rows, noise_multiplier=LOUD)
    check_noise_law(update, LOUD * 2)


def tensors_differ(tmp_path):
    update, trainer = one_update(tmp_path, noise_multiplier=LOUD)
    shapes = [parameter.numel() for parameter in trainer.model.parameters()]
    largest = [piece for piece in update.split(shapes) if piece.numel() == 16 * 32]
    check_uncorrelated(torch.cat(largest[0::2]), torch.cat(largest[1::2]))


def noise_has_full_resolution(tmp_path):
    update, _ = one_update(tmp_path, noise_multiplier=LOUD)
    check_resolution(update)


def runs_with_one_seed_differ(tmp_path):
    updates = [one_update(tmp_path, noise_multiplier=LOUD, seed=42)[0] for _ in range(2)]
    check_uncorrelated(*updates)


@pytest.mark.parametrize(
    "double, check",
    [
        (NoiseRelativeToC, scale_is_right),
        (ClipsEachTensor, clipped_norm_is_bounded),
        (DividesByRealisedCount, empty_batches_look_like_others),
        (SkipsEmptyBatches, empty_batches_look_like_others),
        (LetsNaNPass, bad_records_look_like_others),
        (StopsOnNaN, bad_records_look_like_others),
        (ReusesGeneratorState, tensors_differ),
        (HalfPrecisionNoise, noise_has_full_resolution),
        (ScaledLoss, scale_is_right),
        (GlobalGenerator, runs_with_one_seed_differ),
    ],
    ids=lambda value: value.__name__,
)
def test_broken_mechanism_is_caught(tmp_path, monkeypatch, double, check):
    check(tmp_path)
    plant(monkeypatch, double)
    with pytest.raises(AssertionError):
        check(tmp_path)


# ---- Doubles of the sampler ----


class PositionalMicrobatches(PoissonSampler):
    """The batch cut into K equal pieces: one inserted record shifts all later ones."""

    def draw(self):
        return np.array_split(np.sort(self._draw_units()), self.plan.num_microbatches)


class ShuffledFixedSize(PoissonSampler):
    """The next B records of a shuffled epoch."""

    def draw(self):
        size = self.plan.expected_batch_size
        units = self.generator.permutation(self.plan.num_examples)[:size]
        labels = self.generator.integers(self.plan.num_microbatches, size=size)
        return [units[labels == label] for label in range(self.plan.num_microbatches)]


class SameSeedOnEveryRank(PoissonSampler):
    """Two ranks draw from their own half of the data, with the same random numbers."""

    def draw(self):
        half = self.plan.num_examples // 2
        chosen = np.flatnonzero(self.generator.random(half) < self.plan.sampling_probability)
        return [chosen, chosen + half]


def draws(sampler_class, num_microbatches):
    plan = PrivacyPlan(
        num_examples=60,
        expected_batch_size=12,
        num_microbatches=num_microbatches,
        num_steps=1,
        noise_multiplier=1.0,
    )
    sampler = sampler_class(plan, Randomness().sampling())
    return [sampler.draw() for _ in range(5000)]


@pytest.mark.parametrize(
    "double, check",
    [
        (PositionalMicrobatches, check_independent_labels),
        (ShuffledFixedSize, check_poisson_batches),
        (SameSeedOnEveryRank, check_poisson_batches),
    ],
    ids=lambda value: value.__name__,
)
def test_broken_sampler_is_caught(double, check):
    check(draws(PoissonSampler, 2), 60, 0.2)
    with pytest.raises(AssertionError):
        check(draws(double, 2), 60, 0.2)


def test_inserting_a_record_shifts_positional_microbatches():
    """What makes the mistake a leak: K microbatches move, not one, and with them up to K times the sensitivity."""
    records = np.array([[1.0, 0], [-1, 0]] * 8)

    def summed(rows):
        pieces = [rows[start : start + 2] for start in range(0, len(rows), 2)]
        gradients = [torch.tensor(piece[0] * 3 + piece[-1], dtype=torch.float32) for piece in pieces]
        for gradient in gradients:
            torch.nn.functional.normalize(gradient, dim=0, out=gradient)
        return torch.stack(gradients).sum(0)

    difference = summed(np.vstack([[0.0, 1.0], records])) - summed(records)
    with pytest.raises(AssertionError):
        check_bounded(difference, 2.0)


# ---- Doubles of the trainer ----


class NoiseInEveryMicroStep(DPCLIPTrainer):
    """Releases once per forward pass and adds the releases up."""

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
    """One composition per forward pass."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._steps_taken += 1
        return super().training_step(model, inputs, num_items_in_batch)


class ForgetsOnResume(DPCLIPTrainer):
    """The count lives in an object that is made anew for every run, after the checkpoint was read."""

    def _draw_randomness(self):
        super()._draw_randomness()
        self._steps_taken = 0


def noise_enters_once_per_step(trainer_class, tmp_path):
    update, trainer = one_update(
        tmp_path, trainer_class=trainer_class, noise_multiplier=LOUD, gradient_accumulation_steps=4
    )
    check_noise_law(update * trainer.plan.num_microbatches, LOUD * 2)


def steps_are_optimizer_steps(trainer_class, tmp_path):
    _, trainer = one_update(tmp_path, trainer_class=trainer_class, gradient_accumulation_steps=4, max_steps=3)
    assert trainer.privacy_spent().steps == 3


def resuming_continues_the_count(trainer_class, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "sgd"}
    one_update(tmp_path, trainer_class=trainer_class, **settings)
    trainer = trainer_class(tiny_clip(), arguments(tmp_path, **settings), train_dataset=pairs(64))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.privacy_spent().steps == 3


@pytest.mark.parametrize(
    "double, check",
    [
        (NoiseInEveryMicroStep, noise_enters_once_per_step),
        (CountsMicroSteps, steps_are_optimizer_steps),
        (ForgetsOnResume, resuming_continues_the_count),
    ],
    ids=lambda value: value.__name__,
)
def test_broken_trainer_is_caught(tmp_path, double, check):
    check(DPCLIPTrainer, tmp_path / "honest")
    with pytest.raises(AssertionError):
        check(double, tmp_path / "broken")


class SilentlyResolves(DPTrainingArguments):
    """Neither target nor noise: σ = 0."""

    def _check_noise(self):
        self.noise_multiplier = self.noise_multiplier or 0.0


@pytest.mark.parametrize("given", [{}, {"target_epsilon": 3.0, "noise_multiplier": 1.0}], ids=["neither", "both"])
def test_unresolved_noise_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="target_epsilon and noise_multiplier"):
        DPTrainingArguments(output_dir=str(tmp_path), **given)
    # Should the arguments let it pass, the plan does not.
    if not given:
        with pytest.raises(ValueError, match="noise_multiplier"):
            DPCLIPTrainer(
                tiny_clip(), SilentlyResolves(output_dir=str(tmp_path), use_cpu=True), train_dataset=pairs(64)
            )


def test_the_binomial_check_tells_neighbouring_laws_apart():
    generator = np.random.default_rng(0)
    check_binomial(generator.binomial(60, 0.2, 5000), 60, 0.2)
    for wrong in (0.15, 0.25):
        with pytest.raises(AssertionError):
            check_binomial(generator.binomial(60, wrong, 5000), 60, 0.2)
