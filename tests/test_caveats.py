"""What a trainer warns of when it is made."""

import copy
import logging

import pytest
from checks import warnings_of
from datasets import concatenate_datasets
from factories import (
    answered_questions,
    other_raw_pairs,
    pairs,
    raw_pairs,
    tiny_clip,
    tiny_clip_vqa,
    tiny_dual_encoder,
    tiny_processor,
    with_adapters,
    with_texts,
)
from peft import PeftModel, get_peft_model
from plans import plan
from torch import nn
from transformers import CLIPModel, VisionTextDualEncoderModel

from hf_dpclip import CLIPForVisualQuestionAnswering, DPCLIPTrainer, ImageTextCollator, lora_config
from hf_dpclip.advice import weak_promises
from hf_dpclip.caveats import warn_of_private_captions, warn_of_private_start
from hf_dpclip.held_out import check_evaluation_data


# ---- Starting weights ----


@pytest.fixture
def saved(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    return tmp_path / "saved", trainer.privacy_spent()


def test_weights_that_have_cost_something_are_named(saved, caplog):
    folder, spent = saved
    model = CLIPModel.from_pretrained(folder)
    for start in (model, CLIPForVisualQuestionAnswering.from_clip(model, ["yes", "no"]), with_adapters(model)):
        message = warnings_of(caplog, warn_of_private_start, start)
        assert f"starts from {folder}, which spent ε = {spent.epsilon:.4g}" in message
        assert "both costs add up" in message and "ledger_path" in message


def test_so_are_towers_that_were_loaded_one_by_one(saved, caplog):
    folder, _ = saved
    text_tower = tiny_dual_encoder().text_model
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(folder, text_model=text_tower)
    assert warnings_of(caplog, warn_of_private_start, model).count("both costs add up") == 1


@pytest.mark.parametrize(
    "wrap", [lambda model: model, with_adapters, copy.deepcopy], ids=["the model", "new adapters on it", "a copy"]
)
def test_so_is_a_model_that_another_trainer_has_trained(make_trainer, caplog, wrap):
    trainer = make_trainer()
    assert warnings_of(caplog, warn_of_private_start, trainer.model) == ""
    trainer.train()
    trainer.train()
    message = warnings_of(caplog, warn_of_private_start, wrap(trainer.model))
    assert "the model, or a part of it, was trained before, in 4 steps. If that was" in message


def test_so_are_adapters_that_were_trained(make_trainer, tmp_path, caplog):
    trainer = make_trainer(model=get_peft_model(tiny_clip(), lora_config(tiny_clip())))
    trainer.save_model(tmp_path / "before")
    trainer.train()
    trainer.save_model(tmp_path / "after")
    # These need not begin at zero.
    pissa = get_peft_model(tiny_clip(), lora_config(tiny_clip(), init_lora_weights="pissa"))
    assert warnings_of(caplog, warn_of_private_start, pissa) == ""
    for folder, is_said in (("before", False), ("after", True)):
        model = PeftModel.from_pretrained(tiny_clip(), tmp_path / folder, is_trainable=True)
        message = warnings_of(caplog, warn_of_private_start, model)
        assert ("the adapters that the model has were trained before" in message) == is_said == bool(message)


def test_weights_without_a_guarantee_are_called_that(make_trainer, tmp_path, caplog):
    trainer = make_trainer(noise_seed=3)
    trainer.train()
    trainer.save_model(tmp_path / "seeded")
    message = warnings_of(caplog, warn_of_private_start, CLIPModel.from_pretrained(tmp_path / "seeded"))
    assert "seeded, which is NOT PRIVATE (noise_seed" in message and "spent" not in message


@pytest.mark.parametrize("model", [tiny_clip(), nn.Linear(2, 2)], ids=["a new model", "no model of transformers"])
def test_nothing_is_said_of_others(model, caplog):
    assert warnings_of(caplog, warn_of_private_start, model) == ""


def test_nor_of_weights_that_were_saved_before_training(make_trainer, tmp_path, caplog):
    make_trainer().save_model(tmp_path / "saved")
    assert warnings_of(caplog, warn_of_private_start, CLIPModel.from_pretrained(tmp_path / "saved")) == ""


def test_the_trainer_says_it(saved, make_trainer, caplog):
    folder, _ = saved
    with caplog.at_level(logging.WARNING):
        make_trainer(CLIPModel.from_pretrained(folder))
    assert "both costs add up" in caplog.text


# ---- Evaluation ----


@pytest.mark.parametrize(
    ("size", "model", "records", "warned"),
    [(1, tiny_clip, pairs, True), (2, tiny_clip, pairs, False), (1, tiny_clip_vqa, answered_questions, False)],
)
def test_an_evaluation_that_contrasts_pairs_with_none(size, model, records, warned, make_trainer, caplog):
    """A contrastive loss of one pair is 0, whatever the model; answers have a loss of their own."""
    options = {"eval_dataset": records(8, seed=1)}
    with caplog.at_level(logging.WARNING):
        make_trainer(model(), records(64), options, per_device_eval_batch_size=size)
    assert ("contrasts each pair with none" in caplog.text) == warned


@pytest.mark.parametrize(
    ("private", "evaluated", "compared"),
    [
        (raw_pairs(10), raw_pairs(20), 20),
        (pairs(6), concatenate_datasets([pairs(6), pairs(2, seed=1)]), 8),
        (raw_pairs(2), raw_pairs(70), 64),
    ],
    ids=["images", "encoded", "many"],
)
def test_records_for_evaluation_that_overlap_with_the_private_ones_are_named(private, evaluated, compared, caplog):
    message = warnings_of(caplog, check_evaluation_data, private, evaluated, None)
    assert f"some of the first {compared} records of eval_dataset are copies of records of the private" in message


@pytest.mark.parametrize("shown", [lambda table: table, lambda table: table.with_transform(dict), list])
def test_images_for_evaluation_that_are_private_ones_with_another_text_are_named(shown, caplog):
    private, collator = raw_pairs(8), ImageTextCollator(tiny_processor())
    texts = [f"another view of {number}" for number in range(8)]
    evaluated = private.remove_columns("text").add_column("text", texts)
    message = warnings_of(caplog, check_evaluation_data, private, shown(evaluated), None, "test", collator)
    assert "some of the first 8 records of test have an image or a sound of the private training" in message


def test_nothing_is_said_of_other_records_for_evaluation(caplog):
    assert warnings_of(caplog, check_evaluation_data, raw_pairs(8), other_raw_pairs(8), None) == ""


def test_the_trainer_names_them_once(make_trainer, caplog):
    options = {"data_collator": ImageTextCollator(tiny_processor()), "eval_dataset": raw_pairs(20)}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(train_dataset=raw_pairs(10), trainer_options=options)
        trainer.evaluate()
    assert caplog.text.count("are copies of records of the private training dataset") == 1


# ---- Captions ----


@pytest.mark.parametrize("public", [["a", "b", "c"], with_texts(["a", "b", "c"])], ids=["texts", "records"])
def test_public_captions_that_one_private_record_has_are_counted(public, caplog):
    collator = ImageTextCollator(tiny_processor())
    message = warnings_of(caplog, warn_of_private_captions, with_texts(["a", "b", "c", "c"]), collator, public)
    assert "2 of the 3 public_negatives are the caption of one private record each" in message


def test_captions_that_all_records_of_one_unit_share_are_named(caplog):
    private = with_texts(["a", "a", "b", "b"]).add_column("patient", [1, 1, 2, 3])
    collator = ImageTextCollator(tiny_processor())
    message = warnings_of(caplog, warn_of_private_captions, private, collator, ["a", "b"], "patient")
    assert "1 of the 2 public_negatives are the caption of one private patient each" in message


@pytest.mark.parametrize(
    ("private", "collator", "public"),
    [
        (with_texts(["a", "a", "b", "b"]), ImageTextCollator(tiny_processor()), ["a", "b", "c"]),
        (with_texts(["a", "b"]), ImageTextCollator(tiny_processor()), other_raw_pairs(3).remove_columns("text")),
        (with_texts(["a", "b"]), ImageTextCollator(tiny_processor()), None),
        (with_texts(["a", "b"]), list, ["a"]),
        (pairs(4), ImageTextCollator(tiny_processor()), ["a"]),
    ],
    ids=["class prompts", "images", "none", "another collator", "encoded"],
)
def test_no_other_captions_are(private, collator, public, caplog):
    assert warnings_of(caplog, warn_of_private_captions, private, collator, public) == ""


def test_the_trainer_counts_them_too(make_trainer, caplog):
    options = {"data_collator": ImageTextCollator(tiny_processor()), "public_negatives": ["a", "u"]}
    dataset = with_texts(["a", *["u"] * 15])
    with caplog.at_level(logging.WARNING):
        make_trainer(train_dataset=dataset, trainer_options=options, microbatch_size=1)
    assert "1 of the 2 public_negatives" in caplog.text


# ---- Promises ----


@pytest.mark.parametrize(
    ("epsilon", "delta", "words"), [(11, 1e-5, "ε = 11 promises little"), (1, 0.002, "δ = 0.002")]
)
def test_a_guarantee_that_says_little_is_called_that(epsilon, delta, words):
    (weakness,) = weak_promises(plan(num_examples=400, expected_batch_size=128, target_delta=delta), epsilon)
    assert words in weakness


def test_what_is_promised_is_promised_to_a_unit():
    sizes = {"num_examples": 400, "expected_batch_size": 128, "target_delta": 0.002}
    of_epsilon, of_delta = weak_promises(plan(**sizes, privacy_unit="patient"), 11)
    assert "knows of one patient may change" in of_epsilon and "promised to one patient." in of_delta
    assert "promised to one record." in weak_promises(plan(**sizes), 11)[1]


def test_a_usual_one_is_not():
    assert weak_promises(plan(), 8.0) == []
    assert weak_promises(plan(noise_multiplier=0, non_private=True), float("inf")) == []


# ---- What is saved ----


def test_the_collators_processor_is_saved_where_no_other_was_given(tmp_path, make_trainer):
    options = {"data_collator": ImageTextCollator(tiny_processor())}
    trainer = make_trainer(train_dataset=raw_pairs(16), trainer_options=options)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    assert isinstance(trainer, DPCLIPTrainer)
