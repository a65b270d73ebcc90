"""The models and `Trainer` options that users combine: each trains, saves, and loads again."""

import math

import pytest
import torch
from checks import flat_weights, logged_values, one_update
from datasets import Dataset
from factories import (
    SAVING,
    answered_questions,
    pairs,
    tiny_blip,
    tiny_clip,
    tiny_clip_vqa,
    tiny_dual_encoder,
    tiny_siglip,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPModel, TrainerCallback
from wrong_calls import check_explained

from hf_dpclip import DPTrainingArguments, PrivacyStatement, lora_config
from hf_dpclip.metrics import VQAAccuracy
from hf_dpclip.models import base_model


def questions(n: int = 64, seed: int = 0) -> Dataset:
    """Pairs in which the text is a question and part of it the answer."""
    dataset = pairs(n, seed)
    return dataset.add_column("labels", dataset.with_format("numpy")[:]["input_ids"][:, :3].tolist())


MODELS = {
    "clip": (tiny_clip, pairs),
    "siglip": (tiny_siglip, pairs),
    "dual_encoder": (tiny_dual_encoder, pairs),
    "blip_question_answering": (tiny_blip, questions),
    "clip_question_answering": (tiny_clip_vqa, answered_questions),
}
pytestmark = pytest.mark.usefixtures("same_initial_weights")
EACH_MODEL = pytest.mark.parametrize(("make_model", "make_dataset"), MODELS.values(), ids=MODELS)


class Gradients(TrainerCallback):
    """Records what the optimizer sees."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([parameter.grad.clone() for parameter in model.parameters()])


def assert_noise_only_has_scale(gradients: list[torch.Tensor], std: float) -> None:
    """The noise drowns a gradient of norm C spread over thousands of coordinates, so their spread is the noise's."""
    values = torch.cat([gradient.float().flatten() for gradient in gradients])
    assert values.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * len(values)) + 0.01)


# ---- Architectures ----


@EACH_MODEL
def test_training_moves_every_parameter(make_trainer, make_model, make_dataset):
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    make_trainer(model, make_dataset(64), learning_rate=0.01).train()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


@EACH_MODEL
def test_a_gradient_reaches_every_parameter(make_trainer, make_model, make_dataset):
    # Noise alone moves parameters too.
    seen, model = Gradients(), make_model()
    options = {"callbacks": [seen]}
    make_trainer(model, make_dataset(64), options, noise_multiplier=0.0, non_private=True).train()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name, *gradients in zip(names, *seen.steps) if not any(map(torch.any, gradients))]


@EACH_MODEL
def test_saved_weights_load_again_with_their_privacy_statement(make_trainer, make_model, make_dataset, tmp_path):
    model = make_model()
    trainer = make_trainer(model, make_dataset(64))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert PrivacyStatement.load(tmp_path / "saved").spent == trainer.privacy_spent()


@EACH_MODEL
def test_without_noise_the_loss_on_training_pairs_falls(make_trainer, make_model, make_dataset):
    model, dataset = make_model(), make_dataset(16)
    trainer = make_trainer(
        model,
        dataset,
        {"eval_dataset": dataset},
        non_private=True,
        log_private_statistics=True,
        max_steps=30,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=0.002,
        lr_scheduler_type="constant",
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


QUESTION_ANSWERING = {name: models for name, models in MODELS.items() if name.endswith("question_answering")}


@pytest.mark.parametrize(("make_model", "make_dataset"), QUESTION_ANSWERING.values(), ids=QUESTION_ANSWERING)
def test_a_loss_over_labels_may_be_clipped_per_example(tmp_path, make_model, make_dataset):
    # With B = n every record takes part.
    settings = {"per_device_train_batch_size": 6, "microbatch_size": 1, "max_grad_norm": 0.5, "non_private": True}
    model, dataset = make_model(), make_dataset(6)
    expected = torch.stack([clipped_gradient(model, dataset[[i]], 0.5) for i in range(6)]).mean(dim=0)
    update, trainer = one_update(tmp_path, model, dataset, **settings)
    assert torch.allclose(update, expected, atol=1e-6) and expected.norm() > 0.01
    assert (trainer.plan.num_microbatches, trainer.plan.sensitivity) == (6, 0.5)


def clipped_gradient(model: nn.Module, record: dict, bound: float) -> torch.Tensor:
    model.zero_grad()
    model.train()(**record).loss.backward()
    gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    flat = torch.cat([g.double().flatten() for g in gradient])
    model.zero_grad()
    return flat * min(1, bound / float(flat.norm()))


def test_a_generative_loss_is_a_mean_over_tokens_without_padding():
    model, batch = tiny_blip().eval(), questions(2)[:]
    answers = batch.pop("labels")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    decoder = {"decoder_input_ids": answers, "decoder_attention_mask": mask}
    together = model(**batch, **decoder, labels=answers.masked_fill(mask == 0, -100)).loss
    rows = [{name: tensor[[row]] for name, tensor in batch.items()} for row in range(2)]
    # The first token of an answer is given; two are to be found, and one.
    losses = [model(**rows[0], labels=answers[:1]).loss, model(**rows[1], labels=answers[1:, :2]).loss]
    assert torch.allclose(together, (2 * losses[0] + losses[1]) / 3)


def test_a_generative_model_learns_to_answer(make_trainer):
    model, dataset = tiny_blip(), questions(4)
    settings = {"max_steps": 60, "learning_rate": 0.02, "per_device_train_batch_size": 4, "microbatch_size": 2}
    make_trainer(model, dataset, non_private=True, lr_scheduler_type="constant", **settings).train()
    inputs = dataset[:]
    # The decoder starts with the first token of the labels and answers with the two that follow.
    truth = inputs.pop("labels")
    generated = model.eval().generate(**inputs, max_new_tokens=2)
    spelled = [[" ".join(map(str, row)) for row in rows[:, 1:3].tolist()] for rows in (generated, truth)]
    assert VQAAccuracy().compute(predictions=spelled[0], references=spelled[1]) == {"vqa_accuracy": 1.0}


def test_a_pair_of_towers_has_a_loss_only_if_the_trainer_asks_for_it(make_trainer):
    assert make_trainer(tiny_clip()).can_return_loss
    assert not make_trainer(tiny_blip(), questions(64)).can_return_loss


# ---- LoRA ----


@pytest.fixture
def trained_adapters(make_trainer, tmp_path):
    """A CLIP with adapters after two steps, in evaluation mode, and the folder it was saved to."""
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip(), r=2))
    trainer = make_trainer(model, learning_rate=0.05)
    trainer.train()
    trainer.save_model(tmp_path / "adapters")
    return trainer.model.eval(), tmp_path / "adapters"


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**pairs(4, seed=1)[:]).logits_per_image


def test_adapters_are_in_both_towers_and_both_projections():
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip(), r=2))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    prefix = "base_model.model."
    attention = [f"{tower}_model.encoder.layers.0.self_attn" for tower in ("text", "vision")]
    expected = {f"{prefix}{path}.{name}" for path in attention for name in ("q_proj", "v_proj")}
    assert adapted == expected | {f"{prefix}{name}" for name in ("text_projection", "visual_projection")}


@pytest.mark.parametrize("make_model", [tiny_siglip, tiny_dual_encoder])
def test_adapters_are_in_both_towers_of_other_dual_encoders(make_model):
    model = get_peft_model(make_model(), lora_config(make_model(), r=2))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("text_model" in name for name in trainable)
    assert any("vision_model" in name for name in trainable)


def test_only_adapters_are_trainable():
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip()))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no query, value or projection layers.*target_modules"):
        lora_config(nn.Sequential(nn.Linear(2, 2)))


def test_a_rank_is_a_number():
    with pytest.raises(ValueError, match="r=True is not possible"):
        lora_config(tiny_clip(), r=True)


def test_lora_config_passes_further_fields_on():
    config = lora_config(tiny_clip(), r=4, lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)


@pytest.mark.parametrize("targets", [["k_proj"], ["q_proj", "fc1"]])
def test_the_callers_layers_take_the_place_of_those_of_lora_config(targets):
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip(), target_modules=targets))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {*targets}


def test_they_may_be_any_of_a_model_whose_layers_are_not_known():
    model = get_peft_model(
        nn.Sequential(nn.Linear(2, 2)), lora_config(nn.Sequential(nn.Linear(2, 2)), target_modules=["0"])
    )
    assert any(".lora_" in name for name, _ in model.named_parameters())


def test_training_adapters_leaves_the_base_weights_alone(trained_adapters):
    model, _ = trained_adapters
    base = dict(tiny_clip().named_parameters())
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
    assert kept.keys() == base.keys()
    assert all(torch.equal(parameter, base[name]) for name, parameter in kept.items())


def test_saved_adapters_load_onto_the_same_base(trained_adapters):
    model, folder = trained_adapters
    loaded = PeftModel.from_pretrained(tiny_clip(), folder).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_clip().eval()))


def test_only_adapters_are_saved_with_their_privacy_statement(trained_adapters):
    _, folder = trained_adapters
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert PrivacyStatement.load(folder).steps == 2


def test_merged_adapters_compute_the_same(trained_adapters):
    model, _ = trained_adapters
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is CLIPModel
    torch.testing.assert_close(logits(merged), expected)


def test_adapters_that_were_merged_before_they_were_saved_are_not_saved_as_nothing(make_trainer, tmp_path):
    trainer = make_trainer(get_peft_model(tiny_clip(), lora_config(tiny_clip(), r=2)))
    trainer.train()
    trainer.save_model(tmp_path / "adapters")
    saved = (tmp_path / "adapters" / "adapter_model.safetensors").read_bytes()
    merged = trainer.model.merge_and_unload()
    check_explained(
        lambda: trainer.save_model(tmp_path / "adapters"),
        "the model's adapters are gone",
        "save adapters first, or merge copy.deepcopy(trainer.model)",
    )
    # Those that were saved before are still there, with their statement.
    assert (tmp_path / "adapters" / "adapter_model.safetensors").read_bytes() == saved
    assert PrivacyStatement.load(tmp_path / "adapters").steps == trainer.privacy_spent().steps
    # What the message says instead.
    merged.save_pretrained(tmp_path / "merged")
    trainer.privacy_statement().save(tmp_path / "merged")
    assert not PrivacyStatement.load(tmp_path / "merged").not_private_because


def test_modules_that_are_trained_in_full_are_saved_without_adapters_beside_them(make_trainer, tmp_path):
    config = LoraConfig(target_modules="dummy-target-modules", modules_to_save=["visual_projection"])
    trainer = make_trainer(get_peft_model(tiny_clip(), config))
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=True)
    assert torch.equal(flat_weights(loaded), flat_weights(trainer.model))


# ---- Precision ----


def test_autocast_to_bfloat16_keeps_weights_and_noise_in_float32(make_trainer):
    gradients = Gradients()
    model = tiny_clip()
    make_trainer(model, trainer_options={"callbacks": [gradients]}, bf16=True).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients.steps[0]} == {torch.float32}
    assert_noise_only_has_scale(gradients.steps[0], std=2.0)


@pytest.mark.parametrize(("noise_multiplier", "microbatch_size"), [(1.0, 8), (4.0, 8), (4.0, 2)])
def test_bfloat16_weights_get_noise_of_the_right_scale(make_trainer, noise_multiplier, microbatch_size):
    gradients = Gradients()
    model = tiny_clip().to(torch.bfloat16)
    trainer = make_trainer(
        model,
        trainer_options={"callbacks": [gradients]},
        noise_multiplier=noise_multiplier,
        microbatch_size=microbatch_size,
        max_steps=1,
    )
    trainer.train()
    assert {gradient.dtype for gradient in gradients.steps[0]} == {torch.bfloat16}
    num_microbatches = 8 // microbatch_size
    assert_noise_only_has_scale(gradients.steps[0], std=noise_multiplier * 2 / num_microbatches)


def test_bfloat16_weights_are_saved_as_such(make_trainer, tmp_path):
    trainer = make_trainer(tiny_clip().to(torch.bfloat16), learning_rate=0.1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = CLIPModel.from_pretrained(tmp_path / "saved", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.visual_projection.weight, trainer.model.visual_projection.weight)


# ---- Options of the Trainer ----


@pytest.mark.parametrize("name", ["clip", "clip_question_answering"])
def test_activation_checkpointing_changes_nothing(make_trainer, name):
    make_model, make_dataset = MODELS[name]
    # transformers renamed the argument within the releases that are supported.
    names = {"activation_checkpointing", "gradient_checkpointing"} & DPTrainingArguments.__dataclass_fields__.keys()
    trained = []
    for checkpointing in (False, True):
        trainer = make_trainer(make_model(), make_dataset(64), noise_seed=1, **{min(names): checkpointing})
        trainer.train()
        trained.append(flat_weights(trainer.model))
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_optimizers_step_on_the_noisy_gradient(make_trainer, optim):
    trainer = make_trainer(optim=optim, learning_rate=0.01)
    before = flat_weights(trainer.model)
    trainer.train()
    after = flat_weights(trainer.model)
    assert torch.isfinite(after).all()
    assert (after != before).float().mean() > 0.99


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
    ],
)
def test_schedulers_follow_the_planned_steps(make_trainer, scheduler, rates):
    trainer = make_trainer(lr_scheduler_type=scheduler, max_steps=4, logging_steps=1, learning_rate=1.0, optim="sgd")
    trainer.train()
    logged = logged_values(trainer, "learning_rate")
    assert logged == pytest.approx(rates)


@pytest.mark.parametrize(
    ("epochs", "batch", "accumulation"), [(1, 8, 1), (2.5, 8, 1), (2, 5, 1), (2, 5, 3), (0.5, 8, 2)]
)
def test_epochs_take_the_planned_number_of_steps(make_trainer, epochs, batch, accumulation):
    trainer = make_trainer(
        num_train_epochs=epochs,
        max_steps=-1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    planned = math.ceil(epochs * math.ceil(64 / (batch * accumulation)))
    assert trainer.plan.num_steps == trainer.state.global_step == trainer.privacy_spent().steps == planned


def test_evaluation_during_training_reports_loss_and_metrics(make_trainer):
    trainer = make_trainer(
        tiny_blip(),
        questions(64),
        {"eval_dataset": questions(8, seed=1), "compute_metrics": lambda result: {"rows": len(result.label_ids)}},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert all(entry["eval_rows"] == 8 for entry in evaluations)


def test_contrastive_models_report_an_evaluation_loss(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": pairs(16, seed=1)}, eval_strategy="epoch", max_steps=8)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert math.isfinite(entry["eval_loss"])


def test_the_best_checkpoint_is_loaded_at_the_end_with_the_cost_of_all_steps(make_trainer):
    trainer = make_trainer(
        trainer_options={"eval_dataset": pairs(16, seed=1)},
        eval_strategy="steps",
        eval_steps=1,
        **SAVING,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
        max_steps=3,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert trainer.privacy_spent().steps == 3


def test_only_the_last_checkpoints_are_kept_each_with_its_own_statement(make_trainer, tmp_path):
    make_trainer(max_steps=4, **SAVING, save_total_limit=2).train()
    steps = {path.name: PrivacyStatement.load(path).steps for path in tmp_path.glob("checkpoint-*")}
    assert steps == {"checkpoint-3": 3, "checkpoint-4": 4}


def test_static_shapes_are_refused_for_a_model_that_is_not_told_where_texts_end(make_trainer):
    with pytest.raises(ValueError, match="static_shapes=True needs CLIPModel"):
        make_trainer(tiny_siglip(), static_shapes=True)


def test_mixed_adapters_are_trained_one_microbatch_at_a_time(make_trainer):
    model = get_peft_model(tiny_clip(), lora_config(tiny_clip()), mixed=True)
    trainer = make_trainer(model, microbatch_size=4)
    trainer.train()
    assert trainer.privacy_spent().steps == 2 and base_model(model) is model.base_model.model
