"""`compute_metrics` of the trainer: what is gathered over batches, and what is computed from it."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from factories import other_raw_pairs, pairs, raw_pairs, tiny_clip
from transformers import EvalPrediction
from wrong_calls import processed

from hf_dpclip import ImageTextCollator
from hf_dpclip.evaluation import keep_embeddings, retrieval_recall, vqa_accuracy


RECALLS = [f"eval_{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]


def embeddings_of(model, dataset):
    """What the model says of the whole dataset in one forward pass."""
    with torch.no_grad():
        outputs = model.eval()(**dataset[:])
    return outputs.image_embeds.numpy(), outputs.text_embeds.numpy()


@pytest.mark.parametrize("ids", [None, [0, 0, 1, 1, 1, *range(2, 15)]], ids=["own images", "shared images"])
def test_recall_over_batches_is_that_of_the_whole_dataset(make_trainer, ids):
    model, held_out = tiny_clip(), pairs(18, seed=1)
    compute_metrics = partial(retrieval_recall, image_ids=ids, ks=(1, 5))
    options = {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": keep_embeddings}
    # Batches of 8, 8 and 2 records.
    trainer = make_trainer(model, trainer_options={"eval_dataset": held_out, **options}, per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    expected = compute_metrics(EvalPrediction(embeddings_of(model, held_out), ()))
    assert [metrics[name] for name in RECALLS] == [expected[name.removeprefix("eval_")] for name in RECALLS]


def test_shared_images_are_one_candidate_with_several_captions():
    images = np.eye(2, dtype=np.float32)[[0, 1, 0]]
    texts = np.asarray([[0, 1], [0.1, 1], [1, 0]], dtype=np.float32)
    recalls = retrieval_recall(EvalPrediction((images, texts), ()), image_ids=["x", "y", "x"], ks=(1,))
    # Image y is nearer to the first caption of x than to its own one.
    assert recalls == {"image_to_text_recall@1": 1 / 2, "text_to_image_recall@1": pytest.approx(2 / 3)}


def test_recall_during_training(make_trainer):
    options = {
        "eval_dataset": pairs(18, seed=1),
        "compute_metrics": partial(retrieval_recall, ks=(1, 5)),
        "preprocess_logits_for_metrics": keep_embeddings,
    }
    trainer = make_trainer(trainer_options=options, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert [logs["step"] for logs in trainer.state.log_history if RECALLS[0] in logs] == [1, 2]


def test_everything_else_that_the_model_returns_is_refused_with_the_remedy(make_trainer):
    options = {"eval_dataset": pairs(18, seed=1), "compute_metrics": retrieval_recall}
    with pytest.raises(ValueError, match="pass preprocess_logits_for_metrics=keep_embeddings to the trainer"):
        make_trainer(trainer_options=options).evaluate()


@pytest.mark.parametrize(
    "own, known", [({"a": pairs(8, seed=1)}, "(a)"), (pairs(8, seed=1), "(without names)")], ids=str
)
def test_a_name_is_that_of_an_own_dataset(make_trainer, own, known):
    trainer = make_trainer(trainer_options={"eval_dataset": own})
    with pytest.raises(ValueError, match=re.escape(f"'b' is none of the trainer's evaluation datasets {known}")):
        trainer.evaluate("b")


def test_ids_must_be_as_many_as_records():
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="there are 2 image_ids for 3 records"):
        retrieval_recall(EvalPrediction((rows, rows), ()), image_ids=[0, 1], ks=(1,))


def test_answers_are_those_of_the_largest_logits():
    prediction = EvalPrediction(np.asarray([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]]), np.asarray([1, 1, 1]))
    assert vqa_accuracy(prediction, {0: "no", 1: "yes"}) == {"vqa_accuracy": pytest.approx(2 / 3)}


def test_records_are_looked_at_once_and_those_of_several_datasets_by_name(tmp_path, monkeypatch):
    looked_at = []
    check = ImageTextCollator.check_records
    monkeypatch.setattr(
        ImageTextCollator, "check_records", lambda *args: looked_at.append(len(args[1])) or check(*args)
    )
    held_out = {"near": raw_pairs(4), "far": raw_pairs(6)}
    trainer = processed(tmp_path, other_raw_pairs(8), options={"eval_dataset": held_out})
    assert looked_at == [8, 4, 6]
    assert {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate().keys()
    assert looked_at == [8, 4, 6]
    trainer.evaluate(raw_pairs(5))
    assert looked_at == [8, 4, 6, 5]
