"""All microbatches in one pass: the same norms and the same sums as one pass for each."""

import functools
import random
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from factories import EOS, IMAGE_SIZE, tiny_clip
from gradient_checks import (
    ROUNDING,
    Mixing,
    all_at_once,
    as_contrastive,
    assert_same,
    lora_clip,
    microbatch,
    microbatches,
    norms_of,
    one_by_one,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners import lora
from PIL import Image
from torch import nn
from torch.nn.modules import module as modules
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.clip import modeling_clip

from hf_dpclip.gradients import (
    ContrastiveModel,
    NotVectorizable,
    factored,
    group_microbatches,
    products,
    vectorization_obstacle,
)
from hf_dpclip.gradients.factored import Dense, Outer, SpareMemory
from hf_dpclip.gradients.layout import Layout
from hf_dpclip.gradients.recording import Recording


def groups_of(model, batches):
    """Each by the seeds of its microbatches, all of which can be vectorized."""
    groups, others = group_microbatches(as_contrastive(model), batches)
    assert others == []
    assert sorted(seed for group in groups for seed, _ in group) == sorted(seed for seed, _ in batches)
    return {tuple(seed for seed, _ in group): group for group in groups}


sizes_of_microbatches = st.lists(st.integers(1, 6), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1)


@settings(deadline=None, max_examples=25)
@given(sizes=sizes_of_microbatches, length=st.integers(1, 12), mask=st.booleans())
def test_all_parameters(sizes, length, mask):
    assert_same(tiny_clip(), microbatches(sizes, length=length, mask=mask))


@settings(deadline=None, max_examples=25)
@given(sizes=sizes_of_microbatches, length=st.integers(1, 12), rank_stabilised=st.booleans())
def test_lora(sizes, length, rank_stabilised):
    assert_same(lora_clip(use_rslora=rank_stabilised), microbatches(sizes, length=length))


@settings(deadline=None, max_examples=10)
@given(sizes=sizes_of_microbatches, length=st.integers(1, 12))
def test_static_shapes_change_nothing(sizes, length):
    assert_same(tiny_clip(), microbatches(sizes, length=length), static_shapes=True)


def test_one_pair_each():
    """In a contrastive loss of one pair nothing depends on the parameters; with its neighbours, everything would."""
    _, gradients = all_at_once(tiny_clip().train(), microbatches([1, 1, 1]))
    assert gradients.norms.max() < 1e-5


@pytest.mark.parametrize(
    "form", [lambda _, outer: outer, lambda _, outer: Dense(outer.dense())], ids=["factored", "dense"]
)
@pytest.mark.parametrize("joined", [True, False])
def test_every_form_of_a_weights_gradient(form, joined, monkeypatch):
    """The form is chosen by size; here each has to do for everything."""
    monkeypatch.setattr(SpareMemory, "cheaper_form", form)
    monkeypatch.setattr(Dense, "is_small", joined)
    assert_same(tiny_clip(), microbatches([2, 3, 3, 5]))
    assert_same(lora_clip(), microbatches([2, 3, 3, 5]))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Microbatches padded with zeros, several products at a time, also of layers of one shape, weighted sums from
    narrow parts."""
    monkeypatch.setattr(Layout, "batches_products", True)
    monkeypatch.setattr(products, "_at_once", lambda a, b: 2)
    monkeypatch.setattr(products, "_in_tensor_cores", lambda x, y: True)
    monkeypatch.setattr(products, "_matmul", lambda x, y: torch.bmm(x.float(), y.float()))
    monkeypatch.setattr(SpareMemory, "cheaper_form", lambda _, outer: outer)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_the_ways_of_an_accelerator():
    sizes = [1, 2, 3, 4, 4, 5, 7, 8, 9]
    for model in (tiny_clip(), lora_clip()):
        assert_same(model, microbatches(sizes))
        assert_same(model, microbatches(sizes), factors=torch.tensor([1, 0, 1, 2, 3, 0, 0, 1, 2.0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [3, 200], ids=["gram", "products"])
def test_narrow_factors_are_multiplied_as_if_they_were_wide(rows):
    """On tensor cores, where float32 adds up what bfloat16 multiplies."""
    sizes, factors = [1, 2, 2, 3, 5], torch.rand(5)
    a, b = (torch.randn(13, rows, width).to("cuda", torch.bfloat16) for width in (256, 192))
    narrow = Outer(a, b, Layout(sizes, 13, a.device))
    assert products._in_tensor_cores(a, b)
    of_each = zip(*(factor.cpu().double().split(sizes) for factor in (a, b)))
    exact = torch.stack([y.flatten(0, 1).T @ x.flatten(0, 1) for x, y in of_each])
    assert torch.allclose(narrow.squared_norms().cpu(), exact.square().sum(dim=(1, 2)), rtol=1e-5)
    assert torch.allclose(narrow.dense().cpu().double(), exact, rtol=1e-4, atol=1e-3)
    total = torch.tensordot(factors.double(), exact, dims=1)
    assert torch.allclose(narrow.weighted_sum(factors.cuda(), False).cpu().double(), total, rtol=1e-4, atol=1e-3)


def test_narrow_parts_lose_nothing():
    exact = torch.randn(10_000) * 10.0 ** torch.arange(-20, 20).repeat(250)
    parts = [*products._narrow_parts(exact)]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(sum(part.double() for part in parts), exact.double())


def test_microbatches_are_padded_to_less_than_twice_their_size(monkeypatch):
    monkeypatch.setattr(Layout, "batches_products", True)
    groups = Layout([1, 2, 3, 4, 4, 5, 7, 8, 9], 43, torch.device("cpu")).groups
    assert [group.sizes for group in groups] == [[1], [2], [3, 4, 4], [5, 7, 8], [9]]
    padded = groups[2].matrices(torch.arange(43.0)[:, None, None])
    assert padded.squeeze(2).tolist() == [[3, 4, 5, 0], [6, 7, 8, 9], [10, 11, 12, 13]]


def test_gradients_are_multiplied_out_while_there_is_memory_for_it():
    products = Outer(torch.randn(2, 1, 4), torch.randn(2, 1, 4), Layout([1, 1], 2, torch.device("cpu")))
    # Two matrices of 16 elements each, from factors of 16 elements.
    spare = SpareMemory(40)
    assert [type(spare.cheaper_form(products)) for _ in range(3)] == [Dense, Dense, Outer]
    assert spare.num_elements == 8


def test_products_of_one_shape_are_multiplied_together(monkeypatch):
    monkeypatch.setattr(Layout, "batches_products", True)
    layout = Layout([1, 2, 4], 8, torch.device("cpu"))
    products = {
        number: Outer(torch.randn(8, 9, width), torch.randn(8, 9, 4), layout)
        for number, width in enumerate([6, 5, 6, 6])
    }
    # They wait, as long as copying the factors takes less time than starting on a product.
    assert all(SpareMemory(1000).cheaper_form(each) is each for each in products.values())
    # Two of width 6 at a time.
    monkeypatch.setattr(factored, "SIDE_BY_SIDE", 2 * products[0].num_factors)
    of_each = {number: each.dense() for number, each in products.items()}
    multiplied = []
    monkeypatch.setattr(factored, "product", lambda a, b: multiplied.append(len(a)) or b.transpose(1, 2) @ a)
    together = factored.multiplied_out(products)
    assert sorted(multiplied) == [8, 8, 16]
    assert together.keys() == of_each.keys()
    assert all(torch.allclose(together[number].gradients, of_each[number], rtol=1e-5, atol=1e-5) for number in of_each)
    monkeypatch.setattr(factored, "WAITING", products[1].num_factors)
    assert [each.is_better_batched for each in products.values()] == [False, True, False, False]


@pytest.mark.parametrize("rows, width", [(2, 8), (50, 8), (300, 1024)])
def test_norms_of_products(rows, width):
    """Few rows: from Gram matrices, in blocks of rows. Many: from the products."""
    a, b = torch.randn(6, rows, width), torch.randn(6, rows, width // 2)
    squared = Outer(a, b, Layout([1] * 6, 6, a.device)).squared_norms()
    assert torch.allclose(squared, (b.double().transpose(1, 2) @ a.double()).square().sum(dim=(1, 2)), rtol=1e-5)


def test_texts_of_different_lengths():
    batches = [microbatch(2, length=3, seed=1), microbatch(3, length=9, seed=2), microbatch(2, length=1, seed=3)]
    assert_same(tiny_clip(), batches)
    masked = [microbatch(2, length=3, seed=1, mask=True), microbatch(3, length=9, seed=2, mask=True)]
    assert_same(tiny_clip(), masked)


def test_dropout_draws_what_each_microbatch_would_draw_alone():
    assert_same(lora_clip(lora_dropout=0.4), microbatches([3, 1, 2, 5]))


def test_one_record_more_changes_nothing_but_its_own_microbatch():
    """Dropout included: given its seed, a gradient depends on its own microbatch only."""
    model = lora_clip(lora_dropout=0.4).train()
    others = [microbatch(4, seed=1), microbatch(5, seed=3)]
    _, before = all_at_once(model, [microbatch(2, seed=2), *others])
    _, after = all_at_once(model, [microbatch(3, seed=2), *others])
    assert torch.allclose(before.norms[1:], after.norms[1:], rtol=1e-5)
    assert not torch.allclose(before.norms[:1], after.norms[:1], rtol=1e-2)


def test_a_parameter_that_is_used_twice():
    model = tiny_clip()
    layer = model.vision_model.encoder.layers[0]
    layer.self_attn.q_proj.weight = layer.self_attn.v_proj.weight
    layer.layer_norm2.weight = layer.layer_norm1.weight
    embeddings = model.text_model.embeddings
    embeddings.position_embedding.weight = embeddings.token_embedding.weight
    assert_same(model, microbatches([2, 3, 3]))


@pytest.mark.parametrize(
    "use",
    [lambda x, weight: x + weight, lambda x, weight: x * weight.expand(*x.shape)],
    ids=["sum", "repetition"],
)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (1, 4, 3)], ids=str)
def test_a_parameter_for_every_row_has_a_gradient_for_each_microbatch(use, shape):
    weight, x = nn.Parameter(torch.randn(shape)), torch.randn(3, 4, 3)
    recording = Recording([weight], Layout([1, 2], 3, torch.device("cpu")), [])
    with recording:
        loss = use(x, weight).square().sum()
    loss.backward()
    (gradient,) = recording.gradients[id(weight)]
    (expected,) = zip(*(torch.autograd.grad(use(rows, weight).square().sum(), weight) for rows in x.split([1, 2])))
    assert torch.allclose(gradient.dense().view(2, *shape), torch.stack(expected), atol=1e-5)
    assert weight.grad is None


IDS = torch.tensor([[0, 0, 1]] * 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight: F.linear(torch.cat([x, x]), weight),
        lambda x, weight: F.linear(x[0, :1], weight),
        lambda x, weight: torch.cat([x, x]) + weight,
        lambda x, weight: x[0] + weight,
        lambda x, weight: torch.Tensor.add(x, weight, alpha=2),
        lambda x, weight: weight.expand(2, 3, 3) * x[:2],
        lambda x, weight: F.embedding(IDS, weight, scale_grad_by_freq=True),
        lambda x, weight: F.embedding(IDS, weight, padding_idx=-2),
        lambda x, weight: F.embedding(torch.cat([IDS, IDS]), weight),
    ],
    ids=[
        "linear of more rows",
        "linear of fewer rows",
        "sum with more rows",
        "sum with one row",
        "sum with a multiple",
        "fewer rows",
        "embedding by frequency",
        "embedding with padding at the end",
        "embedding of more rows",
    ],
)
def test_uses_that_cannot_be_told_apart_are_left_alone(use):
    """Recorded all the same, some would be missing from the norms."""
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(3, 3, 3)
    recording = Recording([weight], Layout([1, 2], 3, torch.device("cpu")), [])
    with recording:
        loss = use(x, weight).square().sum()
    loss.backward()
    (expected,) = torch.autograd.grad(use(x, weight).square().sum(), weight)
    assert not recording.gradients
    assert torch.allclose(weight.grad, expected)


@pytest.mark.parametrize("frozen", ["text_model", "vision_model", "bias", "weight", "logit_scale", "layer_norm"])
def test_frozen_parameters(frozen):
    model = tiny_clip()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_same(model, microbatches([2, 3, 3]))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("ways", ["as_on_a_cpu", "as_on_an_accelerator"])
def test_a_gradient_that_is_not_finite_stays_in_its_microbatch(ways, joined, request, monkeypatch):
    if ways == "as_on_an_accelerator":
        request.getfixturevalue(ways)
    monkeypatch.setattr(Dense, "is_small", joined)
    model, batches = tiny_clip().train(), microbatches([2, 3, 3, 4])
    poisoned = [(seed, dict(inputs)) for seed, inputs in batches]
    poisoned[1][1]["pixel_values"] = poisoned[1][1]["pixel_values"] * torch.inf
    _, healthy = all_at_once(model, batches)
    _, gradients = all_at_once(model, poisoned)
    finite = torch.tensor([True, False, True, True])
    assert torch.equal(gradients.norms.isfinite(), finite)
    assert torch.allclose(gradients.norms[finite], healthy.norms[finite], rtol=1e-5)
    factors = torch.tensor([0.5, 0.0, 0.25, 1.0])
    scale = float(healthy.norms.max())
    for total, expected in zip(gradients.weighted_sum(factors), healthy.weighted_sum(factors)):
        assert torch.allclose(total, expected, rtol=1e-5, atol=ROUNDING * scale)


@pytest.mark.parametrize("make", [tiny_clip, lora_clip])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("ways", ["as_on_a_cpu", "as_on_an_accelerator"])
def test_sums_are_added_to_totals(make, joined, ways, request, monkeypatch):
    """In their memory: what is new to the process takes longer to reach than to fill."""
    if ways == "as_on_an_accelerator":
        request.getfixturevalue(ways)
    monkeypatch.setattr(Dense, "is_small", joined)
    model, batches, factors = make().train(), microbatches([2, 3, 3, 4]), torch.tensor([0.5, 0.0, 0.25, 1.0])
    passes = [all_at_once(model, batches)[1] for _ in range(4)]
    once = [*passes[0].weighted_sum(factors)]
    totals = [*passes[1].weighted_sum(factors)]
    twice = [*passes[2].weighted_sum(factors, totals)]
    assert [total.data_ptr() for total in twice] == [total.data_ptr() for total in totals]
    for first, both in zip(once, twice):
        assert torch.allclose(both, 2 * first, rtol=1e-5, atol=ROUNDING * float(passes[0].norms.max()))
    kept = [total.clone() for total in twice]
    unchanged = [*passes[3].weighted_sum(torch.zeros(4), twice)]
    assert all(map(torch.equal, unchanged, kept))


def test_the_total_of_a_parameter_without_gradient_stays():
    model = tiny_clip().train()
    model.unused = nn.Parameter(torch.ones(3))
    gradients = [all_at_once(model, microbatches([2, 3]))[1] for _ in range(2)]
    parameters, factors = gradients[0].parameters, torch.ones(2)
    nothing = dict(zip(parameters, gradients[0].weighted_sum(factors)))
    totals = dict(zip(parameters, gradients[1].weighted_sum(factors, map(torch.ones_like, parameters))))
    assert nothing[model.unused] is None
    assert torch.equal(totals[model.unused], torch.ones(3))


@pytest.mark.parametrize("layer", ["fc1", "layer_norm1", "patch_embedding"])
def test_a_weight_that_is_computed_is_not_passed_over(layer):
    """Its bias alone would be recorded, and the gradient of what the weight is computed from be lost."""
    model = tiny_clip()
    name, module = next((name, each) for name, each in model.named_modules() if name.endswith(layer))
    weight = nn.Parameter(module.weight.detach().clone())
    del module.weight
    model.register_parameter("source", weight)
    # As pruning and weight normalisation do it, without a hook.
    module.__dict__["weight"] = 2 * weight
    if module._parameters.get("bias") is None:
        module.bias = nn.Parameter(torch.zeros(len(weight)))
    with pytest.raises(NotVectorizable, match=rf"it uses {name}.bias|it uses source"):
        all_at_once(model.train(), microbatches([2, 3, 3]))


def test_images_and_texts_of_different_numbers_are_refused():
    """One text more than there are images would shift those of all later microbatches."""
    batches = microbatches([2, 3, 3])
    batches[0][1]["pixel_values"] = batches[0][1]["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"different numbers of rows, \{.pixel_values.: 1, .input_ids.: 2\}"):
        all_at_once(tiny_clip().train(), batches)
    model = ContrastiveModel(tiny_clip(), tiny_clip(), dict)
    with pytest.raises(ValueError, match="as many images as texts"):
        model.compute_loss(batches[0][1])


@pytest.mark.parametrize("end", [EOS, 2], ids=["no_end_token", "old_config"])
def test_texts_that_would_be_read_up_to_the_padding(end):
    """One long text would otherwise change what is read of all others."""
    model = tiny_clip().train()
    config = model.config.text_config
    config.eos_token_id = model.text_model.eos_token_id = end
    config.pad_token_id = EOS
    batches = [microbatch(2, length=length, seed=length) for length in (3, 9, 4, 6)]
    for _, inputs in batches[:2]:
        # A single one is enough.
        inputs["input_ids"][0, -1] = 5
    groups = groups_of(model, batches)
    assert groups.keys() == {(3,), (9,), (4, 6)}
    for group in groups.values():
        assert_same(model, group)


@pytest.mark.parametrize("hidden", [7, 3], ids=["all of it", "its beginning"])
def test_texts_that_are_hidden_from_themselves(hidden):
    """Attention that sees nothing is attention to everything, padding included."""
    model = tiny_clip()
    model.set_attn_implementation("eager")
    batches = [microbatch(2, length=length, seed=length, mask=True) for length in (5, 9, 4, 6)]
    batches[0][1]["attention_mask"][1, :hidden] = 0
    # It has no end token, so that its first position is what is read.
    batches[0][1]["input_ids"][1, -1] = 5
    groups = groups_of(model, batches)
    assert groups.keys() == {(5,), (9,), (4, 6)}
    for group in groups.values():
        assert_same(model, group)


def hooked(model):
    model.vision_model.embeddings.register_forward_hook(lambda module, inputs, output: output - output.mean(dim=0))


def patched(model):
    layer = model.vision_model.embeddings
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs).roll(1, dims=0)


def wrapped(model):
    """The outermost module's, as Accelerate does for autocast."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def with_other_features(model):
    features = model.get_image_features

    def centred(*args, **kwargs):
        outputs = features(*args, **kwargs)
        outputs.pooler_output = outputs.pooler_output - outputs.pooler_output.mean(dim=0)
        return outputs

    model.get_image_features = centred


def softened(model):
    model.vision_model.encoder.layers[0].mlp.activation_fn = nn.Softmax(dim=0)


def time_first(model):
    model.vision_model.encoder.layers[0].self_attn = nn.MultiheadAttention(16, 2, batch_first=False)


def contrasting_values(module, query, key, value, attention_mask, **kwargs):
    """Attention that looks at the whole batch."""
    return sdpa_attention_forward(module, query, key, value - value.mean(dim=0), attention_mask, **kwargs)


def with_other_attention(model):
    AttentionInterface.register("contrasting", contrasting_values)
    model.vision_model.config._attn_implementation = "contrasting"


CHANGES = [
    (with_other_attention, "attention is 'contrasting'"),
    (hooked, "hook"),
    (patched, "method of its own"),
    (wrapped, "the model has a hook, or a method of its own"),
    (with_other_features, "the model has a hook, or a method of its own"),
    (softened, "Softmax"),
    (time_first, "MultiheadAttention"),
]


@pytest.mark.parametrize("change, named", CHANGES)
def test_what_may_mix_rows_is_an_obstacle(change, named):
    model = tiny_clip()
    assert vectorization_obstacle(model) is None
    change(model)
    assert named in vectorization_obstacle(model)


def centred(function):
    """As a patch of a library's function would be written, with its name."""

    @functools.wraps(function)
    def patched(*args, **kwargs):
        result = function(*args, **kwargs)
        return result - result.mean(dim=0, keepdim=True)

    return patched


class Fused(torch.autograd.Function):
    """As kernels are written that replace a function of torch's."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(dim=0)


class Centred:
    """The same as an object that can be called."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (modeling_clip.CLIPMLP, "forward"),
        (nn.Linear, "forward"),
        (lora.layer.Linear, "forward"),
        (nn.Module, "__call__"),
        (nn.Module, "_wrapped_call_impl"),
        (nn.Module, "_call_impl"),
        (modeling_clip, "eager_attention_forward"),
        (nn.functional, "scaled_dot_product_attention"),
        (torch, "matmul"),
        (torch.Tensor, "softmax"),
    ],
)
def test_a_function_of_the_libraries_that_was_replaced_is_an_obstacle(place, name, monkeypatch):
    model = lora_clip()
    assert vectorization_obstacle(model) is None
    patch = centred(getattr(place, name))
    # Decorators of the libraries around it hide nothing.
    partials = [functools.partial, functools.partialmethod]
    ways = [torch.no_grad(), *partials, Centred, functools.cache, lambda patch: Centred(patch).__call__]
    for replaced in (patch, *(way(patch) for way in ways), Fused.apply, MagicMock(side_effect=patch)):
        monkeypatch.setattr(place, name, replaced)
        assert vectorization_obstacle(model).startswith(f"{place.__name__}.{name} was replaced by another function")


class Batches(dict):
    """Has methods of its own that are written in C, as `torch.autograd.Function` has since torch 2.15."""


@pytest.mark.parametrize("replaced", [Image.core.blend, Batches.fromkeys])
def test_a_function_that_is_written_in_c_is_an_obstacle_if_it_is_another_librarys(replaced, monkeypatch):
    monkeypatch.setattr(torch, "matmul", replaced)
    assert vectorization_obstacle(lora_clip()).startswith("torch.matmul was replaced by another function")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch, "load"),
        (torch.Tensor, "__repr__"),
        (torch.Tensor, "shown"),
        (nn.Module, "num_parameters_in_millions"),
        (PreTrainedModel, "save_pretrained"),
    ],
)
def test_a_replaced_function_that_takes_no_part_in_a_forward_pass_is_none(place, name, monkeypatch):
    model = lora_clip()
    monkeypatch.setattr(place, name, lambda *_: None, raising=False)
    assert vectorization_obstacle(model) is None


def test_a_patch_without_a_module_of_its_own_is_an_obstacle(monkeypatch):
    made = {}
    exec("def patch(*args): return args", made)
    assert "__name__" not in made
    monkeypatch.setattr(modeling_clip, "eager_attention_forward", made["patch"])
    assert "eager_attention_forward was replaced by another function" in vectorization_obstacle(lora_clip())


def test_what_was_compiled_before_in_the_process_is_no_obstacle():
    compiled = torch.compile(modeling_clip.contrastive_loss, backend="eager")
    compiled(torch.ones(2, 2))
    assert any(name.startswith("__compiled_fn") for name in vars(modeling_clip))
    assert vectorization_obstacle(lora_clip()) is None


def test_a_function_that_the_attention_calls_is_looked_at(monkeypatch):
    monkeypatch.setattr(sdpa_attention, "repeat_kv", centred(sdpa_attention.repeat_kv))
    assert vectorization_obstacle(tiny_clip()).startswith("transformers.integrations.sdpa_attention.repeat_kv was")


def test_attention_under_the_name_of_a_known_one_is_an_obstacle(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", contrasting_values)
    assert vectorization_obstacle(tiny_clip()).startswith("the attention 'sdpa' was replaced")


@pytest.mark.parametrize(
    "register",
    [
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
        modules.register_module_full_backward_hook,
        modules.register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_on_all_modules_is_an_obstacle(register):
    handle = register(lambda *_: None)
    try:
        assert "torch has a hook on all modules" in vectorization_obstacle(tiny_clip())
    finally:
        handle.remove()
    assert vectorization_obstacle(tiny_clip()) is None


def ordered_otherwise(model):
    model.state_dict = lambda *args, **kwargs: {}


def with_its_own_forward(model):
    """As what removes a hook leaves it."""
    model.forward = model.forward


@pytest.mark.parametrize("change", [ordered_otherwise, with_its_own_forward])
def test_what_computes_nothing_else_is_no_obstacle(change):
    model = tiny_clip()
    change(model)
    assert vectorization_obstacle(model) is None


def under_accelerate(model):
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)


@pytest.mark.parametrize("changes", [(under_accelerate, wrapped), (wrapped, under_accelerate)], ids=["over", "under"])
def test_a_forward_beside_that_of_accelerate_is_an_obstacle(changes):
    model = tiny_clip()
    under_accelerate(model)
    assert vectorization_obstacle(model) is None
    model = tiny_clip()
    for change in changes:
        change(model)
    assert "the model has a hook, or a method of its own" in vectorization_obstacle(model)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_that_are_not_torchs_are_found_out(draw, monkeypatch):
    model = tiny_clip().train()
    relu = nn.functional.relu
    monkeypatch.setattr(nn.functional, "relu", lambda x, inplace=False: relu(x) * draw())
    model.vision_model.encoder.layers[0].mlp.activation_fn = nn.ReLU()
    with pytest.raises(NotVectorizable, match="random numbers"):
        all_at_once(model, microbatches([2, 3]))


def test_norms_of_what_is_too_small_for_float32_are_not_too_small():
    """Inputs of 1e17 before a normalisation leave gradients of 1e-17, whose products vanish."""
    a, b = torch.randn(4, 9, 512) * 1e17, torch.randn(4, 9, 256) * 1e-23
    squared = Outer(a, b, Layout([1] * 4, 4, a.device)).squared_norms()
    assert (squared >= (b.double().transpose(1, 2) @ a.double()).square().sum(dim=(1, 2))).all()


def test_autocast():
    """Bfloat16 has three digits: close to its own loop, and to that of float32."""
    model, batches = tiny_clip().train(), microbatches([2, 3, 4])
    exact = norms_of(one_by_one(model, batches, return_loss=True)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loop = norms_of(one_by_one(model, batches, return_loss=True)[0])
        _, gradients = all_at_once(model, batches)
    assert torch.allclose(gradients.norms, loop, rtol=0.03)
    assert torch.allclose(gradients.norms, exact, rtol=0.05)


def test_longer_texts_elsewhere_must_not_move_dropout_masks():
    batches = [microbatch(3, seed=1, length=3), microbatch(4, seed=2), microbatch(2, seed=3)]
    model = lora_clip(lora_dropout=0.4)
    groups = groups_of(model, batches)
    assert groups.keys() == {(1,), (2, 3)}
    for group in groups.values():
        assert_same(model, group)
    assert groups_of(lora_clip(), batches).keys() == {(1, 2, 3)}
    assert_same(lora_clip(), batches)


def replaced(model):
    model.vision_model.post_layernorm = nn.Sequential(model.vision_model.post_layernorm, Mixing(16, 16))
    return model


def test_an_unknown_layer_is_named():
    assert vectorization_obstacle(tiny_clip()) is None
    assert vectorization_obstacle(lora_clip()) is None
    assert "vision_model.post_layernorm is a Sequential" in vectorization_obstacle(replaced(tiny_clip()))
    assert "DoraLinearLayer" in vectorization_obstacle(lora_clip(use_dora=True))


def test_activation_checkpointing_is_an_obstacle():
    model = tiny_clip()
    model.vision_model.encoder.gradient_checkpointing = True
    assert "activation checkpointing" in vectorization_obstacle(model)


def test_a_use_that_is_not_known_is_found_out():
    """Whoever multiplies with a parameter by hand gets the plain path, not a norm without it."""
    model = tiny_clip().train()
    norm = model.vision_model.post_layernorm
    norm.forward = lambda x: nn.functional.layer_norm(x, (16,)) * norm.weight + norm.bias
    with pytest.raises(NotVectorizable, match=r"post_layernorm.weight in a way that is not known"):
        all_at_once(model, microbatches([2, 3]))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_randomness_outside_of_dropout_layers_is_found_out():
    model = tiny_clip().train()
    for module in model.modules():
        if hasattr(module, "scale") and hasattr(module, "dropout"):
            module.dropout = 0.1
    with pytest.raises(NotVectorizable, match="random numbers"):
        all_at_once(model, microbatches([2, 3]))


def test_the_global_generator_is_left_alone():
    model = lora_clip(lora_dropout=0.4).train()
    before = torch.get_rng_state()
    all_at_once(model, microbatches([2, 3]))
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_that_do_not_fit_together():
    wide, exact = microbatch(2, seed=1), microbatch(2, seed=2)
    wide[1]["pixel_values"] = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE * 2)
    exact[1]["pixel_values"] = exact[1]["pixel_values"].double()
    batches = [wide, microbatch(3, seed=3), exact, microbatch(4, seed=4)]
    assert groups_of(tiny_clip(), batches).keys() == {(1,), (2,), (3, 4)}


@pytest.mark.parametrize("change", [{"input_ids": None}, {"ids": ["a", "b"]}, {"scale": torch.tensor(1.0)}], ids=str)
def test_inputs_that_are_not_rows_are_left_to_the_plain_way(change):
    """Their microbatches alone."""
    odd, *known = microbatches([2, 3, 3])
    odd = odd[0], {name: value for name, value in (odd[1] | change).items() if value is not None}
    model = tiny_clip()
    found = group_microbatches(as_contrastive(model), [known[0], odd, known[1]])
    assert found == ([known], [odd])


def test_an_input_that_only_some_have_is_not_lost():
    few, more = microbatch(2, seed=1), microbatch(3, seed=2)
    few[1].pop("attention_mask", None)
    more[1]["attention_mask"] = torch.ones_like(more[1]["input_ids"])
    # Without it the whole text would be looked at.
    more[1]["attention_mask"][:, 2] = 0
    model = tiny_clip()
    groups = groups_of(model, [few, more])
    assert groups.keys() == {(1,), (2,)}
    for group in groups.values():
        assert_same(model, group)


kinds_of_microbatches = st.tuples(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans())


@settings(deadline=None, max_examples=15)
@given(kinds=st.lists(kinds_of_microbatches, min_size=1, max_size=6), dropout=st.sampled_from([0.0, 0.4]))
def test_whatever_is_drawn_together_each_counts_as_it_would_alone(kinds, dropout):
    """Texts of all lengths, with and without a mask or an end token."""
    model, batches = lora_clip(lora_dropout=dropout), []
    for seed, (size, length, mask, ends) in enumerate(kinds, start=1):
        batches.append(microbatch(size, length, seed, mask))
        batches[-1][1]["input_ids"][0, -1] = EOS if ends else 1
    for group in groups_of(model, batches).values():
        assert_same(model, group)


def test_norms_of_what_cancels_are_not_too_small():
    """Rows of opposite gradients, which add up to almost nothing."""
    rows = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0))
    activations = rows.expand(1, 16, 256) + 1e-4 * torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(1))
    signs = torch.tensor([1.0, -1.0]).repeat(8)[None, :, None]
    outputs = signs * torch.ones(1, 16, 256)
    exact = (outputs[0].double().T @ activations[0].double()).square().sum()
    gradients = Outer(activations, outputs, Layout([1], 1, torch.device("cpu")))
    assert gradients.squared_norms()[0] >= exact
