"""Units of several records: all of an id's records move the sum as one record does, however many they are."""

import numpy as np
import pytest
import torch
from checks import Given, check_binomial, check_bounded, sum_of_clipped
from datasets import Dataset
from factories import arguments
from plans import one_step_plan

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.dataloader import ForwardBatchSampler
from hf_dpclip.privacy import PoissonSampler, Randomness
from hf_dpclip.privacy_units import PrivacyUnits


# The id with many records, the last in order: without it, the other units keep their numbers.
CANARY, CANARY_RECORDS = 9, 50


def records_of_ids(with_canary: bool = True) -> Dataset:
    """Nine ids of two records, and, if asked for, one of fifty that all turn the gradient of the others around."""
    ids = [unit for unit in range(CANARY) for _ in range(2)] + [CANARY] * CANARY_RECORDS * with_canary
    vectors = [[-10.0 if unit == CANARY else 1.0, 0.1 * unit, 0.0, 0.0] for unit in ids]
    return Dataset.from_dict({"vector": vectors, "user": ids}).with_format("torch")


def sum_over_ids(folder, monkeypatch, dataset, microbatches, **overrides) -> torch.Tensor:
    settings = {"privacy_unit_column": "user", **overrides}
    return sum_of_clipped(folder, monkeypatch, Given(), dataset, microbatches, **settings)


def difference(folder, monkeypatch, microbatches, **overrides) -> torch.Tensor:
    """What the canary, drawn as the microbatches say, changes in the sum."""
    without = [[unit for unit in microbatch if unit != CANARY] for microbatch in microbatches]
    with_it = sum_over_ids(folder, monkeypatch, records_of_ids(), microbatches, **overrides)
    return with_it - sum_over_ids(folder, monkeypatch, records_of_ids(False), without, **overrides)


CAPS = [{}, {"max_records_per_unit": 1}, {"max_records_per_unit": 7}]


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_an_id_of_many_records_moves_the_sum_by_at_most_2c(tmp_path, monkeypatch, cap):
    moved = difference(tmp_path, monkeypatch, [[0, 3], [1, CANARY], [], [2, 4, 5]], microbatch_size=2, **cap)
    check_bounded(moved, 2.0)
    # The bound is of use: little less would not do.
    assert float(moved.norm()) > 1.9


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_an_id_in_a_microbatch_of_its_own_moves_the_sum_by_at_most_c(tmp_path, monkeypatch, cap):
    moved = difference(tmp_path, monkeypatch, [[0], [CANARY], [5]], microbatch_size=1, **cap)
    check_bounded(moved, 1.0)
    assert float(moved.norm()) > 0.9


def test_records_as_units_would_let_one_id_move_more(tmp_path, monkeypatch):
    """What goes wrong without the column: the records of one id turn several microbatches around."""
    first_canary_record = 2 * CANARY
    with_it = [[0, first_canary_record], [1, first_canary_record + 1], [2, first_canary_record + 2]]
    settings = {"microbatch_size": 2, "privacy_unit_column": None}
    moved = sum_over_ids(tmp_path, monkeypatch, records_of_ids(), with_it, **settings)
    moved -= sum_over_ids(tmp_path, monkeypatch, records_of_ids(False), [[0], [1], [2]], **settings)
    with pytest.raises(AssertionError, match="norm"):
        check_bounded(moved, 2.0)


# ---- Which records of an id take part ----

DRAWS, SIZE, CAP = 6000, 10, 3


def units_of(sizes: list[int], max_records: int | None = None) -> PrivacyUnits:
    ids = np.repeat(np.arange(len(sizes)), sizes)
    return PrivacyUnits(Dataset.from_dict({"user": ids.tolist()}), "user", max_records)


def test_the_cap_bounds_the_records_of_every_unit():
    units = units_of([SIZE, 2, CAP, 1], max_records=CAP)
    drawn = units.records(np.arange(4), seed=1)
    assert np.bincount(np.repeat(np.arange(4), [SIZE, 2, CAP, 1])[drawn]).tolist() == [CAP, 2, CAP, 1]
    assert len(set(drawn.tolist())) == len(drawn)


def test_without_a_cap_all_records_take_part():
    assert len(units_of([SIZE, 2]).records(np.arange(2), seed=1)) == SIZE + 2


def test_ids_are_told_apart_by_every_character():
    """numpy takes texts that differ by NUL characters at their end for the same."""
    units = PrivacyUnits(Dataset.from_dict({"id": ["b", "a\0", "a", "b"]}), "id")
    assert [units.records([unit], 0).tolist() for unit in range(len(units))] == [[2], [1], [0, 3]]


def test_every_record_of_a_large_unit_is_as_likely_as_the_others():
    units, seeds = units_of([2, SIZE], CAP), Randomness().sampling().integers(2**32, size=DRAWS)
    drawn = [set(units.records(np.array([1]), int(seed)).tolist()) for seed in seeds]
    for record in range(2, 2 + SIZE):
        check_binomial([record in each for each in drawn], 1, CAP / SIZE)
    for pair in ({2, 3}, {2, 1 + SIZE}):
        check_binomial([pair <= each for each in drawn], 1, CAP * (CAP - 1) / (SIZE * (SIZE - 1)))


def test_the_subset_depends_on_the_microbatch_only():
    units = units_of([SIZE] * 3, CAP)
    assert np.array_equal(units.records(np.array([1]), seed=7), units.records(np.array([1]), seed=7))
    assert not np.array_equal(units.records(np.array([1]), seed=7), units.records(np.array([1]), seed=8))


def sampler_of(units: PrivacyUnits, steps: int, num_microbatches: int, seed: int | None = None, **options):
    plan = one_step_plan(
        num_examples=len(units), expected_batch_size=len(units) // 4, num_microbatches=num_microbatches
    )
    poisson = PoissonSampler(plan, Randomness(seed).sampling())
    return ForwardBatchSampler(poisson, units, steps, forward_passes=1, **options)


@pytest.mark.parametrize(("num_microbatches", "max_records"), [(2, None), (6, 2)])
def test_ids_are_poisson_sampled_whatever_the_number_of_their_records(num_microbatches, max_records):
    sizes = [1 + unit % 5 for unit in range(24)]
    owner = np.repeat(np.arange(24), sizes)
    sampler = sampler_of(units_of(sizes, max_records), DRAWS, num_microbatches)
    drawn = [{int(owner[record]) for _, records in batch for record in records} for batch in sampler]
    check_binomial([len(ids) for ids in drawn], 24, 0.25)
    for pair in ({0, 1}, {4, 23}):
        check_binomial([pair <= ids for ids in drawn], 1, 0.25**2)


def test_processes_agree_on_the_records_of_a_microbatch_that_spans_them():
    units = units_of([SIZE] * 8, CAP)
    shares = [
        sampler_of(units, 20, 1, seed=3, process=process, num_processes=2, spanning=True) for process in range(2)
    ]
    (whole,) = [sampler_of(units, 20, 1, seed=3, spanning=True)]
    for batch, *parts in zip(whole, *shares):
        ((_, records),) = batch
        together = np.concatenate([share for part in parts for _, share in part])
        assert sorted(together) == sorted(records)


def test_the_cap_bounds_the_rows_that_reach_the_model(tmp_path):
    rows = []

    def collator(records):
        rows.append(len(records))
        return torch.utils.data.default_collate([{"vector": record["vector"]} for record in records])

    settings = {"per_device_train_batch_size": 5, "microbatch_size": 1, "max_records_per_unit": CAP, "max_steps": 20}
    args = arguments(tmp_path, privacy_unit_column="user", remove_unused_columns=False, **settings)
    trainer = DPCLIPTrainer(Given(), args, collator, records_of_ids())
    trainer.train()
    assert max(rows) == CAP
    assert trainer.plan.num_examples == CANARY + 1
