"""The step from `Trainer` that `docs/migrating.md` describes, taken by the letter and run under the real launcher."""

import json
import subprocess
import sys

import pytest
from migrating import SCRIPT, write_inputs, write_private_script
from scripts import ROOT, load_script, output_of, run_main
from transformers import AutoModel

from hf_dpclip import PrivacyStatement


CONFIGS = ROOT / "examples" / "accelerate"
TRAINING = ["--do_train", "--do_eval", "--remove_unused_columns", "False", "--report_to", "none", "--use_cpu"]
TRAINING += ["--per_device_train_batch_size", "8", "--max_steps", "2", "--save_strategy", "no"]
PRIVACY = ["--noise_multiplier", "1", "--microbatch_size", "4", "--accountant", "rdp"]


@pytest.fixture(scope="module")
def private_script(tmp_path_factory):
    return write_private_script(tmp_path_factory.mktemp("script"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(launcher, script, output_dir, *arguments):
    return output_of(*launcher, script, *arguments, *TRAINING, "--output_dir", output_dir)


def accelerate(config, *options):
    return ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]


def test_the_script_runs_with_the_ordinary_trainer(inputs, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, load_script(SCRIPT), *inputs, *TRAINING, "--output_dir", tmp_path)
    assert "train_loss" in capsys.readouterr().out and not (tmp_path / "privacy.json").exists()


@pytest.mark.parametrize(("config", "processes"), [("cpu.yaml", 1), ("one_machine.yaml", 2)])
def test_the_documented_diff_makes_it_private(private_script, inputs, tmp_path, config, processes):
    output = run(accelerate(config), private_script, tmp_path, *inputs, *PRIVACY)
    assert output.count("Differentially private training") == 1
    assert "train_loss" not in output and "eval_loss" in output
    statement = PrivacyStatement.load(tmp_path)
    assert (statement.plan.num_examples, statement.plan.expected_batch_size) == (40, 8 * processes)
    assert statement.steps == 2 and not statement.not_private_because
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "VisionTextDualEncoderModel"
    assert "differentially private" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "loss" not in json.loads((tmp_path / "train_results.json").read_text())


@pytest.mark.slow
def test_two_machines_are_one_run(private_script, inputs, tmp_path):
    """Both on this machine, which the configuration file does not know."""
    arguments = [*inputs, *PRIVACY, *TRAINING, "--output_dir", str(tmp_path)]
    options = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29571", "--num_processes", "2"]
    machines = []
    for rank in ("0", "1"):
        launcher = accelerate("two_machines.yaml", *options, "--machine_rank", rank)
        command = [sys.executable, *launcher, str(private_script), *arguments]
        machines.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [machine.communicate(timeout=600)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][-4000:]
    statement = PrivacyStatement.load(tmp_path)
    assert (statement.plan.expected_batch_size, statement.steps) == (16, 2)
