"""Noise that floating-point arithmetic does not give away: its law, and the grid on which every release lies."""

import math
import os

import pytest
import torch
from checks import LOUD, check_noise_law, check_uncorrelated, one_update
from plans import one_step_plan
from torch.nn import Parameter

from hf_dpclip.privacy import GaussianMechanism, Randomness, SecureGaussianMechanism
from hf_dpclip.privacy.secure_noise import POINTS_PER_DEVIATION, grid_width, standard_normals


SIZE = 20_000


def released(settings, mechanism=SecureGaussianMechanism, size=SIZE, gradient=None, dtype=torch.float32):
    """The noisy sum of one microbatch with the given gradient."""
    weights = [Parameter(torch.zeros(size, dtype=dtype))]
    gaussian = mechanism(settings, weights, Randomness().noise())
    if gradient is not None:
        with gaussian.microbatch():
            weights[0].grad = gradient.clone()
    gaussian.release()
    return weights[0].grad * settings.num_microbatches


def check_on_grid(values: torch.Tensor, width: float) -> None:
    """Every value is a multiple of the grid's width."""
    multiples = values.double() / width
    assert torch.equal(multiples, multiples.round()), "a value lies between the points of the grid"


@pytest.mark.parametrize("noise_multiplier, max_grad_norm", [(1.0, 1.0), (0.7, 1e-4), (13.0, 50.0)])
def test_noise_has_the_scale_of_the_plan(noise_multiplier, max_grad_norm):
    settings = one_step_plan(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    check_noise_law(released(settings), settings.noise_std)


def test_the_sum_is_the_centre_of_the_noise():
    settings = one_step_plan(noise_multiplier=0.05)
    gradient = torch.full((SIZE,), 0.007)
    total = released(settings, gradient=gradient)
    check_noise_law(total - gradient, settings.noise_std)
    with pytest.raises(AssertionError):
        check_noise_law(total, settings.noise_std)


def test_standard_normals_are_normal_far_out_and_pairwise_independent():
    values = standard_normals(2 * SIZE + 1)
    assert values.dtype == torch.float64 and len(values) == 2 * SIZE + 1
    check_noise_law(values, 1.0)
    # Radius and angle are shared by the two halves.
    check_uncorrelated(values[:SIZE], values[SIZE + 1 :])
    check_uncorrelated(values[:SIZE].square(), values[SIZE + 1 :].square())


def test_extreme_random_bits_give_finite_noise(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr(os, "urandom", lambda size, byte=byte: byte * size)
        values = standard_normals(8)
        assert values.isfinite().all() and values.abs().max() < 8.6


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.3, 1e-5])
def test_every_release_is_a_multiple_of_the_grid_whatever_the_sum(max_grad_norm):
    settings = one_step_plan(noise_multiplier=1.3, max_grad_norm=max_grad_norm)
    width = grid_width(settings)
    for scale in (0.0, 1e-12, 1e-3, 7.0):
        check_on_grid(released(settings, gradient=scale * torch.randn(SIZE)), width)


def test_noise_without_a_grid_is_caught():
    settings = one_step_plan(noise_multiplier=1.3)
    with pytest.raises(AssertionError, match="between the points"):
        check_on_grid(released(settings, GaussianMechanism), grid_width(settings))


@pytest.mark.parametrize("noise_multiplier", [0.4, 1.0, 3.7])
def test_the_grid_is_public_a_power_of_two_and_fine_enough(noise_multiplier):
    settings = one_step_plan(noise_multiplier=noise_multiplier)
    width = grid_width(settings)
    assert math.log2(width).is_integer()
    assert POINTS_PER_DEVIATION <= settings.noise_std / width < 2 * POINTS_PER_DEVIATION
    # Rounding is uniform on a cell, whose variance is width²/12.
    assert width**2 / 12 < 1e-7 * settings.noise_std**2


def test_neighbouring_grid_points_are_all_reached():
    """Of the 2,000 or so points around the centre, a gap of even one would tell sums apart."""
    settings = one_step_plan()
    width = grid_width(settings)
    shifted = released(settings, size=200_000, gradient=torch.full((200_000,), 0.3 * width))
    points = (shifted / width).round().to(torch.int64)
    counts = torch.bincount(points[points.abs() <= 500] + 500, minlength=1001)
    # Each is expected more than 30 times: all of them are reached but for once in 10^10 runs.
    assert counts.min() > 0


def test_successive_releases_differ():
    check_uncorrelated(released(one_step_plan()), released(one_step_plan()))


def test_noise_in_half_precision_parameters_is_cast_afterwards():
    total = released(one_step_plan(), dtype=torch.bfloat16)
    assert total.dtype == torch.bfloat16
    check_noise_law(total.float() + torch.rand(SIZE) * 1e-2, 2.0)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    released(one_step_plan())
    assert torch.equal(torch.rand(1), expected)


def test_the_trainer_uses_it_where_asked(tmp_path):
    update, trainer = one_update(tmp_path, noise_multiplier=LOUD, secure_noise=True)
    assert type(trainer._mechanism) is SecureGaussianMechanism
    check_noise_law(update * trainer.plan.num_microbatches, LOUD * 2)
    assert type(one_update(tmp_path)[1]._mechanism) is GaussianMechanism
