"""The audit of one step: it passes the honest mechanism, nearly tight, and convicts every broken one."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from hf_dpclip import cli
from hf_dpclip.audit import MECHANISMS, audit_step, find_mechanism
from hf_dpclip.audit.bounds import ErrorBounds, lower_bounds, one_run_lower_bound, one_run_p_value, upper_bound
from hf_dpclip.audit.game import Mechanism


# The honest mechanism must not be convicted once in ten million runs of the tests.
SURE = 1 - 1e-7
BROKEN = [mechanism for mechanism in MECHANISMS if not mechanism.honest]


# ---- The bounds ----


@pytest.mark.parametrize(("events", "trials"), [(0, 50), (3, 50), (49, 50)])
def test_so_few_events_are_just_possible_at_the_upper_bound(events, trials):
    bound = upper_bound(events, trials, 0.001)
    assert stats.binom.cdf(events, trials, bound) == pytest.approx(0.001)


def test_what_happened_every_time_may_be_certain():
    assert upper_bound(50, 50, 0.001) == 1.0


def test_error_rates_of_randomised_response_give_its_epsilon():
    wrong = 1 / (1 + math.exp(1.5))
    assert ErrorBounds(wrong, wrong).epsilon(0.0) == pytest.approx(1.5)


def test_either_error_may_be_the_rare_one():
    assert ErrorBounds(0.01, 0.5).epsilon(0.1) == ErrorBounds(0.5, 0.01).epsilon(0.1) == pytest.approx(math.log(40))


def test_guessing_bounds_nothing():
    assert ErrorBounds(0.5, 0.5).epsilon(0.0) == ErrorBounds(0.5, 0.5).gaussian_epsilon(0.01) == 0.0


def test_error_rates_of_a_gaussian_give_its_epsilon():
    errors = ErrorBounds(stats.norm.sf(0.3), stats.norm.cdf(0.3 - 1.2))
    epsilon = errors.gaussian_epsilon(1e-3)
    # The definition of (ε, δ), with signal-to-noise ratio 1.2.
    delta = stats.norm.cdf(0.6 - epsilon / 1.2) - math.exp(epsilon) * stats.norm.cdf(-0.6 - epsilon / 1.2)
    assert delta == pytest.approx(1e-3, rel=1e-4)
    assert errors.epsilon(1e-3) < epsilon


def test_perfect_plays_bound_no_more_than_their_number_allows():
    bound, _ = lower_bounds(np.ones(100), np.zeros(100), [0.5], 0.01, 0.999)
    missed = 1 - 0.0005 ** (1 / 100)
    assert bound == pytest.approx(math.log((1 - 0.01 - missed) / missed))


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_bounds_of_one_run_are_those_that_its_paper_prints(canaries, guesses, correct, delta, published):
    assert one_run_lower_bound(canaries, guesses, correct, delta, 0.95) == pytest.approx(published, abs=2e-3)


def test_delta_makes_guesses_less_telling():
    pure = one_run_p_value(100, 50, 45, 1.0, 0.0)
    assert pure == pytest.approx(stats.binom.sf(44, 50, 1 / (1 + math.exp(-1))))
    assert pure < one_run_p_value(100, 50, 45, 1.0, 1e-3) <= 1


@pytest.mark.parametrize("correct", [0, 25])
def test_no_more_right_guesses_than_by_chance_bound_nothing(correct):
    assert one_run_lower_bound(100, 50, correct, 0.0, 0.95) == 0.0


# ---- The game ----


def test_the_honest_mechanism_passes_and_is_nearly_tight():
    audit = audit_step(find_mechanism("honest"))
    assert audit.epsilon_lower_bound >= 0.8 * audit.claimed_epsilon
    assert audit.claimed_epsilon == pytest.approx(8.24, abs=0.01)
    assert dataclasses.asdict(audit)["plays"] == 4500


@pytest.mark.parametrize("mechanism", BROKEN, ids=lambda mechanism: mechanism.name)
def test_a_broken_mechanism_is_convicted(mechanism):
    audit = audit_step(mechanism)
    assert audit.confidence == 0.999
    assert audit.epsilon_lower_bound > audit.claimed_epsilon > 0, audit


@pytest.mark.parametrize("mechanism", BROKEN, ids=lambda mechanism: mechanism.name)
def test_the_honest_mechanism_passes_every_game(mechanism):
    game = dataclasses.replace(mechanism.game, plays=min(100, mechanism.game.plays))
    audit = audit_step(Mechanism("honest", "", game), SURE)
    assert not audit.refuted, audit


def test_every_mistake_has_a_name_of_its_own():
    assert len({mechanism.name for mechanism in MECHANISMS}) == len(MECHANISMS)
    assert {"honest", "published-dp-clip"} <= {mechanism.name for mechanism in MECHANISMS}


# ---- The command ----


def test_the_command_lists_all_mechanisms(capsys):
    assert cli.main(["audit", "step", "--list"]) == 0
    assert capsys.readouterr().out.split() == [mechanism.name for mechanism in MECHANISMS]


def test_the_command_convicts_and_says_so_in_json(capsys):
    assert cli.main(["audit", "step", "--mechanism", "skips-empty-batches", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert list(values) == ["mechanism", "claimed_epsilon", "epsilon_lower_bound", "confidence", "delta"]
    assert values["mechanism"] == "skips-empty-batches"
    assert values["epsilon_lower_bound"] > values["claimed_epsilon"]


def test_the_command_prints_a_verdict(capsys):
    assert cli.main(["audit", "step", "--mechanism", "silently-resolved"]) == 1
    assert "CONVICTED" in capsys.readouterr().out


def test_an_unknown_mechanism_is_answered_with_the_known_ones(capsys):
    assert cli.main(["audit", "step", "--mechanism", "opacus"]) == 2
    assert "there is no mechanism 'opacus': choose one of honest, published-dp-clip" in capsys.readouterr().err
