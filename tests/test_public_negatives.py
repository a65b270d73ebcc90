"""Public negatives: constants of the mechanism, with which one private pair is enough for a microbatch."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import check_bounded, one_update
from datasets import Dataset, concatenate_datasets
from factories import IMAGE_SIZE, arguments, pairs, tiny_clip, tiny_processor
from gradient_checks import as_contrastive
from PIL import Image

from hf_dpclip import DPCLIPTrainer, ImageTextCollator
from hf_dpclip.public_negatives import PublicNegatives, collate_public_negatives, shared_rows


CAPTIONS = ["a cat", "a dog", "a cow", "an owl"]
EVERYONE = {
    "per_device_train_batch_size": 8,
    "microbatch_size": 1,
    "non_private": True,
    "remove_unused_columns": False,
}


def raw_pairs(n: int, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    images = [
        Image.fromarray(generator.integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)) for _ in range(n)
    ]
    return Dataset.from_dict({"image": images, "text": [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]})


def contrasting_with(public_negatives):
    """What makes trainers with these."""
    return partial(DPCLIPTrainer, processing_class=tiny_processor(), public_negatives=public_negatives)


def trainer_of(tmp_path, train_dataset, public_negatives, model=None, **overrides):
    model = tiny_clip() if model is None else model
    args = arguments(tmp_path, **{**EVERYONE, **overrides})
    return contrasting_with(public_negatives)(model, args, train_dataset=train_dataset)


def update(tmp_path, train_dataset, public_negatives, **overrides) -> torch.Tensor:
    """The sum of clipped gradients."""
    settings = {"trainer_class": contrasting_with(public_negatives), **EVERYONE, **overrides}
    released, trainer = one_update(tmp_path, dataset=train_dataset, **settings)
    return trainer.plan.num_microbatches * released


def encoded(negatives: PublicNegatives, model) -> tuple:
    contrastive = as_contrastive(model)
    negatives.begin_step(contrastive)
    embeddings = negatives.embeddings(contrastive)
    return embeddings.images, embeddings.texts


@pytest.mark.parametrize("public", [CAPTIONS, raw_pairs(5, seed=1), raw_pairs(5, seed=1).select_columns(["image"])])
def test_one_pair_alone_moves_the_sum_by_at_most_c(tmp_path, public):
    """Neighbouring datasets, everyone drawn: the sensitivity is C, and the bound is reached."""
    records = raw_pairs(8)
    with_it = update(tmp_path, records, public, max_grad_norm=0.01)
    # Everyone again, since q is 1 in both.
    without = update(tmp_path, records.select(range(7)), public, max_grad_norm=0.01, per_device_train_batch_size=7)
    difference = with_it - without
    check_bounded(difference, 0.01 * 1.01)
    assert float(difference.norm()) > 0.009


def test_the_plan_has_sensitivity_c(tmp_path):
    plan = trainer_of(tmp_path, raw_pairs(8), CAPTIONS).plan
    assert (plan.sensitivity, plan.num_microbatches) == (plan.max_grad_norm, 8)


def test_without_negatives_one_pair_is_refused(tmp_path):
    with pytest.raises(ValueError, match="public_negatives"):
        trainer_of(tmp_path, raw_pairs(8), None)


def test_all_at_once_computes_what_one_by_one_computes(tmp_path):
    records = raw_pairs(8)
    together = update(tmp_path, records, CAPTIONS)
    alone = update(tmp_path, records, CAPTIONS, vectorized=False)
    assert torch.allclose(together, alone, atol=1e-4)


def test_microbatches_of_several_pairs_and_chunks_use_them_too(tmp_path):
    records = raw_pairs(8)
    whole = update(tmp_path, records, CAPTIONS, microbatch_size=8)
    in_chunks = update(
        tmp_path, records, CAPTIONS, microbatch_size=8, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    without = update(tmp_path, records, None, microbatch_size=8)
    assert torch.allclose(whole, in_chunks, atol=1e-4)
    assert not torch.allclose(whole, without, atol=1e-2)


def test_with_gradient_the_text_encoder_learns_from_them(tmp_path):
    images_only = raw_pairs(8)
    constant = update(tmp_path, images_only, CAPTIONS)
    learning = update(tmp_path, images_only, CAPTIONS, public_negatives_gradient=True)
    assert not torch.allclose(constant, learning, atol=1e-3)


def test_with_gradient_they_are_the_same_embeddings():
    model, chunks = tiny_clip(), collate_public_negatives(CAPTIONS, None, tiny_processor(), batch_size=3)
    constant, learning = (encoded(PublicNegatives(chunks, with_gradient), model)[1] for with_gradient in (False, True))
    assert torch.allclose(learning, constant, atol=1e-5)
    assert learning.requires_grad and not constant.requires_grad


def test_they_are_encoded_every_so_many_steps():
    model, chunks = tiny_clip(), collate_public_negatives(CAPTIONS, None, tiny_processor(), batch_size=3)
    negatives = PublicNegatives(chunks, steps=2)
    seen = []
    for _ in range(4):
        seen.append(encoded(negatives, model)[1])
        with torch.no_grad():
            model.text_projection.weight.add_(torch.randn_like(model.text_projection.weight))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])


def test_when_they_are_encoded_does_not_depend_on_who_was_drawn(tmp_path, monkeypatch):
    """Nobody or somebody in the first of two steps that share embeddings: these are of the first step's weights."""
    model = tiny_clip()
    trainer = trainer_of(tmp_path, raw_pairs(8), CAPTIONS, model, public_negatives_steps=2, max_steps=1)
    before = trainer.public_negatives
    with torch.no_grad():
        expected = F.normalize(model.eval().get_text_features(**before.chunks[0]).pooler_output, dim=1)
    # A forward batch in which nobody was drawn.
    monkeypatch.setattr("hf_dpclip.dataloader.ForwardBatchSampler.__iter__", lambda self: iter([[]]))
    trainer.train()
    assert torch.allclose(before.embeddings(None).texts, expected, atol=1e-5)


def test_chunks_do_not_change_the_embeddings():
    model = tiny_clip().eval()
    few = PublicNegatives(collate_public_negatives(CAPTIONS, None, tiny_processor(), batch_size=1))
    all_together = PublicNegatives(collate_public_negatives(CAPTIONS, None, tiny_processor(), batch_size=9))
    assert torch.allclose(encoded(few, model)[1], encoded(all_together, model)[1], atol=1e-5)
    assert len(few) == len(all_together) == 4


def test_encoding_them_leaves_the_model_in_training():
    model = tiny_clip().train()
    encoded(PublicNegatives(collate_public_negatives(CAPTIONS, None, tiny_processor(), 4)), model)
    assert model.training and model.vision_model.training


@pytest.mark.parametrize("rows", [slice(0, 8), slice(3, 4)])
def test_private_records_are_recognised(tmp_path, rows):
    private = raw_pairs(8)
    public = private.select(range(8)[rows])
    assert shared_rows(private, public) == len(range(8)[rows])
    with pytest.raises(ValueError, match="are records of the private train_dataset"):
        trainer_of(tmp_path, private, public)


def test_private_records_are_counted_as_often_as_they_are_there():
    private = raw_pairs(8)
    assert shared_rows(private, concatenate_datasets([private.select([2, 2, 2]), raw_pairs(12).select([10, 11])])) == 3


def test_encoded_private_records_are_recognised():
    private = pairs(8)
    assert shared_rows(private, private.select([2, 5])) == 2
    assert shared_rows(private, pairs(8, seed=1)) == 0


def test_columns_of_one_name_are_compared_only_if_both_hold_images():
    private = Dataset.from_dict({"image": [{"bytes": None, "path": "a.png"}], "pixel_values": [[0.5]]})
    assert shared_rows(private, raw_pairs(3)) == 0


class OfAReport(ImageTextCollator):
    def __init__(self, processor):
        super().__init__(processor, image_column="scan", text_column="report")


def test_a_collator_with_a_constructor_of_its_own_encodes_public_records():
    public = raw_pairs(3).rename_columns({"text": "report"}).remove_columns("image")
    (chunk,) = collate_public_negatives(public, OfAReport(tiny_processor()), None, batch_size=9)
    assert len(chunk["input_ids"]) == 3 and "pixel_values" not in chunk


def test_class_prompts_are_public_although_they_are_the_captions():
    assert shared_rows(raw_pairs(8), CAPTIONS) == 0


def test_a_column_of_captions_will_do():
    chunks = collate_public_negatives(raw_pairs(3)["text"], None, tiny_processor(), batch_size=9)
    assert len(PublicNegatives(chunks)) == 3


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ([], "is empty"),
        ("a cat", "is a str: give a list of captions"),
        ([1, 2], "is 1, which is no caption: give a list of captions"),
        (Dataset.from_dict({"words": ["a cat"]}), "neither 'image' nor 'text'"),
    ],
)
def test_what_is_no_negative_is_refused(public, message):
    with pytest.raises(ValueError, match=message):
        collate_public_negatives(public, ImageTextCollator(tiny_processor()), None, 4)


def test_captions_need_a_tokenizer():
    with pytest.raises(ValueError, match="processing_class"):
        collate_public_negatives(CAPTIONS, None, None, 4)


def test_the_noise_is_that_of_one_pair(tmp_path):
    """σC, not 2σC, and every pair counts: the mean update of many identical runs is not what is looked at here."""
    released, trainer = one_update(
        tmp_path,
        trainer_class=contrasting_with(CAPTIONS),
        microbatch_size=1,
        noise_multiplier=3.0,
        max_grad_norm=1e-3,
    )
    expected = trainer.plan.noise_multiplier * trainer.plan.max_grad_norm
    measured = float((released * trainer.plan.num_microbatches).std())
    assert measured == pytest.approx(expected, rel=0.05)
