"""The guarantee, measured on what the real trainer does to the weights."""

import pytest
import torch
from checks import (
    LOUD,
    Given,
    check_bounded,
    check_independent_labels,
    check_noise_law,
    check_poisson_batches,
    check_resolution,
    check_uncorrelated,
    flat_weights,
    one_update,
    vectors,
)
from factories import arguments, pairs, tiny_clip

from hf_dpclip import DPCLIPTrainer


def whole_batch_update(tmp_path, rows, **overrides):
    """The sum that is released when everybody takes part (q = 1) and no noise is added."""
    settings = {"per_device_train_batch_size": len(rows), "non_private": True, **overrides}
    update, trainer = one_update(tmp_path, Given(len(rows[0])), vectors(*rows), **settings)
    return update * trainer.plan.num_microbatches


@pytest.mark.parametrize(
    "overrides, num_microbatches",
    [
        ({}, 1),
        ({"microbatch_size": 2}, 4),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"gradient_accumulation_steps": 3, "microbatch_size": 4}, 6),
    ],
)
def test_the_update_carries_noise_of_the_planned_law(tmp_path, overrides, num_microbatches):
    update, trainer = one_update(tmp_path, noise_multiplier=LOUD, max_grad_norm=0.5, **overrides)
    assert trainer.plan.num_microbatches == num_microbatches
    check_noise_law(update * num_microbatches, LOUD * 2 * 0.5)
    check_resolution(update)


def test_noise_is_relative_to_c_when_every_example_is_clipped(tmp_path):
    update, trainer = one_update(
        tmp_path, Given(5000), vectors(*[[0.0] * 5000] * 16), noise_multiplier=LOUD, microbatch_size=1
    )
    check_noise_law(update * trainer.plan.expected_batch_size, LOUD)


def test_noise_of_successive_steps_is_independent(tmp_path):
    first, trainer = one_update(tmp_path, noise_multiplier=LOUD)
    before = flat_weights(trainer.model)
    trainer.train()
    check_uncorrelated(first, before - flat_weights(trainer.model))


def test_noise_law_holds_under_autocast(tmp_path):
    update, _ = one_update(tmp_path, noise_multiplier=LOUD, bf16=True)
    check_noise_law(update, LOUD * 2)
    check_resolution(update)


@pytest.mark.parametrize("overrides", [{}, {"microbatch_size": 2}, {"clipping": "automatic"}], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_one_record_more_or_less_moves_the_sum_by_at_most_the_sensitivity(tmp_path, overrides, scale):
    """q = 1 and one noise_seed: the others keep their labels, so the two datasets are coupled as in the proof."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(8, 4, generator=generator) * scale).tolist()
    settings = {"max_grad_norm": 0.5, **overrides}
    everyone = whole_batch_update(tmp_path, rows, noise_seed=1, **settings)
    # The removed record becomes the zero vector, which adds nothing to its microbatch.
    for removed in range(8):
        neighbours = [[0.0] * 4 if row == removed else values for row, values in enumerate(rows)]
        difference = everyone - whole_batch_update(tmp_path, neighbours, noise_seed=1, **settings)
        check_bounded(difference, 2 * 0.5)


def test_one_record_can_turn_a_whole_batch_around(tmp_path):
    others, canary = [[1.0, 0.0]] * 3, [-100.0, 0.0]
    with_it = whole_batch_update(tmp_path, [*others, canary])
    without = whole_batch_update(tmp_path, [*others, [0.0, 0.0]])
    assert (with_it - without).norm().item() == pytest.approx(2.0, rel=1e-5)


def test_one_record_moves_the_sum_by_c_when_every_example_is_clipped(tmp_path):
    rows = [[100.0, 0.0], [0.0, 100.0], [-100.0, 0.0]]
    total = whole_batch_update(tmp_path, rows, microbatch_size=1)
    for removed in range(3):
        neighbours = [[0.0, 0.0] if row == removed else values for row, values in enumerate(rows)]
        check_bounded(total - whole_batch_update(tmp_path, neighbours, microbatch_size=1), 1.0)


@pytest.mark.parametrize("vector", [[float("nan"), 0.0], [float("inf"), 0.0], [3e38, 3e38]], ids=str)
def test_a_bad_record_is_not_visible(tmp_path, vector):
    """A gradient that is not finite becomes zero; noise is released and the step counted as always."""
    rows = vectors(*[vector] * 2000)
    update, trainer = one_update(tmp_path, Given(2), rows, noise_multiplier=LOUD, per_device_train_batch_size=2)
    assert torch.isfinite(update).all()
    assert trainer.privacy_spent().steps == trainer.state.global_step == 1


@pytest.mark.parametrize("records", [0, 1])
def test_an_empty_or_single_batch_is_not_visible(tmp_path, monkeypatch, records):
    """Same noise, same step count, same logs as with any other batch."""
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: [torch.arange(records).numpy()])
    update, trainer = one_update(tmp_path, noise_multiplier=LOUD, logging_steps=1)
    check_noise_law(update, LOUD * 2)
    assert trainer.privacy_spent().steps == trainer.state.global_step == 1
    assert set(trainer.state.log_history[0]) == {"grad_norm", "learning_rate", "epsilon", "epoch", "step"}


def drawn(tmp_path, steps=4000, **overrides):
    """The units of many steps, as the trainer's own data loader draws them."""
    args = arguments(tmp_path, **{"max_steps": 1, **overrides})
    trainer = DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(60))
    trainer.train()
    sampler = trainer.get_train_dataloader().sampler.sampler
    return [sampler.draw() for _ in range(steps)]


def test_the_trainers_batches_are_poisson_samples(tmp_path):
    check_poisson_batches(drawn(tmp_path, per_device_train_batch_size=12), 60, 0.2)


def test_the_trainers_microbatches_are_labelled_independently(tmp_path):
    draws = drawn(tmp_path, per_device_train_batch_size=12, microbatch_size=4)
    check_independent_labels(draws, 60, 0.2)


def test_two_default_runs_differ_in_spite_of_the_same_seed(tmp_path):
    first, _ = one_update(tmp_path, noise_multiplier=LOUD, seed=42)
    second, _ = one_update(tmp_path, noise_multiplier=LOUD, seed=42)
    check_uncorrelated(first, second)


def test_two_runs_with_one_noise_seed_agree_bit_for_bit(tmp_path):
    first, _ = one_update(tmp_path, noise_seed=3)
    second, _ = one_update(tmp_path, noise_seed=3)
    assert torch.equal(first, second)


def test_steps_are_optimizer_steps_whatever_the_accumulation(tmp_path):
    _, trainer = one_update(tmp_path, gradient_accumulation_steps=3, max_steps=4)
    assert trainer.privacy_spent().steps == trainer.state.global_step == 4
    assert trainer.privacy_spent().epsilon == trainer.plan.epsilon(4)


def test_nothing_is_updated_if_the_release_does_not_run(tmp_path, monkeypatch):
    """Should a release of transformers no longer call the hook, training stands still instead of leaking."""
    monkeypatch.setattr(DPCLIPTrainer, "_clip_grad_norm", lambda self, model: None)
    update, _ = one_update(tmp_path)
    assert update.abs().max() == 0
