"""CLIP for visual question answering: what it computes, and that it is an ordinary model of `transformers`."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from factories import ANSWERS, answered_questions, arguments, tiny_clip, tiny_clip_vqa, tiny_processor
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from torch import nn
from transformers import AutoConfig, AutoModelForVisualQuestionAnswering, CLIPConfig

from hf_dpclip import (
    CLIPForVisualQuestionAnswering,
    CLIPVQAConfig,
    DPCLIPTrainer,
    VisualQuestionCollator,
    lora_config,
)
from hf_dpclip.evaluation import vqa_accuracy


def records(n: int = 8, **renamed) -> Dataset:
    """Pictures of one of three colours, and the same question about each."""
    colours = ["yellow", "navy", "red"]
    columns = {
        "image": [PILImage.new("RGB", (12, 12), colours[number % 3]) for number in range(n)],
        "question": ["is it bad"] * n,
        "answer": [ANSWERS[number % 3] for number in range(n)],
        "image_id": [number // 2 for number in range(n)],
    }
    dataset = Dataset.from_dict(columns).cast_column("image", Image())
    return dataset.rename_columns(renamed) if renamed else dataset


def collator(**options) -> VisualQuestionCollator:
    labels = {answer: label for label, answer in enumerate(ANSWERS)}
    return VisualQuestionCollator(tiny_processor(), **{"label2id": labels, **options})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**answered_questions(5, seed=1)[:]).logits


# ---- The model ----


def test_the_loss_is_the_mean_over_records_of_their_own_losses():
    model, batch = tiny_clip_vqa(), answered_questions(6)[:]
    alone = [model(**answered_questions(6)[[number]]).loss for number in range(6)]
    assert torch.allclose(model(**batch).loss, torch.stack(alone).mean())
    assert torch.allclose(model(**batch).loss, F.cross_entropy(model(**batch).logits, batch["labels"]))


def test_without_labels_there_are_logits_only():
    batch = answered_questions(6)[:]
    del batch["labels"]
    outputs = tiny_clip_vqa()(**batch)
    assert outputs.loss is None and outputs.logits.shape == (6, 3)


@pytest.mark.parametrize("changed", ["pixel_values", "input_ids"])
def test_logits_depend_on_the_image_and_on_the_question(changed):
    model, batch = tiny_clip_vqa(), answered_questions(6)[:]
    other = {**batch, changed: answered_questions(6, seed=1)[:][changed]}
    assert (model(**batch).logits - model(**other).logits).abs().max() > 1e-3


def test_it_starts_from_the_weights_of_a_clip_model():
    clip = tiny_clip(seed=3)
    model = CLIPForVisualQuestionAnswering.from_clip(clip, ANSWERS)
    copied = model.clip.state_dict()
    assert clip.state_dict().keys() - copied.keys() == {"logit_scale"}
    assert all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in copied.items())
    nn.init.zeros_(clip.visual_projection.weight)
    assert model.clip.visual_projection.weight.any()


@pytest.mark.parametrize("answers", [[], ["yes", "no", "yes"]])
def test_impossible_answers_are_refused(answers):
    with pytest.raises(ValueError, match="answers must be at least one and differ from one another"):
        CLIPForVisualQuestionAnswering.from_clip(tiny_clip(), answers)


def test_the_configuration_names_the_answers():
    config = tiny_clip_vqa().config
    assert (config.num_labels, config.id2label, config.label2id["red"]) == (3, dict(enumerate(ANSWERS)), 2)
    assert isinstance(CLIPVQAConfig().clip_config, CLIPConfig)


def test_the_head_starts_with_outputs_of_ordinary_size():
    model = CLIPForVisualQuestionAnswering(CLIPVQAConfig(tiny_clip().config.to_dict(), num_labels=100))
    assert 0.1 < logits(model).std() < 10


# ---- Saved and loaded ----


def test_saved_weights_load_again_by_any_name(tmp_path):
    model = tiny_clip_vqa()
    model.save_pretrained(tmp_path)
    for cls in (CLIPForVisualQuestionAnswering, AutoModelForVisualQuestionAnswering):
        loaded = cls.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), logits(model)) and loaded.config.id2label == model.config.id2label
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CLIPVQAConfig)
    assert CLIPForVisualQuestionAnswering.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_adapters_and_the_head_are_trained_saved_and_loaded(make_trainer, tmp_path):
    model = get_peft_model(tiny_clip_vqa(), lora_config(tiny_clip_vqa(), r=2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, answered_questions(64), learning_rate=0.05, microbatch_size=1)
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(".lora_" in name or ".head.modules_to_save." in name for name in moved)
    assert sum(".head." in name for name in moved) == 8
    trainer.save_model(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(tiny_clip_vqa(), tmp_path / "adapters")
    assert torch.allclose(logits(loaded), logits(trainer.model), atol=1e-6)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = CLIPForVisualQuestionAnswering.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(trainer.model), atol=1e-5)


# ---- With records and the trainer ----


def test_questions_are_answered_after_training(make_trainer):
    model = tiny_clip_vqa()
    options = {
        "data_collator": collator(),
        "eval_dataset": records(12),
        "compute_metrics": partial(vqa_accuracy, id2label=model.config.id2label),
    }
    settings = {"max_steps": 40, "learning_rate": 0.01, "lr_scheduler_type": "constant", "microbatch_size": 4}
    settings |= {"non_private": True, "log_private_statistics": True}
    trainer = make_trainer(model, records(24), options, per_device_eval_batch_size=5, **settings)
    assert trainer.evaluate()["eval_vqa_accuracy"] < 1
    trainer.train()
    assert trainer.evaluate()["eval_vqa_accuracy"] == 1


def test_an_image_with_all_its_questions_may_be_the_privacy_unit(make_trainer):
    settings = {"privacy_unit_column": "image_id", "microbatch_size": 1}
    trainer = make_trainer(tiny_clip_vqa(), records(40), {"data_collator": collator()}, **settings)
    trainer.train()
    assert (trainer.plan.num_examples, trainer.plan.sensitivity) == (20, 1.0)


def test_labels_are_the_numbers_of_the_answers():
    assert collator()(list(records(4)))["labels"].tolist() == [0, 1, 2, 0]


def test_every_view_has_the_label_of_its_record():
    assert collator(views=2, augmentation=lambda image: image)(list(records(2)))["labels"].tolist() == [0, 0, 1, 1]


def test_unknown_answers_are_refused_before_training_and_not_shown(make_trainer):
    with pytest.raises(
        ValueError, match=r"record 2 of the dataset \(such records: 13\) is none of the 2 answers"
    ) as refusal:
        make_trainer(tiny_clip_vqa(), records(40), {"data_collator": collator(label2id={"yes": 0, "no": 1})})
    assert "red" not in str(refusal.value)


def test_unknown_answers_of_other_datasets_are_not_shown_either(make_trainer):
    """They are seen when the first of them is drawn, if they are not among the first records. Here all are drawn."""
    options = {"data_collator": collator(label2id={"yes": 0, "no": 1})}
    known_first = sorted(records(40), key=lambda record: record["answer"] == "red")
    trainer = make_trainer(tiny_clip_vqa(), known_first, options, per_device_train_batch_size=40)
    with pytest.raises(ValueError, match=r"an answer in column 'answer' is none of the 2") as refusal:
        trainer.train()
    assert "red" not in str(refusal.value)


@pytest.mark.parametrize("column", ["image", "question", "answer"])
def test_wrong_column_names_are_refused_before_training(make_trainer, column):
    message = rf"no column '{column}'.* data_collator=VisualQuestionCollator\(processor, label2id=\.\.\., image_column"
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_clip_vqa(), records(8, **{column: "other"}), {"data_collator": collator()})


def test_columns_may_have_other_names(make_trainer):
    names = {"image_column": "scan", "text_column": "asked", "answer_column": "finding"}
    dataset = records(8, image="scan", question="asked", answer="finding")
    trainer = make_trainer(tiny_clip_vqa(), dataset, {"data_collator": collator(**names)})
    trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_missing_labels_are_said_to_be_missing(make_trainer):
    with pytest.raises(ValueError, match=r"batches have no labels .*give encoded records a column 'labels'"):
        make_trainer(tiny_clip_vqa(), answered_questions(64).remove_columns("labels"))


def test_what_a_transform_draws_for_private_records_leaves_no_trace(tmp_path):
    """Neither in the state of the generators, which checkpoints hold, nor in what is initialised later."""

    def jittered(batch: dict) -> dict:
        torch.rand(sum(len(answer) for answer in batch.get("answer", [])))
        return batch

    states = []
    for answer in ("no", "yellow"):
        dataset = records(8).remove_columns("answer").add_column("answer", ["no"] * 7 + [answer])
        torch.manual_seed(0)
        options = {"train_dataset": dataset.with_transform(jittered), "args": arguments(tmp_path)}
        DPCLIPTrainer(tiny_clip_vqa(), data_collator=collator(label2id={"no": 0, "yellow": 1}), **options)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
