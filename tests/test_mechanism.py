"""Clipping, summation and the release, on gradients that are known."""

import math

import numpy as np
import pytest
import torch
from checks import check_bounded, check_noise_law, check_resolution, check_uncorrelated
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import noiseless_plan, one_step_plan
from torch.nn import Parameter

from hf_dpclip.privacy import GaussianMechanism, Randomness, clip_
from hf_dpclip.privacy.mechanism import NORM_ROW, clip_factors
from hf_dpclip.privacy.reduction import flat_chunks


def parameters(*shapes, dtype=torch.float32):
    return [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def mechanism(settings, weights):
    return GaussianMechanism(settings, weights, Randomness().noise())


def released(settings, weights, microbatches):
    """K times the released gradient (the noisy sum), where each microbatch is its gradient for each parameter."""
    gaussian = mechanism(settings, weights)
    for gradients in microbatches:
        with gaussian.microbatch():
            for weight, gradient in zip(weights, gradients):
                weight.grad = None if gradient is None else gradient.clone()
    gaussian.release()
    return torch.cat([weight.grad.flatten() for weight in weights]) * settings.num_microbatches


def vector(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_small_gradients_are_left_alone():
    gradient = vector(0.3, 0.4)
    assert clip_([gradient], noiseless_plan())
    assert torch.equal(gradient, vector(0.3, 0.4))


def test_the_norm_counts_all_tensors_together():
    gradients = [vector(3.0), vector(4.0)]
    clip_(gradients, noiseless_plan(max_grad_norm=1.0))
    assert torch.allclose(torch.cat(gradients), vector(0.6, 0.8))


@pytest.mark.parametrize("size", [NORM_ROW - 1, NORM_ROW, 2 * NORM_ROW + 3])
def test_the_norm_counts_every_coordinate_of_a_large_tensor_once(size):
    gradient = torch.linspace(0.5, 2.0, size).view(1, -1)
    clip_([gradient], noiseless_plan(max_grad_norm=3.0))
    assert gradient.norm().item() == pytest.approx(3.0, rel=1e-5)


def test_automatic_clipping_normalises_up_to_gamma():
    gradient = vector(3.0, 4.0)
    clip_([gradient], noiseless_plan(max_grad_norm=2.0, clipping="automatic"))
    assert gradient.norm() == pytest.approx(2 * 5 / 5.01)
    small = vector(0.003, 0.004)
    clip_([small], noiseless_plan(max_grad_norm=2.0, clipping="automatic"))
    assert small.norm() == pytest.approx(2 * 0.005 / 0.015)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_at_the_largest_bound_no_sum_leaves_float32(count):
    """It would be seen through any noise: that of gradients that are all scaled up to C, or that of one of zeros."""
    largest = noiseless_plan(max_grad_norm=1e30, clipping="automatic")
    gradients = [[vector(float(number > 0), 0.0)] for number in range(count)]
    assert released(largest, parameters(2), gradients).isfinite().all()
    with pytest.raises(ValueError, match="at most 1e30"):
        noiseless_plan(max_grad_norm=1.1e30)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.sampled_from(["flat", "automatic"]),
    st.floats(1e-3, 1e3),
)
@settings(deadline=None)
def test_no_gradient_exceeds_the_bound(values, clipping, bound):
    gradient = torch.tensor(values, dtype=torch.float32)
    if clip_([gradient], noiseless_plan(max_grad_norm=bound, clipping=clipping)):
        check_bounded(gradient, bound)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("size", [5.148852951284286e37, 3e38])
def test_a_gradient_whose_factor_float32_cannot_hold_counts_as_zero(size, clipping):
    """Rounded to what float32 has below 1e-38, it would leave a norm above C by 7e-5."""
    tiny = noiseless_plan(max_grad_norm=0.001, clipping=clipping)
    assert not clip_([vector(size)], tiny)
    assert clip_factors(torch.tensor([size, 1.0]).double(), tiny)[0] == 0
    assert clip_([vector(size)], noiseless_plan(max_grad_norm=10.0, clipping=clipping))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad):
    weights = parameters(2, 2)
    total = released(
        noiseless_plan(), weights, [[vector(0.1, 0.2), vector(0.3, bad)], [vector(0.1, 0.0), vector(0.0, 0.2)]]
    )
    assert torch.allclose(total, vector(0.1, 0.0, 0.0, 0.2))


def test_microbatches_are_clipped_one_by_one_and_added_up():
    weights = parameters(2)
    total = released(noiseless_plan(), weights, [[vector(10.0, 0.0)], [vector(0.0, 20.0)], [vector(0.25, 0.25)]])
    assert torch.allclose(total, vector(1.25, 1.25))


def test_sums_that_lack_a_parameter_are_an_error():
    """Cut short, the sum would be released without the noise of the parameters that follow."""
    gaussian = mechanism(noiseless_plan(), parameters(1, 1))
    with pytest.raises(ValueError, match="shorter"):
        gaussian.add(torch.ones(1), lambda factors, totals: totals[:1])


def test_parameters_without_gradient_count_as_zero():
    weights = parameters(1, 1)
    total = released(noiseless_plan(), weights, [[vector(0.5), None], [None, vector(0.25)]])
    assert torch.allclose(total, vector(0.5, 0.25))


@pytest.mark.parametrize("drawn", [0, 1, 3, 4])
def test_the_divisor_is_the_public_constant(drawn):
    weights = parameters(1)
    gaussian = mechanism(noiseless_plan(num_microbatches=4), weights)
    for _ in range(drawn):
        with gaussian.microbatch():
            weights[0].grad = vector(1.0)
    gaussian.release()
    assert weights[0].grad.item() == pytest.approx(drawn / 4)


def test_gradients_are_out_of_the_optimizers_reach_until_released():
    weights = parameters(1)
    gaussian = mechanism(noiseless_plan(), weights)
    with gaussian.microbatch():
        weights[0].grad = vector(1.0)
    assert weights[0].grad is None


def test_a_stray_gradient_does_not_enter_the_sum():
    weights = parameters(1)
    weights[0].grad = vector(100.0)
    assert released(noiseless_plan(), weights, [[vector(0.5)]]).item() == 0.5


def test_an_exception_adds_nothing():
    weights = parameters(1)
    gaussian = mechanism(noiseless_plan(), weights)
    with pytest.raises(RuntimeError, match="out of memory"), gaussian.microbatch():
        weights[0].grad = vector(1.0)
        raise RuntimeError("out of memory")
    gaussian.release()
    assert weights[0].grad.item() == 0


def test_each_release_starts_from_zero():
    weights = parameters(1)
    gaussian = mechanism(noiseless_plan(), weights)
    for _ in range(2):
        with gaussian.microbatch():
            weights[0].grad = vector(1.0)
        gaussian.release()
        assert weights[0].grad.item() == 0.25


def test_one_microbatch_holds_no_second_copy_of_the_gradient():
    weights = parameters(3)
    gaussian = mechanism(noiseless_plan(num_microbatches=1), weights)
    gradient = vector(0.1, 0.2, 0.3)
    with gaussian.microbatch():
        weights[0].grad = gradient
    gaussian.release()
    assert weights[0].grad.data_ptr() == gradient.data_ptr()


@pytest.mark.parametrize("num_microbatches, factor", [(1, 2), (4, 2), (16, 1)])
def test_noise_has_the_scale_of_the_plan(num_microbatches, factor):
    settings = one_step_plan(num_microbatches=num_microbatches, max_grad_norm=0.5, noise_multiplier=3.0)
    total = released(settings, parameters((50, 60), 2000), [])
    check_noise_law(total, 3.0 * factor * 0.5)


def test_noise_reaches_further_than_one_draw(monkeypatch):
    """A float32 normal of torch never exceeds 5.77 standard deviations: a release beyond would tell of the sum."""
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, mean, std, generator: self.fill_(mean + 5.77 * std))
    plan = one_step_plan()
    assert released(plan, parameters(3), []).min() > 8.1 * plan.noise_std


def test_noise_in_many_chunks_has_the_same_law(monkeypatch):
    """More chunks than streams, tensors of several chunks and chunks of several tensors."""
    monkeypatch.setattr("hf_dpclip.privacy.mechanism.NOISE_CHUNK", 64)
    total = released(one_step_plan(), parameters((50, 60), 2000, (), (3, 7), 1979), [])
    check_noise_law(total, 2.0)
    check_uncorrelated(total[:3500], total[3500:7000])
    # One chunk against the next, and against those that follow in the same stream.
    for distance in (64, 4 * 64):
        check_uncorrelated(total[:-distance], total[distance:])


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), limit=st.integers(1, 12))
def test_chunks_hold_every_coordinate_once(sizes, limit):
    tensors = [torch.zeros(size) for size in sizes]
    chunks = flat_chunks(tensors, limit)
    assert all(sum(map(len, pieces)) <= limit for pieces in chunks)
    for piece in (piece for pieces in chunks for piece in pieces):
        piece.add_(1)
    assert torch.equal(torch.cat(tensors), torch.ones(sum(sizes)))
    # No more chunks than if every second one were half full.
    assert len(chunks) <= 2 * sum(sizes) / limit + 1


def test_equal_tensors_get_different_noise():
    total = released(one_step_plan(), parameters(4000, 4000), [])
    check_uncorrelated(*total.chunk(2))


def test_successive_releases_get_different_noise():
    weights = parameters(4000)
    gaussian = mechanism(one_step_plan(), weights)
    gaussian.release()
    first = weights[0].grad.clone()
    gaussian.release()
    check_uncorrelated(first, weights[0].grad)


def test_noise_is_float32_and_cast_afterwards_for_half_precision_parameters():
    weights = parameters(20_000, dtype=torch.bfloat16)
    total = released(one_step_plan(num_microbatches=1), weights, [])
    assert weights[0].grad.dtype == torch.bfloat16
    check_noise_law(total.float() + torch.rand(20_000) * 1e-2, 2.0)


def test_half_precision_gradients_are_added_in_float32():
    weights = parameters(1, dtype=torch.bfloat16)
    one, tiny = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-9, dtype=torch.bfloat16)
    total = released(noiseless_plan(num_microbatches=16), weights, [[one], *[[tiny]] * 15])
    # In bfloat16, 1 + 2^-9 is 1 however often it is added.
    assert total.item() > 1


def test_noise_has_the_resolution_of_float32():
    check_resolution(released(one_step_plan(), parameters(5000), []))


def test_noise_is_float32_whatever_the_default_dtype_is():
    weights = parameters(20_000)
    torch.set_default_dtype(torch.bfloat16)
    try:
        released(one_step_plan(), weights, [])
    finally:
        torch.set_default_dtype(torch.float32)
    check_resolution(weights[0].grad)


def contributions(generator, size):
    """A neighbourhood: the microbatches of D, and those of D with one record more in one of them."""
    records = [generator.normal(size=(size, 3)) * 10 ** generator.uniform(-2, 2) for _ in range(4)]
    label, extra = generator.integers(4), generator.normal(size=3) * 10 ** generator.uniform(-2, 2)
    neighbours = [np.vstack([r, extra]) if j == label else r for j, r in enumerate(records)]
    return records, neighbours


def summed(records, settings):
    weights = parameters(3)
    gradients = [[torch.tensor(r.sum(axis=0), dtype=torch.float32)] for r in records if len(r)]
    return released(settings, weights, gradients)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("size, factor", [(5, 2), (1, 2), (0, 1)])
def test_one_record_more_or_less_moves_the_sum_by_at_most_the_sensitivity(size, factor, clipping):
    """`size=0`: the record is alone in its microbatch, which is where a sensitivity of C comes from."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        without, with_it = contributions(generator, size)
        settings = noiseless_plan(max_grad_norm=0.7, clipping=clipping)
        difference = summed(with_it, settings) - summed(without, settings)
        check_bounded(difference, factor * 0.7)
        check_bounded(-difference, factor * 0.7)


def test_twice_the_clipping_norm_is_reached():
    """One record turns its microbatch's gradient around: the bound of 2C cannot be lowered."""
    others, canary = np.array([[50.0, 0, 0]]), np.array([[-100.0, 0, 0]])
    settings = noiseless_plan(max_grad_norm=0.7)
    difference = summed([np.vstack([others, canary])], settings) - summed([others], settings)
    assert difference.norm().item() == pytest.approx(1.4, rel=1e-5)


def test_pure_noise_of_a_convolution_in_another_layout_is_released():
    weight = Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    mechanism(one_step_plan(), [weight]).release()
    assert weight.grad.shape == weight.shape
    assert (weight.grad != 0).all()
