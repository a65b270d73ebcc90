"""kill -9 at random moments of training, saving and resuming: nothing is lost, and no release goes uncounted."""

import json

import pytest
from scripts import DISTRIBUTED, output_of


@pytest.fixture(
    scope="module", params=[5, pytest.param(100, marks=pytest.mark.slow)], ids=["five_kills", "hundred_kills"]
)
def killed(request, tmp_path_factory):
    """What the attempts left behind, by their own account and by an independent one."""
    folder = tmp_path_factory.mktemp("killed")
    output = output_of(DISTRIBUTED / "killed.py", folder, request.param, 0, timeout=1800)
    facts = json.loads(output.splitlines()[-1])
    print({name: value for name, value in facts.items() if name != "finals"}, f"{len(facts['finals'])} runs")
    return {**facts, "wanted": request.param}


def test_runs_were_killed_in_every_phase(killed):
    assert sum(killed["kills"].values()) == killed["wanted"]
    assert killed["wanted"] < 100 or min(killed["kills"].values()) >= 5


def test_no_release_went_uncounted_nothing_saved_was_lost_and_what_counts_as_good_is_readable(killed):
    assert killed["problems"] == []


def test_every_run_ends_at_the_planned_epsilon(killed):
    assert len(killed["finals"]) >= 2
    for final in killed["finals"]:
        assert final["steps"] == 12
        assert final["epsilon"] == final["planned"]
