"""One microbatch in pieces: the gradient is that of the whole."""

import pytest
import torch
from checks import check_bounded, one_update
from factories import arguments, pairs, tiny_clip
from gradient_checks import (
    IN_CHUNKS,
    REPRODUCIBLE,
    as_contrastive,
    assert_close,
    gradient,
    lora_clip,
    microbatch,
    pieces,
)

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.gradients import accumulate_chunked_gradient


@pytest.mark.parametrize("make", [tiny_clip, lora_clip])
@pytest.mark.parametrize("size", [1, 4, 5, 13, 20])
@pytest.mark.parametrize("static_shapes", [False, True])
def test_the_gradient_of_the_pieces_is_that_of_the_whole(make, size, static_shapes):
    model = make().train()
    _, inputs = microbatch(13)
    expected_loss = model(**inputs, return_loss=True).loss
    expected_loss.backward()
    expected = gradient(model)
    contrastive = as_contrastive(model, static_shapes)
    loss = accumulate_chunked_gradient(contrastive, pieces(inputs, size), torch.Tensor.backward)
    assert torch.allclose(loss, expected_loss, rtol=1e-5) and not loss.requires_grad
    assert_close(gradient(model), expected)


@pytest.mark.parametrize("size", [6, 2, 4])
def test_dropout_is_the_same_in_both_passes(size):
    """Masks that differed would give the gradient of a loss that was never computed."""
    model = lora_clip(lora_dropout=0.4).train()
    _, inputs = microbatch(6)
    chunks = pieces(inputs, size)
    contrastive = as_contrastive(model)
    embeddings = [embeddings_drawn_with(seed, contrastive, chunk) for seed, chunk in chunks]
    images, texts = (torch.cat(each) for each in zip(*embeddings))
    contrastive.loss(images, texts, contrastive.scalars, contrastive.captions(inputs)).backward()
    expected = gradient(model)
    accumulate_chunked_gradient(contrastive, chunks, torch.Tensor.backward)
    assert_close(gradient(model), expected)


def embeddings_drawn_with(seed, contrastive, inputs):
    torch.manual_seed(seed)
    return contrastive.encode(inputs)


@pytest.mark.parametrize("rows, size, expected", [(6, 6, 1), (6, 5, 3), (6, 2, 5), (8, 1, 15), (9, 1, 18)])
def test_of_a_few_chunks_the_last_is_computed_once_and_the_others_twice(rows, size, expected):
    model = tiny_clip()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    contrastive = as_contrastive(model)
    accumulate_chunked_gradient(contrastive, pieces(microbatch(rows)[1], size), torch.Tensor.backward)
    assert len(passes) == expected
    assert sum(passes) == (expected + 1) // 2


@pytest.mark.parametrize("size", [13, 4])
def test_the_temperature_alone_can_be_trained(size):
    model = tiny_clip().requires_grad_(False)
    model.logit_scale.requires_grad_()
    _, inputs = microbatch(13)
    model(**inputs, return_loss=True).loss.backward()
    expected = gradient(model)
    contrastive = as_contrastive(model)
    accumulate_chunked_gradient(contrastive, pieces(inputs, size), torch.Tensor.backward)
    assert_close(gradient(model), expected)


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("share", [5, 13])
def test_the_parts_of_several_processes_add_up_to_the_gradient_of_the_whole(size, share):
    """Also if one has no pair, and where both have a pair of one caption, which are no negatives of each other."""
    model = tiny_clip()
    contrastive = as_contrastive(model)
    _, inputs = microbatch(13)
    inputs["input_ids"][12] = inputs["input_ids"][0]
    expected_loss = contrastive.compute_loss(inputs)
    expected_loss.backward()
    expected = gradient(model)
    with torch.no_grad():
        gathered = {
            torch.float32: torch.cat(contrastive.encode(inputs), dim=1),
            torch.int64: contrastive.captions(inputs),
        }
    for process, rows in enumerate([slice(0, share), slice(share, 13)]):

        def gather(own, rows=rows):
            assert torch.allclose(own, gathered[own.dtype][rows], atol=1e-6)
            return gathered[own.dtype].clone(), rows.start

        chunks = pieces({name: value[rows] for name, value in inputs.items()}, size)
        loss = accumulate_chunked_gradient(contrastive, chunks, torch.Tensor.backward, gather, process)
        assert torch.allclose(loss, expected_loss, rtol=1e-5)
    assert_close(gradient(model), expected)


def test_nothing_drawn():
    model = tiny_clip()
    contrastive = as_contrastive(model)
    assert accumulate_chunked_gradient(contrastive, [], torch.Tensor.backward) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("microbatch_size", [8, 16])
def test_a_trainer_in_chunks_computes_what_one_without_computes(tmp_path, microbatch_size):
    whole, _ = one_update(tmp_path, per_device_train_batch_size=16, microbatch_size=microbatch_size, **REPRODUCIBLE)
    chunked, trainer = one_update(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        microbatch_size=microbatch_size,
        **REPRODUCIBLE,
    )
    assert trainer.args.chunked
    assert trainer.plan.num_microbatches == 16 // microbatch_size
    assert_close(chunked, whole)
    check_bounded(chunked, 0.5)


def test_chunks_are_read_by_workers_too(tmp_path):
    alone, _ = one_update(tmp_path, **IN_CHUNKS, **REPRODUCIBLE)
    with_workers, _ = one_update(tmp_path, dataloader_num_workers=1, **IN_CHUNKS, **REPRODUCIBLE)
    assert_close(with_workers, alone)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (IN_CHUNKS, "put together again for CLIPModel"),
        ({"static_shapes": True}, "static_shapes=True needs CLIPModel"),
    ],
    ids=["chunks", "static_shapes"],
)
def test_another_loss_than_clips_own_is_refused(tmp_path, options, refusal):
    args = arguments(tmp_path, **options)
    with pytest.raises(ValueError, match=refusal):
        DPCLIPTrainer(
            tiny_clip(), args, train_dataset=pairs(64), compute_loss_func=lambda outputs, *_, **__: outputs.loss
        )
