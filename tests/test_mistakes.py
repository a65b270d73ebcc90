"""Every mistake that published code makes, planted where the honest code was, and the check that catches it.

Each check passes on the honest code beside it, so that neither can rot unnoticed.
"""

import numpy as np
import pytest
import torch
from checks import (
    LOUD,
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
from factories import SAVING, arguments, pairs, tiny_clip
from plans import one_step_plan

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments
from hf_dpclip.audit.mistakes import (
    ClipsEachTensor,
    CountsMicroSteps,
    DividesByRealisedCount,
    ForgetsOnResume,
    GlobalGenerator,
    HalfPrecisionNoise,
    LetsNaNPass,
    NoiseInEveryMicroStep,
    NoiseRelativeToC,
    NoNoise,
    PositionalMicrobatches,
    PublishedRecipe,
    ReusesGeneratorState,
    SameSeedOnEveryRank,
    ScaledLoss,
    ShuffledFixedSize,
    SkipsEmptyBatches,
    StopsOnNaN,
)
from hf_dpclip.privacy import PoissonSampler, Randomness


# ---- The mechanism ----


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
        (NoNoise, scale_is_right),
        (PublishedRecipe, scale_is_right),
    ],
    ids=lambda value: value.__name__,
)
def test_broken_mechanism_is_caught(tmp_path, monkeypatch, double, check):
    check(tmp_path)
    plant(monkeypatch, double)
    with pytest.raises((AssertionError, FloatingPointError)):
        check(tmp_path)


# ---- The sampler ----


def draws(sampler_class, num_microbatches):
    plan = one_step_plan(num_examples=60, expected_batch_size=12, num_microbatches=num_microbatches)
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
    plan = one_step_plan(num_examples=24, expected_batch_size=24, num_microbatches=8)

    def summed(missing):
        """Each microbatch has a gradient of norm 1, whose sign its first record decides: every third is positive."""
        microbatches = PositionalMicrobatches(plan, Randomness().sampling(), missing).draw()
        return torch.tensor([1.0 if units[0] % 3 == 0 else -1.0 for units in microbatches]).sum()

    with pytest.raises(AssertionError):
        check_bounded(summed(missing=[]) - summed(missing=[0]), plan.sensitivity)


# ---- The trainer ----


def noise_enters_once_per_step(trainer_class, tmp_path):
    update, trainer = one_update(
        tmp_path, trainer_class=trainer_class, noise_multiplier=LOUD, gradient_accumulation_steps=4
    )
    check_noise_law(update * trainer.plan.num_microbatches, LOUD * 2)


def steps_are_optimizer_steps(trainer_class, tmp_path):
    _, trainer = one_update(tmp_path, trainer_class=trainer_class, gradient_accumulation_steps=4, max_steps=3)
    assert trainer.privacy_spent().steps == 3


def resuming_continues_the_count(trainer_class, tmp_path):
    settings = {**SAVING, "max_steps": 3, "optim": "sgd"}
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
