"""`hf-dpclip check`: what a run would stop at is found beforehand, all of it."""

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from factories import clap_processor, pairs, pictures, raw_pairs, tiny_processor
from scripts import modules_after

from hf_dpclip import ImageTextCollator, VisualQuestionCollator
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
        texts = [] if "--label-column" in options else ["--text-column", "report"]
        code = main(["check", dataset, "--model", model, "--image-column", "scan", *texts, *options])
        return code, *capsys.readouterr()

    return ask


def test_good_records_pass(table, answer):
    code, text, _ = answer(table(3))
    assert (code, text) == (0, "All 3 records can be read and encoded.\n")


def test_a_record_without_a_unit_is_found_beside_the_others(tmp_path, answer):
    ids = ["x", None, "y", " n/a"]
    table = Dataset.from_dict({"scan": pictures(4), "report": ["a", " ", "", "b"], "patient": ids})
    path = str(tmp_path / "pairs.parquet")
    table.cast_column("scan", Image()).to_parquet(path)
    code, said, _ = answer(path, "--privacy-unit-column", "patient")
    assert code == 1 and said.startswith("3 of 4 records cannot be trained on")
    assert "record 1: ValueError: column 'report' holds a blank text" in said
    assert "leave the record out; column 'patient' holds nothing (None), no id of a privacy unit: give" in said
    assert "record 3: column 'patient' holds ' n/a', no id of a privacy unit" in said
    code, said, _ = answer(path, "--privacy-unit-column", "patient", "--json")
    assert code == 1 and [*json.loads(said)["unusable"]] == ["1", "2", "3"]
    code, _, error = answer(path, "--privacy-unit-column", "person")
    assert code == 2 and "--privacy-unit-column 'person' is not a column" in error


def test_labels_take_the_place_of_texts(tmp_path, answer):
    labels = Features({"scan": Image(), "finding": ClassLabel(names=["none", "fracture"])})

    def check(classes: list[int], column: str) -> tuple[int, str, str]:
        Dataset.from_dict({"scan": pictures(3), "finding": classes}, labels).to_parquet(tmp_path / "scans.parquet")
        return answer(str(tmp_path / "scans.parquet"), "--label-column", column)

    assert check([0, 1, 0], "finding")[:2] == (0, "All 3 records can be read and encoded.\n")
    code, said, _ = check([0, -1, 0], "finding")
    assert code == 1 and "record 1: column 'finding' holds no label: leave the record out" in said
    assert "unusable_records" not in said
    assert "label column 'scan' is not a ClassLabel column" in check([0, 1, 0], "scan")[2]


def test_what_a_trainer_would_warn_of_is_said_too(table, answer, caplog):
    path = table(3, texts={1: "a" * 30})
    assert answer(path)[0] == 0
    assert "1 of the first 3 texts have more than the 16 tokens" in caplog.text and "share" not in caplog.text
    with open(path, "a", encoding="utf-8") as file:
        file.write("0.png,the same from the left\n")
    answer(path, "--privacy-unit-column", "report")
    assert "share" not in caplog.text
    answer(path)
    assert "2 of the 4 records looked at share their 'scan' with another record" in caplog.text


def test_all_bad_records_are_named_with_the_reason(table, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(5, images={1: b"no image"}, texts={3: " \u3000"})
    code, text, _ = answer("pairs.csv")
    assert code == 1
    assert text.startswith(
        "2 of 5 records cannot be trained on (for your eyes only, like the records):\n  record 1 (1.png): Un"
    )
    assert "  record 3 (3.png): ValueError: column 'report' holds a blank text: write one" in text
    assert "if row not in unusable" in text


def test_records_with_one_reason_are_one_line(table, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(25, texts=dict.fromkeys(range(2, 24), "\t"))
    _, text, _ = answer("pairs.csv")
    first_ones = ", ".join(map(str, range(2, 22)))
    line = f"22 records ({first_ones}, ...), the first of them record 2 (2.png): ValueError: column 'report' holds a"
    assert f"\n  {line}" in text


def test_many_reasons_are_cut_but_not_for_programs(table, answer):
    bad = table(25, images=dict.fromkeys(range(22), b""))
    _, text, _ = answer(bad)
    assert "record 19 (" in text and "record 20 (" not in text
    assert "and 2 reasons more, which --json lists" in text
    code, text, _ = answer(bad, "--json")
    found = json.loads(text)
    assert code == 1 and found["records"] == 25
    assert list(found["unusable"]) == [str(number) for number in range(22)]


def test_nobody_is_advised_to_leave_everything_out(table, answer):
    code, text, _ = answer(table(2, texts={0: " ", 1: " "}))
    assert code == 1 and text.startswith("2 of 2 records") and "leave them out" not in text


def test_another_split_and_the_default_columns(tmp_path, model, capsys):
    bad = Dataset.from_dict({"image": pictures(2), "text": ["a", ""]})
    DatasetDict(train=raw_pairs(3), test=bad).save_to_disk(tmp_path / "splits")
    command = ["check", str(tmp_path / "splits"), "--model", model]
    assert main(command) == 0
    assert main([*command, "--split", "test"]) == 1
    assert "record 1: ValueError: column 'text' holds a blank text" in capsys.readouterr().out


def test_empty_cells_of_images_hide_no_other_fault(answer, table):
    path = table(1)
    Path(path).write_text("scan,report\n0.png,a\n,b\n,c\nmissing.png,d\n0.png,\n", encoding="utf-8")
    code, said, _ = answer(path)
    assert code == 1 and said.startswith("4 of 5 records")
    assert "2 records (1, 2), the first of them record 1: ValueError: column 'scan' holds nothing (None)" in said
    assert "missing.png): FileNotFoundError" in said
    assert "record 4 (" in said and "column 'report' holds nothing (None) where a text is expected" in said


def test_a_column_of_empty_cells_is_reported(answer, table):
    path = table(1)
    Path(path).write_text("scan,report\n,a\n,b\n", encoding="utf-8")
    code, said, _ = answer(path)
    assert code == 1 and said.startswith("2 of 2 records cannot be trained on")


def test_numbers_in_the_place_of_images_are_refused(answer, table):
    path = table(1)
    Path(path).write_text("scan,report\n3,a\n4,b\n", encoding="utf-8")
    code, _, error = answer(path)
    assert code == 2 and "holds int in the place of an image (2 in all" in error


def test_ids_that_are_neither_texts_nor_whole_numbers_are_reported(tmp_path, answer):
    table = Dataset.from_dict({"scan": pictures(2), "report": ["a", "b"], "patient": [1.5, 2.5]})
    table.cast_column("scan", Image()).to_parquet(tmp_path / "pairs.parquet")
    code, said, _ = answer(str(tmp_path / "pairs.parquet"), "--privacy-unit-column", "patient")
    assert code == 1 and "column 'patient' holds float, no id of a privacy unit" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "no split 'test', only ['train']"),
        (["--image-column", "picture"], "no image column 'picture'"),
        (["--text-column", "caption"], "['report', 'scan']: name that of the texts with --text-column"),
    ],
)
def test_what_is_not_there_is_said(table, answer, options, message):
    code, _, error = answer(table(2), *options)
    assert code == 2 and message in error


def test_a_model_without_processor_is_said(table, answer, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, error = answer(table(2), "--model", str(tmp_path / "empty"))
    assert code == 2 and "empty has no processor" in error


@pytest.mark.parametrize("processor", [tiny_processor().tokenizer, clap_processor()])
def test_a_processor_of_other_things_is_refused_as_in_training(table, answer, tmp_path, processor):
    processor.save_pretrained(tmp_path / "other")
    code, _, error = answer(table(2), "--model", str(tmp_path / "other"))
    assert code == 2 and "is no processor of images and texts" in error


def test_what_is_left_can_be_read_and_collated():
    images = raw_pairs(4).cast_column("image", Image(decode=False))["image"][:]
    images[0] = {"bytes": b"none", "path": None}
    dataset = Dataset.from_dict({"image": images, "text": ["a", "b", None, "d"]}).cast_column("image", Image())
    collator = ImageTextCollator(tiny_processor())
    unusable = unusable_records(dataset, collator)
    assert list(unusable) == [0, 2]
    left = dataset.select([row for row in range(len(dataset)) if row not in unusable])
    collator([left[0], left[1]])


def test_columns_that_nobody_reads_may_hold_anything():
    broken = [{"bytes": b"none", "path": None}] * 4
    dataset = raw_pairs(4).add_column("thumbnail", broken).cast_column("thumbnail", Image())
    assert unusable_records(dataset, ImageTextCollator(tiny_processor())) == {}


class Weighing(ImageTextCollator):
    """Reads a column that its fields do not name."""

    def __call__(self, records):
        return {**super().__call__(records), "weight": [record["weight"] for record in records]}


def test_a_collator_of_the_users_own_may_read_other_columns():
    dataset = raw_pairs(2).add_column("weight", [1, 2])
    assert unusable_records(dataset, Weighing(tiny_processor())) == {}


def test_reasons_hold_no_addresses():
    images = [{"bytes": b"none", "path": None}] * 9
    dataset = Dataset.from_dict({"image": images, "text": [*"abcdefghi"]}).cast_column("image", Image())
    (reason,) = {*unusable_records(dataset, ImageTextCollator(tiny_processor())).values()}
    assert reason == "UnidentifiedImageError: cannot identify image file <_io.BytesIO object>"


def test_a_blank_answer_is_an_answer_if_the_model_can_give_it():
    dataset = raw_pairs(2, text="question").add_column("answer", ["", "no"])
    assert unusable_records(dataset, VisualQuestionCollator(tiny_processor(), label2id={"": 0, "no": 1})) == {}


class Numbers(torch.utils.data.Dataset):
    """Records that are their own numbers, of which one cannot be read."""

    def __init__(self, numbers, unreadable=None):
        self.numbers, self.unreadable = numbers, unreadable

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, row):
        if self.numbers[row] == self.unreadable:
            raise KeyError(row)
        return self.numbers[row]


def test_any_dataset_and_collator_will_do():
    def collate(records):
        if records == [2]:
            raise ZeroDivisionError("of two")

    found = unusable_records(Numbers([0, 1, 2], unreadable=1), collate)
    assert found == {1: "KeyError: 1", 2: "ZeroDivisionError: of two"}
    assert unusable_records(pairs(4), lambda records: records) == {}


def test_a_record_decides_about_itself_alone_and_leaves_no_trace():
    """As the formal guarantee says, also where collating draws at random, and how much depends on the record."""

    def collate(records):
        if torch.rand(1 + records[0]).max() > 0.9:
            raise ValueError("by chance")

    state = torch.get_rng_state()
    numbers = [5, 0, 9, 3, 7, 1, 30, 2]
    verdicts = {numbers[row] for row in unusable_records(Numbers(numbers), collate)}
    without = {numbers[1:][row] for row in unusable_records(Numbers(numbers[1:]), collate)}
    assert verdicts - {5} == without
    assert 0 < len(without) < 7
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (raw_pairs(2, image="scan"), "no column 'image'"),
        (DatasetDict(train=raw_pairs(2)), "has several splits"),
        (raw_pairs(2).to_iterable_dataset(), "has no random access"),
        (raw_pairs(2).select([]), "is empty"),
    ],
)
def test_a_wrong_call_is_no_fault_of_the_records(dataset, message):
    with pytest.raises(ValueError, match=message):
        unusable_records(dataset, ImageTextCollator(tiny_processor()))


def test_help_is_immediate():
    assert not {"torch", "transformers", "datasets"} & modules_after("from hf_dpclip.cli import _parser; _parser()")
