"""`hf-dpclip plan`: figures of the plan, advice of the trainer, and an exit code that says whether it ran."""

import json
import math
import sys

import pytest
import torch
from factories import arguments
from scripts import modules_after

from hf_dpclip import PrivacyPlan, PrivacyStatement
from hf_dpclip.cli import main
from hf_dpclip.planning import make_plan
from hf_dpclip.reporting import summary


SIZES = {"num_examples": 4000, "expected_batch_size": 512, "num_microbatches": 64}
TARGET = {**SIZES, "num_steps": 80, "target_epsilon": 3.0, "target_delta": 1e-5, "accountant": "rdp"}
NOISE = {**SIZES, "num_steps": 80, "noise_multiplier": 1.1, "max_grad_norm": 0.5, "accountant": "rdp"}


def command(**options) -> list[str]:
    return ["plan", *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value)))]


@pytest.fixture
def shown(capsys):
    """The printed table, by the names of its rows, and what was printed beside it."""

    def show(**options) -> tuple[dict[str, str], str]:
        assert main(command(**options)) == 0
        text = capsys.readouterr().out
        cells = [line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  ")]
        return {name: value.strip() for name, value in cells}, text

    return show


@pytest.fixture
def printed_json(capsys):
    def read(**options) -> dict:
        assert main([*command(**options), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return read


# ---- Figures ----


def test_json_is_the_calibrated_plan_and_its_epsilon(printed_json):
    plan = PrivacyPlan.calibrate(**TARGET)
    assert printed_json(**TARGET) == {**plan.to_dict(), "epsilon": plan.epsilon()}


def test_the_size_of_a_microbatch_says_how_many_there_are(printed_json):
    assert printed_json(**without(NOISE, "num_microbatches"), microbatch_size=8) == printed_json(**NOISE)


def test_json_is_the_plan_of_a_given_noise_and_its_epsilon(printed_json):
    plan = PrivacyPlan(**NOISE)
    assert printed_json(**NOISE) == {**plan.to_dict(), "epsilon": plan.epsilon()}


def test_the_default_accountant_is_that_of_the_plan(printed_json):
    options = {name: value for name, value in NOISE.items() if name != "accountant"}
    assert printed_json(**options)["epsilon"] == PrivacyPlan(**options).epsilon()


def test_json_holds_a_plan_that_reads_back_equal(printed_json):
    values = printed_json(**TARGET)
    del values["epsilon"]
    assert PrivacyPlan.from_dict(values) == PrivacyPlan.calibrate(**TARGET)


@pytest.mark.parametrize("num_epochs", [1.0, 2.5, 10.0])
def test_epochs_make_as_many_steps_as_in_the_trainer(printed_json, tmp_path, num_epochs):
    settings = {"num_train_epochs": num_epochs, "max_steps": -1, "per_device_train_batch_size": 30}
    planned = make_plan(arguments(tmp_path, accountant="rdp", **settings), 1000)
    options = {"num_examples": 1000, "expected_batch_size": 30, "num_epochs": num_epochs, "noise_multiplier": 1.0}
    assert printed_json(**options, accountant="rdp")["num_steps"] == planned.num_steps


def test_an_epsilon_that_no_number_holds_is_null(printed_json, monkeypatch):
    # What an accountant answers where its grid resolves nothing.
    monkeypatch.setattr(PrivacyPlan, "epsilon", lambda plan: math.inf)
    assert printed_json(**NOISE)["epsilon"] is None


def test_the_table_shows_noise_and_epsilon_by_epoch(shown):
    plan = PrivacyPlan.calibrate(**TARGET)
    rows, _ = shown(**TARGET)
    assert rows["noise multiplier σ"] == f"{plan.noise_multiplier:.4g}"
    assert rows["noise standard deviation σΔ"] == f"{plan.noise_std:.4g}"
    # ceil(4000 / 512) = 8 steps are an epoch.
    for epoch in (1, 2, 5):
        assert rows[f"ε after epoch {epoch}"] == f"{plan.epsilon(8 * epoch):.4g} (rdp accountant)"
    assert rows["ε after all 80 steps (10 epochs)"] == f"{plan.epsilon():.4g} (rdp accountant)"
    assert not {"ε after epoch 10", "ε after epoch 20"} & rows.keys()


def test_the_table_shows_the_signal_of_so_many_parameters(shown):
    plan = PrivacyPlan(**NOISE)
    rows, _ = shown(**NOISE, num_parameters=250_000)
    assert rows["trainable parameters d"] == "250,000"
    assert rows["signal-to-noise ceiling of a step"] == f"{plan.signal_to_noise(250_000):.3g}"
    total = plan.signal_to_noise(250_000) * math.sqrt(80)
    assert rows["signal-to-noise ceiling of all steps"] == f"{total:.3g}"


def test_large_numbers_are_shown_alike(shown):
    sizes = {"num_examples": 10**6, "expected_batch_size": 65536, "num_microbatches": 1}
    rows, _ = shown(**{**NOISE, **sizes})
    assert (rows["expected batch size B"], rows["microbatches per step K"]) == (
        "65,536",
        "1 of about 65,536 units each",
    )


def test_without_parameters_there_is_no_word_of_signal(shown):
    rows, text = shown(**NOISE)
    assert not any("signal" in name for name in rows)
    assert "--num-parameters" in text


# ---- Advice ----


@pytest.mark.parametrize("num_microbatches", [1, 64])
@pytest.mark.parametrize("num_parameters", [50_000, 50_000_000])
def test_the_advice_is_that_of_the_trainer(shown, num_microbatches, num_parameters):
    options = {**NOISE, "num_microbatches": num_microbatches}
    _, text = shown(**options, num_parameters=num_parameters)
    plan = PrivacyPlan(**options)
    with torch.device("meta"):
        model = torch.nn.Linear(num_parameters // 1000, 1000, bias=False)
    warnings = [
        line.strip()
        for line in summary(PrivacyStatement(plan, 0), model, plan.num_steps).splitlines()
        if "WARNING" in line
    ]
    assert [line for line in text.splitlines() if "WARNING" in line] == warnings


def test_too_little_signal_is_warned_of(shown):
    _, text = shown(**{**NOISE, "num_microbatches": 1}, num_parameters=50_000_000)
    assert "WARNING: noise drowns the signal" in text
    assert "microbatch_size=8 (signal × 64)" in text
    assert "LoRA" in text
    assert "a larger batch" in text


def test_enough_signal_is_not(shown):
    _, text = shown(**NOISE, num_parameters=50_000)
    assert "WARNING" not in text
    assert "above 0.3" in text


# ---- Output ----


def test_a_pipe_receives_plain_text(shown):
    _, text = shown(**NOISE)
    assert "\x1b" not in text
    assert not set("─│┃━") & set(text)


def test_a_terminal_receives_a_framed_table(monkeypatch, shown):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    _, text = shown(**NOISE)
    assert set("│─") & set(text)
    assert "noise multiplier σ" in text


def test_the_figure_is_a_png(tmp_path):
    path = tmp_path / "epsilon.png"
    assert main([*command(**TARGET), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_json_stays_json_beside_a_figure(printed_json, tmp_path):
    assert printed_json(**NOISE, plot=tmp_path / "epsilon.png")["num_steps"] == 80
    assert (tmp_path / "epsilon.png").is_file()


def test_the_command_waits_for_no_training_library():
    loaded = modules_after(f"from hf_dpclip.cli import main; main({[*command(**TARGET), '--json']!r})")
    assert "dp_accounting" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "matplotlib", "rich"}


# ---- Refusals ----


def without(options: dict, *names: str) -> dict:
    return {name: value for name, value in options.items() if name not in names}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (without(TARGET, "target_epsilon"), "--target-epsilon --noise-multiplier is required"),
        ({**TARGET, "noise_multiplier": 1.0}, "not allowed with argument --target-epsilon"),
        (without(TARGET, "num_steps"), "--num-epochs --num-steps is required"),
        ({**TARGET, "num_epochs": 3}, "not allowed with argument --num-steps"),
        (without(TARGET, "num_examples"), "--num-examples"),
        ({**TARGET, "num_examples": "many"}, "invalid int value: 'many'"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        main(command(**options))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**TARGET, "expected_batch_size": 5120}, "--expected-batch-size 5120 is not possible"),
        ({**TARGET, "num_microbatches": 513}, "--num-microbatches 513 does not divide --expected-batch-size 512"),
        ({**TARGET, "num_microbatches": 7}, "--num-microbatches 7 does not divide --expected-batch-size 512"),
        ({**TARGET, "num_microbatches": -1}, "--num-microbatches -1 does not divide"),
        ({**without(TARGET, "target_delta"), "num_examples": 1}, "--num-examples 1 is not possible"),
        ({**TARGET, "target_delta": 1e-3}, "--target-delta 0.001 is not possible"),
        ({**TARGET, "target_epsilon": -1}, "--target-epsilon -1.0 is not possible"),
        ({**NOISE, "noise_multiplier": 0}, "--noise-multiplier 0.0 is not possible"),
        ({**NOISE, "noise_multiplier": 1e-5, "accountant": "pld"}, "--noise-multiplier 1e-05 is not possible"),
        ({**NOISE, "accountant": "prv"}, "--accountant 'prv' is not possible: expected pld or rdp"),
        ({**without(NOISE, "num_steps"), "num_epochs": 0}, "--num-epochs 0 is not possible"),
        ({**without(NOISE, "num_steps"), "num_epochs": "nan"}, "--num-epochs nan is not possible"),
        ({**without(NOISE, "num_steps"), "num_epochs": 1e308}, "--num-epochs 1e+308 is not possible"),
        ({**without(NOISE, "num_steps"), "num_epochs": 3, "expected_batch_size": 0}, "--expected-batch-size 0 is not"),
        ({**without(NOISE, "num_microbatches"), "microbatch_size": 7}, "--microbatch-size 7 does not divide"),
        ({**without(NOISE, "num_microbatches"), "microbatch_size": 0}, "--microbatch-size 0 does not divide"),
        ({**NOISE, "num_parameters": 0}, "--num-parameters 0 is not possible"),
        ({**NOISE, "plot": "epsilon.nonsense"}, "nonsense"),
    ],
)
def test_an_impossible_plan_is_refused_with_what_is_wrong(capsys, options, message):
    assert main(command(**options)) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*command(**NOISE), "--plot", str(tmp_path / "epsilon.png")]) == 2
    assert "pip install hf_dpclip[plot]" in capsys.readouterr().err


def test_a_figure_has_a_folder_before_the_plan_is_shown(capsys, tmp_path):
    path = tmp_path / "nowhere" / "epsilon.png"
    assert main([*command(**NOISE), "--plot", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"--plot {path}: {path.parent} is no folder here: make it first" in printed.err
