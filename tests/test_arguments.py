"""`DPTrainingArguments`: parsing, defaults, and what is derived from them. (What is refused: `test_bad_input.py`.)"""

import pytest
from factories import arguments
from transformers import HfArgumentParser, TrainingArguments

from hf_dpclip import DPTrainingArguments


def parse(*command_line: str) -> DPTrainingArguments:
    return HfArgumentParser(DPTrainingArguments).parse_args_into_dataclasses(["--use_cpu", *command_line])[0]


@pytest.mark.parametrize(
    ("command_line", "name", "value"),
    [
        ("--target_epsilon 3", "target_epsilon", 3.0),
        ("--noise_multiplier 0.8", "noise_multiplier", 0.8),
        ("--target_epsilon 3 --target_delta 1e-5", "target_delta", 1e-5),
        ("--target_epsilon 3 --microbatch_size 4", "microbatch_size", 4),
        ("--target_epsilon 3 --max_grad_norm 0.5", "max_grad_norm", 0.5),
        ("--target_epsilon 3 --clipping automatic", "clipping", "automatic"),
        ("--target_epsilon 3 --accountant rdp", "accountant", "rdp"),
        ("--target_epsilon 3 --privacy_unit_column user_id", "privacy_unit_column", "user_id"),
        ("--target_epsilon 3 --noise_seed 7", "noise_seed", 7),
        ("--target_epsilon 3 --static_shapes", "static_shapes", True),
        ("--target_epsilon 3 --static_shapes False", "static_shapes", False),
        ("--non_private", "non_private", True),
        ("--target_epsilon 3 --log_private_statistics", "log_private_statistics", True),
    ],
)
def test_command_line_option_is_parsed(command_line, name, value):
    assert getattr(parse(*command_line.split()), name) == value


@pytest.mark.parametrize("option", ["--clipping per_layer", "--accountant prv", "--target_epsilon three"])
def test_command_line_option_with_an_unknown_value_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        parse("--noise_multiplier", "1", *option.split())
    assert option.split()[0] in capsys.readouterr().err


def test_every_own_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    own = DPTrainingArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    shown = capsys.readouterr().out
    assert len(own) == 19
    assert all(DPTrainingArguments.__dataclass_fields__[name].metadata["help"] for name in own)
    assert all(f"--{name}" in shown for name in own)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("target_epsilon", None),
        ("target_delta", None),
        ("microbatch_size", None),
        ("clipping", "flat"),
        ("accountant", "pld"),
        ("privacy_unit_column", None),
        ("noise_seed", None),
        ("static_shapes", None),
        ("non_private", False),
        ("log_private_statistics", False),
        ("max_grad_norm", 1.0),
    ],
)
def test_default(tmp_path, name, default):
    assert getattr(arguments(tmp_path), name) == default


def test_a_resumed_run_never_skips_the_batches_of_the_interrupted_one(tmp_path):
    assert arguments(tmp_path, ignore_data_skip=False).ignore_data_skip


@pytest.mark.parametrize(("accumulation", "processes", "batch"), [(1, 1, 8), (3, 1, 24), (1, 2, 16), (3, 2, 48)])
def test_expected_batch_is_per_device_batch_times_accumulation_times_processes(
    tmp_path, monkeypatch, accumulation, processes, batch
):
    monkeypatch.setattr(DPTrainingArguments, "world_size", processes)
    args = arguments(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=accumulation)
    assert args.expected_batch_size == batch


@pytest.mark.parametrize(("microbatch_size", "num_microbatches"), [(None, 3), (8, 3), (4, 6), (2, 12), (1, 24)])
def test_number_of_microbatches(tmp_path, microbatch_size, num_microbatches):
    args = arguments(tmp_path, gradient_accumulation_steps=3, microbatch_size=microbatch_size)
    assert args.num_microbatches == num_microbatches


def test_a_run_with_noise_is_private(tmp_path):
    assert arguments(tmp_path).not_private_because == ()


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"non_private": True}, ["non_private"]),
        ({"non_private": True, "noise_multiplier": 0.0}, ["non_private"]),
        ({"noise_seed": 7}, ["noise_seed"]),
        ({"noise_seed": 0}, ["noise_seed"]),
        ({"log_private_statistics": True}, ["log_private_statistics"]),
        ({"noise_seed": 7, "log_private_statistics": True}, ["noise_seed", "log_private_statistics"]),
    ],
)
def test_every_reason_why_a_run_is_not_private_is_named(tmp_path, overrides, names):
    reasons = arguments(tmp_path, **overrides).not_private_because
    assert len(reasons) == len(names)
    assert all(reason.startswith(name) for reason, name in zip(reasons, names))


def test_parallelism_config_is_refused(tmp_path):
    from accelerate.utils import ParallelismConfig

    with pytest.raises(ValueError, match=r"parallelism_config is not supported: use DDP \(torchrun\)"):
        arguments(tmp_path, parallelism_config=ParallelismConfig())


def test_tf32_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use bf16=True"):
        arguments(tmp_path, tf32=True)


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    # The Trainer's own set-up of DeepSpeed, which needs it installed, comes before the refusal.
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    with pytest.raises(ValueError, match="DeepSpeed reduces gradients before they are clipped: use DDP"):
        arguments(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})


def test_data_parallel_over_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DPTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"torch\.nn\.DataParallel mixes the gradients.*one process per GPU"):
        arguments(tmp_path)


def test_statistics_of_batches_are_allowed_where_private_statistics_are(tmp_path):
    assert arguments(tmp_path, log_private_statistics=True, skip_memory_metrics=False).not_private_because
