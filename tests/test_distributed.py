"""Two processes under the real launchers: one mechanism, not two."""

import json
import sys
from math import ceil

import numpy as np
import pytest
import torch
from checks import (
    LOUD,
    check_independent_labels,
    check_noise_law,
    check_poisson_batches,
    check_uncorrelated,
    flat_weights,
    one_update,
)
from factories import tiny_clip
from gradient_checks import assert_close
from scripts import ACCELERATE, DISTRIBUTED, TORCHRUN, output_of


sys.path.insert(0, str(DISTRIBUTED))

from two_processes import averaged_update

from hf_dpclip.privacy import LEDGER_NAME, Ledger


LAUNCHERS = {"torchrun": TORCHRUN, "accelerate": ACCELERATE}


@pytest.fixture(scope="module", params=LAUNCHERS, ids=str)
def run(request, tmp_path_factory):
    """What each process wrote down."""
    folder = tmp_path_factory.mktemp(request.param)
    output_of(*LAUNCHERS[request.param], DISTRIBUTED / "two_processes.py", folder)
    return {
        "results": [dict(np.load(folder / f"process-{process}.npz")) for process in range(2)],
        "ledger": Ledger(folder / LEDGER_NAME).runs(),
        "facts": [json.loads((folder / f"facts-{process}.json").read_text()) for process in range(2)],
        "spanning": [json.loads((folder / f"spanning-{process}.json").read_text()) for process in range(2)],
    }


def test_there_are_two_processes_and_their_microbatches_add_up(run):
    assert [facts["num_processes"] for facts in run["facts"]] == [2, 2]
    # 8 examples per device in microbatches of 4, on two devices.
    assert run["facts"][0]["num_microbatches"] == 4


@pytest.mark.parametrize(
    "name", ["noisy", "exact", "exact in buckets", "spanning", "spanning in buckets", "averaged", "empty", "secure"]
)
def test_weights_are_identical_on_all_processes(run, name):
    first, second = (results[name] for results in run["results"])
    assert np.array_equal(first, second)


def test_one_process_records_what_all_take_together(run):
    assert [(record.steps, record.reserved) for record in run["ledger"]] == [(steps, 0) for steps in (3, 1, 1, 30, 1)]


def test_one_reduction_of_the_trainable_parameters_per_step(run):
    for facts in run["facts"]:
        size = facts["trainable"]
        large = [call for call in facts["collectives"] if call[1] > 100]
        assert large == [["all_reduce", size]] * facts["steps"] == [["all_reduce", size]] * 3


def test_a_microbatch_that_spans_the_processes_takes_the_two_halves_of_one_reduction(run):
    for calls, facts in zip(run["spanning"], run["facts"]):
        size = 2 * ceil(facts["trainable"] / 2)
        (embeddings, _), *large = [call for call in calls if call[1] > 100]
        assert embeddings == "all_gather"
        assert large == [["all_to_all_single", size], ["all_gather", size]]


@pytest.mark.parametrize(
    "name",
    [
        "spanning noise",
        "spanning secure noise",
        "spanning noise in buckets",
        "noise in buckets",
        "secure noise in buckets",
    ],
)
def test_every_coordinate_is_noised_once_by_one_process(run, name):
    first, second = (torch.tensor(results[name]) for results in run["results"])
    assert torch.equal(first, second)
    check_noise_law(first, 2.0)
    check_uncorrelated(*first[:20_000].chunk(2))


@pytest.mark.parametrize("name", ["spanning sums", "spanning sums in buckets"])
def test_the_parts_of_a_spanning_microbatch_are_clipped_together(run, name):
    expected = torch.tensor([0.3, 0, 0, 0, 0.4]) + torch.tensor([0.6, 0, 0, 0, 0.8])
    for results in run["results"]:
        assert torch.allclose(torch.tensor(results[name]), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["exact", "spanning"])
def test_buckets_change_nothing(run, name):
    for results in run["results"]:
        assert np.allclose(results[f"{name} in buckets"], results[name], rtol=1e-5, atol=1e-7)


def test_microbatches_that_span_the_processes_are_not_released_with_others(run):
    assert all(results["refuses a mixture"] for results in run["results"])


@pytest.mark.parametrize("kind", ["", " of a list"])
def test_records_in_another_order_are_refused_by_all(run, kind):
    assert all(results[f"refuses another order{kind}"] for results in run["results"])


def test_a_loss_that_gathers_over_processes_is_refused(run):
    assert all(results["refuses to gather"] for results in run["results"])


def test_noise_has_the_planned_variance_after_the_reduction(run):
    # Three steps of K = 4: the sum of three independent draws.
    check_noise_law(torch.tensor(run["results"][0]["noisy"]) * 4, LOUD * 2 * 3**0.5)


def test_secure_noise_of_both_processes_is_on_one_grid_and_has_the_planned_variance(run):
    values = torch.tensor(run["results"][0]["secure"])
    check_noise_law(values, 2.0)
    # The standard deviation is 1024 grid widths.
    assert torch.equal(values * 512, (values * 512).round())
    check_uncorrelated(*values.chunk(2))


def test_the_shares_of_noise_are_independent(run):
    values = torch.tensor(run["results"][0]["noisy"])
    check_uncorrelated(*(half[: len(values) // 2] for half in values.tensor_split(2)))


def test_two_processes_compute_what_one_computes(run, tmp_path):
    settings = {"non_private": True, "noise_seed": 5, "microbatch_size": 2, "per_device_train_batch_size": 16}
    update, _ = one_update(tmp_path, **settings)
    assert torch.allclose(torch.tensor(run["results"][0]["exact"]), update, atol=1e-6)


def test_one_microbatch_on_two_processes_is_the_same_as_on_one(run, tmp_path):
    settings = {"non_private": True, "noise_seed": 5, "microbatch_size": 16, "per_device_train_batch_size": 16}
    update, _ = one_update(tmp_path, **settings)
    assert_close(torch.tensor(run["results"][0]["spanning"]), update)


def test_a_resumed_run_on_two_processes_goes_on_with_the_averages(run, tmp_path):
    expected = averaged_update(tmp_path)
    assert torch.allclose(torch.tensor(run["results"][0]["averaged"]), expected, rtol=1e-5, atol=1e-6)
    assert float((expected - flat_weights(tiny_clip())).norm()) > 1e-2


def as_draws(results):
    """The microbatches of both processes, step by step: labels 1 and 2 of each are four microbatches in all."""
    shares = [result["draws"] for result in results]
    return [
        [np.flatnonzero(share[step] == label) for share in shares for label in (1, 2)]
        for step in range(len(shares[0]))
    ]


def test_batches_over_both_processes_are_poisson_samples(run):
    check_poisson_batches(as_draws(run["results"]), 60, 0.2)


def test_no_unit_is_dealt_to_both_processes(run):
    first, second = (result["draws"] > 0 for result in run["results"])
    assert not (first & second).any()


def test_labels_over_both_processes_are_independent(run):
    # They come in an order of their sizes.
    shuffled = np.random.default_rng(0)
    draws = [[step[label] for label in shuffled.permutation(len(step))] for step in as_draws(run["results"])]
    check_independent_labels(draws, 60, 0.2)
