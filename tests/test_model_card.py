"""The model card: it states the guarantee, tells no private statistic, and its code runs."""

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checks import logged_values
from factories import ANSWERS, answered_questions, pairs, tiny_clip, tiny_clip_vqa, tiny_processor
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import CLIPModel, TrainerCallback

from hf_dpclip import CLIPForVisualQuestionAnswering, lora_config
from hf_dpclip.privacy_section import contradictions


LOADING_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


@pytest.fixture
def trained(make_trainer):
    """A trainer after two steps, each of them logged, and evaluated if `evaluated`."""

    def train(model=None, evaluated=False, trainer_options=None, **overrides):
        options = dict(trainer_options or {})
        if evaluated:
            overrides = {"eval_strategy": "steps", "eval_steps": 1, **overrides}
            options = {"eval_dataset": pairs(8, seed=1), **options}
        trainer = make_trainer(model, trainer_options=options, logging_steps=1, **overrides)
        trainer.train()
        return trainer

    return train


def card_of(trainer, **names) -> str:
    trainer.create_model_card(**names)
    return Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")


def metadata_of(trainer, **names):
    return ModelCard(card_of(trainer, **names)).data


# ---- The guarantee ----


def test_the_card_states_the_guarantee_and_the_mechanism(trained):
    trainer = trained(target_delta=1e-4, accountant="pld")
    card = card_of(trainer)
    epsilon = trainer.privacy_spent().epsilon
    assert f"**({epsilon:.4g}, 0.0001)-differentially private**" in card
    for row in (
        f"| ε | {epsilon:.4g} |",
        "| privacy units n | 64 (one unit = one record) |",
        "| adjacency | one privacy unit added or removed |",
        "| sampler | Poisson, probability q = 0.125, fresh in every step |",
        "| expected batch size B | 8 |",
        "| microbatches per step K | 1 of about 8 units each |",
        "| clipping norm C | 1 (flat) |",
        "| sensitivity Δ | 2 |",
        "| noise multiplier σ | 1 |",
        "| noise standard deviation σΔ | 2 |",
        "| δ | 0.0001 |",
        "| steps taken | 2 (planned: 2) |",
    ):
        assert row in card
    assert "| accountant | pld (dp-accounting " in card
    assert "NOT PRIVATE" not in card


@pytest.mark.parametrize(
    "heading",
    ["## Privacy", "### Not covered", "## Training data", "## Evaluation", "## Usage", "## Training procedure"],
)
def test_the_card_has_each_section_once(trained, heading):
    trainer = trained()
    card_of(trainer)
    assert card_of(trainer).splitlines().count(heading) == 1


def test_the_card_agrees_with_the_statement(trained):
    trainer = trained(evaluated=True)
    assert contradictions(card_of(trainer), trainer.privacy_statement()) == []


def test_the_card_says_not_private(trained, not_private):
    trainer = trained(evaluated=True, **not_private)
    (name,) = not_private
    card = card_of(trainer)
    assert f"**NOT PRIVATE**: {name}" in card
    assert "| ε | no guarantee |" in card
    assert "-differentially private**" not in card
    assert "with differential privacy" not in card
    assert {"not-private"} == set(ModelCard(card).data.tags) & {"not-private", "differential-privacy", "dp-sgd"}
    assert contradictions(card, trainer.privacy_statement()) == []


def test_a_trainer_without_a_training_dataset_leaves_the_card_to_its_parent(make_trainer):
    trainer = make_trainer()
    trainer.plan = None
    assert "## Privacy" not in card_of(trainer)


# ---- Private statistics ----


@pytest.mark.parametrize("settings", [{}, {"log_private_statistics": True}], ids=["default", "logged"])
def test_the_card_holds_no_statistic_of_the_private_records(trained, settings):
    trainer = trained(evaluated=True, **settings)
    card = card_of(trainer)
    assert not re.search("training loss *[|:]|No log|grad_norm", card, re.IGNORECASE)
    losses = logged_values(trainer, "loss")
    assert len(losses) == (2 if settings else 0)
    assert not any(f"{loss:.{digits}g}" in card for loss in losses for digits in (4, 5))


def test_evaluations_of_a_run_that_may_see_private_records_are_left_out(trained):
    trainer = trained(evaluated=True, log_private_statistics=True)
    card = card_of(trainer)
    assert "No metrics were computed" in card
    assert ModelCard(card).data.eval_results is None


# ---- Evaluation ----


def test_every_evaluation_stands_with_its_epsilon(trained):
    trainer = trained(evaluated=True)
    card = card_of(trainer)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for entry in logged:
        assert f"| {entry['step']} | {trainer.plan.epsilon(entry['step']):.4g} | {entry['eval_loss']:.4g} |" in card


def test_an_evaluation_that_is_repeated_stands_once(trained):
    trainer = trained(evaluated=True)
    before = card_of(trainer)
    trainer.evaluate()
    assert card_of(trainer) == before


def test_the_card_names_the_step_of_the_best_weights(trained, make_trainer):
    assert "The weights are the best ones" not in card_of(trained(evaluated=True))
    falling = iter([0.5, 0.25])
    options = {"eval_dataset": pairs(8, seed=1), "compute_metrics": lambda _: {"score": next(falling)}}
    trainer, later = (make_trainer(trainer_options=options, **LOADING_BEST) for _ in range(2))
    trainer.train()
    # Which takes no further step.
    later.train(resume_from_checkpoint=True)
    for each in (trainer, later):
        assert "The weights are the best ones, of step 1;" in card_of(each)
        scores = [result.metric_value for result in metadata_of(each).eval_results if result.metric_type == "score"]
        assert scores == [0.5]


def test_later_evaluations_are_of_the_best_weights(make_trainer):
    scores = iter([0.5, 0.25, 0.5, 0.4])
    options = {"eval_dataset": pairs(8, seed=1), "compute_metrics": lambda _: {"score": next(scores)}}
    trainer = make_trainer(trainer_options=options, **LOADING_BEST)
    trainer.train()
    before = card_of(trainer)
    trainer.evaluate()
    assert card_of(trainer) == before
    trainer.evaluate(pairs(8, seed=2), metric_key_prefix="eval_test")
    rows = [line.split(" | ")[0] for line in card_of(trainer).splitlines() if line.startswith("| ")]
    assert rows[-3:] == ["| 1", "| 2", "| 1"]
    found = {result.metric_type: result.metric_value for result in metadata_of(trainer).eval_results}
    assert (found["score"], found["test_score"]) == (0.5, 0.4)


def test_best_weights_that_are_no_longer_there_are_not_claimed(make_trainer):
    class Deleting(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                shutil.rmtree(state.best_model_checkpoint)

    scores = iter([0.5, 0.25])
    options = {"eval_dataset": pairs(8, seed=1), "compute_metrics": lambda _: {"score": next(scores)}}
    trainer = make_trainer(trainer_options={**options, "callbacks": [Deleting()]}, **LOADING_BEST)
    trainer.train()
    assert "The weights are the best ones" not in card_of(trainer)


def test_weights_that_were_trained_on_since_are_not_the_best_ones(make_trainer):
    class Interrupting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    scores = iter([0.5, 0.25, 0.1])
    options = {"eval_dataset": pairs(8, seed=1), "compute_metrics": lambda _: {"score": next(scores)}}
    trainer = make_trainer(trainer_options=options, **LOADING_BEST)
    trainer.train()
    trainer.add_callback(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    card = card_of(trainer)
    assert "## Evaluation" in card and "The weights are the best ones" not in card


def test_an_evaluation_before_training_stands_at_epsilon_zero(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(8, seed=1)})
    loss = trainer.evaluate()["eval_loss"]
    assert f"| 0 | 0 | {loss:.4g} |" in card_of(trainer)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": 0.75}


def test_the_model_index_holds_the_last_results(trained):
    trainer = trained(evaluated=True, trainer_options={"compute_metrics": accuracy})
    data = metadata_of(trainer, model_name="clip", dataset_tags="me/scans", dataset="Scans")
    results = {result.metric_type: result for result in data.eval_results}
    assert results.keys() == {"loss", "accuracy"}
    assert results["accuracy"].metric_value == 0.75
    assert results["loss"].metric_value == trainer.state.log_history[-2]["eval_loss"]
    assert {(each.dataset_type, each.dataset_name) for each in results.values()} == {("me/scans", "Scans")}
    assert results["accuracy"].task_type == "zero-shot-image-classification"
    assert (data.model_name, data.metrics, data.datasets) == ("clip", ["accuracy"], ["me/scans"])


def test_several_evaluation_datasets_stand_in_one_row(trained, tmp_path):
    datasets = {"new": pairs(8, seed=1), "old": pairs(8, seed=2)}
    trainer = trained(evaluated=True, trainer_options={"eval_dataset": datasets})
    card = card_of(trainer, model_name="clip")
    new, old = ([e for e in trainer.state.log_history if f"eval_{name}_loss" in e][-1] for name in datasets)
    row = f"| 2 | {trainer.plan.epsilon(2):.4g} | {new['eval_new_loss']:.4g} | {old['eval_old_loss']:.4g} |"
    assert row in card
    assert {each.metric_type for each in ModelCard(card).data.eval_results} == {"new_loss", "old_loss"}
    assert (tmp_path / "privacy_utility.png").exists()


def test_evaluations_of_the_same_metrics_at_one_step_stand_apart(make_trainer):
    trainer = make_trainer()
    losses = [trainer.evaluate(pairs(8, seed=seed))["eval_loss"] for seed in (1, 2)]
    card = card_of(trainer)
    assert all(f"| 0 | 0 | {loss:.4g} |" in card for loss in losses)


def test_evaluations_without_a_common_metric_make_no_figure(make_trainer, tmp_path):
    trainer = make_trainer(logging_steps=1)
    trainer.evaluate(pairs(8, seed=1))
    trainer.train()
    trainer.evaluate(pairs(8, seed=2), metric_key_prefix="eval_other")
    trainer.state.log_history = [{"step": 0, "eval_loss": 2.0}, *trainer.state.log_history]
    assert "privacy_utility.png" not in card_of(trainer)
    assert not (tmp_path / "privacy_utility.png").exists()


def test_without_evaluations_there_is_no_model_index(trained):
    assert "model-index" not in card_of(trained())


def test_accuracy_against_epsilon_is_drawn(trained, tmp_path):
    card = card_of(trained(evaluated=True, trainer_options={"compute_metrics": accuracy}))
    assert "![Metric against ε spent](privacy_utility.png)" in card
    assert (tmp_path / "privacy_utility.png").read_bytes().startswith(b"\x89PNG")


def test_one_evaluation_makes_no_figure(trained, tmp_path):
    assert "privacy_utility.png" not in card_of(trained(evaluated=True, eval_steps=2))
    assert not (tmp_path / "privacy_utility.png").exists()


def test_the_figure_of_another_run_is_not_shown(trained, tmp_path):
    (tmp_path / "privacy_utility.png").write_bytes(b"of yesterday")
    assert "privacy_utility.png" not in card_of(trained(evaluated=True, eval_steps=2))


def test_without_matplotlib_the_card_has_no_figure(trained, monkeypatch):
    monkeypatch.setattr("hf_dpclip.model_card.find_spec", lambda name: None)
    assert "privacy_utility.png" not in card_of(trained(evaluated=True))


# ---- Metadata ----


def test_the_metadata_describes_a_full_model(trained):
    data = metadata_of(trained(), tags=["medical"], license="mit", language="en")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert {"hf_dpclip", "differential-privacy", "dp-sgd", "medical", "generated_from_trainer"} == set(data.tags)
    assert (data.license, data.language, data.base_model) == ("mit", "en", None)


def test_the_metadata_names_the_base_model_that_is_on_the_hub(trained):
    model = tiny_clip()
    model.config.name_or_path = "openai/clip-vit-base-patch32"
    card = card_of(trained(model))
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("openai/clip-vit-base-patch32", "finetune")
    assert "[openai/clip-vit-base-patch32](https://huggingface.co/openai/clip-vit-base-patch32)" in card


def test_the_metadata_describes_adapters(trained):
    model = tiny_clip()
    model.config.name_or_path = "openai/clip-vit-base-patch32"
    data = metadata_of(trained(get_peft_model(model, lora_config(model))))
    assert (data.library_name, data.pipeline_tag) == ("peft", "zero-shot-image-classification")
    assert (data.base_model, data.base_model_relation) == ("openai/clip-vit-base-patch32", "adapter")
    assert "lora" in data.tags


def test_a_folder_on_this_machine_is_no_base_model(trained, tmp_path):
    tiny_clip().save_pretrained(tmp_path / "start")
    card = card_of(trained(CLIPModel.from_pretrained(tmp_path / "start")))
    assert ModelCard(card).data.base_model is None
    assert "A fine-tuned version of a model that is not on the Hub" in card


def test_a_folder_on_this_machine_is_not_published(trained, tmp_path):
    tiny_clip().save_pretrained(tmp_path / "start")
    trainer = trained(get_peft_model(CLIPModel.from_pretrained(tmp_path / "start"), lora_config(tiny_clip())))
    assert f'CLIPModel.from_pretrained("{tmp_path / "start"}")' in card_of(trainer)
    trainer.hub_model_id = "me/private-clip"
    card = card_of(trainer)
    assert str(tmp_path) not in card
    assert "base = ...  # the weights that training started from" in card


def test_the_dataset_stays_unnamed_by_default(trained):
    card = card_of(trained(evaluated=True))
    assert ModelCard(card).data.datasets is None
    assert "64 privacy units (one unit = one record) of a dataset that is not named here" in card


# ---- Code ----


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def run(code: str) -> dict:
    namespace = {}
    exec(code, namespace)
    return namespace


def clip(folder):
    return tiny_clip(), {}


def clip_adapters(folder):
    tiny_clip().save_pretrained(folder)
    model = CLIPModel.from_pretrained(folder)
    return get_peft_model(model, lora_config(model)), {}


def vqa(folder):
    return tiny_clip_vqa(), {"train_dataset": answered_questions(64)}


def vqa_adapters(folder):
    tiny_clip_vqa().save_pretrained(folder)
    model = CLIPForVisualQuestionAnswering.from_pretrained(folder)
    return get_peft_model(model, lora_config(model)), {"train_dataset": answered_questions(64)}


@pytest.mark.parametrize("make", [clip, clip_adapters, vqa, vqa_adapters], ids=lambda make: make.__name__)
def test_the_code_on_the_card_runs_and_loads_the_model(trained, tmp_path, capsys, make):
    model, settings = make(tmp_path / "start")
    trainer = trained(model, trainer_options={"processing_class": tiny_processor()}, **settings)
    trainer.save_model()
    loaded = run(code_of(card_of(trainer)))
    assert type(loaded["processor"]).__name__ == "CLIPProcessor"
    expected = trainer.model.state_dict()
    assert loaded["model"].state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded["model"].state_dict().items())
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert "tensor" in printed if make in (clip, clip_adapters) else printed in ANSWERS


def test_without_a_processor_the_code_loads_the_model(trained):
    trainer = trained()
    trainer.save_model()
    loaded = run(code_of(card_of(trainer)))
    assert isinstance(loaded["model"], CLIPModel)
    assert "processor" not in loaded


def test_the_code_names_the_module_of_a_class_of_your_own(trained):
    class MyCLIP(CLIPModel):
        pass

    model = MyCLIP(tiny_clip().config)
    assert f"from {__name__} import MyCLIP" in code_of(card_of(trained(model)))


def test_settings_of_the_training_are_listed(trained):
    trainer = trained(learning_rate=0.125)
    card = card_of(trainer)
    numbers = sum(math.prod(parameter.shape) for parameter in trainer.model.parameters())
    assert f"- trainable_parameters: {numbers:,}" in card
    assert "- learning_rate: 0.125" in card
    assert f"- transformers: {sys.modules['transformers'].__version__}" in card
