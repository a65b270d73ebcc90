"""All microbatches in one pass: the same norms and the same sums as one pass for each."""

import pytest
import torch
from factories import BOS, EOS, IMAGE_SIZE, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from hf_dpclip import lora_config
from hf_dpclip.gradients import ContrastiveModel, NotVectorizable, contrastive_base, microbatch_gradients, obstacle
from hf_dpclip.seeding import seeded


# What float32 leaves of a gradient that is zero, relative to the gradient of all parameters together.
ROUNDING = 1e-7


def lora_clip(**settings):
    """A tiny CLIP with adapters that already do something."""
    model = tiny_clip()
    model = get_peft_model(model, lora_config(model, r=4, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def microbatch(size, length=5, seed=0, mask=False):
    """The seed and the inputs of a microbatch of noise, its texts `length` words long."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 47, (size, length), generator=generator)
    input_ids = torch.cat([torch.full((size, 1), BOS), words, torch.full((size, 1), EOS)], dim=1)
    inputs = {"pixel_values": torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator), "input_ids": input_ids}
    if mask:
        inputs["attention_mask"] = torch.ones_like(input_ids)
    return seed, inputs


def microbatches(sizes, **options):
    return [microbatch(size, seed=seed, **options) for seed, size in enumerate(sizes, start=1)]


def one_by_one(model, batches):
    """The gradients of each microbatch, parameter by parameter, and their losses, from passes of their own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, losses = [], []
    for seed, inputs in batches:
        with seeded(seed):
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        gradients.append([parameter.grad for parameter in parameters])
        losses.append(loss.detach())
        model.zero_grad()
    return gradients, torch.stack(losses)


def all_at_once(model, batches, static_shapes=False):
    contrastive = ContrastiveModel(model, contrastive_base(model), dict, static_shapes)
    return microbatch_gradients(contrastive, batches, torch.Tensor.backward)


def norms_of(gradients):
    present = [[g.double().flatten() for g in of_one if g is not None] for of_one in gradients]
    return torch.stack([torch.cat(of_one).norm() for of_one in present])


def assert_same(model, batches, factors=None, tolerance=1e-5, static_shapes=False):
    """Norms and weighted sums agree, for each parameter by itself, to `tolerance`."""
    model.train()
    # As they are sorted inside.
    batches = sorted(batches, key=lambda batch: len(batch[1]["input_ids"]))
    expected, expected_losses = one_by_one(model, batches)
    losses, gradients = all_at_once(model, batches, static_shapes)
    norms = norms_of(expected)
    assert torch.allclose(losses, expected_losses, rtol=tolerance, atol=1e-6)
    assert torch.allclose(gradients.norms, norms, rtol=tolerance, atol=ROUNDING * float(norms.max()))
    factors = torch.rand(len(batches)) if factors is None else factors
    for number, of_all in enumerate(gradients.weighted_sum(factors)):
        assert of_all is None or not of_all.requires_grad
        parts = [None if of_one[number] is None else f * of_one[number] for f, of_one in zip(factors, expected) if f]
        if any(part is None for part in parts):
            assert of_all is None
            continue
        total = torch.stack(parts).sum(dim=0)
        assert float((of_all - total).norm()) <= tolerance * float(total.norm()) + ROUNDING * float(norms.max())
    assert all(parameter.grad is None for parameter in model.parameters())


sizes_of_microbatches = st.lists(st.integers(1, 6), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1)


@settings(deadline=None, max_examples=25)
@given(sizes=sizes_of_microbatches, length=st.integers(1, 12), mask=st.booleans())
def test_all_parameters(sizes, length, mask):
    assert_same(tiny_clip(), microbatches(sizes, length=length, mask=mask))


@settings(deadline=None, max_examples=25)
@given(sizes=sizes_of_microbatches, length=st.integers(1, 12), rank_stabilised=st.booleans())
def test_lora(sizes, length, rank_stabilised):
    assert_same(lora_clip(use_rslora=rank_stabilised), microbatches(sizes, length=length))
