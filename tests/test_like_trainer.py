"""What the `Trainer` does for its users, in the places where a private one has a way of its own."""

import json
import logging
import shutil

import pytest
from checks import logged_values
from factories import (
    SAVING,
    StopAfter,
    collate_with_loss,
    other_raw_pairs,
    pairs,
    raw_pairs,
    tiny_clip,
    tiny_processor,
)
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dpclip import DPCLIPTrainer, ImageTextCollator
from hf_dpclip.collators import PairCollator
from hf_dpclip.planning import PLANNED


class Calls(TrainerCallback):
    """Where a run was when its epochs ended."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((state.global_step, state.epoch))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append((state.global_step, state.epoch))


# ---- Arguments that change ----

OTHER_VALUES = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "microbatch_size": 2,
    "max_grad_norm": 0.5,
    "clipping": "automatic",
    "target_epsilon": 1.0,
    "noise_multiplier": 2.0,
    "non_private": True,
    "target_delta": 1e-6,
    "accountant": "pld",
    "privacy_unit_column": "patient",
    "max_records_per_unit": 2,
}


@pytest.mark.parametrize("name", PLANNED)
def test_an_argument_that_is_changed_after_planning_has_no_silent_effect(make_trainer, name):
    trainer = make_trainer()
    setattr(trainer.args, name, OTHER_VALUES[name])
    with pytest.raises(ValueError, match=rf"{name} was .* when the privacy plan was made, .* trainer\.begin_run\(\)"):
        trainer.train()
    assert trainer.privacy_statement().steps == 0


def test_a_new_run_takes_changed_arguments(make_trainer):
    trainer = make_trainer()
    trainer.args.max_grad_norm, trainer.args.microbatch_size = 0.5, 2
    trainer.begin_run()
    trainer.train()
    assert (trainer.plan.max_grad_norm, trainer.plan.num_microbatches) == (0.5, 4)


# ---- Losses ----


def constant_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
    loss = 3 + 0 * next(model.parameters()).sum()
    return (loss, {}) if return_outputs else loss


def test_a_loss_that_is_put_on_the_trainer_is_the_one_that_is_minimised(make_trainer):
    trainer = make_trainer(log_private_statistics=True, logging_steps=1)
    trainer.compute_loss = constant_loss
    trainer.train()
    assert logged_values(trainer, "loss") == [3.0, 3.0]


@pytest.mark.parametrize(
    "sizes",
    [
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2, "microbatch_size": 16},
        {"per_device_train_batch_size": 64},
    ],
    ids=str,
)
def test_the_loss_that_is_logged_is_the_mean_of_the_microbatches(make_trainer, sizes):
    # All take part in each step. That one of four microbatches of 64 records is empty has a probability of 4e-8.
    trainer = make_trainer(log_private_statistics=True, logging_steps=1, **sizes)
    trainer.compute_loss = constant_loss
    output = trainer.train()
    assert output.training_loss == 3.0
    assert logged_values(trainer, "loss") == [3.0, 3.0]


# ---- Epochs ----


@pytest.mark.parametrize("stop_after", [3, 8, 9])
def test_a_resumed_run_goes_on_to_the_end_of_its_epoch(make_trainer, tmp_path, stop_after):
    whole, first, second = Calls(), Calls(), Calls()
    epochs = {"max_steps": -1, "num_train_epochs": 2}
    args = TrainingArguments(
        tmp_path / "plain", per_device_train_batch_size=8, use_cpu=True, report_to="none", **epochs
    )
    args.disable_tqdm, args.save_strategy = True, "no"
    Trainer(tiny_clip(), args, collate_with_loss, pairs(64), callbacks=[whole]).train()
    make_trainer(trainer_options={"callbacks": [first, StopAfter(stop_after)]}, **SAVING, **epochs).train()
    make_trainer(trainer_options={"callbacks": [second]}, **epochs).train(resume_from_checkpoint=True)
    assert whole.epochs == [(8, 1.0), (16, 2.0)]
    assert first.steps + second.steps == whole.steps
    assert second.epochs == [end for end in whole.epochs if end[0] > stop_after]


# ---- Metrics ----


def test_metrics_name_the_epoch_and_nothing_of_ours(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)})
    output = trainer.train()
    metrics = trainer.evaluate()
    assert output.metrics["epoch"] == metrics["epoch"] == trainer.state.epoch
    assert not {"epsilon", "total_flos", "loss", "train_loss"} & {*output.metrics, *metrics}
    assert all("epsilon" in entry for entry in trainer.state.log_history)


class Scoring(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_score"] = float(state.global_step)


class ScoringTrainer(DPCLIPTrainer):
    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_score"] = float(self.state.global_step)
        return output


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "score",
    "load_best_model_at_end": True,
    **SAVING,
}


def test_the_best_metric_may_be_one_that_a_callback_adds(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1), "callbacks": [Scoring()]}, **BEST)
    trainer.train()
    assert trainer.state.best_metric == 2.0


def test_the_best_metric_may_be_one_of_another_evaluation_loop(make_trainer, monkeypatch):
    monkeypatch.setattr("conftest.DPCLIPTrainer", ScoringTrainer)
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)}, **BEST)
    trainer.train()
    assert trainer.state.best_metric == 2.0


# ---- Loaders ----


def test_the_training_loader_can_be_looked_at_before_training(make_trainer):
    trainer = make_trainer()
    assert len(trainer.get_train_dataloader()) == 8
    trainer.train()


def test_there_is_no_training_loader_without_training_data(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8)})
    trainer.plan = None
    with pytest.raises(ValueError, match="there is no privacy plan without a train_dataset"):
        trainer.get_train_dataloader()


def test_a_training_loader_without_poisson_sampling_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.get_train_dataloader = lambda: DataLoader(pairs(64), batch_size=8)
    with pytest.raises(ValueError, match=r"does not draw the samples .* return what super\(\)"):
        trainer.train()
    assert trainer.privacy_statement().steps == 0


def test_memory_is_given_back_as_often_as_asked(make_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr("hf_dpclip.trainer.clear_device_cache", lambda: calls.append(None))
    make_trainer(torch_empty_cache_steps=2, max_steps=5).train()
    assert len(calls) == 3


def test_columns_are_kept_once_however_often_evaluation_looks(make_trainer):
    collator = ImageTextCollator(tiny_processor())
    trainer = make_trainer(
        train_dataset=other_raw_pairs(64),
        trainer_options={"data_collator": collator, "eval_dataset": raw_pairs(4)},
        remove_unused_columns=True,
    )
    for _ in range(3):
        trainer.evaluate()
    assert isinstance(collator, PairCollator)
    assert len(trainer._signature_columns) == len({*trainer._signature_columns})


# ---- Calls ----


def test_train_takes_its_arguments_in_order(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)}, eval_strategy="steps", eval_steps=1)
    assert trainer.train(None, None, ["logits_per_image"]).global_step == 2
    assert make_trainer().train("").global_step == 2


def test_public_negatives_are_no_seventh_argument(make_trainer):
    with pytest.raises(TypeError, match="positional arguments"):
        DPCLIPTrainer(tiny_clip(), make_trainer().args, None, pairs(64), None, None, tiny_clip)


def test_a_checkpoint_by_another_name_has_lost_no_steps(make_trainer, tmp_path, caplog):
    make_trainer(trainer_options={"callbacks": [StopAfter(2)]}, max_steps=4, **SAVING).train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "last-checkpoint")
    with caplog.at_level(logging.WARNING):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(tmp_path / "last-checkpoint"))
    assert "steps that ε of the resumed run will not contain" not in caplog.text


def test_a_finished_run_knows_which_process_it_is_in(make_trainer, tmp_path):
    make_trainer(**SAVING).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    written_elsewhere = json.loads(file.read_text(encoding="utf-8")) | {"is_world_process_zero": False}
    file.write_text(json.dumps(written_elsewhere), encoding="utf-8")
    (tmp_path / "checkpoint-2" / "checkpoint_seal.json").unlink()
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.is_world_process_zero
