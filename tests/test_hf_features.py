"""What users of `Trainer` rely on keeps working, and says what it costs in privacy."""

import dataclasses
import itertools
import json
import math
import sqlite3
from pathlib import Path

import optuna
import pytest
import torch
from checks import flat_weights
from factories import SAVING, answered_questions, arguments, pairs, tiny_clip, tiny_clip_vqa
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPModel, EarlyStoppingCallback, Trainer, TrainerCallback

from hf_dpclip import DPCLIPTrainer, PrivacyStatement
from hf_dpclip.checkpoints import check_undamaged
from hf_dpclip.privacy import LEDGER_NAME, Ledger


EVERY_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    **SAVING,
    "logging_steps": 1,
}


def scripted(*scores):
    """`compute_metrics` that gives these scores, one after another."""
    remaining = iter(scores)
    return lambda prediction: {"score": next(remaining)}


@pytest.fixture
def make_scored(make_trainer):
    """A trainer whose evaluations on held-out records give the scores asked for, after every step."""

    def make(scores, callbacks=(), **overrides):
        options = {
            "eval_dataset": answered_questions(8, seed=1),
            "compute_metrics": scripted(*scores),
            "callbacks": [*callbacks],
        }
        settings = {**EVERY_STEP, "metric_for_best_model": "score", "load_best_model_at_end": True, **overrides}
        return make_trainer(tiny_clip_vqa(), answered_questions(64), options, **settings)

    return make


# ---- The best checkpoint, early stopping ----


def test_the_best_checkpoint_is_loaded_and_costs_all_steps(make_scored, tmp_path):
    trainer = make_scored([0.1, 0.3, 0.2], max_steps=3, learning_rate=0.01)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    last = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(flat_weights(trainer.model), flat_weights(best))
    assert not torch.equal(flat_weights(trainer.model), flat_weights(last))
    # Which one is the best was found out by looking at all of them.
    trainer.save_model(tmp_path / "saved")
    assert PrivacyStatement.load(tmp_path / "saved").steps == 3
    assert PrivacyStatement.load(tmp_path / "checkpoint-2").steps == 2


@pytest.mark.parametrize("best, step", [(True, 1), (False, 2)], ids=["best", "last"])
def test_a_finished_run_resumes_with_the_weights_that_are_asked_for(make_scored, tmp_path, best, step):
    make_scored([0.5, 0.25]).train()
    resumed = make_scored([], load_best_model_at_end=best)
    resumed.train(resume_from_checkpoint=True)
    asked_for = type(resumed.model).from_pretrained(tmp_path / f"checkpoint-{step}")
    assert torch.equal(flat_weights(resumed.model), flat_weights(asked_for))


def test_early_stopping_spends_the_steps_that_were_taken(make_scored):
    scores = [0.3, 0.2, 0.1, 0.1, 0.1]
    trainer = make_scored(scores, [EarlyStoppingCallback(early_stopping_patience=2)], max_steps=10)
    trainer.train()
    assert trainer.state.global_step == trainer.privacy_spent().steps == 3
    assert trainer.privacy_spent().epsilon == trainer.plan.epsilon(3) < trainer.plan.epsilon()


# ---- Hyperparameter search ----


@pytest.fixture
def make_searcher(make_trainer):
    """A trainer that makes its model anew for every trial."""

    def make(**overrides):
        options = {"eval_dataset": pairs(16, seed=1), "model_init": lambda: tiny_clip()}
        return make_trainer(trainer_options=options, **overrides)

    return make


def learning_rates(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}


def search(trainer, space=learning_rates, n_trials=3, **kwargs):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kwargs = {"sampler": optuna.samplers.RandomSampler(seed=0), **kwargs}
    return trainer.hyperparameter_search(space, n_trials=n_trials, direction="minimize", **kwargs)


def test_trials_that_nothing_would_tell_apart_are_refused_before_the_first(make_trainer):
    trainer = make_trainer(trainer_options={"model_init": lambda: tiny_clip()})
    with pytest.raises(ValueError, match="pass an eval_dataset"):
        search(trainer)
    assert trainer.privacy_spent().steps == 0


def test_every_trial_spends_and_says_so(make_searcher, capsys):
    trainer = make_searcher(save_strategy="steps", save_steps=2)
    best = search(trainer)
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-2
    statement = trainer.privacy_statement()
    assert [steps for _, steps in statement.runs] == [2, 2, 2]
    one, all_three = trainer.plan.epsilon(2), trainer.plan.epsilon(6)
    assert statement.spent.epsilon == all_three
    assert one < all_three < 3 * one
    printed = capsys.readouterr().out
    assert printed.count(f"ε = {one:.4g} at δ = 0.0103 after 2 steps (q = 0.125, σ = 1)") == 3
    assert f"together: ε = {all_three:.4g} at δ = 0.0103 after 6 steps" in printed
    assert f"spent before (earlier runs: 2): ε = {trainer.plan.epsilon(4):.4g}" in printed


class KeepStatements(TrainerCallback):
    """Of every checkpoint, as it was saved."""

    def __init__(self):
        self.statements = []

    def on_save(self, args, state, control, **kwargs):
        self.statements += [PrivacyStatement.load(path) for path in Path(args.output_dir).glob("run-*/checkpoint-2")]


def test_a_trials_checkpoint_counts_the_trials_before_it(make_searcher):
    trainer = make_searcher(save_strategy="steps", save_steps=2)
    trainer.add_callback(kept := KeepStatements())
    search(trainer)
    by_run = {statement.run: statement for statement in kept.statements}
    assert len(by_run) == 3
    for trial, statement in enumerate(by_run.values()):
        assert statement.spent.epsilon == trainer.plan.epsilon(2 * (trial + 1))
        assert len(statement.earlier_runs) == trial


@pytest.mark.parametrize("only_model", [False, True])
def test_after_a_search_every_trials_checkpoint_counts_all_of_them(make_searcher, tmp_path, only_model):
    """Which is the best one was decided by all."""
    trainer = make_searcher(**SAVING, save_only_model=only_model)
    search(trainer)
    together = trainer.privacy_spent()
    for trial, step in itertools.product(range(3), (1, 2)):
        checkpoint = tmp_path / f"run-{trial}" / f"checkpoint-{step}"
        assert PrivacyStatement.load(checkpoint).spent == together
        check_undamaged(checkpoint)


class FailLater(TrainerCallback):
    """In the third training."""

    def __init__(self):
        self.trainings = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainings == 3:
            raise RuntimeError("the machine is on fire")


def test_a_search_that_fails_counts_the_trials_that_it_had(make_searcher, tmp_path):
    trainer = make_searcher(save_strategy="steps", save_steps=2)
    trainer.add_callback(FailLater())
    with pytest.raises(RuntimeError, match="on fire"):
        search(trainer)
    assert trainer.privacy_spent().steps == 5
    for trial in range(2):
        assert PrivacyStatement.load(tmp_path / f"run-{trial}" / "checkpoint-2").spent == trainer.privacy_spent()


def test_a_second_search_counts_for_the_first_too(make_searcher, tmp_path):
    trainer = make_searcher(save_strategy="steps", save_steps=2)
    search(trainer, n_trials=2)
    search(trainer, n_trials=1)
    assert PrivacyStatement.load(tmp_path / "run-1" / "checkpoint-2").spent == trainer.privacy_spent()


def test_a_search_does_not_stumble_over_what_others_left(make_searcher, tmp_path):
    left = tmp_path / "run-0" / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "trainer_state.json").write_text("{}", encoding="utf-8")
    trainer = make_searcher(save_strategy="steps", save_steps=2)
    assert search(trainer).run_id in {"0", "1", "2"}


def test_a_study_that_is_continued_is_refused(make_searcher):
    with pytest.raises(ValueError, match="chooses among trials that this trainer has not counted"):
        search(make_searcher(), study_name="ours", load_if_exists=True)


def test_a_search_leaves_the_checkpoints_of_others_alone(make_searcher, tmp_path):
    args = arguments(tmp_path / "run-0", max_steps=1, **SAVING)
    DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64)).train()
    search(make_searcher(save_strategy="no"))
    assert PrivacyStatement.load(tmp_path / "run-0" / "checkpoint-1").earlier_runs == {}


def test_training_on_with_the_best_settings_adds_to_the_search(make_searcher, tmp_path):
    trainer = make_searcher()
    best = search(trainer)
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.args.max_steps = 3
    trainer.train()
    assert trainer.state.global_step == trainer.plan.num_steps == 3
    assert trainer.privacy_spent().epsilon == trainer.plan.epsilon(3 * 2 + 3)
    trainer.save_model(tmp_path / "saved")
    assert PrivacyStatement.load(tmp_path / "saved") == trainer.privacy_statement()


def steps_of_runs(statement):
    return [steps for _, steps in statement.runs]


def test_a_trial_that_is_complete_is_resumed_without_a_further_step(make_searcher, tmp_path):
    trainer = make_searcher(target_epsilon=8.0, **SAVING)
    search(trainer, n_trials=2)
    before = trainer.privacy_statement()
    checkpoint = tmp_path / "run-0" / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    assert steps_of_runs(trainer.privacy_statement()) == [2, 2]
    assert trainer.privacy_spent() == before.spent
    assert torch.equal(flat_weights(trainer.model), flat_weights(CLIPModel.from_pretrained(checkpoint)))


def test_a_trial_goes_on_from_the_middle_and_counts_once(make_searcher, tmp_path):
    trainer = make_searcher(**SAVING)
    search(trainer, n_trials=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run-0" / "checkpoint-1"))
    assert trainer.state.global_step == 2
    # The second trial's, and the first one's two and the one that was taken anew.
    assert steps_of_runs(trainer.privacy_statement()) == [2, 3]
    assert [record.steps for record in Ledger(tmp_path / LEDGER_NAME).runs()] == [3, 2]


def test_trials_count_what_came_between_two_searches(make_searcher, tmp_path):
    other = DPCLIPTrainer(
        tiny_clip(),
        arguments(tmp_path / "other", accountant="rdp", max_steps=2, **SAVING),
        train_dataset=pairs(64),
    )
    other.train()
    trainer = make_searcher(**SAVING)
    search(trainer, n_trials=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1"))
    search(trainer, n_trials=1)
    assert steps_of_runs(trainer.privacy_statement()) == [2, 2, 2, 2]
    for trial in range(2):
        saved = PrivacyStatement.load(tmp_path / f"run-{trial}" / "checkpoint-2")
        assert sorted(steps_of_runs(saved)) == [2, 2, 2, 2]


def test_a_search_takes_the_arguments_of_the_trainers_in_their_order(make_searcher):
    best = make_searcher().hyperparameter_search(learning_rates, None, 1, "minimize", "optuna")
    assert best.run_id == "0"


def test_a_search_for_what_is_no_argument_is_refused_before_anything_is_spent(make_searcher):
    trainer = make_searcher()
    with pytest.raises(ValueError, match="'learning_rat', which is no argument of DPTrainingArguments"):
        search(trainer, lambda trial: {"learning_rat": trial.suggest_float("learning_rat", 1e-4, 1e-2)})
    assert trainer.privacy_spent().steps == 0


def test_a_space_in_the_words_of_another_backend_passes(make_searcher, monkeypatch):
    given = []
    monkeypatch.setattr(
        Trainer, "hyperparameter_search", lambda self, space, *args, **kwargs: given.append(space(None))
    )
    trainer = make_searcher()
    trainer.hyperparameter_search(lambda trial: {"method": "random", "parameters": {}}, backend="wandb")
    assert given == [{"method": "random", "parameters": {}}]


def test_arguments_that_are_changed_after_the_target_is_spent_are_not_ignored(make_trainer):
    trainer = make_trainer(target_epsilon=3.0, accountant="rdp", max_steps=2)
    trainer.train()
    trainer.args.target_epsilon = 20.0
    with pytest.raises(ValueError, match=r"target_epsilon was 3.0.* and is 20.0: call trainer.begin_run\(\)"):
        trainer.train()


def test_before_training_all_planned_steps_are_ahead(make_trainer):
    trainer = make_trainer(max_steps=3)
    assert trainer.planned_steps == 3
    with pytest.raises(ValueError, match="no privacy plan without a train_dataset"):
        DPCLIPTrainer(tiny_clip(), trainer.args).remaining_steps  # noqa: B018


def test_a_target_is_that_of_each_trial(make_searcher):
    trainer = make_searcher(target_epsilon=1.0, accountant="rdp")
    search(trainer, n_trials=2)
    (first, _), (second, _) = trainer.privacy_statement().runs
    assert first.epsilon() <= 1 and second.epsilon() <= 1 < trainer.privacy_spent().epsilon
    trainer.train()
    assert len(trainer.privacy_statement().earlier_runs) == 2


def test_trials_with_plans_of_their_own_are_added_up(make_searcher):
    sizes = iter([4, 8])
    trainer = make_searcher()
    search(trainer, lambda trial: {"per_device_train_batch_size": next(sizes)}, n_trials=2)
    (first, _), (second, _) = trainer.privacy_statement().runs
    assert (first.expected_batch_size, second.expected_batch_size) == (4, 8)
    assert (first.num_microbatches, second.num_microbatches) == (1, 1)
    spent, delta = trainer.privacy_spent(), first.target_delta
    halves = [dataclasses.replace(plan, target_delta=delta / 2).epsilon() for plan in (first, second)]
    assert spent.epsilon == sum(halves) > first.epsilon() + second.epsilon()
    assert spent.delta == delta == second.target_delta


def test_trials_start_from_the_same_weights_and_draw_noise_of_their_own(make_searcher):
    class Weights(TrainerCallback):
        def __init__(self):
            self.before, self.after = [], []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.before.append(flat_weights(model))

        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.after.append(flat_weights(model))

    trainer, weights = make_searcher(), Weights()
    trainer.add_callback(weights)
    search(trainer, lambda trial: {"learning_rate": 0.01}, n_trials=2)
    assert torch.equal(*weights.before)
    assert not torch.equal(*weights.after)


def test_a_pruned_trial_has_spent_what_it_took(make_searcher):
    class Always(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return True

    trainer = make_searcher(eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="No trials are completed"):
        search(trainer, n_trials=2, pruner=Always())
    assert [steps for _, steps in trainer.privacy_statement().runs] == [1, 1]


def test_a_trial_with_settings_that_do_not_fit_is_refused_before_its_first_step(make_searcher):
    trainer = make_searcher(microbatch_size=4)
    with pytest.raises(ValueError, match="microbatch_size=3 does not divide per_device_train_batch_size=8"):
        search(trainer, lambda trial: {"microbatch_size": 3})
    assert trainer.privacy_spent().steps == 0


@pytest.mark.parametrize("options", [{"backend": "ray"}, {"n_jobs": 2}], ids=str)
def test_trials_side_by_side_are_refused(make_searcher, options):
    with pytest.raises(ValueError, match="do not know what the others spend: use backend='optuna'"):
        search(make_searcher(), **options)


def test_an_edited_search_is_found_out(make_searcher, tmp_path):
    trainer = make_searcher()
    search(trainer, n_trials=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    path = tmp_path / "saved" / "privacy.json"
    path.write_text(path.read_text().replace('"earlier_runs"', '"forgotten_runs"'))
    with pytest.raises(ValueError, match=r"epsilon is .* but the plan and 2 steps give"):
        PrivacyStatement.load(tmp_path / "saved")


# ---- Trackers ----


@pytest.fixture
def tracked(make_trainer, tmp_path, monkeypatch):
    """A trainer after three steps that TensorBoard and trackio have followed, without the network."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    settings = {"report_to": ["tensorboard", "trackio"], "project": "dp", "run_name": "run", "logging_steps": 1}
    # A Space is the default in early releases.
    settings["trackio_space_id"] = None
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)}, max_steps=3, **settings)
    trainer.train()
    return trainer


def test_trackers_record_the_curve_of_epsilon_and_no_training_loss(tracked, tmp_path):
    expected = pytest.approx([tracked.plan.epsilon(step) for step in (1, 2, 3, 3)])
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir()))).Reload()
    assert [event.value for event in events.Scalars("train/epsilon")] == expected
    assert not [tag for tag in events.Tags()["scalars"] if "loss" in tag]
    logged = trackio_logs(next((tmp_path / "trackio").glob("*.db")))
    assert [log["train/epsilon"] for log in logged if "train/epsilon" in log] == expected
    assert not [name for log in logged for name in log if "loss" in name]


def trackio_logs(database):
    with sqlite3.connect(database) as connection:
        return [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics ORDER BY id")]


def test_the_notebook_table_shows_epsilon(make_trainer, monkeypatch):
    notebook = pytest.importorskip("transformers.utils.notebook")
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    tables = []
    monkeypatch.setattr(notebook, "text_to_html_table", lambda rows: tables.append([*map(list, rows)]) or "")
    settings = {"disable_tqdm": False, "logging_steps": 1}
    make_trainer(**settings).train()
    assert tables[-1][0] == ["Step", "Training Loss", "Epsilon"]
    assert [row[:2] for row in tables[-1][1:]] == [[1, "private"], [2, "private"]]
    trainer = make_trainer(**settings, log_private_statistics=True)
    trainer.train()
    assert [row[1] for row in tables[-1][1:]] == [log["loss"] for log in trainer.state.log_history[:-1]]
    make_trainer(**settings, non_private=True, log_private_statistics=True).train()
    assert [row[2] for row in tables[-1][1:]] == ["NOT PRIVATE", "NOT PRIVATE"]
    options = {"eval_dataset": pairs(8, seed=1)}
    trainer = make_trainer(trainer_options=options, **settings, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert tables[-1][0] == ["Step", "Training Loss", "Validation Loss", "Epsilon"]
    assert [row[3] for row in tables[-1][1:]] == [trainer.plan.epsilon(1), trainer.plan.epsilon(2)]
    assert [row[1] for row in tables[-1][1:]] == ["private", "private"]
    make_trainer(
        trainer_options=options, **settings, eval_strategy="steps", eval_steps=1, log_private_statistics=True
    ).train()
    assert not any("private" in row for row in tables[-1][1:])


# ---- Computation ----


def test_compiled_training_computes_the_same_and_is_saved_under_its_own_names(make_trainer, tmp_path):
    """With the backend that compiles nothing: what is traced, and how inputs reach it, is the same for all."""
    trained = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager", "static_shapes": True}):
        trainer = make_trainer(tiny_clip(), noise_seed=1, microbatch_size=4, learning_rate=0.01, **settings)
        trainer.train()
        trained.append(flat_weights(trainer.model))
    torch.testing.assert_close(*trained)
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(flat_weights(CLIPModel.from_pretrained(tmp_path / "saved")), trained[1])
    assert PrivacyStatement.load(tmp_path / "saved").steps == 2


# ---- Checkpoints, predictions ----


def test_checkpoints_of_the_model_only_say_what_was_spent_and_can_be_resumed(make_trainer, tmp_path):
    settings = {"save_only_model": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(**settings).train()
    checkpoint = tmp_path / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "privacy.json"} <= names and not {"optimizer.pt", "scheduler.pt"} & names
    assert PrivacyStatement.load(checkpoint).steps == 2
    trainer = make_trainer(**settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.privacy_spent().steps == 4


def test_predictions_are_those_of_the_model(make_trainer):
    trainer = make_trainer(tiny_clip_vqa(), answered_questions(64))
    trainer.train()
    held_out = answered_questions(16, seed=1)
    output = trainer.predict(held_out)
    inputs = {name: value for name, value in held_out[:].items() if name != "labels"}
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
    assert torch.allclose(torch.from_numpy(output.predictions), expected, atol=1e-6)
    assert output.label_ids.tolist() == held_out[:]["labels"].tolist()
    assert math.isfinite(output.metrics["test_loss"])


def test_predictions_for_the_training_dataset_are_refused(make_trainer):
    trainer = make_trainer(tiny_clip_vqa(), answered_questions(64))
    with pytest.raises(ValueError, match="test_dataset is the private training dataset"):
        trainer.predict(trainer.train_dataset)
