"""`hf-dpclip check`: what a run would stop at is found beforehand, all of it."""

import json

import pytest
import torch
from datasets import Dataset, Image
from factories import pairs, pictures, raw_pairs, tiny_processor
from test_import import modules_after

from hf_dpclip import ImageTextCollator
from hf_dpclip.cli import main
from hf_dpclip.data import unusable_records


@pytest.fixture
def model(tmp_path):
    """A folder with the processor of a model."""
    tiny_processor().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def table(tmp_path):
    """Writes the CSV file of so many pairs, with some of the images and texts replaced."""

    def write(count: int, images: dict[int, bytes] | None = None, texts: dict[int, str] | None = None) -> str:
        for number, picture in enumerate(pictures(count)):
            picture.save(tmp_path / f"{number}.png")
        for number, content in (images or {}).items():
            (tmp_path / f"{number}.png").write_bytes(content)
        captions = [(texts or {}).get(number, "a photo") for number in range(count)]
        names = [f"{number}.png" for number in range(count)]
        Dataset.from_dict({"scan": names, "report": captions}).to_csv(tmp_path / "pairs.csv")
        return str(tmp_path / "pairs.csv")

    return write


@pytest.fixture
def answer(capsys, model):
    """The exit code for a dataset, and what was printed."""

    def ask(dataset: str, *options: str) -> tuple[int, str, str]:
        columns = ["--image-column", "scan", "--text-column", "report"]
        code = main(["check", dataset, "--model", model, *columns, *options])
        return code, *capsys.readouterr()

    return ask


def test_good_records_pass(table, answer):
    code, text, _ = answer(table(3))
    assert (code, text) == (0, "All 3 records can be trained on.\n")


def test_all_bad_records_are_named_with_the_reason(table, answer):
    code, text, _ = answer(table(5, images={1: b"no image"}, texts={3: " \u3000"}))
    assert code == 1
    assert text.startswith("2 of 5 records cannot be trained on:\n  record 1: UnidentifiedImageError: ")
    assert "  record 3: ValueError: column 'report' holds a blank text.\n" in text
    assert "if row not in unusable" in text


def test_a_long_list_is_cut_but_not_for_programs(table, answer):
    bad = table(25, images=dict.fromkeys(range(22), b""))
    assert "and 2 more, which --json lists" in answer(bad)[1]
    code, text, _ = answer(bad, "--json")
    found = json.loads(text)
    assert code == 1 and found["records"] == 25
    assert list(found["unusable"]) == [str(number) for number in range(22)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "no split 'test', only ['train']"),
        (["--image-column", "picture"], "no image column 'picture'"),
        (["--text-column", "caption"], "no column 'caption'"),
    ],
)
def test_what_is_not_there_is_said(table, answer, options, message):
    code, _, error = answer(table(2), *options)
    assert code == 2 and message in error


def test_a_model_without_processor_is_said(table, answer, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, error = answer(table(2), "--model", str(tmp_path / "empty"))
    assert code == 2 and "empty has no processor" in error


def test_what_is_left_can_be_read_and_collated():
    images = raw_pairs(4).cast_column("image", Image(decode=False))["image"][:]
    images[0] = {"bytes": b"none", "path": None}
    dataset = Dataset.from_dict({"image": images, "text": ["a", "b", None, "d"]}).cast_column("image", Image())
    collator = ImageTextCollator(tiny_processor())
    unusable = unusable_records(dataset, collator)
    assert list(unusable) == [0, 2]
    left = dataset.select(row for row in range(len(dataset)) if row not in unusable)
    collator([left[0], left[1]])


def test_any_dataset_and_collator_will_do():
    class Torch(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            if row == 1:
                raise KeyError(row)
            return row

    def collate(records):
        if records == [2]:
            raise ZeroDivisionError("of two")
        return records

    assert unusable_records(Torch(), collate) == {1: "KeyError: 1", 2: "ZeroDivisionError: of two"}
    assert unusable_records(pairs(4), lambda records: records) == {}


def test_help_is_immediate():
    assert not {"torch", "transformers", "datasets"} & modules_after("from hf_dpclip.cli import _parser; _parser()")
