"""Records that are named, and datasets that are told apart, by what is stored of them."""

import datasets
import pytest
import torch
from datasets import Dataset, Image
from factories import pairs, pictures, raw_pairs, tiny_processor
from transformers import default_data_collator

from hf_dpclip import DPCLIPTrainer, ImageTextCollator
from hf_dpclip.dataloader import MicrobatchDataset
from hf_dpclip.digests import sampled_digest


def digest_of(dataset, collator=default_data_collator):
    return sampled_digest(MicrobatchDataset(dataset, collator))


def with_files(folder, text: str = "a") -> Dataset:
    """Pairs whose images are files in this folder."""
    folder.mkdir()
    for number, picture in enumerate(pictures(4)):
        picture.save(folder / f"{number}.png")
    paths = [str(folder / f"{number}.png") for number in range(4)]
    return Dataset.from_dict({"image": paths, "text": [text] * 4}).cast_column("image", Image())


# ---- The same records on every process ----


def test_the_digest_is_that_of_the_records_in_their_order():
    whole = raw_pairs(200)
    digest = digest_of(whole)
    assert digest_of(raw_pairs(200).shuffle(seed=3)) != digest
    assert digest_of(whole.select(range(199))) != digest
    assert digest_of(raw_pairs(200)) == digest
    assert digest_of(whole.select(range(200))) == digest
    assert digest_of(whole.with_transform(lambda batch: {"image": [], "text": []})) == digest


def test_every_row_counts_where_there_are_few():
    digests = {
        digest_of(Dataset.from_dict({"text": ["b" if row == other else "a" for row in range(64)]}))
        for other in range(65)
    }
    assert len(digests) == 65


def test_files_in_another_folder_are_the_same_and_texts_are_not(tmp_path):
    here, there = with_files(tmp_path / "here"), with_files(tmp_path / "there")
    assert digest_of(here) == digest_of(there) != digest_of(with_files(tmp_path / "other", "b"))


def test_columns_may_come_in_any_order():
    assert digest_of(raw_pairs(4)) == digest_of(raw_pairs(4).select_columns(["text", "image"]))


class Read(torch.utils.data.Dataset):
    """What a function makes of the number of a record."""

    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.read(index)


def test_other_datasets_are_compared_by_what_is_collated():
    records = [{"pixel_values": torch.full((2, 2), float(row)), "text": str(row)} for row in range(16)]
    digest = digest_of(records)
    assert digest == digest_of([dict(record) for record in records]) == digest_of(Read(records.__getitem__))
    assert digest_of(records[::-1]) != digest != digest_of([*records[:-1], records[0]])


def test_what_the_collator_leaves_out_is_not_compared():
    there = [{"pixel_values": torch.full((2, 2), float(row)), "folder": f"/there/{row}"} for row in range(16)]
    assert digest_of(there) == digest_of([{**record, "folder": "/here"} for record in there]) is not None


def test_what_is_drawn_from_the_global_generators_is_the_same():
    noisy = Read(lambda index: {"pixel_values": torch.rand(3) + index})
    before = torch.get_rng_state()
    assert digest_of(noisy) == digest_of(noisy) is not None
    assert torch.equal(torch.get_rng_state(), before)


def collated_into_generators(records):
    return {"pixel_values": (record for record in records)}


@pytest.mark.parametrize("collator", [default_data_collator, collated_into_generators])
def test_records_that_are_never_the_same_or_cannot_be_told_are_not_compared(collator):
    generator = torch.Generator().manual_seed(0)
    own_draws = Read(lambda index: {"pixel_values": torch.rand(3, generator=generator)})
    assert digest_of(own_draws, collator) is None


def test_images_are_what_they_show_wherever_they_are(tmp_path):
    here, there = with_files(tmp_path / "here"), with_files(tmp_path / "there")
    collator = ImageTextCollator(tiny_processor())
    assert digest_of([*here], collator) == digest_of([*there], collator) != digest_of([*here][::-1], collator)


# ---- Evaluation ----


class Counting(torch.utils.data.Dataset):
    """Encoded pairs, and how often one was read."""

    def __init__(self):
        self.pairs, self.reads = pairs(8, seed=1), 0

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, number):
        self.reads += 1
        return self.pairs[number]


def test_an_error_that_is_not_about_reading_passes_at_once(make_trainer):
    dataset = Counting()
    trainer = make_trainer(trainer_options={"eval_dataset": dataset})

    def fail(*args, **kwargs):
        raise ValueError("not a number")

    trainer.prediction_step = fail
    before = dataset.reads
    with pytest.raises(ValueError, match=r"^not a number$"):
        trainer.evaluate()
    assert dataset.reads == before + 8


def test_an_evaluation_loader_may_be_any_iterable(make_trainer, monkeypatch):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)})
    batches = list(trainer.get_eval_dataloader())
    monkeypatch.setattr(DPCLIPTrainer, "get_eval_dataloader", lambda self, dataset=None: batches)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_stream_is_evaluated(make_trainer):
    stream = pairs(8, seed=1).to_iterable_dataset()
    assert isinstance(stream, datasets.IterableDataset)
    assert make_trainer().evaluate(stream)["eval_loss"] > 0
