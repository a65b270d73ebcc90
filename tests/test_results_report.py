"""Tables and figures say what the rows say, here made-up ones; those of the documentation say what was measured."""

import math
import re
import sys

import pytest
from matplotlib import pyplot as plt
from scripts import ROOT, load_script, run_main


PAPER_TABLE = load_script(ROOT / "examples" / "paper_table.py")
REPORT = load_script(ROOT / "examples" / "results_report.py")
PUBLISHED = load_script(ROOT / "examples" / "published_epsilon.py")


def row(arm, accuracy, epsilon=None, num_microbatches=None, seed=0, tuning="full", dataset="shapes"):
    delta = None if epsilon is None else 1e-4
    values = (dataset, arm, tuning, epsilon, num_microbatches, seed)
    return {**dict(zip(PAPER_TABLE.KEY, values)), "delta": delta, "accuracy": accuracy, "command": "python ..."}


MADE_UP = [
    *(row("zero_shot", 0.3, seed=seed, tuning=tuning) for seed in (0, 1) for tuning in ("full", "lora")),
    *(row("non_private", accuracy, seed=seed) for seed, accuracy in enumerate((0.79, 0.81))),
    *(row("per_batch", 0.4 + epsilon / 50, epsilon, 1, seed) for epsilon in (1.0, 3.0) for seed in (0, 1)),
    *(row("microbatch", 0.6 + seed / 50, epsilon, 64, seed) for epsilon in (1.0, 3.0) for seed in (0, 1)),
    row("microbatch", 0.5, 3.0, 8),
    row("public_negatives", 0.72, 3.0, 512),
    row("microbatch", 0.55, 3.0, 64, tuning="lora"),
    row("microbatch", 0.45, 3.0, 8, tuning="lora"),
]


@pytest.fixture
def results():
    return REPORT.Results(MADE_UP)


def table_of(markdown: str) -> dict[tuple, list[str]]:
    """The entries of each line, by its first three."""
    lines = [[entry.strip() for entry in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    return {tuple(line[:3]): line[3:] for line in lines}


def test_the_table_holds_means_deviations_and_ratios(results):
    table = table_of(REPORT.tables(results))
    assert table == {
        ("arm", "trained", "K"): ["ε = 1", "ε = 3", "no noise"],
        ("---",) * 3: ["---"] * 3,
        ("zero-shot", "", ""): ["", "", "30.0 ± 0.0 % (4)"],
        ("no privacy", "all parameters", ""): ["", "", "80.0 ± 1.4 % (2)"],
        ("per batch", "all parameters", "1"): ["42.0 ± 0.0 % (2), 0.525", "46.0 ± 0.0 % (2), 0.575", ""],
        ("microbatches", "all parameters", "8"): ["", "50.0 % (1), 0.625", ""],
        ("microbatches", "all parameters", "64"): ["61.0 ± 1.4 % (2), 0.762", "61.0 ± 1.4 % (2), 0.762", ""],
        ("microbatches", "LoRA", "8"): ["", "45.0 % (1)", ""],
        ("microbatches", "LoRA", "64"): ["", "55.0 % (1)", ""],
        ("public negatives", "all parameters", "512"): ["", "72.0 % (1), 0.900", ""],
    }


def test_every_dataset_has_a_table_of_its_own():
    both = [*MADE_UP, row("zero_shot", 0.1, dataset="digits")]
    assert re.findall("### (.*)", REPORT.tables(REPORT.Results(both))) == ["digits (δ = none)", "shapes (δ = 0.0001)"]


def drawn(draw, results, tmp_path, monkeypatch):
    """The figure while it is still open: by panel, the points and bars of every line by its label."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw(results, tmp_path / "figures" / "figure.png")
    assert (tmp_path / "figures" / "figure.png").stat().st_size > 10_000
    panels = plt.gcf().axes
    monkeypatch.undo()
    plt.close()
    return {panel.get_title(): panel for panel in panels}


def points(panel) -> dict[str, list]:
    return {
        bars.get_label(): [(x, pytest.approx(y)) for x, y in zip(*bars.lines[0].get_data())]
        for bars in panel.containers
    }


def test_privacy_utility_is_drawn_from_zero_with_both_levels(results, tmp_path, monkeypatch):
    panels = drawn(REPORT.draw_privacy_utility, results, tmp_path, monkeypatch)
    assert panels.keys() == {"shapes, all parameters", "shapes, LoRA"}
    panel = panels["shapes, all parameters"]
    assert points(panel) == {
        "per batch, K = 1": [(1, 0.42), (3, 0.46)],
        "microbatches, K = 64": [(1, 0.61), (3, 0.61)],
        "public negatives, K = 512": [(3, 0.72)],
    }
    assert panel.get_ylim() == (0, 1) and panel.get_xlabel() == "ε" and panel.get_ylabel() == "test accuracy"
    levels = {line.get_label(): line.get_ydata()[0] for line in panel.lines if not line.get_label().startswith("_")}
    assert levels == {"no privacy": pytest.approx(0.8), "zero-shot": pytest.approx(0.3)}
    assert points(panels["shapes, LoRA"]) == {"microbatches, K = 8": [(3, 0.45)], "microbatches, K = 64": [(3, 0.55)]}


def test_bars_are_one_standard_deviation(results, tmp_path, monkeypatch):
    panel = drawn(REPORT.draw_privacy_utility, results, tmp_path, monkeypatch)["shapes, all parameters"]
    (bars,) = (bars for bars in panel.containers if bars.get_label() == "microbatches, K = 64")
    (lower, upper), *_ = ([y for _, y in segment] for segment in bars.lines[2][0].get_segments())
    assert (lower, upper) == (pytest.approx(0.61 - 0.02 / math.sqrt(2)), pytest.approx(0.61 + 0.02 / math.sqrt(2)))


def test_accuracy_is_drawn_against_the_number_of_microbatches(results, tmp_path, monkeypatch):
    panel = drawn(REPORT.draw_accuracy_by_microbatches, results, tmp_path, monkeypatch)["shapes, all parameters"]
    assert points(panel) == {"ε = 1": [(1, 0.42), (64, 0.61)], "ε = 3": [(1, 0.46), (8, 0.5), (64, 0.61)]}
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "8", "64"]


@pytest.fixture
def made_up_documentation(tmp_path, monkeypatch):
    """A folder in the place of the documentation's."""
    rows = tmp_path / "results" / "paper_table.json"
    for each in MADE_UP:
        PAPER_TABLE.add_row(rows, each)
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- begin measured -->\nold\n<!-- end measured -->\nafter\n")
    for name, path in {"ROWS": rows, "DOCUMENT": document, "FIGURES": tmp_path / "figures"}.items():
        monkeypatch.setattr(REPORT, name, path)
    return document


def test_the_tables_are_written_between_the_markers(made_up_documentation, monkeypatch, results):
    for _ in range(2):
        run_main(monkeypatch, REPORT)
        text = made_up_documentation.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n")
        assert text.count(REPORT.tables(results)) == 1 and "old" not in text
    assert {path.stem for path in REPORT.FIGURES.glob("*.png")} == REPORT.FIGURE_OF.keys()


def test_rows_of_another_file_leave_the_documentation_alone(made_up_documentation, monkeypatch, tmp_path, capsys):
    PAPER_TABLE.add_row(tmp_path / "other.json", row("per_batch", 0.5, 3.0, 1))
    before = made_up_documentation.read_text()
    run_main(monkeypatch, REPORT, "--rows", tmp_path / "other.json")
    assert "| per batch | all parameters | 1 | 50.0 % (1) |" in capsys.readouterr().out
    assert made_up_documentation.read_text() == before
    assert (tmp_path / "privacy_utility.png").exists()


def test_there_is_a_panel_for_what_was_measured_only(tmp_path, monkeypatch, capsys):
    PAPER_TABLE.add_row(tmp_path / "rows.json", row("non_private", 0.8))
    run_main(monkeypatch, REPORT, "--rows", tmp_path / "rows.json")
    assert "Figure" not in capsys.readouterr().out
    PAPER_TABLE.add_row(tmp_path / "rows.json", row("public_negatives", 0.72, 3.0, 512))
    run_main(monkeypatch, REPORT, "--rows", tmp_path / "rows.json")
    assert [path.name for path in tmp_path.glob("*.png")] == ["privacy_utility.png"]
    rows = [*MADE_UP, row("public_negatives", 0.7, 3.0, 512, dataset="digits")]
    panels = drawn(REPORT.draw_accuracy_by_microbatches, REPORT.Results(rows), tmp_path, monkeypatch)
    assert panels.keys() == {"shapes, all parameters", "shapes, LoRA"}


def test_no_rows_and_no_markers_are_said_to_be_missing(made_up_documentation, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"absent.json has no rows: measure some"):
        run_main(monkeypatch, REPORT, "--rows", tmp_path / "absent.json")
    made_up_documentation.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines <!-- begin measured -->"):
        run_main(monkeypatch, REPORT)


# ---- The documentation ----


def test_the_documented_tables_are_those_of_the_rows():
    between = re.search("<!-- begin measured -->\n(.*)<!-- end measured -->", REPORT.DOCUMENT.read_text(), re.DOTALL)
    assert between[1].strip() == REPORT.measured(REPORT.Results(PAPER_TABLE.load_rows(REPORT.ROWS)))


def test_the_documented_commands_are_possible(monkeypatch):
    commands = re.findall(r"^python examples/(paper_table.py.*)$", REPORT.DOCUMENT.read_text(), re.MULTILINE)
    measured = set()
    for command in commands:
        monkeypatch.setattr(sys, "argv", command.split())
        args = PAPER_TABLE.parse_arguments()
        measured |= {
            (dataset, arm, tuning) for dataset in args.datasets for arm in args.arms for tuning in args.tuning
        }
    on_hub = [name for name in PAPER_TABLE.PRESETS if "/" in name]
    assert {
        (name, arm, tuning) for name in on_hub for arm in REPORT.ARM_NAMES for tuning in ("full", "lora")
    } <= measured


def test_the_documented_worth_of_a_published_epsilon_is_the_accountants():
    """Of the whole table, one entry: all of them take most of a minute."""
    text = REPORT.DOCUMENT.read_text()
    line = text[text.index("| MNIST |") :].splitlines()[1].strip("|").split("|")
    documented = dict(zip(PUBLISHED.EPSILONS, (entry.strip() for entry in line[2:])))
    worth = PUBLISHED.honest_epsilon(PUBLISHED.claimed_plan(60_000, 3.0))
    assert documented[3.0] == f"ε = {worth:.3g}"
    assert worth > 50


def test_the_published_noise_is_half_of_what_a_whole_batch_needs():
    claimed = PUBLISHED.claimed_plan(60_000, 10.0)
    assert claimed.noise_std == claimed.noise_multiplier * claimed.max_grad_norm
    assert 9.9 <= claimed.epsilon() <= 10
    assert PUBLISHED.honest_epsilon(claimed) > 100
