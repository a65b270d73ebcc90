"""A hyperparameter search on two processes under the real launcher: the same trials, plans and ledger, and no hang."""

import json

import pytest
import torch
from scripts import ACCELERATE, DISTRIBUTED, output_of

from hf_dpclip.privacy import LEDGER_NAME, Ledger


TRIALS = 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each process wrote down what it saw."""
    folder = tmp_path_factory.mktemp("search")
    output_of(*ACCELERATE, DISTRIBUTED / "searching.py", folder)
    return folder


@pytest.fixture(scope="module")
def facts(folder):
    first, second = (json.loads((folder / f"facts-{process}.json").read_text()) for process in range(2))
    return first, second


def test_both_processes_take_the_same_trials_under_the_same_plans(facts):
    first, second = facts
    assert first["settings"] == second["settings"] and first["runs"] == second["runs"]
    # Two processes; and after the trials, one run with the best of their settings.
    assert first["runs"] == [[2 * batch_size, 2] for _, batch_size in first["settings"]]
    assert len(first["runs"]) == TRIALS + 1
    assert len({learning_rate for learning_rate, _ in first["settings"][:TRIALS]}) == TRIALS


def test_weights_of_every_trial_are_identical_on_both_processes(folder):
    first, second = (torch.load(folder / f"weights-{process}.pt") for process in range(2))
    assert len(first) == TRIALS + 1
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_both_processes_learn_what_was_best_and_what_all_trials_spent(facts):
    first, second = facts
    assert first["best"] == second["best"]
    learning_rate, batch_size = first["settings"][int(first["best"][0])]
    assert first["best"][2] == {"learning_rate": learning_rate, "per_device_train_batch_size": batch_size}
    assert first["epsilon"] == second["epsilon"]
    assert first["run"] == second["run"]


def test_the_ledger_records_every_trial_once(folder, facts):
    records = Ledger(folder / LEDGER_NAME).runs()
    assert [[record.plan["expected_batch_size"], record.steps] for record in records] == facts[0]["runs"]
    assert not any(record.reserved for record in records)
    assert len({record.run for record in records}) == TRIALS + 1


def test_what_would_leave_a_process_waiting_is_refused_on_both(facts):
    assert all("timeout ends a trial or the search on process 0 only" in each["refused"] for each in facts)


def test_processes_that_planned_different_runs_are_refused_on_both(facts):
    assert all("planned different runs: num_examples was 64, is 65" in each["different"] for each in facts)


def test_both_processes_know_a_checkpoint_of_their_own_run(facts):
    assert [each["resumed"][0] for each in facts] == [2, 2]
    assert facts[0]["resumed"] == facts[1]["resumed"]
