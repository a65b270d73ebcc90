"""Averages of the weights: their values, that they are what is evaluated and saved, and that runs resume with both."""

import re

import pytest
import torch
from checks import flat_weights
from factories import SAVING, StopAfter, collate_with_loss, pairs, tiny_clip
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPModel, Trainer, TrainerCallback, TrainingArguments

from hf_dpclip import WeightAveraging, lora_config
from hf_dpclip.averaging import AVERAGES_NAME
from hf_dpclip.checkpoints import SEAL_NAME


# Steps so large that weights and averages are far apart.
MOVING = {"max_steps": 4, "learning_rate": 0.01, "lr_scheduler_type": "constant"}


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


class Watching(TrainerCallback):
    """Remembers the weights of the optimizer after every step, and what others see."""

    def __init__(self):
        self.weights, self.begun, self.evaluated = [], [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.start = trainable(model)

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.weights.append(trainable(model))

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated.append(trainable(model))


class Beginning(TrainerCallback):
    """Remembers the weights with which each step begins."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights.append(trainable(model))


@pytest.fixture
def make_averaging(make_trainer):
    """A trainer that averages, and what its callbacks saw."""

    def make(model=None, decay=0.9999, stop_after=0, **overrides):
        watching, beginning = Watching(), Beginning()
        callbacks = [watching, WeightAveraging(decay), beginning, StopAfter(stop_after)]
        options = {"callbacks": callbacks, "eval_dataset": pairs(8, seed=1)}
        return make_trainer(model, trainer_options=options, **overrides), watching, beginning

    return make


def averages_of(start: dict, weights: list[dict], decay: float = 0.9999) -> list[dict]:
    """The averages after every step, from their definition, in float64."""
    averages, averaged = {name: value.double() for name, value in start.items()}, []
    for t, step in enumerate(weights):
        d = min(decay, (1 + t) / (10 + t))
        averages = {name: d * averages[name] + (1 - d) * step[name].double() for name in step}
        averaged.append(averages)
    return averaged


def assert_close(actual: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        assert torch.allclose(actual[name].double(), value.double(), rtol=tolerance, atol=tolerance), name


def distance(first: dict, second: dict) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ---- What is averaged ----


@pytest.mark.parametrize("decay", [0.9999, 0.15, 0.0])
def test_the_model_ends_with_the_averages_of_the_weights_of_all_steps(make_averaging, decay):
    trainer, watching, _ = make_averaging(decay=decay, **MOVING)
    trainer.train()
    assert len(watching.weights) == 4
    assert_close(trainable(trainer.model), averages_of(watching.start, watching.weights, decay)[-1])
    far = distance(trainable(trainer.model), watching.weights[-1])
    assert far == 0 if decay == 0 else far > 1e-3


def test_every_step_begins_with_the_weights_of_the_last_one(make_averaging):
    trainer, watching, beginning = make_averaging(gradient_accumulation_steps=2, **MOVING)
    trainer.train()
    assert len(beginning.weights) == 4
    for begun, left in zip(beginning.weights, [watching.start, *watching.weights]):
        assert distance(begun, left) == 0


def test_averaging_does_not_change_the_weights_that_are_averaged(make_averaging, make_trainer):
    averaged, watching, _ = make_averaging(noise_seed=3, **MOVING)
    averaged.train()
    plain = make_trainer(noise_seed=3, **MOVING)
    plain.train()
    assert distance(watching.weights[-1], trainable(plain.model)) == 0
    assert not torch.equal(flat_weights(averaged.model), flat_weights(plain.model))


def test_parameters_that_are_not_trained_stay_as_they_are(make_averaging):
    model = tiny_clip()
    model.logit_scale.requires_grad_(False)
    before = model.logit_scale.clone()
    trainer, watching, _ = make_averaging(model, **MOVING)
    trainer.train()
    assert "logit_scale" not in watching.weights[0]
    assert torch.equal(trainer.model.logit_scale, before)


def test_averages_of_half_precision_weights_are_float32(make_averaging, tmp_path):
    trainer, watching, _ = make_averaging(tiny_clip().bfloat16(), **MOVING, **SAVING)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / AVERAGES_NAME)
    weights, averages = (
        {name: saved[f"{kind}.{name}"] for name in watching.start} for kind in ("weights", "averages")
    )
    assert {tensor.dtype for tensor in averages.values()} == {torch.float32}
    assert_close(averages, averages_of(watching.start, watching.weights)[-1])
    assert distance(weights, watching.weights[-1]) == 0
    rounded = {name: tensor.bfloat16() for name, tensor in averages.items()}
    assert distance(trainable(trainer.model), rounded) == 0


@pytest.mark.parametrize("decay", [1.0, -0.1, 2, float("nan")])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        WeightAveraging(decay)


# ---- What is evaluated and saved ----


def test_evaluation_sees_the_averages(make_averaging):
    trainer, watching, _ = make_averaging(eval_strategy="steps", eval_steps=2, **MOVING)
    trainer.train()
    averages = averages_of(watching.start, watching.weights)
    assert len(watching.evaluated) == 2
    for seen, expected in zip(watching.evaluated, averages[1::2]):
        assert_close(seen, expected)


def test_checkpoints_and_the_saved_model_are_the_averages(make_averaging, tmp_path):
    trainer, watching, _ = make_averaging(**MOVING, **SAVING)
    trainer.train()
    trainer.save_model()
    averages = averages_of(watching.start, watching.weights)
    for step, expected in enumerate(averages, start=1):
        assert_close(trainable(CLIPModel.from_pretrained(tmp_path / f"checkpoint-{step}")), expected)
    assert_close(trainable(CLIPModel.from_pretrained(tmp_path)), averages[-1])
    assert not (tmp_path / AVERAGES_NAME).exists()


def test_the_best_model_is_what_remains_of_a_run_that_asks_for_it(make_averaging, monkeypatch):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps"}
    trainer, watching, _ = make_averaging(eval_steps=1, **best, **MOVING, **SAVING)
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}
    monkeypatch.setattr(trainer, "evaluate", lambda **_: {"eval_score": scores[trainer.state.global_step]})
    trainer.train()
    assert_close(trainable(trainer.model), averages_of(watching.start, watching.weights)[1])


def test_adapters_are_averaged_and_nothing_else(make_averaging, tmp_path):
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip(), r=2))
    base = model.get_base_model().text_model.final_layer_norm.weight.clone()
    trainer, watching, _ = make_averaging(model, **MOVING, **SAVING)
    trainer.train()
    assert all("lora_" in name for name in watching.weights[0])
    averages = averages_of(watching.start, watching.weights)
    assert_close(trainable(trainer.model), averages[-1])
    saved = PeftModel.from_pretrained(tiny_clip(), tmp_path / "checkpoint-3", is_trainable=True)
    assert_close(trainable(saved), averages[2])
    assert torch.equal(model.get_base_model().text_model.final_layer_norm.weight, base)


# ---- Resuming ----


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_goes_on_with_the_weights_and_the_averages(make_averaging, adapters):
    def model():
        return get_peft_model(tiny_clip(), lora_config(tiny_clip(), r=2)) if adapters else tiny_clip()

    first, before, _ = make_averaging(model(), stop_after=2, **MOVING, **SAVING)
    first.train()
    second, after, beginning = make_averaging(model(), **MOVING, **SAVING)
    second.train(resume_from_checkpoint=True)
    assert [len(before.weights), len(after.weights)] == [2, 2]
    assert distance(beginning.weights[0], before.weights[-1]) == 0
    averages = averages_of(before.start, before.weights + after.weights)
    assert_close(after.start, averages[1])
    assert_close(trainable(second.model), averages[-1])


def test_a_second_training_starts_from_the_averages_and_averages_anew(make_averaging):
    trainer, watching, _ = make_averaging(**MOVING)
    trainer.train()
    first = trainable(trainer.model)
    trainer.train()
    assert_close(watching.start, first)
    assert_close(trainable(trainer.model), averages_of(first, watching.weights[4:])[-1])


def test_what_is_cut_short_while_it_is_written_leaves_no_complete_checkpoint(make_averaging, tmp_path, monkeypatch):
    def cut_short(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("hf_dpclip.averaging.save_file", cut_short)
    trainer, _, _ = make_averaging(**MOVING, **SAVING)
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1" / AVERAGES_NAME).exists()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


@pytest.fixture
def interrupted(make_averaging, tmp_path):
    """The checkpoint of a run of 4 steps that ended after the second."""
    make_averaging(stop_after=2, **MOVING, **SAVING)[0].train()
    return tmp_path / "checkpoint-2"


def test_averages_are_not_taken_for_the_weights(make_trainer, interrupted):
    with pytest.raises(ValueError, match=re.escape("are averages, and the run has no WeightAveraging")):
        make_trainer(**MOVING, **SAVING).train(resume_from_checkpoint=str(interrupted))


def test_a_checkpoint_without_averages_is_refused(make_averaging, interrupted):
    for name in (AVERAGES_NAME, SEAL_NAME):
        (interrupted / name).unlink()
    with pytest.raises(FileNotFoundError, match="saved without WeightAveraging, or with save_only_model=True"):
        make_averaging(**MOVING, **SAVING)[0].train(resume_from_checkpoint=str(interrupted))


def test_averages_of_other_parameters_are_refused(interrupted):
    model = tiny_clip()
    model.logit_scale.requires_grad_(False)
    with pytest.raises(ValueError, match="averages of other parameters"):
        WeightAveraging().load(interrupted, model)


def test_the_plain_trainer_averages_but_does_not_resume(tmp_path):
    def trainer(*callbacks):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **MOVING, **SAVING)
        return Trainer(tiny_clip(), args, collate_with_loss, pairs(64), callbacks=[*callbacks, WeightAveraging()])

    watching = Watching()
    stopped = trainer(watching, StopAfter(2))
    stopped.train()
    assert_close(trainable(stopped.model), averages_of(watching.start, watching.weights)[-1])
    with pytest.raises(ValueError, match="a plain Trainer resumes without the averages"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
