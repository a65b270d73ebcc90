"""Collating, captioning and loading image-text pairs."""

import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from checks import SIGMAS, flat_weights
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from factories import (
    BOS,
    CAPTIONS,
    EOS,
    arguments,
    other_raw_pairs,
    pairs,
    pictures,
    raw_pairs,
    tiny_clip,
    tiny_processor,
)
from PIL import Image as PILImage

from hf_dpclip import DPCLIPTrainer, ImageTextCollator, VisualQuestionCollator
from hf_dpclip.data import caption_by_label, class_prompts, hold_out, load_pairs
from hf_dpclip.records import check_image


@pytest.fixture(autouse=True)
def cache_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- Collating ----


def test_the_collator_pads_captions_to_the_longest_of_its_records():
    batch = ImageTextCollator(tiny_processor())(list(raw_pairs()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, len("areddog") + 2)
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 9, 3]


def test_the_collator_encodes_captions_between_their_special_tokens():
    (ids,) = ImageTextCollator(tiny_processor())(list(raw_pairs(1)))["input_ids"].tolist()
    assert (ids[0], ids[-1], len(ids)) == (BOS, EOS, len("acat") + 2)


def test_the_collator_truncates_captions_to_what_the_tokenizer_allows():
    record = {**raw_pairs(1)[0], "text": "a" * 50}
    assert ImageTextCollator(tiny_processor())([record])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_become_three_channels(mode):
    # Not every processor converts them itself.
    processor = tiny_processor()
    processor.image_processor.do_convert_rgb = False
    (image,) = pictures(1, mode)
    batch = ImageTextCollator(processor)([{"image": image, "text": "a"}])
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32


def test_the_collator_reads_the_columns_that_it_is_told():
    collator = ImageTextCollator(tiny_processor(), image_column="scan", text_column="report")
    expected = ImageTextCollator(tiny_processor())(list(raw_pairs()))
    batch = collator(list(raw_pairs(image="scan", text="report")))
    assert collator.columns == ["scan", "report"]
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("columns", "missing"), [(("scan", "text"), "image"), (("image", "report"), "text")])
def test_a_missing_column_is_named(columns, missing):
    with pytest.raises(ValueError, match=f"no column '{missing}' .it has .*image_column=..., text_column=..."):
        ImageTextCollator(tiny_processor()).check_columns(raw_pairs(1, *columns).column_names)


def test_texts_of_a_model_that_is_not_told_where_they_end_have_one_length():
    processor = tiny_processor()
    processor.tokenizer.model_input_names = ["input_ids"]
    assert ImageTextCollator(processor)(list(raw_pairs()))["input_ids"].shape == (3, 16)


def test_evaluation_sees_images_as_they_are(tmp_path):
    flipping, records = Flipping(), other_raw_pairs(8)
    collator = ImageTextCollator(tiny_processor(), augmentation=flipping, views=2)
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = DPCLIPTrainer(tiny_clip(), args, collator, records, raw_pairs(4))
    # One record was collated, for training, when the trainer was made.
    calls = flipping.calls
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(raw_pairs(4))):
        assert len(next(iter(loader))["input_ids"]) == 4
    assert flipping.calls == calls and trainer.data_collator is collator


class Flipping:
    """An augmentation that counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)


def test_a_collator_is_shown_in_one_line():
    shown = repr(ImageTextCollator(tiny_processor(), text_column="report"))
    assert shown == "ImageTextCollator(image_column='image', text_column='report', augmentation=None, views=1)"
    asking = VisualQuestionCollator(tiny_processor(), label2id={"yes": 0})
    assert "processor" not in repr(asking) and "label2id" not in repr(asking)


def test_views_are_rows_of_the_same_microbatch():
    flipping, records = Flipping(), list(raw_pairs(2))
    flipped = ImageTextCollator(tiny_processor())([{**each, "image": Flipping()(each["image"])} for each in records])
    batch = ImageTextCollator(tiny_processor(), augmentation=flipping, views=3)(records)
    assert (len(batch["pixel_values"]), len(batch["input_ids"]), flipping.calls) == (6, 6, 6)
    assert torch.equal(batch["pixel_values"], flipped["pixel_values"].repeat_interleave(3, dim=0))
    assert torch.equal(batch["input_ids"][1], batch["input_ids"][2])


# ---- The collator in the trainer ----


def test_raw_pairs_are_collated_by_the_processor_without_further_ado(make_trainer):
    trainer = make_trainer(train_dataset=raw_pairs(16), trainer_options={"processing_class": tiny_processor()})
    trainer.train()
    assert isinstance(trainer.data_collator, ImageTextCollator)
    assert trainer.privacy_spent().steps == 2


def test_columns_of_other_names_are_kept_for_the_collator_that_reads_them(make_trainer):
    collator = ImageTextCollator(tiny_processor(), image_column="scan", text_column="report")
    dataset = raw_pairs(16, "scan", "report").add_column("patient", list(range(16)))
    trainer = make_trainer(train_dataset=dataset, trainer_options={"data_collator": collator})
    trainer.train()
    assert trainer.privacy_spent().steps == 2


def encode(records):
    return dict(tiny_processor()(images=records["image"], text=records["text"], padding=True, return_tensors="pt"))


@pytest.mark.parametrize("processor", [tiny_processor(), None], ids=["processor", "no processor"])
@pytest.mark.parametrize(
    "dataset",
    [pairs(16), [*pairs(16)], raw_pairs(16).with_transform(encode)],
    ids=["columns", "records", "made by a transform"],
)
def test_encoded_pairs_are_not_processed_again(dataset, processor, make_trainer):
    options = {"processing_class": processor}
    trainer = make_trainer(train_dataset=dataset, trainer_options=options, remove_unused_columns=False)
    assert not isinstance(trainer.data_collator, ImageTextCollator)
    trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_a_column_that_the_dataset_does_not_have_stops_training_before_its_first_step(make_trainer):
    model = tiny_clip()
    before = flat_weights(model)
    dataset = raw_pairs(16, "scan", "text")
    with pytest.raises(ValueError, match="no column 'image'"):
        make_trainer(model, dataset, {"processing_class": tiny_processor()}).train()
    assert torch.equal(flat_weights(model), before)


# ---- Captions ----


def test_class_prompts_put_each_name_into_the_template():
    assert class_prompts(["cat", "dog"], "one {} here") == ["one cat here", "one dog here"]


def labelled(feature) -> Dataset:
    return Dataset.from_dict({"label": [1, 0, 1]}, features=Features({"label": feature}))


def test_captions_follow_the_labels():
    dataset = caption_by_label(labelled(ClassLabel(names=["cat", "dog"])), "label", "a {}")
    assert list(dataset["caption"]) == ["a dog", "a cat", "a dog"]


@pytest.mark.parametrize("column", ["label", "absent"])
def test_captions_need_a_column_of_class_labels(column):
    with pytest.raises(ValueError, match=f"'{column}' is not a ClassLabel column.*cast_column"):
        caption_by_label(labelled(Value("int64")), column, "a {}")


# ---- Loading ----


def test_who_is_held_out_depends_on_nobody_else():
    """With `train_test_split`, one record more would change where hundreds of others go."""
    records = Dataset.from_dict({"id": [f"patient {number}" for number in range(1000)]})
    with_one, without = hold_out(records, "id"), hold_out(records.select([*range(400), *range(401, 1000)]), "id")
    moved = [set(with_one[name]["id"]) ^ set(without[name]["id"]) for name in ("train", "test")]
    assert sorted(map(len, moved)) == [0, 1]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_that_was_asked_for_is_held_out(share):
    records = Dataset.from_dict({"id": range(10_000)})
    held_out = len(hold_out(records, "id", share)["test"])
    assert abs(held_out - 10_000 * share) < SIGMAS * math.sqrt(10_000 * share * (1 - share))


def test_records_of_one_image_are_held_out_together():
    images = [image for image in pictures(40) for _ in range(2)]
    records = Dataset.from_dict({"image": images, "text": range(80)}).cast_column("image", Image())
    splits = hold_out(records, "image", share=0.5)
    assert len(splits["train"]) + len(splits["test"]) == 80
    for split in splits.values():
        assert set(Counter(text // 2 for text in split["text"]).values()) == {2}


@pytest.mark.parametrize("size", [2, 3, 20])
def test_one_is_held_out_in_any_case_and_one_more_moves_only_one(size):
    everyone = [f"patient {number}" for number in range(size)]
    splits = [hold_out(Dataset.from_dict({"id": ids}), "id", share=1e-9) for ids in _each_left_out(everyone)]
    all_of_them, *others = [set(split["train"]["id"]) for split in splits]
    assert {len(split["test"]) for split in splits} == {1}
    assert all(len(all_of_them ^ train) == 1 for train in others)


def _each_left_out(values):
    yield values
    if len(values) > 2:
        yield from (values[:number] + values[number + 1 :] for number in range(len(values)))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_of_ordinary_values_are_what_they_are(mode):
    picture = PILImage.new(mode, (8, 8), 100)
    assert check_image(picture, "image").convert("RGB").getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("share", [0, 1, -1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="it must be between 0 and 1"):
        hold_out(raw_pairs(8), "image", share)


def test_an_empty_dataset_cannot_be_split():
    with pytest.raises(ValueError, match="dataset is empty"):
        hold_out(raw_pairs(8).select([]), "image")


def test_nothing_to_train_on_is_an_error():
    records = Dataset.from_dict({"id": [1, 1], "text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"all 2 records would be held out: choose a column of more values than 'id'"):
        hold_out(records, "id")
    with pytest.raises(
        ValueError, match=r"'patient' is not a column of texts, .* of the dataset \(\['id', 'text'\]\)"
    ):
        hold_out(records, "patient")


def test_records_without_columns_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"dataset is a list: make a datasets\.Dataset"):
        hold_out([*raw_pairs()], "image")


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_images_named_by_a_file_are_found_beside_it(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    names = [f"images/{i}.png" for i in range(3)]
    for name, picture in zip(names, pictures(3)):
        picture.save(tmp_path / name)
    table = Dataset.from_dict({"image": names, "text": CAPTIONS})
    path = tmp_path / f"pairs.{suffix}"
    _ = table.to_csv(path) if suffix == "csv" else table.to_json(path)
    dataset = load_pairs(str(path))["train"]
    assert list(dataset["text"]) == CAPTIONS
    assert np.array_equal(np.asarray(dataset[1]["image"]), np.asarray(pictures(3)[1]))


@pytest.mark.parametrize(
    "rows, hint",
    [
        (["text,image", "Broken, displaced,0.png", "Broken, again,1.png"], 'in double quotes, "like, this"'),
        (["text;image", "Broken, displaced;0.png"], "commas, no semicolons, between columns"),
        (["text;image", "Broken;0.png"], "Between columns there must be commas"),
        (["text;image", "Broken;0.png", "Broken, displaced;1.png"], "commas between columns and double quotes around"),
    ],
    ids=["commas in texts", "semicolons and commas", "semicolons", "semicolons and a comma"],
)
def test_commas_that_part_texts_are_explained(tmp_path, rows, hint):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=hint):
        load_pairs(str(path))


def test_a_parquet_file_holds_its_images_itself(tmp_path):
    raw_pairs().to_parquet(tmp_path / "pairs.parquet")
    dataset = load_pairs(str(tmp_path / "pairs.parquet"))["train"]
    assert dataset[2]["text"] == CAPTIONS[2]
    assert dataset[2]["image"].size == (12, 10)


@pytest.mark.parametrize("with_splits", [False, True])
def test_a_folder_that_save_to_disk_wrote_is_loaded(tmp_path, with_splits):
    splits = DatasetDict(train=raw_pairs(), test=raw_pairs(2))
    (splits if with_splits else splits["train"]).save_to_disk(tmp_path / "saved")
    loaded = load_pairs(str(tmp_path / "saved"))
    assert {name: len(split) for name, split in loaded.items()} == (
        {"train": 3, "test": 2} if with_splits else {"train": 3}
    )


def test_a_folder_of_images_with_their_metadata_is_loaded(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, picture in enumerate(pictures(3)):
        picture.save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(3)]
    Dataset.from_dict({"file_name": names, "text": CAPTIONS}).to_json(folder / "metadata.jsonl")
    dataset = load_pairs(str(folder))["train"]
    assert sorted(dataset["text"]) == sorted(CAPTIONS)


@pytest.mark.parametrize("column", ["bytes", "bytes and path", "Image"])
def test_a_folder_of_parquet_files_is_loaded(tmp_path, column):
    """As `snapshot_download` leaves it, or other libraries write it."""
    pairs = raw_pairs(4)
    if column != "Image":
        files = pairs.cast_column("image", Image(decode=False))["image"][:]
        values = [image["bytes"] for image in files] if column == "bytes" else files
        pairs = Dataset.from_dict({"image": values, "text": pairs["text"][:]})
    (tmp_path / "data").mkdir()
    for shard in range(2):
        pairs.select([2 * shard, 2 * shard + 1]).to_parquet(tmp_path / "data" / f"train-{shard}-of-2.parquet")
    dataset = load_pairs(str(tmp_path))["train"]
    assert [dataset[row]["image"].tobytes() for row in range(4)] == [picture.tobytes() for picture in pictures(4)]
    assert load_pairs(str(tmp_path / "data" / "train-0-of-2.parquet"))["train"][1]["image"].size == pictures(2)[1].size


def test_parquet_files_beside_images_with_their_metadata_are_left_alone(tmp_path):
    for number, picture in enumerate(pictures(3)):
        picture.save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(3)]
    Dataset.from_dict({"file_name": names, "text": CAPTIONS}).to_json(tmp_path / "metadata.jsonl")
    Dataset.from_dict({"v": [1]}).to_parquet(tmp_path / "other.parquet")
    assert sorted(load_pairs(str(tmp_path))["train"]["text"]) == sorted(CAPTIONS)


def test_addresses_of_images_are_left_as_they_are(tmp_path):
    address = "https://archive.example.org/0.png"
    (tmp_path / "pairs.csv").write_text(f"image,text\n{address},a\n", encoding="utf-8")
    dataset = load_pairs(str(tmp_path / "pairs.csv"))["train"]
    assert dataset.cast_column("image", Image(decode=False))[0]["image"] == {"bytes": None, "path": address}


def test_texts_that_say_that_there_is_nothing_are_texts(tmp_path):
    pictures(1)[0].save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("image,text,age\na.png,None,3\na.png,N/A,\na.png,,4\n", encoding="utf-8")
    dataset = load_pairs(str(tmp_path / "pairs.csv"))["train"]
    assert dataset["text"][:] == ["None", "N/A", None] and dataset["age"][:] == [3, None, 4]
