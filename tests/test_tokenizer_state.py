"""The files of a tokenizer do not tell how long private texts are."""

import json

import numpy as np
import pytest
from factories import arguments, pairs, tiny_clip, tiny_processor, with_texts
from transformers import default_data_collator

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.tokenizer_state import TokenizerState


LONG = "u" * 12


def to_the_longest_of_a_batch(processor):
    """A collator that cuts and pads as the texts ask for."""

    def collate(records):
        texts = [record["text"] for record in records]
        longest = min(max(map(len, texts)) + 2, 16)
        settings = {"padding": "max_length", "max_length": longest, "truncation": True, "return_tensors": "pt"}
        images = processor.image_processor([record["image"] for record in records], return_tensors="pt")
        return {**processor.tokenizer(texts, **settings), **images}

    return collate


@pytest.mark.parametrize("drawn", [[0, 1], [2, 15]], ids=["short texts", "the long one"])
def test_saved_files_do_not_show_the_texts_of_the_last_microbatch(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: [np.array(drawn)])
    processor, records = tiny_processor(), with_texts(["a cat"] * 15 + [LONG])
    processor.tokenizer.backend_tokenizer.enable_truncation(max_length=9)
    args = arguments(tmp_path, per_device_train_batch_size=4, remove_unused_columns=False, max_steps=1)
    collate = to_the_longest_of_a_batch(processor)
    trainer = DPCLIPTrainer(tiny_clip(), args, collate, records, processing_class=processor)
    trainer.train()
    in_use = processor.tokenizer.backend_tokenizer.padding
    trainer.save_model(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["padding"] is None and saved["truncation"]["max_length"] == 9
    assert in_use["length"] > 0 and processor.tokenizer.backend_tokenizer.padding == in_use


@pytest.mark.parametrize("collator", [None, default_data_collator], ids=["nothing", "a function"])
def test_what_has_no_tokenizer_is_saved_without_one(tmp_path, collator):
    trainer = DPCLIPTrainer(tiny_clip(), arguments(tmp_path), collator, pairs(64))
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "privacy.json").exists() and not [*(tmp_path / "saved").glob("tokenizer*")]


def test_a_tokenizer_that_neither_padded_nor_cut_does_not_where_it_is_restored():
    tokenizer = tiny_processor().tokenizer
    state, backend = TokenizerState(tokenizer), tokenizer.backend_tokenizer
    tokenizer("a", padding="max_length", max_length=7, truncation=True)
    with state.restored():
        assert backend.padding is None and backend.truncation is None


def test_settings_come_back_as_they_were():
    tokenizer = tiny_processor().tokenizer
    tokenizer("a", padding="max_length", max_length=7, truncation=True)
    state, backend = TokenizerState(tokenizer), tokenizer.backend_tokenizer
    before = backend.padding, backend.truncation
    tokenizer("a", padding="max_length", max_length=11, truncation=True)
    with state.restored():
        assert (backend.padding, backend.truncation) == before
    assert backend.padding["length"] == backend.truncation["max_length"] == 11


def saved_padding(trainer, folder):
    trainer.save_model(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["padding"]


def test_a_second_trainer_saves_a_tokenizer_as_the_first_was_given_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: [np.array([2, 15])])
    processor, records = tiny_processor(), with_texts(["a cat"] * 15 + [LONG])
    args = arguments(tmp_path, per_device_train_batch_size=4, remove_unused_columns=False, max_steps=1)
    collate = to_the_longest_of_a_batch(processor)
    for _ in range(2):
        trainer = DPCLIPTrainer(tiny_clip(), args, collate, records, processing_class=processor)
        trainer.train()
        assert saved_padding(trainer, tmp_path / "saved") is None


def test_a_transform_that_encodes_the_first_record_leaves_no_trace(tmp_path):
    processor = tiny_processor()
    collate = to_the_longest_of_a_batch(processor)

    def encode(batch):
        return collate([{"image": image, "text": text} for image, text in zip(batch["image"], batch["text"])])

    records = with_texts([LONG] * 16).with_transform(encode)
    args = arguments(tmp_path, per_device_train_batch_size=4, remove_unused_columns=False)
    trainer = DPCLIPTrainer(tiny_clip(), args, train_dataset=records, processing_class=processor)
    assert saved_padding(trainer, tmp_path / "saved") is None
