"""The paper's table: rows are complete, measured once, and each can be measured by its own command."""

import json
import sys

import pytest
from scripts import ROOT, load_script, run_main


PAPER_TABLE = load_script(ROOT / "examples" / "paper_table.py")


@pytest.fixture
def hundred_digits(monkeypatch):
    """The embedded digits, a hundred to train on and a hundred to test on, in batches that fit."""
    preset = PAPER_TABLE.PRESETS["mnist-5k"]
    splits = preset.load()
    few = {name: split.select(range(100)) for name, split in splits.items()}
    monkeypatch.setitem(PAPER_TABLE.PRESETS, "mnist-5k", type(preset)(lambda: few, preset.template))
    monkeypatch.setattr(PAPER_TABLE, "FORWARD_BATCH", 16)
    monkeypatch.setattr(PAPER_TABLE, "SMALL", PAPER_TABLE.Schedule(32, 1, 1))


@pytest.mark.usefixtures("hundred_digits")
def test_every_arm_has_its_row(monkeypatch, tmp_path):
    rows = tmp_path / "results" / "rows.json"
    options = ["--rows", rows, "--max_steps", "1", "--epsilons", "2", "4", "--tuning", "lora"]
    run_main(monkeypatch, PAPER_TABLE, *options)
    measured = json.loads(rows.read_text())
    assert [(row["arm"], row["epsilon"], row["num_microbatches"]) for row in measured] == [
        ("zero_shot", None, None),
        ("non_private", None, None),
        ("per_batch", 2.0, 1),
        ("per_batch", 4.0, 1),
        ("microbatch", 2.0, 4),
        ("microbatch", 4.0, 4),
        ("public_negatives", 2.0, 32),
        ("public_negatives", 4.0, 32),
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in measured)
    assert measured[2]["delta"] == pytest.approx(100**-1.1)
    run_main(monkeypatch, PAPER_TABLE, *options)
    assert json.loads(rows.read_text()) == measured


def test_the_command_of_a_row_asks_for_that_row_alone(monkeypatch):
    asked = ["--epsilons", "3", "--seeds", "0", "7", "--num_microbatches", "16", "128"]
    asked += ["--max_steps", "5", "--rows", "some.json"]
    monkeypatch.setattr(sys, "argv", ["paper_table.py", *asked])
    args = PAPER_TABLE.parse_arguments()
    wanted = PAPER_TABLE.wanted_rows(args, "mnist-5k")
    for row in wanted:
        _, script, *options = PAPER_TABLE.command(row, args).split()
        assert script == "examples/paper_table.py"
        monkeypatch.setattr(sys, "argv", [script, *options])
        own = PAPER_TABLE.parse_arguments()
        assert PAPER_TABLE.wanted_rows(own, "mnist-5k") == [row]
        assert own.max_steps == 5


@pytest.mark.usefixtures("hundred_digits")
def test_numbers_of_microbatches_are_rows_of_their_own(monkeypatch, tmp_path):
    rows = tmp_path / "rows.json"
    options = ["--rows", rows, "--max_steps", "1", "--arms", "microbatch", "--tuning", "lora", "--epsilons", "2"]
    for counts in (["2"], ["2", "16"], []):
        run_main(monkeypatch, PAPER_TABLE, *options, *(["--num_microbatches", *counts] if counts else []))
    assert [row["num_microbatches"] for row in json.loads(rows.read_text())] == [2, 16, 4]


@pytest.mark.parametrize("count", [100, 512, 0])
def test_microbatches_of_less_than_two_pairs_are_refused(monkeypatch, capsys, count):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, PAPER_TABLE, "--num_microbatches", count)
    assert f"invalid choice: {count} (choose from 2, 4, 8" in capsys.readouterr().err


@pytest.mark.usefixtures("hundred_digits")
def test_images_that_are_too_many_to_keep_are_encoded_when_they_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(PAPER_TABLE, "KEPT", 0)
    rows = tmp_path / "rows.json"
    arms = ["non_private", "public_negatives"]
    options = ["--max_steps", "1", "--tuning", "lora", "--epsilons", "2", "--learning_rate", "1e-3"]
    run_main(monkeypatch, PAPER_TABLE, "--rows", rows, *options, "--arms", *arms)
    measured = json.loads(rows.read_text())
    assert [row["arm"] for row in measured] == arms
    assert all("--learning_rate 0.001" in row["command"] for row in measured)


def test_trials_do_not_end_up_among_the_results(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, PAPER_TABLE, "--max_steps", "1")
    assert "--rows outputs/rows.json" in capsys.readouterr().err


def test_an_unknown_dataset_is_refused_with_the_known_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, PAPER_TABLE, "--datasets", "cifar")
    assert "mnist-5k" in capsys.readouterr().err
