"""The plan: what follows from it, that it survives JSON. (What it refuses: `test_bad_input.py`.)"""

import dataclasses
import json
import math

import pytest
from plans import SIZES, plan

from hf_dpclip import PrivacyPlan
from hf_dpclip.privacy import PrivacySpent, composed


def test_sampling_probability_and_microbatch_size_follow():
    assert plan().sampling_probability == 0.1
    assert plan().microbatch_size == 10


@pytest.mark.parametrize("num_microbatches, factor", [(1, 2), (10, 2), (99, 2), (100, 1)])
def test_sensitivity_is_2c_unless_units_are_microbatches_by_construction(num_microbatches, factor):
    assert plan(num_microbatches=num_microbatches, max_grad_norm=0.5).sensitivity == factor * 0.5


def test_noise_is_relative_to_the_sensitivity_not_to_the_clipping_norm():
    assert plan(max_grad_norm=0.5).noise_std == 1.25 * 2 * 0.5
    assert plan(num_microbatches=100, max_grad_norm=0.5).noise_std == 1.25 * 0.5


def test_delta_defaults_to_less_than_one_over_n():
    assert PrivacyPlan(**SIZES, noise_multiplier=1.25).target_delta == pytest.approx(1000**-1.1)


def test_epsilon_defaults_to_all_steps():
    assert plan().epsilon() == plan().epsilon(20) > plan().epsilon(19)


def test_signal_to_noise_is_the_ratio_of_norms():
    assert plan(max_grad_norm=0.5).signal_to_noise(400) == pytest.approx(10 * 0.5 / (1.25 * 20))
    assert plan(noise_multiplier=0, non_private=True).signal_to_noise(400) == math.inf


def test_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().noise_multiplier = 0.1


def test_calibrate_reaches_the_target_and_remembers_it():
    calibrated = PrivacyPlan.calibrate(target_epsilon=2.0, **SIZES)
    assert 0.99 * 2.0 <= calibrated.epsilon() <= 2.0
    assert calibrated.target_epsilon == 2.0


def test_plan_survives_json():
    original = plan(
        target_epsilon=3.0, max_grad_norm=0.5, clipping="automatic", accountant="rdp", privacy_unit="patient"
    )
    assert PrivacyPlan.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_dictionary_says_everything_the_guarantee_depends_on():
    values = plan(max_grad_norm=0.5).to_dict()
    assert values["sampling_probability"] == 0.1
    assert values["sensitivity"] == 1.0
    assert values["noise_std"] == 1.25
    assert values["adjacency"] == "add_or_remove_one"
    assert values["sampler"] == "poisson"
    assert values["accountant_version"].startswith("dp-accounting ")


@pytest.mark.parametrize(
    "edit",
    [
        {"sensitivity": 0.5},
        {"noise_std": 9.0},
        {"adjacency": "replace_one"},
        {"sampler": "shuffle"},
        {"sampling_probability": 0.01},
        {"noise_multiplier": 3.0},
        {"invented": 1},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_edited_dictionary_is_refused(edit):
    with pytest.raises(ValueError, match=f"{next(iter(edit))}|noise_std"):
        PrivacyPlan.from_dict({**plan().to_dict(), **edit})


def test_incomplete_dictionary_is_refused():
    values = plan().to_dict()
    del values["num_steps"]
    with pytest.raises(ValueError, match=r"missing.*num_steps"):
        PrivacyPlan.from_dict(values)


def test_runs_that_protect_different_units_are_not_added_up():
    with pytest.raises(ValueError, match="different privacy units, patient and record, have no common"):
        composed([(plan(), 3), (plan(privacy_unit="patient"), 3)])
    assert composed([(plan(), 0), (plan(privacy_unit="patient"), 3)]).steps == 3


def test_runs_of_one_mechanism_compose_as_their_steps_do():
    assert composed([(plan(), 3), (plan(num_steps=50), 4)]) == PrivacySpent(plan().epsilon(7), 1e-5, 7)


def test_runs_of_several_share_the_smallest_delta_of_all():
    """Were δ added up, ten runs would have one at which publishing a record counts as private."""
    noises = [1.0, *(1.0 + number / 10 for number in range(9))]
    shares = [plan(noise_multiplier=sigma, target_delta=plan().target_delta / 10) for sigma in noises]
    spent = composed([(plan(noise_multiplier=sigma), 3) for sigma in noises])
    assert (spent.delta, spent.steps) == (plan().target_delta, 30)
    assert spent.epsilon == pytest.approx(sum(share.epsilon(3) for share in shares))
    stricter = plan(target_delta=plan().target_delta / 7)
    assert composed([(plan(), 3), (stricter, 4)]) == PrivacySpent(stricter.epsilon(7), stricter.target_delta, 7)


def test_runs_with_accountants_of_their_own_are_added_up():
    plans = plan(), plan(accountant="rdp")
    halves = [dataclasses.replace(each, target_delta=each.target_delta / 2).epsilon(3) for each in plans]
    assert composed([(each, 3) for each in plans]).epsilon == sum(halves)


def test_a_share_that_is_too_small_for_pld_is_accounted_by_rdp():
    small = plan(target_delta=1e-9)
    assert composed([(small, 3)]).epsilon == small.epsilon(3)
    runs = [(plan(target_delta=1e-9, noise_multiplier=sigma), 3) for sigma in (1.25, 2.0)]
    shares = [plan(target_delta=5e-10, noise_multiplier=sigma, accountant="rdp") for sigma in (1.25, 2.0)]
    assert composed(runs).epsilon == sum(share.epsilon(3) for share in shares)
