"""Data that cannot be trained on, and what is said of it: see `test_bad_input.py` for the form of the tables."""

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Image
from factories import (
    BOS,
    EOS,
    arguments,
    clap_processor,
    other_raw_pairs,
    pairs,
    pictures,
    raw_pairs,
    tiny_altclip,
    tiny_clap,
    tiny_clip,
    tiny_clip_vqa,
    tiny_processor,
    with_texts,
)
from PIL import Image as PILImage
from torch.utils.data import ConcatDataset, Subset
from transformers import default_data_collator
from wrong_calls import check_explained, processed, table, trainer

from hf_dpclip import (
    AudioTextCollator,
    DPCLIPTrainer,
    ImageTextCollator,
    VisualQuestionCollator,
    freeze_batch_norm,
)
from hf_dpclip.data import class_prompts, load_pairs
from hf_dpclip.digests import array_digests


def with_images(images: list) -> Dataset:
    return Dataset.from_dict({"image": images, "text": ["a"] * len(images)})


def stored(images: list[dict]) -> Dataset:
    """Images as `datasets` keeps them."""
    return with_images(images).cast_column("image", Image())


def undecodable(number: int) -> Dataset:
    """Eight pairs, of which one image's bytes are none."""
    images = raw_pairs(8).cast_column("image", Image(decode=False))["image"][:]
    images[number] = {"bytes": b"not an image", "path": None}
    return stored(images)


def files(folder) -> list[str]:
    """The paths of three images."""
    paths = [str(folder / f"{number}.png") for number in range(3)]
    for path, picture in zip(paths, pictures(3)):
        picture.save(path)
    return paths


def questions(answers: list, folder, label2id=None, rows=slice(None), model=None) -> DPCLIPTrainer:
    label2id = label2id or tiny_clip_vqa().config.label2id
    dataset = with_texts(["a"] * len(answers)).rename_column("text", "question").add_column("answer", answers)
    dataset = dataset.select(range(len(answers))[rows])
    collator = VisualQuestionCollator(tiny_processor(), label2id=label2id)
    return trainer(folder, dataset, model or tiny_clip_vqa(), collator)


def augmented(augmentation) -> ImageTextCollator:
    return ImageTextCollator(tiny_processor(), augmentation=augmentation)


def unpadded() -> Dataset:
    """Encoded pairs, whose texts get longer."""
    texts = [[BOS, *[1] * row, EOS] for row in range(8)]
    return pairs(8).remove_columns("input_ids").with_format(None).add_column("input_ids", texts)


def evaluated_on_subset(folder, private, part) -> DPCLIPTrainer:
    """Whose evaluation data is a part of the private records."""
    return trainer(folder, private, options={"eval_dataset": part(private)})


def long_texts(folder, length=10**30, model=None, records=None):
    processor = tiny_processor()
    processor.tokenizer.model_max_length = length
    return trainer(folder, records or raw_pairs(8), model, processor=processor)


def without_sounds(count: int) -> list[dict]:
    return [{"audio": None, "text": "a"} for _ in range(count)]


def without_images(count: int) -> list[dict]:
    return [{"image": None, "text": "a"} for _ in range(count)]


def deep_images():
    """The sixth of eight records, which are some of ten."""
    grey = [PILImage.fromarray(np.full((8, 8), 30_000 if row == 7 else 30, dtype=np.uint16)) for row in range(10)]
    dataset = Dataset.from_dict({"image": grey, "text": ["a"] * 10}).cast_column("image", Image())
    return dataset.select([1, 2, 3, 4, 5, 7, 8, 9])


def more_words(folder):
    processor = tiny_processor()
    processor.tokenizer.add_tokens(["x", "y", "z"])
    return trainer(folder, raw_pairs(8), processor=processor)


def larger_images(folder, model=None):
    processor = tiny_processor()
    processor.image_processor.crop_size = {"height": 16, "width": 12}
    return trainer(folder, raw_pairs(8), model=model, collator=ImageTextCollator(processor))


def unnamed_image(folder) -> str:
    """A table whose second row names no image."""
    pictures(1)[0].save(folder / "a.png")
    return table(folder, "pairs.csv", "image,text\na.png,a\n,b\na.png,c\n")


# Until every record was drawn, all but surely.
LONGER = {"max_steps": 50, "remove_unused_columns": False}


def uncut(records):
    """As a user's own collator that leaves `truncation=True` out."""
    images, texts = ([record[column] for record in records] for column in ("image", "text"))
    return tiny_processor()(images=images, text=texts, padding=True, return_tensors="pt")


DATA = {
    "no image column": (lambda f: processed(f, raw_pairs(8, "scan")), "no column 'image'", "image_column=..."),
    "no text column": (lambda f: processed(f, raw_pairs(8, text="report")), "no column 'text'", "text_column=..."),
    "empty": (lambda f: processed(f, raw_pairs(8).select([])), "train_dataset is empty", "check the split"),
    "empty list": (lambda f: trainer(f, []), "train_dataset is empty", "check the split"),
    "no caption": (
        lambda f: processed(f, with_texts(["a", None, "b", None])),
        "record 1 (such records: 2) has no text in column 'text'",
        "dataset.filter",
    ),
    "empty caption": (
        lambda f: processed(f, with_texts(["a", "b", ""])),
        "record 2 (such records: 1) has no text",
        "dataset.filter",
    ),
    "numbers as captions": (
        lambda f: processed(f, with_texts([1, 2, 3, 4])),
        "column 'text' holds int where a text is expected",
        "dataset.map",
    ),
    "lists of captions": (
        lambda f: processed(f, with_texts([["a", "b"]] * 4)),
        "column 'text' holds list",
        "one record of each of several texts",
    ),
    "no image": (
        lambda f: processed(f, with_images([*pictures(3), None])),
        "record 3 (such records: 1) has no image in column 'image'",
        "dataset.filter",
    ),
    "no image in a list": (
        lambda f: processed(f, [{"image": None, "text": "a"}] * 8),
        "column 'image' holds nothing (None)",
        "leave records without an image out",
    ),
    "no image later in a list": (
        lambda f: processed(f, [*raw_pairs(4), *without_images(4)], train=True, max_steps=30),
        "column 'image' holds nothing (None)",
        "leave records without an image out",
    ),
    "paths": (
        lambda f: processed(f, with_images(["a.png"] * 8)),
        "column 'image' holds str where a PIL image is expected",
        "cast_column('image', datasets.Image())",
    ),
    "bytes": (
        lambda f: processed(f, with_images([b"png"] * 8)),
        "column 'image' holds bytes",
        "cast_column('image', datasets.Image())",
    ),
    "arrays": (
        lambda f: processed(f, with_images([np.zeros((8, 8, 3), dtype=np.uint8)] * 8)),
        "column 'image' holds list",
        "PIL.Image.fromarray",
    ),
    "an undecodable first image": (
        lambda f: processed(f, undecodable(0)),
        "record 0 of the dataset cannot be read (UnidentifiedImageError",
        "leave it out, as in dataset.select",
    ),
    "an undecodable image": (
        lambda f: processed(f, undecodable(5), train=True, per_device_train_batch_size=8),
        "record 5 of the dataset cannot be read (UnidentifiedImageError",
        "leave it out, as in dataset.select",
    ),
    **{
        f"an image of mode {mode}": (
            lambda f, mode=mode: processed(f, with_images([PILImage.new(mode, (8, 8), 1000)] * 8)),
            f"column 'image' holds an image whose values are not within 0 and 255 (mode {mode})",
            "choose the window of values that matters",
        )
        for mode in ("I;16", "I", "F")
    },
    **{
        f"an id like {text!r}": (
            lambda f, text=text: processed(
                f, raw_pairs(8).add_column("patient", ["a", text, *"bcdefg"]), privacy_unit_column="patient"
            ),
            f"record 1 (such records: 1) has {text!r} as its 'patient'",
            "give each of them an id of its own",
        )
        for text in ("", "NA", "N/A", "nan", "None", " null")
    },
    "images without values": (
        lambda f: processed(f, with_images([PILImage.fromarray(np.full((8, 8), np.nan, np.float32))] * 8)),
        "values are not within 0 and 255 (mode F)",
        "choose the window",
    ),
    "images with values up to one": (
        lambda f: processed(f, with_images([PILImage.fromarray(np.full((8, 8), 0.5, np.float32))] * 8)),
        "holds an image whose values are between 0 and 1",
        "multiply them by 255 first",
    ),
    "units of the evaluation data": (
        lambda f: DPCLIPTrainer(
            tiny_clip(),
            arguments(f, privacy_unit_column="patient"),
            train_dataset=pairs(16).add_column("patient", [*"aabbccddeeffgghh"]),
            eval_dataset={"some": pairs(4, seed=1).add_column("patient", [*"wxah"])},
        ),
        "2 records of eval_dataset have the 'patient' of records of the private training dataset",
        "split with hf_dpclip.data.hold_out(dataset, 'patient')",
    ),
    "a missing id": (
        lambda f: processed(
            f, raw_pairs(8).add_column("patient", ["a", None, *"bcdefg"]), privacy_unit_column="patient"
        ),
        "such as the NoneType of record 1 (such records: 1",
        "give every record the id of its unit",
    ),
    "a missing file": (
        lambda f: processed(f, with_images(["nowhere.png"] * 8).cast_column("image", Image())),
        "record 0 of the dataset (nowhere.png) cannot be read (FileNotFoundError",
        "leave it out",
    ),
    "an image of 16 bits": (
        lambda f: processed(f, deep_images(), train=True, max_steps=40),
        "Found in record 5 of the dataset (row 7 of the table that it was selected from)",
        "convert images to 8 bits first",
    ),
    "a base64 text in place of an image": (
        lambda f: processed(f, with_images(["iVBORw0KGgo" * 100] * 8).cast_column("image", Image())),
        f"record 0 of the dataset ({('iVBORw0KGgo' * 100)[:50]}...{('iVBORw0KGgo' * 100)[-50:]}) cannot be read",
        "leave it out",
    ),
    "a file that is missing later": (
        lambda f: processed(f, with_images([*files(f), "nowhere.png"]).cast_column("image", Image())),
        "record 3 (such records: 1) names an image that is not there, 'nowhere.png'",
        "correct the path, or leave such records out",
    ),
    "a folder in the place of a file": (
        lambda f: processed(f, with_images([*files(f), str(f)]).cast_column("image", Image())),
        "record 3 (such records: 1) names an image that is not there",
        "correct the path, or leave such records out",
    ),
    "neither a path nor bytes": (
        lambda f: processed(f, stored([{"bytes": None, "path": path} for path in [*files(f), None, ""]])),
        "record 3 (such records: 2) has no image in column 'image'",
        "dataset.filter",
    ),
    "a file that is missing in a selection": (
        lambda f: processed(f, with_images([*files(f), "nowhere.png"]).cast_column("image", Image()).select([0, 3])),
        "record 1 (such records: 1) names an image that is not there, 'nowhere.png'",
        "correct the path, or leave such records out",
    ),
    "a blank text": (
        lambda f: processed(f, with_texts(["a", "b", " \t", "d"])),
        "record 2 (such records: 1) has no text in column 'text'",
        "dataset.filter(lambda record: record['text'] and record['text'].strip())",
    ),
    "columns": (lambda f: processed(f, raw_pairs(8)[:]), "train_dataset is a dict", "Dataset.from_dict"),
    "a data frame": (
        lambda f: processed(f, pd.DataFrame({"image": pictures(8), "text": ["a"] * 8})),
        "train_dataset is a DataFrame",
        "datasets.Dataset.from_pandas(train_dataset)",
    ),
    "a name": (lambda f: processed(f, "mnist-5k"), "train_dataset is a str", "load one by its name"),
    "tuples": (
        lambda f: processed(f, list(zip(pictures(8), ["a"] * 8))),
        "records are of type tuple",
        "make them dictionaries",
    ),
    "a tokenizer": (
        lambda f: trainer(f, raw_pairs(8), processor=tiny_processor().tokenizer),
        "raw images (column 'image')",
        "pass a processor",
    ),
    "no processor": (lambda f: trainer(f, raw_pairs(8)), "raw images (column 'image')", "pass a processor"),
    "a collator with a tokenizer": (
        lambda f: trainer(f, raw_pairs(8), collator=ImageTextCollator(tiny_processor().tokenizer)),
        "CLIPTokenizer is no processor of images and texts",
        "AutoProcessor.from_pretrained",
    ),
    "a dataset as collator": (
        lambda f: trainer(f, None, collator=raw_pairs(8)),
        "data_collator is a Dataset, which cannot be called",
        "train_dataset=...",
    ),
    "views that are the same": (
        lambda f: ImageTextCollator(tiny_processor(), views=2),
        "views=2 without an augmentation would be the same image 2 times",
        "give augmentation, a function",
    ),
    "no views": (
        lambda f: ImageTextCollator(tiny_processor(), views=0),
        "views=0 is not possible",
        "a whole number of at least 1",
    ),
    "an augmentation by name": (
        lambda f: ImageTextCollator(tiny_processor(), augmentation="flip"),
        "augmentation is a str",
        "a function from an image to an image",
    ),
    "texts of any length": (
        long_texts,
        "the tokenizer cuts no text, since it has no limit, but the model reads at most 16 tokens",
        "set processor.tokenizer.model_max_length = 16",
    ),
    "long texts of any length, in no table": (
        lambda f: long_texts(f, records=[*with_texts(["a" * 30] * 8)]),
        "the tokenizer cuts no text, since it has no limit, but the model reads at most 16 tokens",
        "set processor.tokenizer.model_max_length = 16",
    ),
    "texts longer than the model's": (
        lambda f: long_texts(f, 77),
        "the tokenizer cuts texts at 77 tokens, but the model reads at most 16",
        "set processor.tokenizer.model_max_length = 16",
    ),
    "and than those of a model that counts from behind the padding": (
        lambda f: long_texts(f, 16, tiny_altclip()),
        "but the model reads at most 15",
        "set processor.tokenizer.model_max_length = 15",
    ),
    "a tokenizer of another model": (
        more_words,
        "the tokenizer knows 51 tokens, the model 50",
        "from the same checkpoint",
    ),
    "an image processor of another model": (
        larger_images,
        "images of 16 x 12 pixels, the model reads 8 x 8",
        "from the same checkpoint",
    ),
    "and of a model that answers questions": (
        lambda f: larger_images(f, tiny_clip_vqa()),
        "images of 16 x 12 pixels, the model reads 8 x 8",
        "from the same checkpoint",
    ),
    "an augmentation that ends in tensors": (
        lambda f: trainer(f, raw_pairs(8), collator=augmented(lambda image: torch.tensor(np.asarray(image) / 255))),
        "the augmentation returned a Tensor, not a PIL image",
        "leave ToTensor and Normalize to the processor",
    ),
    "texts of several lengths": (
        lambda f: trainer(f, unpadded(), collator=default_data_collator),
        "Each record alone can be collated",
        "encode them with padding='max_length'",
    ),
    "tensors of several lengths": (
        lambda f: trainer(f, unpadded().with_format("torch"), collator=default_data_collator),
        "Each record alone can be collated",
        "encode them with padding='max_length'",
    ),
    "a collator for something else": (
        lambda f: trainer(f, raw_pairs(8), collator=default_data_collator, remove_unused_columns=False),
        "the data_collator cannot collate the first records (RuntimeError",
        "pass an ImageTextCollator",
    ),
    "a processor as collator": (
        lambda f: trainer(f, raw_pairs(8), collator=tiny_processor(), remove_unused_columns=False),
        "the data_collator cannot collate the first records",
        "pass an ImageTextCollator",
    ),
    "no sounds": (
        lambda f: trainer(
            f,
            Dataset.from_list(without_sounds(8)),
            freeze_batch_norm(tiny_clap()),
            AudioTextCollator(clap_processor()),
        ),
        "the data_collator cannot collate the first records (TypeError",
        "mend what their columns ['audio', 'text'] hold, or name others; hf_dpclip.data.unusable_records",
    ),
    "no sounds in a list": (
        lambda f: trainer(f, without_sounds(8), freeze_batch_norm(tiny_clap()), AudioTextCollator(clap_processor())),
        "the data_collator cannot collate the first records (TypeError",
        "mend what their columns ['audio', 'text'] hold",
    ),
    "one id for all": (
        lambda f: processed(f, raw_pairs(8), privacy_unit_column="text", per_device_train_batch_size=8),
        "expected_batch_size=8 is not possible",
        "at most the 3 privacy units",
    ),
    "evaluation with other columns": (
        lambda f: processed(f, raw_pairs(8), options={"eval_dataset": raw_pairs(4, "scan")}),
        "no column 'image'",
        "image_column=...",
    ),
    "evaluation with other columns later": (
        lambda f: processed(f, raw_pairs(8)).evaluate(raw_pairs(4, "scan")),
        "no column 'image'",
        "image_column=...",
    ),
    "prediction with other columns": (
        lambda f: processed(f, raw_pairs(8)).predict(raw_pairs(4, "scan")),
        "no column 'image'",
        "image_column=...",
    ),
    "evaluation on some of the records": (
        lambda f: processed(f, raw_pairs(8), options={"eval_dataset": raw_pairs(8).shuffle(seed=0).select(range(3))}),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation on some encoded records": (
        lambda f: trainer(f, pairs(8), options={"eval_dataset": pairs(8).select([5, 2])}),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation on the records in another format": (
        lambda f: trainer(f, pairs(8).with_format("numpy")).evaluate(pairs(8)),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation on a subset": (
        lambda f: evaluated_on_subset(f, pairs(8), lambda private: Subset(private, [1, 2])),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation on a subset that overlaps": (
        lambda f: evaluated_on_subset(
            f, Subset(pairs(9), [*range(8)]), lambda private: Subset(private.dataset, [7, 8])
        ),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation on a slice": (
        lambda f: evaluated_on_subset(f, [*pairs(8)], lambda private: private[:2]),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation on a copy later": (
        lambda f: processed(f, raw_pairs(8)).evaluate(raw_pairs(8)),
        "the records of eval_dataset are among those of the private training dataset",
        "hf_dpclip.data.hold_out",
    ),
    "evaluation with an undecodable image": (
        lambda f: processed(f, other_raw_pairs(8)).evaluate(undecodable(5)),
        "record 5 of the evaluation dataset cannot be read (UnidentifiedImageError",
        "repair it, or leave it out",
    ),
    "no evaluation data": (
        lambda f: processed(f, raw_pairs(8), options={"eval_dataset": other_raw_pairs(8).select([])}),
        "eval_dataset is empty",
        "check the split",
    ),
    "no evaluation data later": (
        lambda f: processed(f, raw_pairs(8)).evaluate(other_raw_pairs(8).select([])),
        "eval_dataset is empty",
        "check the split",
    ),
    "evaluation without a caption of its own": (
        lambda f: processed(f, raw_pairs(8), options={"eval_dataset": with_texts(["a", None])}),
        "eval_dataset: record 1 (such records: 1) has no text",
        "dataset.filter",
    ),
    "evaluation without a caption": (
        lambda f: processed(f, other_raw_pairs(8), options={"eval_dataset": {"test": with_texts(["a", None])}}),
        "record 1 (such records: 1) has no text",
        "dataset.filter",
    ),
    "unknown answers": (
        lambda f: questions(["yes", "maybe", "no", "maybe"], f),
        "the answer of record 1 of the dataset (such records: 2) is none of the 3 answers",
        "leave such records out",
    ),
    "unknown answers of selected records": (
        lambda f: questions(["yes", "maybe", "no", "maybe"], f, rows=slice(1, None, 2)),
        "the answer of record 0 of the dataset (row 1 of the table that it was selected from) (such records: 2) is",
        "leave such records out",
    ),
    "lists of answers": (
        lambda f: questions([["yes", "no"]] * 4, f),
        "column 'answer' holds list where a text is expected",
        "one record of each of several texts",
    ),
    "no answers for a model that answers questions": (
        lambda f: processed(f, raw_pairs(8), model=tiny_clip_vqa()),
        "CLIPForVisualQuestionAnswering learns from answers, and the batches have no labels",
        "pass data_collator=VisualQuestionCollator(processor, label2id=model.config.label2id)",
    ),
    "answers for a model that reads none": (
        lambda f: questions(["yes"] * 4, f, model=tiny_clip()),
        "CLIPModel reads no labels, so it would not learn the answers",
        "CLIPForVisualQuestionAnswering.from_clip(clip, answers=[...])",
    ),
    "labels that the model has not": (
        lambda f: questions(["yes"] * 4, f, {"yes": 3}),
        "label2id has label 3, but the model gives 3 answers",
        "pass model.config.label2id",
    ),
    "a list of labels": (
        lambda f: questions(["yes"] * 4, f, ["yes"]),
        "label2id is a list",
        "pass model.config.label2id",
    ),
    "arrays as records": (
        lambda f: trainer(f, np.zeros((8, 3))),
        "records are of type ndarray",
        "make them dictionaries",
    ),
    "no encoded images": (
        lambda f: trainer(f, pairs(8).remove_columns("pixel_values")),
        "records have no 'pixel_values' (they have ['input_ids']), which CLIPModel reads",
        "pass a processor as processing_class",
    ),
    "no encoded texts": (
        lambda f: trainer(f, pairs(8).remove_columns("input_ids")),
        "records have no 'input_ids'",
        "pass a processor as processing_class",
    ),
    "a collator of nothing": (
        lambda f: trainer(f, pairs(8), collator=lambda records: records, train=True),
        "the data_collator returned a list",
        "return a dictionary of the model's inputs",
    ),
    "a collator that does not cut texts": (
        lambda f: trainer(f, with_texts(["a" * 30] * 8), collator=uncut, remove_unused_columns=False),
        "texts were encoded to more than the 16 tokens that the model reads",
        "truncation=True, max_length=16 (in the data_collator, or where records are encoded), or pass an Image",
    ),
    "a collator that does not cut a text that is met later": (
        lambda f: trainer(f, with_texts([*"aaaaaaa", "a" * 30]), collator=uncut, train=True, **LONGER),
        "texts were encoded to more than the 16 tokens that the model reads",
        "or pass an ImageTextCollator, which cuts them off",
    ),
    "evaluation by name": (
        lambda f: processed(f, raw_pairs(8), options={"eval_dataset": "test"}),
        "eval_dataset is a str, not a dataset",
        "load one by its name with hf_dpclip.data.load_pairs",
    ),
    "a number of public negatives": (
        lambda f: processed(f, raw_pairs(8), options={"public_negatives": 5}),
        "public_negatives is a int",
        "give a list of captions",
    ),
    "public negatives without a caption": (
        lambda f: processed(f, raw_pairs(8), options={"public_negatives": ["a cat", None]}),
        "public_negatives[1] is None, which is no caption",
        "give a list of captions alone",
    ),
    "a blank public negative": (
        lambda f: processed(f, raw_pairs(8), options={"public_negatives": ["a cat", " "]}),
        "public_negatives[1] is ' ', which is no caption",
        "give a list of captions alone",
    ),
    "a prompt without a place": (
        lambda f: class_prompts(["cat"], "a photo"),
        "has no {} for the class name",
        "write e.g. 'a photo of a {}.'",
    ),
    "no such file": (lambda f: load_pairs(f"{f}/no.csv"), "no.csv does not exist", "check the path"),
    "an unknown format": (
        lambda f: load_pairs(table(f, "pairs.xlsx", "image\ttext")),
        "pairs.xlsx is in no known format",
        "convert it to one of .parquet, .csv",
    ),
    "an empty table": (
        lambda f: load_pairs(table(f, "pairs.csv", "")),
        "pairs.csv cannot be read as csv",
        "check the file",
    ),
    "a table without records": (
        lambda f: load_pairs(table(f, "pairs.csv", "image,text\n")),
        "pairs.csv cannot be read as csv",
        "must have records",
    ),
    "a table in another encoding": (
        lambda f: load_pairs(table(f, "pairs.csv", "image,text\na.png,\xe9\n".encode("latin-1"))),
        "pairs.csv cannot be read as csv",
        "text in UTF-8",
    ),
    "a table with semicolons": (
        lambda f: load_pairs(table(f, "pairs.csv", "image;text\na.png;a\n")),
        "has no image column 'image', only ['image;text']",
        "there must be commas",
    ),
    "a broken table": (
        lambda f: load_pairs(table(f, "pairs.parquet", b"PAR1 no more")),
        "pairs.parquet cannot be read as parquet",
        "check the file",
    ),
    "a row without a path": (
        lambda f: processed(f, load_pairs(unnamed_image(f))["train"]),
        "train_dataset: record 1 (such records: 1) has no image in column 'image'",
        "leave such records out, as in dataset.filter(lambda record: record['image'])",
    ),
    "rows of numbers in place of paths": (
        lambda f: load_pairs(table(f, "pairs.csv", "image,text\n1,a\n2,b\n")),
        "row 0 of",
        "write the image's path there",
    ),
    "a folder without images": (
        lambda f: load_pairs(str(Path(table(f, "notes.txt", "none")).parent)),
        "cannot be read as imagefolder",
        "a folder must hold images with a metadata.csv",
    ),
    "a folder of archives": (
        lambda f: load_pairs(str(Path(table(f, "train-000.tar", "none")).parent)),
        "cannot be read as imagefolder",
        "as tar archives of WebDataset, can be written to a folder by save_to_disk",
    ),
    "another image column": (
        lambda f: load_pairs(table(f, "pairs.csv", "scan,text\na.png,a\n")),
        "has no image column 'image', only ['scan', 'text']",
        "name one of these",
    ),
}


@pytest.mark.parametrize("row", DATA)
def test_wrong_data(tmp_path, row):
    call, wrong, remedy = DATA[row]
    check_explained(lambda: call(tmp_path), wrong, remedy)


WHOLE = raw_pairs(24)
RECORDS = [*pairs(24)]


class Wrapped(torch.utils.data.Dataset):
    """As users write them: of which records it consists shows only by reading them."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        return self.records[number]


@pytest.mark.parametrize(
    "private, held_out",
    [
        (WHOLE.select(range(16)), Subset(WHOLE, range(16, 24))),
        (Subset(WHOLE, range(16)), Subset(Subset(WHOLE, range(20)), [16, 17])),
        (RECORDS[:16], Subset(RECORDS, range(16, 24))),
        (Subset(RECORDS, torch.arange(16)), RECORDS[16:]),
        (WHOLE.select(range(16)), [*WHOLE.select(range(16, 24))]),
    ],
    ids=["rows of a table", "subset of a subset", "rows of a list", "slice of a list", "list"],
)
def test_what_was_held_out_is_accepted(tmp_path, private, held_out):
    make = trainer if "pixel_values" in private[0] else processed
    assert math.isfinite(make(tmp_path, private, options={"eval_dataset": held_out}).evaluate()["eval_loss"])


@pytest.mark.parametrize(
    "private, evaluated",
    [
        (Subset(RECORDS, torch.arange(16)), Subset(RECORDS, torch.tensor([20, 15]))),
        (Subset(RECORDS, range(16)), RECORDS),
        (pairs(16), Subset(pairs(16), [3, 4])),
        (pairs(16), [pairs(16)[3]]),
        (pairs(16), Wrapped(pairs(16))),
        (Wrapped(pairs(16)), Subset(Wrapped(pairs(16)), [3, 4])),
        (raw_pairs(16), [raw_pairs(16)[3]]),
    ],
    ids=[
        "tensors",
        "whole",
        "rows of a copy",
        "list of rows",
        "wrapped table",
        "wrapped twice",
        "list of images",
    ],
)
def test_what_was_not_held_out_is_refused(tmp_path, private, evaluated):
    make = trainer if "pixel_values" in private[0] else processed
    with pytest.raises(ValueError, match="are among those of the private training dataset"):
        make(tmp_path, private, options={"eval_dataset": evaluated})


@pytest.mark.parametrize(
    "evaluated",
    [[*pairs(4, seed=1)], Wrapped(pairs(4, seed=1)), pairs(4, seed=1).to_iterable_dataset(), [{"another": 1}]],
    ids=["list", "wrapped table", "stream", "what cannot be collated"],
)
def test_other_records_that_are_no_table_are_accepted(tmp_path, evaluated, caplog):
    trainer(tmp_path, pairs(16), options={"eval_dataset": evaluated})
    assert "private training dataset" not in caplog.text


def test_records_that_cannot_be_read_hide_no_copy(tmp_path):
    class Broken(Wrapped):
        def __getitem__(self, number):
            if number == 15:
                raise OSError("no such page")
            return super().__getitem__(number)

    with pytest.raises(ValueError, match="are among those of the private training dataset"):
        trainer(tmp_path, Broken(pairs(16)), options={"eval_dataset": [pairs(16)[3]]})


def test_columns_that_are_not_read_hide_no_copy(tmp_path):
    private, evaluated = (raw_pairs(8).add_column("split", [name] * 8) for name in ("train", "test"))
    with pytest.raises(ValueError, match="are among those of the private training dataset"):
        processed(tmp_path, private, options={"eval_dataset": evaluated.select([3, 4])})


def test_texts_may_be_as_long_as_the_table_of_positions(tmp_path):
    """Which others have made longer without saying so in the configuration."""
    model = tiny_clip()
    embeddings = model.text_model.embeddings
    embeddings.position_embedding = torch.nn.Embedding(24, embeddings.position_embedding.embedding_dim)
    embeddings.register_buffer("position_ids", torch.arange(24)[None], persistent=False)
    made = trainer(tmp_path, with_texts(["a" * 20] * 8), model, uncut, remove_unused_columns=False, train=True)
    assert made.privacy_spent().steps > 0


class ReadsOtherNames(torch.nn.Module):
    """Of images that are not called `pixel_values`."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 1)

    def forward(self, images, input_ids):
        return {"loss": self.head(images).square().mean()}


def test_other_images_with_the_same_captions_are_accepted(tmp_path, caplog):
    private, held_out = ([{"images": torch.rand(3), "input_ids": torch.ones(2)} for _ in range(8)] for _ in range(2))
    trainer(tmp_path, private, ReadsOtherNames(), options={"eval_dataset": held_out}, microbatch_size=4)
    assert "private training dataset" not in caplog.text


@pytest.mark.parametrize("around", [lambda lazy: lazy, lambda lazy: ConcatDataset([Subset(lazy, [*range(16)])])])
def test_a_file_that_a_dataset_opens_with_its_first_record_stays_closed_until_training(tmp_path, around):
    """Workers that are forked later would share its position."""

    class Lazy(Wrapped):
        file = None

        def __getitem__(self, number):
            self.file = self.file or "open"
            return super().__getitem__(number)

    private, evaluated = Lazy(pairs(16)), Lazy(pairs(16, seed=1))
    made = trainer(tmp_path, around(private), options={"eval_dataset": around(evaluated)})
    assert private.file is evaluated.file is None
    made.train()
    made.evaluate()
    assert private.file == evaluated.file == "open"


def test_a_stream_is_not_read_before_it_is_evaluated(tmp_path):
    read = []
    stream = pairs(8, seed=1).to_iterable_dataset().map(lambda record: read.append(1) or record)
    trainer(tmp_path, pairs(16), options={"eval_dataset": stream})
    assert not read


def test_comparing_records_leaves_no_trace_in_the_generators(tmp_path):
    class Drawing(Wrapped):
        def __getitem__(self, number):
            torch.rand(1), random.random()
            return super().__getitem__(number)

    made = trainer(tmp_path, Drawing(pairs(16)))
    before = torch.get_rng_state(), random.getstate()
    made.get_eval_dataloader(Drawing(pairs(8, seed=1)))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_augmentation_hides_no_copy(tmp_path):
    angles = itertools.count(step=7)
    collator = ImageTextCollator(tiny_processor(), augmentation=lambda image: image.rotate(next(angles)))
    with pytest.raises(ValueError, match="are among those of the private training dataset"):
        trainer(tmp_path, raw_pairs(16), collator=collator, options={"eval_dataset": [raw_pairs(16)[3]]})


def test_records_with_gaps_are_compared():
    private, gaps = pairs(8), [[1, 2, None, 3]] * 8
    private = private.remove_columns("input_ids").add_column("input_ids", gaps)
    assert len({*array_digests(private, "input_ids")}) == 1
    assert [*array_digests(private, "input_ids")] == [*array_digests(private.select(range(8)), "input_ids")]


def test_an_undecodable_image_in_a_worker_is_named(tmp_path):
    settings = {"per_device_train_batch_size": 8, "dataloader_num_workers": 1}
    with pytest.raises(ValueError, match=r"record 5 of the dataset cannot be read \(UnidentifiedImageError"):
        processed(tmp_path, undecodable(5), train=True, **settings)


def test_records_are_numbered_as_they_were_selected(tmp_path):
    texts = with_texts(["a", None, "b", "c", "d"])
    wrong = "record 3 (such records: 1) has no text in column 'text'"
    check_explained(lambda: processed(tmp_path, texts.select([4, 3, 2, 1, 0])), wrong, "dataset.filter")
    assert processed(tmp_path, texts.select([4, 3, 2, 0])).plan.num_examples == 4


def test_a_loss_of_the_users_own_may_read_answers_that_the_model_does_not(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return (outputs.logits_per_image.mean(dim=1) * labels).mean()

    records = with_texts(["a"] * 8).rename_column("text", "question").add_column("answer", ["yes", "no"] * 4)
    collator = VisualQuestionCollator(tiny_processor(), label2id=tiny_clip_vqa().config.label2id)
    run = DPCLIPTrainer(tiny_clip(), arguments(tmp_path), collator, records, compute_loss_func=loss)
    run.train()
    assert run.privacy_spent().steps == 2
