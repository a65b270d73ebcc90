"""How many microbatches a CPU computes in one pass."""

import pytest
import torch
from factories import tiny_clip, tiny_clip_vqa
from gradient_checks import as_contrastive, microbatch, microbatches
from hypothesis import given
from hypothesis import strategies as st

from hf_dpclip.gradients import MeanLossModel, group_microbatches, grouping


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def rows(group):
    return sum(len(inputs["input_ids"]) for _, inputs in group)


@given(SIZES, st.integers(1, 40))
def test_no_pass_is_larger_than_it_may_be(sizes, most):
    """But for less than one microbatch: those of one pass are not chosen, they are the next ones in order of size."""
    model, batches = as_contrastive(tiny_clip()), microbatches(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "CPU_STATE", most * model.hidden_state_size(batches[0][1]))
        groups, others = group_microbatches(model, batches)
    assert others == []
    assert sorted(seed for group in groups for seed, _ in group) == sorted(seed for seed, _ in batches)
    assert all(rows(group) < most + max(sizes) for group in groups)
    assert len(groups) <= -(-sum(sizes) // most)


@pytest.mark.parametrize("length", [1, 6, 7, 13])
@pytest.mark.parametrize("others", [[2], [6], [9, 3], [14, 14]], ids=str)
def test_how_long_texts_are_depends_on_nothing_that_was_drawn_beside_them(length, others):
    """Other shapes are rounded in other ways, by which one record would reach into the gradients of all others."""
    model, own = as_contrastive(tiny_clip()), microbatch(3, length, seed=1)
    beside = [microbatch(2, other, seed=seed) for seed, other in enumerate(others, start=2)]

    def tokens(batches):
        groups, _ = group_microbatches(model, batches)
        return next(inputs["input_ids"] for group in groups for seed, inputs in group if seed == 1)

    assert torch.equal(tokens([own]), tokens([own, *beside]))
    assert tokens([own]).shape[1] == min(-(-(length + 2) // 8) * 8, 16)


def test_what_fits_is_one_pass():
    batches = microbatches([3, 1, 2])
    assert group_microbatches(as_contrastive(tiny_clip()), batches) == ([batches], [])


def test_an_accelerator_takes_everything_in_one_pass(monkeypatch):
    monkeypatch.setattr(grouping, "CPU_STATE", 1)
    batches = microbatches([3, 1, 2])
    model = as_contrastive(tiny_clip())
    assert len(group_microbatches(model, batches)[0]) == 3
    model.trainable = [parameter.to("meta") for parameter in model.trainable]
    assert group_microbatches(model, batches) == ([batches], [])


def test_answers_to_questions_are_as_large_as_the_clip_inside(monkeypatch):
    answering, batch = tiny_clip_vqa(), microbatches([4])[0][1]
    model = MeanLossModel(answering, answering, dict)
    size = model.hidden_state_size(batch)
    assert size == as_contrastive(answering.clip).hidden_state_size(batch)
    monkeypatch.setattr(grouping, "CPU_STATE", 2 * size)
    records = [(seed, {**inputs, "labels": torch.zeros(1, dtype=int)}) for seed, inputs in microbatches([1] * 6)]
    assert [rows(group) for group in group_microbatches(model, records)[0]] == [2, 2, 2]


def test_patches_may_have_two_sides():
    model, batch = as_contrastive(tiny_clip()), microbatches([1], length=1)[0][1]
    size, side = model.hidden_state_size(batch), model.base.config.vision_config.patch_size
    model.base.config.vision_config.patch_size = (side, side)
    assert model.hidden_state_size(batch) == size
    model.base.config.vision_config.patch_size = (side, side // 2)
    assert model.hidden_state_size(batch) == 2 * size
