"""Gradients of microbatches, computed as nobody could get wrong, and what ours are compared with them by."""

import torch
from factories import BOS, EOS, IMAGE_SIZE, tiny_clip, with_adapters
from torch import nn

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.gradients import ContrastiveModel, contrastive_base, microbatch_gradients
from hf_dpclip.seeding import seeded


# What float32 leaves of a gradient that is zero, relative to the gradient of all parameters together.
ROUNDING = 1e-7
# Of a trainer whose updates are the same each time.
REPRODUCIBLE = {"non_private": True, "noise_seed": 3, "max_grad_norm": 0.5}
# Each microbatch in two forward passes.
IN_CHUNKS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "microbatch_size": 8}


def lora_clip(**settings):
    return with_adapters(tiny_clip(), **settings)


def as_contrastive(model, static_shapes=False):
    return ContrastiveModel(model, contrastive_base(model), dict, static_shapes)


def microbatch(size, length=6, seed=0, mask=False):
    """The seed and the inputs of a microbatch of noise, its texts `length` words long."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 47, (size, length), generator=generator)
    while len(words.unique(dim=0)) < size:
        # CLIP's own loss, with which this is compared, counts a caption that stands there twice as its own negative.
        words = torch.randint(1, 47, (size, length), generator=generator)
    input_ids = torch.cat([torch.full((size, 1), BOS), words, torch.full((size, 1), EOS)], dim=1)
    inputs = {
        "pixel_values": torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "input_ids": input_ids,
    }
    if mask:
        inputs["attention_mask"] = torch.ones_like(input_ids)
    return seed, inputs


def microbatches(sizes, **options):
    return [microbatch(size, seed=seed, **options) for seed, size in enumerate(sizes, start=1)]


def one_by_one(model, batches, **options):
    """The gradients of each microbatch, parameter by parameter, and their losses, from passes of their own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, losses = [], []
    for seed, inputs in batches:
        with seeded(seed):
            loss = model(**inputs, **options).loss
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        losses.append(loss.detach())
    return gradients, torch.stack(losses)


def all_at_once(model, batches, static_shapes=False):
    return microbatch_gradients(as_contrastive(model, static_shapes), batches, torch.Tensor.backward)


def norms_of(gradients):
    present = [[g.double().flatten() for g in of_one if g is not None] for of_one in gradients]
    return torch.stack([torch.cat(of_one).norm() for of_one in present])


def assert_same(model, batches, factors=None, tolerance=1e-5, static_shapes=False):
    """Norms and weighted sums agree, for each parameter by itself, to `tolerance`."""
    model.train()
    # As they are sorted inside.
    batches = sorted(batches, key=lambda batch: len(batch[1]["input_ids"]))
    expected, expected_losses = one_by_one(model, batches, return_loss=True)
    losses, gradients = all_at_once(model, batches, static_shapes)
    norms = norms_of(expected)
    assert torch.allclose(losses, expected_losses, rtol=tolerance, atol=1e-6)
    # A norm of 0 is given as one of the size of what float32 cannot hold.
    assert torch.allclose(gradients.norms, norms, rtol=tolerance, atol=ROUNDING * float(norms.max()) + 1e-14)
    factors = torch.rand(len(batches)) if factors is None else factors
    for number, of_all in enumerate(gradients.weighted_sum(factors)):
        # The noise is added to flat views.
        assert of_all is None or (of_all.is_contiguous() and not of_all.requires_grad)
        parts = [None if of_one[number] is None else f * of_one[number] for f, of_one in zip(factors, expected) if f]
        if any(part is None for part in parts):
            assert of_all is None
            continue
        total = torch.stack(parts).sum(dim=0)
        assert float((of_all - total).norm()) <= tolerance * float(total.norm()) + ROUNDING * float(norms.max())
    assert all(parameter.grad is None for parameter in model.parameters())


def gradient(model):
    """Of all parameters together, taken away from them."""
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def pieces(inputs, size):
    rows = range(0, len(inputs["input_ids"]), size)
    return [(seed, {name: value[seed : seed + size] for name, value in inputs.items()}) for seed in rows]


def assert_close(first, second, tolerance=1e-5):
    assert float((first - second).norm() / second.norm()) < tolerance


class Mixing(nn.Linear):
    """Adds the first row to all others, which no layer that is known would."""

    def forward(self, input):
        return super().forward(input) + input[:1].mean()


class Doubled(DPCLIPTrainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)
