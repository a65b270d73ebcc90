"""The simulation of linear encoders: gradients, sensitivities, noise, and the script as a stranger runs it."""

import math
import re

import numpy as np
import pytest
import torch
from scripts import ROOT, load_script, output_of

from hf_dpclip.privacy.mechanism import clip_factors


SIMULATION = load_script(ROOT / "examples" / "theory" / "simulation.py")
LINEAR_THEORY = load_script(ROOT / "examples" / "linear_theory.py")
ARMS = [SIMULATION.PAPER, SIMULATION.BATCH, SIMULATION.MICROBATCHES, SIMULATION.PAIRS]


def setting(arm, **fields):
    return SIMULATION.Setting(arm, **{"num_examples": 12_800, "dimension": 6, "num_steps": 100, **fields})


@pytest.fixture
def data():
    return SIMULATION.SpikedPairs(num_examples=12_800, dimension=6, seed=0)


def perturbed(encoders):
    """Away from the start, at which rows are orthogonal."""
    generator = torch.Generator().manual_seed(1)
    return [(encoder + 0.3 * torch.randn(encoder.shape, generator=generator)).requires_grad_() for encoder in encoders]


def contrastive_loss(encoders, data, units):
    """The linear contrastive loss, pair by pair: similarities to all others of the microbatch less one's own."""
    images, texts = (side[units] @ encoder.T for side, encoder in zip(data.pairs, encoders))
    similarities = images @ texts.T
    count = len(units)
    contrast = (similarities.sum() - count * similarities.diagonal().sum()) / max(count * (count - 1), 1)
    return (contrast if count > 1 else 0 * contrast) + penalty(encoders)


def centred_loss(encoders, data, units):
    """The loss of one pair, centred at public means."""
    image, text = (
        (side[units] - mean) @ encoder.T for side, mean, encoder in zip(data.pairs, data.public_means, encoders)
    )
    return -(image * text).sum() + penalty(encoders)


def penalty(encoders):
    return SIMULATION.ALPHA / 2 * (encoders[0].T @ encoders[1]).square().sum()


def assert_gradients_are_autograds(arm, loss, data, microbatches):
    encoders = perturbed(data.start)
    with torch.no_grad():
        gradients = SIMULATION.microbatch_gradients(encoders, data, microbatches, setting(arm).plan)
    for number, units in enumerate(microbatches):
        expected = torch.autograd.grad(loss(encoders, data, units), encoders)
        for gradient, reference in zip(gradients, expected):
            torch.testing.assert_close(gradient[number], reference, rtol=1e-4, atol=1e-5)


def test_gradients_of_microbatches_are_those_of_the_contrastive_loss(data):
    microbatches = [np.arange(5), np.arange(5, 45), np.arange(45, 47), np.arange(47, 48)]
    assert_gradients_are_autograds(SIMULATION.MICROBATCHES, contrastive_loss, data, microbatches)
    assert_gradients_are_autograds(SIMULATION.BATCH, contrastive_loss, data, [np.arange(300)])


def test_gradients_of_single_pairs_use_public_means(data):
    assert_gradients_are_autograds(SIMULATION.PAIRS, centred_loss, data, [np.array([unit]) for unit in range(7)])


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_empty_microbatches_have_no_gradient(arm, data):
    gradients = SIMULATION.microbatch_gradients(data.start, data, [np.array([], dtype=int)], setting(arm).plan)
    assert all(not gradient.any() for gradient in gradients)
    assert all(gradient.shape == (1, SIMULATION.RANK, 6) for gradient in gradients)


@pytest.mark.parametrize(
    ("arm", "microbatches", "sensitivity"),
    [(SIMULATION.BATCH, 1, 2), (SIMULATION.MICROBATCHES, 2, 2), (SIMULATION.PAIRS, 64, 1)],
    ids=lambda value: getattr(value, "name", None),
)
def test_noise_is_what_the_plan_asks_for(arm, microbatches, sensitivity):
    plan = setting(arm, epsilon=1.0).plan
    assert plan.num_microbatches == microbatches
    assert plan.sensitivity == sensitivity * arm.max_grad_norm
    assert 0.99 <= plan.epsilon() <= 1.0


def test_noise_of_the_paper_is_its_formula_and_costs_more_than_it_says():
    plan = setting(SIMULATION.PAPER, epsilon=1.0).plan
    stated = math.sqrt(plan.num_steps * math.log(1 / plan.target_delta)) / plan.num_examples
    assert plan.noise_std == pytest.approx(stated * SIMULATION.PAPER.max_grad_norm)
    assert plan.num_microbatches == 1
    assert plan.epsilon() > 1000


def clipped_sum(arm, data, microbatches):
    """Of the gradients far from the minimum, where the private pairs alone decide their direction."""
    plan = setting(arm).plan
    encoders = [encoder.detach() for encoder in perturbed(data.start)]
    gradients = SIMULATION.microbatch_gradients(encoders, data, microbatches, plan)
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    return clip_factors(flat.norm(dim=1), plan) @ flat


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_one_pair_moves_the_sum_by_the_sensitivity_and_no_more(arm, data):
    """Pair 1 decides the gradient of the rest; with pair 0, larger and of opposite sign, it turns around."""
    for side, sign in zip(data.pairs, (1, -1)):
        side[0], side[1] = 1e5 * side[2], sign * 1e3 * side[2]
    if setting(arm).plan.one_unit_per_microbatch:
        present, absent = [np.array([0]), np.array([1])], [np.array([1])]
    else:
        present, absent = [np.arange(32)], [np.arange(1, 32)]
    moved = (clipped_sum(arm, data, present) - clipped_sum(arm, data, absent)).norm().item()
    sensitivity = setting(arm).plan.sensitivity
    assert 0.99 * sensitivity < moved <= sensitivity * (1 + 1e-5)


def test_error_is_the_sine_of_the_angle(data):
    assert data.error(data.start) == pytest.approx(SIMULATION.START_SINE, abs=1e-3)
    truth = [space.T for space in data.subspaces]
    assert data.error(truth) == pytest.approx(0, abs=1e-3)


@pytest.fixture
def one_thread():
    """Matrices this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_without_privacy_the_error_is_the_predicted_one():
    """300 steps: what descent has left to do dominates, and it is 0.173 of the start."""
    short = setting(SIMULATION.BATCH, num_steps=300)
    assert SIMULATION.simulate(short, seed=0) == pytest.approx(
        math.sin(math.atan(SIMULATION.predict(short).total)), rel=0.1
    )


@pytest.mark.parametrize(("slope", "written"), [(-0.004, "0.00"), (0.004, "0.00"), (-0.996, "-1.00"), (0.5, "0.50")])
def test_a_slope_of_zero_has_no_sign(slope, written):
    assert LINEAR_THEORY.decimals(slope) == written


def test_quick_run_prints_slopes_and_draws_them(tmp_path):
    script, figure = ROOT / "examples" / "linear_theory.py", tmp_path / "theory.png"
    output = output_of(script, "--quick", "--seeds", 2, "--output", figure)
    predicted, fitted = re.search(r"microbatches of 32, ε = 1 \| pairs n \| (\S+) \| (\S+)", output).groups()
    assert float(predicted) == pytest.approx(-1)
    assert float(fitted) == pytest.approx(-1, abs=0.15)
    assert figure.read_bytes().startswith(b"\x89PNG")
