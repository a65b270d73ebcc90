"""From Poisson draws to collated microbatches: nothing is lost, doubled, or mixed on the way."""

import random

import numpy as np
import pytest
import torch
from checks import flat_weights
from datasets import Dataset
from factories import arguments, pairs
from torch.utils.data import DataLoader

from hf_dpclip import DPTrainingArguments, PrivacyPlan
from hf_dpclip.dataloader import (
    ForwardBatchSampler,
    LoadedChunks,
    MicrobatchDataset,
    RecordNumbers,
    make_dataloader,
)
from hf_dpclip.privacy import PoissonSampler
from hf_dpclip.privacy_units import PrivacyUnits


class Scripted:
    """A sampler whose draws are known: step s is a list of microbatches."""

    def __init__(self, steps: list[list[list[int]]]):
        self.steps = iter(steps)

    def draw(self) -> list[np.ndarray]:
        return [np.array(microbatch, dtype=np.int64) for microbatch in next(self.steps)]

    def draw_seeds(self, count: int) -> list[int]:
        return list(range(count))


def deal(steps, units, num_processes: int, forward_passes: int) -> list[list[list[list[int]]]]:
    """For each process, its forward batches, each a list of microbatches of record numbers."""
    return [
        [
            [records.tolist() for _, records in forward_batch]
            for forward_batch in ForwardBatchSampler(
                Scripted(steps), units, len(steps), forward_passes, process, num_processes
            )
        ]
        for process in range(num_processes)
    ]


def grouped(*values) -> PrivacyUnits:
    dataset = pairs(len(values)).add_column("user_id", list(values))
    return PrivacyUnits(dataset, "user_id")


# ---- Privacy units ----


def test_every_record_is_a_unit_by_default():
    units = PrivacyUnits(pairs(5))
    assert len(units) == units.num_records == 5
    assert units.records(np.array([3, 1]), seed=0).tolist() == [3, 1]


@pytest.mark.parametrize("values", [[7, 5, 7, 7, 5], ["b", "a", "b", "b", "a"]], ids=["integers", "strings"])
def test_records_with_one_value_are_one_unit(values):
    units = grouped(*values)
    assert (len(units), units.num_records) == (2, 5)
    assert units.records(np.array([0]), seed=0).tolist() == [1, 4]
    assert units.records(np.array([1]), seed=0).tolist() == [0, 2, 3]


def test_every_record_belongs_to_exactly_one_unit():
    values = np.random.default_rng(0).integers(10, size=50).tolist()
    units = grouped(*values)
    records = units.records(np.arange(len(units)), seed=0)
    assert sorted(records.tolist()) == list(range(50))


def test_no_units_have_no_records():
    assert grouped(1, 1, 2).records(np.array([], dtype=np.int64), seed=0).tolist() == []


# ---- Dealing microbatches out ----

SETTINGS = [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2), (4, 4)]


@pytest.mark.parametrize(("num_processes", "forward_passes"), SETTINGS)
@pytest.mark.parametrize("num_microbatches", [1, 5, 12, 13])
def test_each_microbatch_goes_to_exactly_one_forward_batch(num_processes, forward_passes, num_microbatches):
    microbatches = [[10 * j, 10 * j + 1] for j in range(num_microbatches)]
    dealt = deal([microbatches], PrivacyUnits(pairs(130)), num_processes, forward_passes)
    everywhere = [microbatch for process in dealt for forward_batch in process for microbatch in forward_batch]
    assert sorted(everywhere) == microbatches


@pytest.mark.parametrize(("num_processes", "forward_passes"), SETTINGS)
@pytest.mark.parametrize(
    "steps",
    [[[], [[1], [2]]], [[[]] * 12, [[1]] * 12], [[[j] for j in range(29)], [[1]]]],
    ids=["no_microbatch", "empty_microbatches", "uneven"],
)
def test_every_process_runs_the_same_number_of_forward_passes_whatever_was_drawn(num_processes, forward_passes, steps):
    dealt = deal(steps, PrivacyUnits(pairs(30)), num_processes, forward_passes)
    assert [len(process) for process in dealt] == [len(steps) * forward_passes] * num_processes


def test_a_forward_batch_holds_microbatches_of_its_own_step_only():
    steps = [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    dealt = deal(steps, PrivacyUnits(pairs(8)), num_processes=2, forward_passes=2)
    drawn_by_step = [
        {record for process in dealt for batch in process[2 * s : 2 * s + 2] for m in batch for record in m}
        for s in range(2)
    ]
    assert drawn_by_step == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_equally_many_microbatches_reach_every_forward_pass():
    dealt = deal([[[j] for j in range(12)]], PrivacyUnits(pairs(12)), num_processes=2, forward_passes=3)
    assert [[len(batch) for batch in process] for process in dealt] == [[2, 2, 2], [2, 2, 2]]


def records_in(forward_batches) -> int:
    return sum(len(microbatch) for forward_batch in forward_batches for microbatch in forward_batch)


@pytest.mark.parametrize(("num_processes", "forward_passes"), SETTINGS)
def test_records_are_shared_out_evenly(num_processes, forward_passes):
    sizes = np.random.default_rng(num_processes).poisson(4, size=24)
    microbatches = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    dealt = deal([microbatches], PrivacyUnits(pairs(sum(sizes))), num_processes, forward_passes)
    of_process = [records_in(forward_batches) for forward_batches in dealt]
    assert max(of_process) - min(of_process) <= max(sizes)
    for forward_batches in dealt:
        of_forward_pass = [records_in([forward_batch]) for forward_batch in forward_batches]
        assert max(of_forward_pass) - min(of_forward_pass) <= max(sizes)


def test_processes_run_parts_of_the_same_microbatches_in_each_forward_pass():
    microbatches = [list(range(10 * j, 10 * j + 2 + j % 3)) for j in range(6)]

    def seeds_and_parts(process: int) -> list[list[tuple[int, list[int]]]]:
        sampler = ForwardBatchSampler(
            Scripted([microbatches]), PrivacyUnits(pairs(60)), 1, 2, process, num_processes=2, spanning=True
        )
        return [[(seed, part.tolist()) for seed, part in forward_batch] for forward_batch in sampler]

    for first, second in zip(seeds_and_parts(0), seeds_and_parts(1), strict=True):
        assert [seed for seed, _ in first] == [seed for seed, _ in second]
        for (seed, one), (_, other) in zip(first, second):
            assert sorted(one + other) == microbatches[seed]


def test_a_microbatch_keeps_its_seed_wherever_it_is_computed():
    microbatches = [list(range(10 * j, 10 * j + 1 + j % 4)) for j in range(12)]
    for process in range(3):
        sampler = ForwardBatchSampler(Scripted([microbatches]), PrivacyUnits(pairs(120)), 1, 2, process, 3)
        assert all(records.tolist() == microbatches[seed] for batch in sampler for seed, records in batch)


def test_empty_microbatches_are_left_out():
    assert deal([[[], [3], []]], PrivacyUnits(pairs(4)), num_processes=1, forward_passes=1) == [[[[3]]]]


def test_the_length_is_the_number_of_forward_batches():
    sampler = ForwardBatchSampler(Scripted([[[0]]] * 3), PrivacyUnits(pairs(4)), steps=3, forward_passes=2)
    assert len(sampler) == len(list(sampler)) == 6


def test_all_records_of_a_unit_land_in_one_microbatch():
    users = np.arange(60) % 12
    units = grouped(*users.tolist())
    plan = PrivacyPlan(12, expected_batch_size=6, num_microbatches=3, num_steps=40, noise_multiplier=1.0)
    sampler = PoissonSampler(plan, np.random.default_rng(0))
    for forward_batch in ForwardBatchSampler(sampler, units, steps=40, forward_passes=1):
        places = [set(users[records]) for _, records in forward_batch]
        assert sum(map(len, places)) == len(set().union(*places)), "a user is in two microbatches"
        for (_, records), present in zip(forward_batch, places):
            assert sorted(records) == [record for record in range(60) if users[record] in present]


# ---- Collating ----


def padding_collator(records: list[dict]) -> dict[str, torch.Tensor]:
    return {"ids": torch.nn.utils.rnn.pad_sequence([record["ids"] for record in records], batch_first=True)}


def ragged(*lengths: int) -> list[dict]:
    return [{"ids": torch.ones(length, dtype=torch.int64)} for length in lengths]


def test_padding_of_a_microbatch_does_not_depend_on_another_one():
    dataset = MicrobatchDataset(ragged(2, 3, 9), padding_collator)
    (_, first), (_, second) = dataset[[(5, np.array([0, 1])), (6, np.array([2]))]]
    assert first["ids"].shape == (2, 3)
    assert second["ids"].shape == (1, 9)


def test_the_dtype_of_a_microbatch_does_not_depend_on_another_one():
    """A missing value makes floats of all that is read together."""
    dataset = Dataset.from_dict({"value": [16777217, 5, None]}).with_format("numpy")
    microbatches = MicrobatchDataset(dataset, lambda records: {"value": [record["value"] for record in records]})
    forward_batch = [(1, np.array([0])), (2, np.array([1, 2]))]
    assert [int(value) for value in microbatches[forward_batch][0][1]["value"]] == [16777217]


@pytest.mark.parametrize("as_list", [False, True], ids=["datasets.Dataset", "list"])
def test_a_microbatch_holds_the_records_that_were_drawn(as_list):
    records = pairs(6)
    dataset = MicrobatchDataset(list(records) if as_list else records, torch.utils.data.default_collate)
    ((seed, microbatch),) = dataset[[(5, np.array([4, 1]))]]
    assert seed == 5
    assert torch.equal(microbatch["pixel_values"], records[[4, 1]]["pixel_values"])
    assert torch.equal(microbatch["input_ids"], records[[4, 1]]["input_ids"])


def test_microbatches_that_are_read_together_hold_their_own_records():
    """A table without a format is read once for the whole forward batch."""
    table = Dataset.from_dict({"number": list(range(10))})
    dataset = MicrobatchDataset(table, lambda records: {"numbers": [record["number"] for record in records]})
    microbatches = dataset[[(5, np.array([4, 1])), (6, np.array([7])), (7, np.array([0, 9, 2]))]]
    assert [(seed, inputs["numbers"]) for seed, inputs in microbatches] == [(5, [4, 1]), (6, [7]), (7, [0, 9, 2])]


def test_augmentation_of_a_microbatch_depends_on_its_own_seed_only():
    def augmenting(records):
        return {"ids": torch.rand(len(records)), "python": random.random(), "numpy": np.random.rand()}

    dataset = MicrobatchDataset(ragged(*[1] * 5), augmenting)
    (_, alone), *_ = dataset[[(7, np.array([0, 1]))]]
    _, (_, after_others) = dataset[[(3, np.array([2, 3, 4])), (7, np.array([0, 1]))]]
    assert torch.equal(alone["ids"], after_others["ids"])
    assert (alone["python"], alone["numpy"]) == (after_others["python"], after_others["numpy"])


@pytest.mark.parametrize("bad", [[1, None], [[1], [2]]], ids=["missing", "lists"])
def test_units_that_are_not_ids_are_refused(bad):
    with pytest.raises(ValueError, match="neither strings nor whole numbers"):
        grouped(*bad)


def test_an_empty_forward_batch_collates_to_no_microbatch():
    assert MicrobatchDataset(pairs(4), torch.utils.data.default_collate)[[]] == []


def test_what_is_loaded_is_on_the_device(tmp_path, monkeypatch):
    args = arguments(tmp_path, dataloader_pin_memory=False)
    monkeypatch.setattr(DPTrainingArguments, "device", torch.device("meta"))
    collated = MicrobatchDataset(pairs(4), torch.utils.data.default_collate)
    ((seed, inputs),) = next(iter(make_dataloader(collated, [[(7, np.arange(2))]], args)))
    assert seed == 7 and {value.device.type for value in inputs.values()} == {"meta"}
    ((seed, records),) = next(iter(make_dataloader(RecordNumbers(4), [[(7, np.arange(2))]], args)))
    assert seed == 7 and records.tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("device, times_read", [("cpu", 2), ("meta", 1)])
def test_an_accelerator_leaves_chunks_in_the_hosts_memory(device, times_read, tmp_path, monkeypatch):
    """Decoding images a second time would take longer than computing with them."""
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, microbatch_size=12)
    args.dataloader_pin_memory = True
    monkeypatch.setattr(DPTrainingArguments, "device", torch.device(device))
    monkeypatch.setattr("hf_dpclip.dataloader.send_to_device", lambda forward_batch, *_, **__: forward_batch)
    read = []
    collated = MicrobatchDataset(range(100), lambda records: read.extend(records) or {"records": list(records)})
    chunks = LoadedChunks(collated, 7, np.arange(20, 30), args)
    first, second = list(chunks), list(chunks)
    assert first == second
    assert len(chunks) == len(first)
    assert [inputs["records"] for _, inputs in first] == [[20, 21, 22, 23, 24], [25, 26, 27, 28, 29]]
    assert read == times_read * list(range(20, 30))


@pytest.mark.parametrize(
    "records, expected", [(0, []), (1, [1]), (5, [5]), (6, [3, 3]), (11, [4, 4, 3]), (13, [5, 4, 4])]
)
def test_chunks_are_as_many_as_expected_and_about_equal(records, expected, tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, microbatch_size=12)
    collated = MicrobatchDataset(range(100), lambda records: {"records": list(records)})
    chunks = LoadedChunks(collated, 7, np.arange(records), args)
    read = [inputs["records"] for _, inputs in chunks]
    assert len(chunks) == len(read)
    assert [len(chunk) for chunk in read] == expected
    assert [number for chunk in read for number in chunk] == list(range(records))
    assert len({seed for seed, _ in chunks}) == len(read)


@pytest.mark.parametrize("spans", [False, True])
def test_who_computes_a_microbatch_shows_in_its_seeds_only_if_all_do(spans, tmp_path, monkeypatch):
    """Who does follows from the sizes of all microbatches, of which none may reach into another's randomness."""
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, microbatch_size=4)
    monkeypatch.setattr(DPTrainingArguments, "microbatch_spans_processes", spans)
    collated = MicrobatchDataset(range(100), lambda records: {})
    seeds = []
    for process in range(2):
        monkeypatch.setattr(DPTrainingArguments, "process_index", process)
        seeds.append([seed for seed, _ in LoadedChunks(collated, 7, np.arange(4), args)])
    assert (seeds[0] != seeds[1]) == spans


# ---- In the trainer ----


def test_the_trainer_loads_as_many_forward_batches_as_an_epoch_has_steps_times_accumulation(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=3, per_device_train_batch_size=4, train_dataset=pairs(50))
    trainer.train()
    loader = trainer.get_train_dataloader()
    assert isinstance(loader, DataLoader)
    assert len(loader) == len(list(loader)) == 5 * 3


def test_the_trainer_draws_anew_in_every_epoch(make_trainer):
    trainer = make_trainer()
    trainer.train()
    loader = trainer.get_train_dataloader()
    first, second = ([m["input_ids"].tolist() for batch in loader for _, m in batch] for _ in range(2))
    assert first != second


def test_worker_processes_load_the_same_microbatches(make_trainer):
    models = []
    for workers in (0, 2):
        trainer = make_trainer(dataloader_num_workers=workers, noise_seed=3, max_steps=3)
        trainer.train()
        assert trainer.privacy_spent().steps == 3
        models.append(flat_weights(trainer.model))
    assert torch.equal(*models)


def test_columns_that_the_model_does_not_read_reach_neither_collator_nor_model(make_trainer):
    seen = []

    def collator(records):
        seen.extend(set(record) for record in records)
        return torch.utils.data.default_collate(records)

    dataset = pairs(64).add_column("user_id", [i % 16 for i in range(64)])
    make_trainer(
        train_dataset=dataset, privacy_unit_column="user_id", trainer_options={"data_collator": collator}
    ).train()
    assert seen
    assert all(columns == {"pixel_values", "input_ids"} for columns in seen)


def test_a_plan_counts_units_where_records_are_grouped(make_trainer):
    dataset = pairs(64).add_column("user_id", [i % 16 for i in range(64)])
    plan = make_trainer(train_dataset=dataset, privacy_unit_column="user_id").plan
    assert (plan.num_examples, plan.privacy_unit, plan.sampling_probability) == (16, "user_id", 0.5)
