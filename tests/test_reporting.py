"""What a run says: its cost everywhere, its data nowhere, and NOT PRIVATE wherever no guarantee holds."""

import json
import math
from functools import partial

import pytest
import torch
from checks import logged_values
from factories import SAVING, pairs, tiny_clip
from peft import get_peft_model
from transformers import TrainerCallback

from hf_dpclip import PrivacyPlan, PrivacyStatement, lora_config
from hf_dpclip.reporting import summary


class Tracker(TrainerCallback):
    """Receives what trackers such as TensorBoard receive."""

    def __init__(self):
        self.received = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.received.append(dict(logs))


@pytest.fixture
def run(make_trainer):
    """Trains for two steps, logging and saving each. Returns the trainer, its output, and what a tracker received."""

    def start(**overrides):
        tracker = Tracker()
        settings = {"logging_steps": 1, **SAVING, **overrides}
        trainer = make_trainer(trainer_options={"callbacks": [tracker]}, **settings)
        return trainer, trainer.train(), tracker.received

    return start


# Of sizes at which advice makes sense.
plan = partial(
    PrivacyPlan,
    num_examples=60_000,
    expected_batch_size=1024,
    num_microbatches=128,
    num_steps=351,
    noise_multiplier=0.846,
    accountant="rdp",
)


def summarise(plan: PrivacyPlan, model=None, taken: int = 0, reasons: tuple[str, ...] = ()) -> str:
    return summary(PrivacyStatement(plan, taken, reasons), model or torch.nn.Linear(1000, 250), plan.num_steps)


# ---- The summary ----


@pytest.mark.parametrize(
    "line",
    [
        "privacy units n = 60,000 (one unit = one record)",
        "sampler = Poisson, probability q = 0.01707, fresh in every step",
        "expected batch size B = 1,024",
        "microbatches per step K = 128 of about 8 units each",
        "steps T = 351, of which taken = 17",
        "clipping norm C = 0.5 (automatic)",
        "sensitivity Δ = 1",
        "noise multiplier σ = 0.846",
        "noise standard deviation σΔ = 0.846",
        "at δ = 5.55e-06 (rdp accountant)",
        "trainable parameters d = 250,250, signal-to-noise ceiling of a step = 0.151",
    ],
)
def test_the_summary_names(line):
    assert line in summarise(plan(max_grad_norm=0.5, clipping="automatic"), taken=17)


def test_the_summary_names_epsilon_of_all_steps():
    assert f"ε = {plan().epsilon():.4g} after all steps" in summarise(plan(), taken=17)


def test_the_summary_names_the_unit_that_is_protected():
    assert "(one unit = one user_id)" in summarise(plan(privacy_unit="user_id"))


def test_the_summary_counts_trainable_parameters_only():
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip(), r=1))
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    assert f"trainable parameters d = {adapters:,}," in summarise(plan(), model)


def test_the_summary_of_a_private_run_does_not_say_otherwise():
    assert "NOT PRIVATE" not in summarise(plan())


def test_the_summary_gives_every_reason_why_a_run_is_not_private():
    text = summarise(plan(), reasons=("the first", "the second"))
    assert "NOT PRIVATE: the first\n" in text
    assert "NOT PRIVATE: the second" in text


@pytest.mark.parametrize("training", [True, False])
def test_the_summary_is_printed_once_when_training_begins(make_trainer, capsys, training):
    trainer = make_trainer()
    if training:
        trainer.train()
    printed = capsys.readouterr().out.count("Differentially private training")
    assert printed == (1 if training else 0)


def test_the_summary_of_a_second_training_counts_the_first(make_trainer, capsys):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    capsys.readouterr()
    trainer.train()
    printed = capsys.readouterr().out
    assert "steps T = 6, of which taken = 3\n" in printed
    assert f"ε = {trainer.privacy_spent().epsilon:.4g} after all steps" in printed


# ---- The warning of a plan that cannot work ----


def test_a_plan_with_enough_signal_is_not_warned_of():
    assert "WARNING" not in summarise(plan())


def test_a_plan_whose_noise_drowns_the_signal_is_warned_of():
    text = summarise(plan(num_microbatches=1), torch.nn.Linear(1000, 3000))
    assert "WARNING: noise drowns the signal in this plan" in text
    assert "microbatch_size=8 (signal × 128)" in text
    assert "LoRA with 300,000 parameters (noise ÷ 3.2)" in text
    assert "a larger batch" in text


def test_the_advice_leaves_out_what_is_done_already():
    text = summarise(plan(num_microbatches=128, num_steps=1, noise_multiplier=20.0))
    assert "WARNING" in text
    assert "microbatch_size=8" not in text
    assert "LoRA" not in text


HOPELESS = {"num_steps": 1, "noise_multiplier": 20.0}


@pytest.mark.parametrize(
    ("size", "advised"), [(11, None), (12, "6 (signal × 2)"), (16, "8 (signal × 2)"), (9, None), (8, None), (10, "5 ")]
)
def test_the_advised_microbatch_is_one_that_training_accepts(size, advised):
    text = summarise(plan(num_examples=10**5, expected_batch_size=8 * size, num_microbatches=8, **HOPELESS))
    assert "a larger batch" in text
    assert ("microbatch_size=" in text.replace("the same microbatch_size", "")) == (advised is not None)
    assert advised is None or f"microbatch_size={advised}" in text


def test_nobody_is_advised_to_draw_more_than_there_is():
    text = summarise(plan(num_examples=64, expected_batch_size=64, num_microbatches=8, **HOPELESS))
    assert "WARNING" in text and "a larger batch" not in text and "Try a larger ε, or gather more records." in text


def test_more_steps_make_up_for_a_weak_signal():
    weak = {"num_microbatches": 8, "noise_multiplier": 2.0}
    assert "WARNING" in summarise(plan(num_steps=10, **weak))
    assert "WARNING" not in summarise(plan(num_steps=10_000, **weak))


def test_a_run_without_noise_is_not_warned_of():
    assert "WARNING" not in summarise(plan(noise_multiplier=0.0, non_private=True, num_microbatches=1))


# ---- ε in logs and trackers ----


def test_every_log_entry_holds_epsilon_of_the_steps_so_far(run):
    trainer, _, _ = run()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history] == [1, 2, 2]
    assert [entry["epsilon"] for entry in history] == [trainer.plan.epsilon(entry["step"]) for entry in history]


def test_trackers_receive_what_the_log_history_holds(run):
    trainer, _, received = run()
    # The history adds the step by itself.
    assert received == [{k: v for k, v in entry.items() if k != "step"} for entry in trainer.state.log_history]


def test_an_evaluation_before_training_claims_no_epsilon(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)})
    trainer.evaluate()
    assert "epsilon" not in trainer.state.log_history[0]


def test_an_evaluation_after_training_is_logged_with_epsilon(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)})
    trainer.train()
    trainer.evaluate()
    assert trainer.state.log_history[-1]["epsilon"] == trainer.privacy_spent().epsilon


def test_the_progress_bar_shows_epsilon(make_trainer, capsys):
    trainer = make_trainer(disable_tqdm=False, logging_steps=1)
    trainer.train()
    assert f"ε={trainer.privacy_spent().epsilon:.3g}" in capsys.readouterr().err


# ---- Statistics of the private data ----

# What may be logged while training: public constants, times, and functions of the noisy gradient.
PUBLIC = {"grad_norm", "learning_rate", "epsilon", "epoch", "step", "total_flos"} | {
    f"train_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")
}


def test_logs_hold_nothing_but_what_is_public(run):
    trainer, _, received = run()
    entries = [*trainer.state.log_history, *received]
    assert set().union(*entries) == PUBLIC


def test_checkpoints_hold_nothing_but_what_is_public(run, tmp_path):
    run()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert set().union(*state["log_history"]) <= PUBLIC
    assert state["num_input_tokens_seen"] == 0


def test_the_output_of_training_holds_no_loss(run):
    _, output, _ = run()
    assert math.isnan(output.training_loss)
    assert output.metrics.keys() <= PUBLIC


def test_the_count_of_floating_point_operations_does_not_reveal_batch_sizes(run, tmp_path):
    trainer, output, _ = run()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    logged = logged_values(trainer, "total_flos")
    assert logged
    assert {*logged, state["total_flos"], trainer.state.total_flos} == {0}
    assert "total_flos" not in output.metrics


def test_throughput_is_computed_from_the_expected_batch_size(run):
    _, output, _ = run()
    samples = output.metrics["train_samples_per_second"] * output.metrics["train_runtime"]
    assert samples == pytest.approx(2 * 8, rel=0.05)


def test_the_logged_gradient_norm_is_that_of_the_noisy_gradient(make_trainer):
    # The clipped gradient has norm 1, its noise one of thousands.
    trainer = make_trainer(noise_multiplier=100.0, logging_steps=1, max_steps=1)
    trainer.train()
    noise = 100 * 2 * math.sqrt(sum(parameter.numel() for parameter in trainer.model.parameters()))
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(noise, rel=0.05)


# ---- Runs without a guarantee ----


def test_logs_say_not_private(run, not_private):
    trainer, _, received = run(**not_private)
    assert all(entry["NOT PRIVATE"] == 1 for entry in [*trainer.state.log_history, *received])


def test_logs_of_a_private_run_do_not(run):
    trainer, _, _ = run()
    assert not any("NOT PRIVATE" in entry for entry in trainer.state.log_history)


def test_the_printed_summary_says_not_private(run, capsys, not_private):
    run(**not_private)
    (name,) = not_private
    assert f"NOT PRIVATE: {name}" in capsys.readouterr().out


def test_the_statement_says_not_private(run, tmp_path, not_private):
    run(**not_private)
    (name,) = not_private
    values = json.loads((tmp_path / "checkpoint-2" / "privacy.json").read_text(encoding="utf-8"))
    assert values["private"] is False
    assert [reason.startswith(name) for reason in values["not_private_because"]] == [True]


@pytest.mark.parametrize(
    "settings", [{"noise_seed": 7}, {"log_private_statistics": True}], ids=lambda s: next(iter(s))
)
def test_the_progress_bar_says_not_private(make_trainer, capsys, settings):
    make_trainer(disable_tqdm=False, logging_steps=1, **settings).train()
    assert " NOT PRIVATE" in capsys.readouterr().err


def test_private_statistics_are_logged_on_request(run):
    trainer, output, _ = run(log_private_statistics=True)
    losses = logged_values(trainer, "loss")
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert output.training_loss == pytest.approx(sum(losses) / 2, abs=1e-3)


def test_a_run_without_noise_claims_no_epsilon(run, tmp_path):
    trainer, _, _ = run(non_private=True)
    values = json.loads((tmp_path / "checkpoint-2" / "privacy.json").read_text(encoding="utf-8"))
    assert trainer.privacy_spent().epsilon == math.inf
    assert values["epsilon"] is None
    assert not any("epsilon" in entry for entry in trainer.state.log_history)
