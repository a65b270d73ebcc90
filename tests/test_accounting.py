"""ε and σ against three accountants of two libraries, and against each other."""

import json
import math
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld
from scipy.special import log_ndtr

from hf_dpclip.privacy import PrivacyPlan
from hf_dpclip.privacy.accounting import (
    ADJACENCY,
    _inside,
    calibrate_noise_multiplier,
    composed_epsilon,
    epsilon,
)


CASES = json.loads(Path(__file__).with_name("accounting.json").read_text())["cases"]


def case_id(case):
    return "q={sampling_probability:.3g},sigma={noise_multiplier},T={steps}".format(**case)


def epsilon_of(case, accountant):
    return epsilon(case["sampling_probability"], case["noise_multiplier"], case["steps"], case["delta"], accountant)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_pld_agrees_with_the_reference_and_never_promises_more(case):
    ours, reference = epsilon_of(case, "pld"), case["epsilon_pld"]
    assert ours == pytest.approx(reference, rel=0.01)
    assert ours >= 0.995 * reference
    assert ours <= case["epsilon_prv_upper"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_rdp_agrees_with_the_reference(case):
    ours = epsilon_of(case, "rdp")
    assert ours == pytest.approx(case["epsilon_rdp"], rel=0.01)
    assert ours >= 0.995 * case["epsilon_pld"]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_calibration_lands_just_below_the_target(case, accountant):
    target, q = case["epsilon_pld"], case["sampling_probability"]
    sigma = calibrate_noise_multiplier(target, case["delta"], q, case["steps"], accountant)
    reached = epsilon(q, sigma, case["steps"], case["delta"], accountant)
    assert 0.99 * target <= reached <= target


@pytest.mark.parametrize("target", [0.05, 0.5, 8.0, 40.0])
def test_calibration_covers_the_range_that_people_ask_for(target):
    sigma = calibrate_noise_multiplier(target, 1e-5, 0.02, 200)
    assert 0.99 * target <= epsilon(0.02, sigma, 200, 1e-5) <= target


def test_calibration_reaches_targets_that_renyi_divergences_do_not():
    """Theirs has a floor, which grows as δ falls."""
    sampling = (1024 / 60_000, 351)
    assert epsilon(sampling[0], 1e4, sampling[1], 1e-8, "rdp") > 0.01
    sigma = calibrate_noise_multiplier(0.01, 1e-8, *sampling)
    assert 0.0099 <= epsilon(sampling[0], sigma, sampling[1], 1e-8) <= 0.01
    with pytest.raises(ValueError, match=r"no noise_multiplier reaches target_epsilon=0\.001"):
        calibrate_noise_multiplier(0.001, 1e-8, *sampling, "rdp")


@pytest.mark.parametrize("low, high", [(0.0, 2.0), (1.9, 2.0), (1.0, math.inf)])
@pytest.mark.parametrize("guess", [-1.0, 0.0, 1.0, 1.95, 2.0, 1e9])
def test_the_search_stays_inside_its_bracket(low, high, guess):
    assert low < _inside(low, high, guess) < high


def test_so_little_noise_that_nothing_can_be_computed_is_refused():
    for accountant in ("pld", "rdp"):
        with pytest.raises(ValueError, match=r"noise_multiplier=1e-200 is not possible"):
            PrivacyPlan(1000, 10, 1, 10, noise_multiplier=1e-200, accountant=accountant)


def test_no_steps_cost_nothing():
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0.0


def test_no_noise_costs_everything():
    assert epsilon(0.1, 0.0, 1, 1e-5) == math.inf


def test_every_step_costs():
    values = [epsilon(0.1, 1.0, steps, 1e-5) for steps in (1, 2, 10, 100)]
    assert values == sorted(set(values))


@pytest.mark.parametrize(
    "sampling_probability, noise_multiplier, steps",
    [(0.064, 0.9, 48), (0.0085, 0.7, 354), (0.017, 1.5, 3510), (0.5, 10.0, 100), (1.0, 5.0, 10), (0.001, 0.6, 1000)],
)
def test_the_grid_costs_less_than_a_thousandth(sampling_probability, noise_multiplier, steps):
    finest = epsilon(sampling_probability, noise_multiplier, steps, 1e-5, interval=1e-4)
    assert finest <= epsilon(sampling_probability, noise_multiplier, steps, 1e-5) <= 1.001 * finest


def test_the_event_gives_an_auditor_the_same_epsilon():
    plan = PrivacyPlan(
        num_examples=1000, expected_batch_size=50, num_microbatches=5, num_steps=40, noise_multiplier=1.0
    )
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    theirs = accountant.compose(plan.dp_event()).get_epsilon(plan.target_delta)
    assert theirs <= plan.epsilon() <= 1.001 * theirs
    assert dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE == ADJACENCY


def test_noise_below_the_sensitivity_is_worth_what_the_spec_says():
    """A claimed ε of 1 with σC instead of 2σC is an ε of about 8."""
    claimed = PrivacyPlan.calibrate(
        target_epsilon=1.0,
        target_delta=1e-5,
        num_examples=60_000,
        expected_batch_size=256,
        num_microbatches=1,
        num_steps=2340,
    )
    actual = epsilon(claimed.sampling_probability, claimed.noise_multiplier / 2, 2340, 1e-5)
    assert actual > 5


@pytest.mark.parametrize("steps", [10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("delta", [1e-6, 1e-7, 1e-8, 1e-9, 1e-11, 1e-13])
def test_totals_are_not_below_the_exact_epsilon_however_small_delta(steps, delta):
    """Without sampling, T steps are one Gaussian with μ = √T / σ, whose δ is known exactly. A distribution of privacy
    losses alone would promise 25.0 at δ = 1e-13 and 100,000 steps, where 26.0 is true, and a δ of 1e-9 for a million
    steps, where 1.04e-9 is."""
    noise_multiplier = 0.3 * math.sqrt(steps)
    total, mu = composed_epsilon({(1.0, noise_multiplier): steps}, delta), math.sqrt(steps) / noise_multiplier
    exact = math.exp(log_ndtr(mu / 2 - total / mu)) - math.exp(total + log_ndtr(-mu / 2 - total / mu))
    assert exact <= delta


def test_a_plan_for_so_small_a_delta_needs_rdp():
    fields = {"num_examples": 100, "expected_batch_size": 10, "num_microbatches": 1, "num_steps": 5}
    fields |= {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-10}
    with pytest.raises(
        ValueError, match=r"accountant='pld' is not possible: expected rdp for a target_delta below 1e-09"
    ):
        PrivacyPlan(**fields)
    assert PrivacyPlan(**fields, accountant="rdp").epsilon() > 0


def test_and_for_a_larger_one_if_there_are_many_steps():
    fields = {"num_examples": 100, "expected_batch_size": 10, "num_microbatches": 1, "noise_multiplier": 100.0}
    assert PrivacyPlan(**fields, num_steps=100_000, target_delta=1e-8).epsilon() > 0
    with pytest.raises(ValueError, match=r"rdp for a target_delta below 1e-07 with 1000000 steps"):
        PrivacyPlan(**fields, num_steps=1_000_000, target_delta=1e-8)
