"""Records that share images: counted, on the console alone, without decoding."""

import logging

import pytest
from checks import warnings_of
from datasets import Dataset, Image
from factories import arguments, pairs, tiny_clip, tiny_processor
from PIL import Image as PILImage

from hf_dpclip import DPCLIPTrainer, ImageTextCollator
from hf_dpclip.caveats import warn_of_shared_images
from hf_dpclip.digests import file_digests


def captioned(values: list[int | None], **columns) -> Dataset:
    """One record per value, which is the grey of its image."""
    images = [None if value is None else PILImage.new("L", (8, 8), value) for value in values]
    return Dataset.from_dict({"image": images, "text": ["a"] * len(values), **columns}).cast_column("image", Image())


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 1, 1, 2, 3, 3], "5 of the 6 records looked at share their 'image'"),
        ([1, None, 2, None, 1], "2 of the 5 records looked at"),
    ],
)
def test_captions_of_one_image_are_counted(caplog, values, found):
    message = warnings_of(caplog, warn_of_shared_images, captioned(values))
    assert found in message and "set privacy_unit_column to a column that names the image" in message


@pytest.mark.parametrize(
    "dataset", [captioned([1, 2, 3]), captioned([1, None, None]), pairs(4), list(captioned([1, 1]))]
)
def test_nothing_is_said_where_none_is_found(caplog, dataset):
    assert warnings_of(caplog, warn_of_shared_images, dataset) == ""


def test_selected_and_shuffled_records_are_those_that_count(caplog):
    dataset = captioned([1, 1, 2, 3])
    assert warnings_of(caplog, warn_of_shared_images, dataset.select([0, 2, 3])) == ""
    assert "2 of the 4 records" in warnings_of(caplog, warn_of_shared_images, dataset.shuffle(seed=0))


def test_paths_are_compared_where_images_are_not_part_of_the_dataset(caplog, tmp_path):
    for name in "ab":
        PILImage.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in "aab"]
    dataset = Dataset.from_dict({"scan": paths}).cast_column("scan", Image())
    assert "2 of the 3 records" in warnings_of(caplog, warn_of_shared_images, dataset)


def test_images_are_not_decoded():
    broken = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 2}).cast_column("image", Image())
    assert len(set(file_digests(broken, "image"))) == 1


def test_images_of_nothing_are_not_the_same_image(caplog):
    nothing = Dataset.from_dict({"image": [{"bytes": None, "path": None}] * 2}).cast_column("image", Image())
    assert warnings_of(caplog, warn_of_shared_images, nothing) == ""


def test_a_large_dataset_is_looked_at_in_part(caplog, monkeypatch):
    monkeypatch.setattr("hf_dpclip.caveats.LOOKED_AT", 3)
    assert warnings_of(caplog, warn_of_shared_images, captioned([1, 2, 3, 1])) == ""
    assert "2 of the 3 records looked at" in warnings_of(caplog, warn_of_shared_images, captioned([1, 1, 2, 1]))


def trainer_of(tmp_path, **overrides):
    dataset = captioned([number // 2 for number in range(16)], patient=[number // 2 for number in range(16)])
    args = arguments(tmp_path, logging_steps=1, **overrides)
    return DPCLIPTrainer(tiny_clip(), args, ImageTextCollator(tiny_processor()), dataset)


def test_the_trainer_says_it_once_before_training_and_to_nobody_else(tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(tmp_path)
    assert "16 of the 16 records" in caplog.text
    caplog.clear()
    capsys.readouterr()
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for place in (caplog.text, capsys.readouterr().out, str(trainer.state.log_history), card):
        assert "share their" not in place


def test_the_trainer_says_nothing_where_the_unit_was_chosen(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, privacy_unit_column="patient")
    assert "share their" not in caplog.text
