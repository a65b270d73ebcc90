"""Texts with more tokens than the model reads: counted, on the console alone, before training."""

import logging

import pytest
from checks import warnings_of
from factories import arguments, clap_processor, raw_pairs, tiny_clip, tiny_processor

from hf_dpclip import AudioTextCollator, DPCLIPTrainer, ImageTextCollator
from hf_dpclip.caveats import warn_of_cut_texts


# With the beginning and the end, texts of 14 letters fill the 16 tokens that the tokenizer of the tests leaves.
LONGEST = "a" * 14


def texts(*values: str):
    return raw_pairs(len(values)).remove_columns("text").add_column("text", list(values))


def warned_of(caplog, dataset, collator=None) -> str:
    return warnings_of(caplog, warn_of_cut_texts, collator or ImageTextCollator(tiny_processor()), dataset)


def test_those_that_are_too_long_are_counted(caplog):
    message = warned_of(caplog, texts(LONGEST, LONGEST + "a", "a", LONGEST * 9))
    assert "2 of the first 4 texts have more than the 16 tokens" in message
    assert "Let what matters come first" in message


@pytest.mark.parametrize(
    "dataset", [texts(LONGEST, "a"), list(texts(LONGEST * 2)), texts(LONGEST * 2).with_transform(dict), None]
)
def test_nothing_is_said_where_none_is_known(caplog, dataset):
    assert warned_of(caplog, dataset) == ""


def test_texts_of_sounds_and_of_other_formats_are_read_too(caplog):
    collator = AudioTextCollator(clap_processor())
    assert "1 of the first 1 texts" in warned_of(caplog, texts(LONGEST * 2).with_format("numpy"), collator)


def test_collators_of_others_are_not_asked(caplog):
    assert warned_of(caplog, texts(LONGEST * 2), list) == ""


def test_of_a_large_dataset_the_first_are_counted(caplog, monkeypatch):
    monkeypatch.setattr("hf_dpclip.caveats.COUNTED_TEXTS", 2)
    assert "1 of the first 2 texts" in warned_of(caplog, texts("a", LONGEST * 2, LONGEST * 2))


def test_the_trainer_says_it_when_it_is_made(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = DPCLIPTrainer(
            tiny_clip(),
            arguments(tmp_path, per_device_train_batch_size=4),
            ImageTextCollator(tiny_processor()),
            texts(*[LONGEST + "a"] * 8),
        )
    assert "8 of the first 8 texts" in caplog.text
    caplog.clear()
    trainer.train()
    assert "of the first" not in caplog.text
