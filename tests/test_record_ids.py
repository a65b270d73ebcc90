"""That records which are listed twice are told from those that are only equal."""

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, interleave_datasets
from factories import arguments, pairs, tiny_clip
from torch.utils.data import ConcatDataset, Subset

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.data import hold_out
from hf_dpclip.held_out import check_evaluation_data
from hf_dpclip.record_ids import RecordIds


TABLE = Dataset.from_dict({"number": [*range(20)], "text": ["a"] * 20, "nothing": [None] * 20})
EQUAL = Dataset.from_dict({"number": [*range(20)], "text": ["a"] * 20, "nothing": [None] * 20})
RECORDS = [{"number": number} for number in range(20)]


class WithoutLength:
    """A dataset of torch, whose records have names."""

    def __getitem__(self, name):
        return {"number": name}


def num_copies(dataset) -> int:
    ids = RecordIds().of(dataset)
    assert len(ids) == len(dataset)
    return len(ids) - len(np.unique(ids))


@pytest.mark.parametrize(
    "dataset, expected",
    [
        (TABLE.repeat(3), 40),
        (TABLE.select([0, 1, 1, 2, 1]), 2),
        (TABLE.shuffle(seed=0).repeat(2).shuffle(seed=1), 20),
        (concatenate_datasets([TABLE, EQUAL, TABLE.select(range(15, 20))]), 5),
        (interleave_datasets([TABLE, EQUAL.select(range(5))], stopping_strategy="all_exhausted"), 15),
        (ConcatDataset([TABLE, EQUAL, TABLE]), 20),
        (Subset(TABLE, [0] * 8), 7),
        (Subset(TABLE.select([3, 4, 3]), [0, 2]), 1),
        (RECORDS * 2, 20),
        (ConcatDataset([Subset(RECORDS, range(8)), RECORDS]), 8),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_records_that_are_listed_again_are_counted(dataset, expected):
    assert num_copies(dataset) == expected


@pytest.mark.parametrize(
    "dataset",
    [
        TABLE,
        TABLE.shuffle(seed=0),
        TABLE.select([5, 3, 9]),
        concatenate_datasets([TABLE, EQUAL]),
        concatenate_datasets([TABLE.select(range(10)), TABLE.select(range(10, 20))]),
        concatenate_datasets([TABLE.select([2, 4]).flatten_indices(), TABLE.select([1, 3])]),
        concatenate_datasets([TABLE.add_column("view", [0] * 20), TABLE.add_column("view", [1] * 20)]),
        TABLE.with_format("torch"),
        RECORDS,
        [dict(record) for record in RECORDS * 2],
        Subset(TABLE, [1, 0]),
        Subset(WithoutLength(), [107, 3, 5]),
        concatenate_datasets([TABLE.add_column("caption", ["a"] * 20), TABLE.add_column("caption", ["b"] * 20)]),
        ConcatDataset([TABLE, EQUAL]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_others_are_not(dataset):
    assert num_copies(dataset) == 0


def test_a_table_of_many_chunks_has_each_record_once():
    parts = [Dataset.from_dict({"number": [part] * 3}) for part in range(50)]
    whole = concatenate_datasets(parts)
    assert len(whole.data.column("number").chunks) == 50
    assert num_copies(whole) == 0
    assert num_copies(concatenate_datasets([whole, parts[7]])) == 3


# ---- In the trainer ----

OVERSAMPLED = {
    "table": lambda: pairs(16).repeat(2),
    "list": lambda: [*pairs(16)] * 2,
    "subset": lambda: Subset(pairs(16), [*range(16)] * 2),
}


@pytest.mark.parametrize(
    "public", [{"non_private": True}, {"log_private_statistics": True}], ids=lambda each: next(iter(each))
)
def test_where_nothing_is_promised_they_are_not(make_trainer, public):
    assert make_trainer(train_dataset=pairs(16).repeat(2), **public).plan.num_examples == 32


@pytest.mark.parametrize("make", OVERSAMPLED.values(), ids=OVERSAMPLED)
def test_oversampled_records_are_refused(make, make_trainer):
    with pytest.raises(ValueError, match=r"lists records more than once .* 16 times.* raise num_train_epochs"):
        make_trainer(train_dataset=make())


def test_a_column_that_says_which_are_copies_makes_them_one_unit(tmp_path):
    records = pairs(16).add_column("record", [*range(16)]).repeat(2)
    args = arguments(tmp_path, privacy_unit_column="record")
    assert DPCLIPTrainer(tiny_clip(), args, train_dataset=records).plan.num_examples == 16


def split(seed):
    return WHOLE.train_test_split(0.25, seed=seed)


WHOLE = pairs(64).add_column("id", [*range(64)])
FEATURES = WHOLE.remove_columns("pixel_values")


@pytest.mark.parametrize(
    "private, evaluated",
    [
        (split(1)["train"], split(2)["test"]),
        (split(1)["train"], concatenate_datasets([pairs(32, seed=1), split(1)["train"].select([3])])),
        (FEATURES.select(range(40)), FEATURES.select(range(39, 64))),
        (WHOLE.remove_columns("id").select(range(40)), WHOLE.select(range(39, 64))),
    ],
    ids=["another split", "one among others", "without images", "other columns"],
)
def test_evaluation_data_with_a_private_record_is_refused(private, evaluated):
    with pytest.raises(ValueError, match="among those of the private training dataset"):
        check_evaluation_data(private, evaluated, unit_column=None)


@pytest.mark.parametrize("held_out", [split(1), hold_out(WHOLE, "id")], ids=["split", "hold_out"])
def test_what_was_held_out_of_one_table_is_accepted(tmp_path, held_out):
    trainer = DPCLIPTrainer(
        tiny_clip(), arguments(tmp_path), train_dataset=held_out["train"], eval_dataset=held_out["test"]
    )
    assert "eval_loss" in trainer.evaluate()
