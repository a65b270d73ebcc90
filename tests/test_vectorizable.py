"""Losses that are a mean over records: many microbatches at once, with the gradients of one at a time."""

import pytest
import torch
from checks import check_bounded, one_update
from factories import answered_questions, tiny_clip_vqa, with_adapters
from gradient_checks import REPRODUCIBLE, ROUNDING, Doubled, assert_close, norms_of, one_by_one
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_dpclip.forward_pass import AllAtOnce, OneByOne
from hf_dpclip.gradients import MeanLossModel, group_microbatches, mean_loss_base, microbatch_gradients


def head_alone():
    model = tiny_clip_vqa()
    model.clip.requires_grad_(False)
    return model


def adapted(**options):
    """Adapters that already do something, and the head."""
    return with_adapters(tiny_clip_vqa(), **options)


TUNINGS = {"all": tiny_clip_vqa, "head": head_alone, "adapters": adapted}


def microbatches(sizes, seed=0):
    """Answered questions, as many in each microbatch as `sizes` say, in ascending order."""
    questions = answered_questions(sum(sizes), seed)[:]
    parts = {name: values.split(sorted(sizes)) for name, values in questions.items()}
    return [(number, {name: parts[name][number] for name in parts}) for number in range(len(sizes))]


def as_mean_loss(model):
    return MeanLossModel(model, mean_loss_base(model), dict)


def all_at_once(model, batches):
    return microbatch_gradients(as_mean_loss(model), batches, torch.Tensor.backward)


@pytest.mark.parametrize("make", TUNINGS.values(), ids=TUNINGS)
@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_norms_and_sums_are_those_of_one_microbatch_at_a_time(make, sizes):
    model, batches = make().train(), microbatches(sizes)
    expected, expected_losses = one_by_one(model, batches)
    losses, gradients = all_at_once(model, batches)
    norms = norms_of(expected)
    assert torch.allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradients.norms, norms, rtol=1e-5)
    factors = torch.rand(len(batches))
    for number, of_all in enumerate(gradients.weighted_sum(factors)):
        parts = [factor * of_one[number] for factor, of_one in zip(factors, expected) if of_one[number] is not None]
        total = sum(parts, torch.zeros(()))
        found = torch.zeros(()) if of_all is None else of_all
        assert float((found - total).norm()) <= 1e-5 * float(total.norm()) + ROUNDING * float(norms.max())


def test_dropout_draws_the_same():
    model, batches = adapted(lora_dropout=0.4).train(), microbatches([1, 2, 3])
    expected, _ = one_by_one(model, batches)
    assert torch.allclose(all_at_once(model, batches)[1].norms, norms_of(expected), rtol=1e-5)


def test_a_record_that_is_not_finite_spoils_its_own_microbatch_only():
    model, batches = tiny_clip_vqa().train(), microbatches([1, 2, 3])
    expected = norms_of(one_by_one(model, batches)[0])
    batches[1][1]["pixel_values"][0] = torch.inf
    losses, gradients = all_at_once(model, batches)
    assert losses.isfinite().tolist() == gradients.norms.isfinite().tolist() == [True, False, True]
    assert torch.allclose(gradients.norms[[0, 2]], expected[[0, 2]], rtol=1e-5)
    sums = list(gradients.weighted_sum(torch.tensor([1.0, 0.0, 1.0])))
    assert all(total is None or total.isfinite().all() for total in sums)


def test_a_loss_of_ones_own_is_not_known_to_be_a_mean():
    class Other(type(tiny_clip_vqa())):
        def forward(self, **inputs):
            return super().forward(**inputs)

    assert mean_loss_base(tiny_clip_vqa()) is not None
    assert mean_loss_base(adapted()) is not None
    assert mean_loss_base(Other(tiny_clip_vqa().config)) is None
    assert mean_loss_base(nn.Linear(2, 2)) is None


def test_records_without_labels_are_left_to_the_plain_way():
    """They alone."""
    unlabelled, *labelled = microbatches([2, 2, 3])
    del unlabelled[1]["labels"]
    ((first, second),), others = group_microbatches(as_mean_loss(tiny_clip_vqa()), [*labelled, unlabelled])
    assert [seed for seed, _ in (first, second)] == [seed for seed, _ in labelled]
    assert others == [unlabelled]


# ---- Through the trainer ----

SINGLE = {**REPRODUCIBLE, "microbatch_size": 1, "per_device_train_batch_size": 16}


def update(tmp_path, make, **overrides):
    settings = {"dataset": answered_questions(64), **SINGLE, "max_grad_norm": 0.1, **overrides}
    return one_update(tmp_path, model=make(), **settings)


@pytest.mark.parametrize("make", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("overrides", [{}, {"microbatch_size": 4}, {"privacy_unit_column": "image_id"}], ids=str)
def test_the_update_is_that_of_one_microbatch_after_another(tmp_path, make, overrides):
    images = [number // 3 for number in range(64)]
    overrides = {"dataset": answered_questions(64).add_column("image_id", images), **overrides}
    together, trainer = update(tmp_path, make, **overrides)
    assert isinstance(trainer._forward_pass, AllAtOnce) and trainer._forward_pass.possible
    alone, trainer = update(tmp_path, make, vectorized=False, **overrides)
    assert isinstance(trainer._forward_pass, OneByOne)
    assert_close(together, alone)


def everyone(tmp_path, dataset) -> torch.Tensor:
    """The sum of the clipped gradients of all records."""
    settings = {"dataset": dataset, "per_device_train_batch_size": len(dataset), "max_grad_norm": 0.01}
    released, trainer = update(tmp_path, tiny_clip_vqa, **settings)
    assert trainer._forward_pass.possible
    return trainer.plan.num_microbatches * released


def test_one_record_moves_the_sum_by_at_most_c(tmp_path):
    """Neighbouring datasets, everyone drawn: the sensitivity is C, and the bound is reached."""
    records = answered_questions(8)
    difference = everyone(tmp_path, records) - everyone(tmp_path, records.select(range(7)))
    check_bounded(difference, 0.01 * 1.001)
    assert float(difference.norm()) > 0.0099


@pytest.mark.parametrize("another", [{"trainer_class": Doubled}, {"label_smoothing_factor": 0.1}], ids=str)
def test_another_loss_takes_the_plain_way(tmp_path, another):
    assert isinstance(update(tmp_path, tiny_clip_vqa, **another)[1]._forward_pass, OneByOne)
