"""Which computation is chosen, and that it makes no difference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import one_update
from factories import arguments, pairs, tiny_clip, tiny_siglip
from gradient_checks import (
    IN_CHUNKS,
    REPRODUCIBLE,
    Doubled,
    Mixing,
    as_contrastive,
    assert_close,
    lora_clip,
    microbatch,
)
from torch import nn
from transformers import TrainerCallback

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.forward_pass import AllAtOnce, ChunkByChunk, OneByOne, static_by_default
from hf_dpclip.gradients import microbatch_gradients, vectorization_obstacle
from hf_dpclip.gradients.contrastive import static_rows


MANY = {**REPRODUCIBLE, "per_device_train_batch_size": 16, "microbatch_size": 4}


def way(trainer):
    return type(trainer._forward_pass)


def update_one_by_one(tmp_path, **settings):
    update, trainer = one_update(tmp_path, vectorized=False, **settings)
    assert way(trainer) is OneByOne
    return update


@pytest.mark.parametrize("make", [tiny_clip, lora_clip], ids=["full", "lora"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"clipping": "automatic"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"static_shapes": True},
    ],
    ids=str,
)
def test_all_at_once_is_one_by_one(tmp_path, make, overrides):
    settings = {**MANY, **overrides}
    expected = update_one_by_one(tmp_path, model=make(), **settings)
    update, trainer = one_update(tmp_path, model=make(), **settings)
    assert way(trainer) is AllAtOnce
    assert trainer._forward_pass.possible
    assert_close(update, expected)


@pytest.mark.parametrize("make", [tiny_clip, lora_clip], ids=["full", "lora"])
@pytest.mark.parametrize("joined", [True, False])
def test_several_passes_are_one_pass(tmp_path, monkeypatch, make, joined):
    """Which a CPU makes of a forward batch that is large."""
    monkeypatch.setattr("hf_dpclip.gradients.factored.Dense.is_small", joined)
    expected, _ = one_update(tmp_path, model=make(), **MANY)
    passes = []

    def counting(*args):
        passes.append(args)
        return microbatch_gradients(*args)

    monkeypatch.setattr("hf_dpclip.forward_pass.microbatch_gradients", counting)
    monkeypatch.setattr("hf_dpclip.gradients.grouping.CPU_STATE", 2**10)
    update, trainer = one_update(tmp_path, model=make(), **MANY)
    assert trainer._forward_pass.possible and len(passes) > 1
    assert_close(update, expected)


def test_dropout_all_at_once_is_dropout_one_by_one(tmp_path):
    expected = update_one_by_one(tmp_path, model=lora_clip(lora_dropout=0.4), **MANY)
    update, trainer = one_update(tmp_path, model=lora_clip(lora_dropout=0.4), **MANY)
    assert trainer._forward_pass.possible
    assert_close(update, expected)


def test_a_model_that_was_compiled_in_place_goes_one_by_one(tmp_path, monkeypatch):
    """Its layers are not seen, and the gradients of some would be missed."""
    expected = update_one_by_one(tmp_path, **MANY)
    said, model = [], tiny_clip()
    monkeypatch.setattr("hf_dpclip.forward_pass.logger.warning_once", said.append)
    model.vision_model.compile(backend="eager")
    update, trainer = one_update(tmp_path, model=model, **MANY)
    assert way(trainer) is OneByOne
    assert "torch_compile hides the model's layers" in said[0]
    assert_close(update, expected)


def test_autocast_is_no_obstacle(tmp_path):
    """Though it comes as a forward of the model's own."""
    _, trainer = one_update(tmp_path, bf16=True, **MANY)
    assert way(trainer) is AllAtOnce
    assert trainer._forward_pass.possible and "forward" in vars(trainer.model)


@pytest.mark.parametrize("part", ["", "vision_model", "text_model.encoder.layers.0"], ids=["whole", "tower", "layer"])
def test_compiled_models_are_an_obstacle(part):
    model = nn.ModuleDict({"model": tiny_clip()})
    name = f"model.{part}".rstrip(".")
    model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
    assert vectorization_obstacle(model["model"]) == "torch_compile hides the model's layers"


def test_dropout_in_padded_batches_goes_one_by_one(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_dpclip.forward_pass.logger.warning_once", said.append)
    _, trainer = one_update(tmp_path, model=lora_clip(lora_dropout=0.4), static_shapes=True, **MANY)
    assert way(trainer) is OneByOne
    assert "dropout" in said[0] and "static_shapes=True" in said[0]


def test_static_shapes_one_by_one_are_the_same_too(tmp_path):
    expected = update_one_by_one(tmp_path, **MANY)
    assert_close(update_one_by_one(tmp_path, static_shapes=True, **MANY), expected)


@pytest.mark.parametrize("value", [None, True, ["a", "b"], torch.tensor(1.0), torch.arange(7).repeat(2, 1)], ids=str)
def test_inputs_that_cannot_be_padded_are_left_as_they_are(value):
    _, inputs = microbatch(2)
    model = tiny_clip()
    contrastive = as_contrastive(model, static_shapes=True)
    assert len(contrastive.prepared(inputs)["input_ids"]) == 8
    assert contrastive.prepared({**inputs, "position_ids": value}) == {**inputs, "position_ids": value}


def test_one_microbatch_takes_the_plain_way(tmp_path):
    assert way(one_update(tmp_path, **REPRODUCIBLE)[1]) is OneByOne


def test_large_microbatches_take_chunks(tmp_path):
    assert way(one_update(tmp_path, **IN_CHUNKS)[1]) is ChunkByChunk


def test_an_unknown_layer_takes_the_plain_way_and_is_named_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_dpclip.forward_pass.logger.warning_once", said.append)
    model = tiny_clip()
    model.vision_model.post_layernorm = Mixing(16, 16)
    _, trainer = one_update(tmp_path, model=model, max_steps=3, **MANY)
    assert way(trainer) is OneByOne
    assert len(said) == 1
    assert "vision_model.post_layernorm is a Mixing" in said[0]


def test_a_model_that_turns_out_to_be_unknown_goes_on_one_by_one(tmp_path, monkeypatch):
    def unusual():
        model = tiny_clip()
        model.vision_model.encoder.layers[0].mlp.activation_fn = torch.nn.PReLU()
        return model

    said = []
    expected = update_one_by_one(tmp_path, model=unusual(), **MANY)
    monkeypatch.setattr("hf_dpclip.forward_pass.logger.warning_once", said.append)
    update, trainer = one_update(tmp_path, model=unusual(), **MANY)
    assert not trainer._forward_pass.possible
    assert "activation_fn.weight" in said[0]
    assert_close(update, expected)


def test_a_model_that_draws_goes_on_with_microbatches_as_they_were_drawn(tmp_path):
    """Those of the pass that was tried have texts that were padded, and what is drawn depends on their length."""

    def drawing():
        model = tiny_clip()
        model.text_model.encoder.layers[0].self_attn.dropout = 0.5
        return model

    expected = update_one_by_one(tmp_path, model=drawing(), **MANY)
    update, trainer = one_update(tmp_path, model=drawing(), **MANY)
    assert trainer._forward_pass.possible is False
    assert_close(update, expected)


def test_a_model_that_is_another_in_later_passes_is_refused(tmp_path, monkeypatch):
    """Whether it is could depend on the records, and how their gradients are computed must not."""
    model, relu = tiny_clip(), torch.nn.functional.relu
    model.vision_model.encoder.layers[0].mlp.activation_fn = torch.nn.ReLU()

    class NoisyLater(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: relu(x + torch.rand(1)))

    trainer = DPCLIPTrainer(
        model, arguments(tmp_path, max_steps=3, **MANY), train_dataset=pairs(64), callbacks=[NoisyLater()]
    )
    with pytest.raises(RuntimeError, match="all at once so far, and no longer: it draws random numbers"):
        trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_a_loss_of_the_users_own_is_not_replaced(tmp_path):
    settings = {**MANY, "max_grad_norm": 1e6}
    single, _ = one_update(tmp_path, **settings)
    doubled, trainer = one_update(tmp_path, trainer_class=Doubled, **settings)
    assert way(trainer) is OneByOne
    assert_close(doubled, 2 * single)


HOPPER = {"device": "cuda", "mixed_precision": "bf16", "capability": (9, 0)}


@pytest.mark.parametrize(
    "make, changes, expected",
    [
        (tiny_clip, {}, True),
        (lora_clip, {}, True),
        (lambda: tiny_clip().to(torch.bfloat16), {"mixed_precision": "no"}, True),
        (lambda: lora_clip(lora_dropout=0.4), {}, False),
        (tiny_siglip, {}, False),
        (tiny_clip, {"mixed_precision": "no"}, False),
        (tiny_clip, {"capability": (8, 0)}, False),
        (tiny_clip, {"device": "cpu"}, False),
    ],
)
def test_shapes_are_static_by_default_where_a_new_one_is_expensive(make, changes, expected, monkeypatch):
    model, setting = make(), {**HOPPER, **changes}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: setting["capability"])
    accelerator = SimpleNamespace(device=torch.device(setting["device"]), mixed_precision=setting["mixed_precision"])
    contrastive = as_contrastive(model)
    assert static_by_default(contrastive, accelerator) is expected


@pytest.mark.parametrize("asked, padded", [(None, True), (True, True), (False, False)])
def test_what_is_asked_for_goes_before_the_default(asked, padded, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpclip.forward_pass.static_by_default", lambda model, accelerator: True)
    _, trainer = one_update(tmp_path, static_shapes=asked, **MANY)
    assert trainer._contrastive_model.static_shapes is padded


def test_small_microbatches_one_by_one_are_not_padded_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpclip.forward_pass.static_by_default", lambda model, accelerator: True)
    for asked, padded in ((None, False), (True, True)):
        _, trainer = one_update(tmp_path, vectorized=False, static_shapes=asked, **MANY)
        assert trainer._contrastive_model.static_shapes is padded


@pytest.mark.parametrize("expected", [2, 64, 1000, 20_000])
def test_poisson_samples_are_padded_to_a_handful_of_sizes_and_by_little(expected):
    drawn = np.random.default_rng(0).poisson(expected, 2000).clip(min=1)
    padded = np.asarray([static_rows(rows) for rows in drawn.tolist()])
    assert (padded >= drawn).all() and (padded - drawn < np.maximum(8, 3 * np.sqrt(drawn))).all()
    assert len({*padded.tolist()}) <= 8


def test_static_shapes_do_not_recompile(tmp_path):
    """Sizes seen by the model: a handful, where Poisson batches have dozens."""
    seen = {True: set(), False: set()}
    for static_shapes, sizes in seen.items():
        model = tiny_clip()
        model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.add(len(kwargs["pixel_values"])), with_kwargs=True
        )
        settings = {"per_device_train_batch_size": 64, "max_steps": 40, "static_shapes": static_shapes}
        DPCLIPTrainer(model, arguments(tmp_path, **settings), train_dataset=pairs(400)).train()
    assert len(seen[False]) > 10
    assert len(seen[True]) <= 5


# ---- What a trainer does to its inputs ----


class Standardising(DPCLIPTrainer):
    """Of many microbatches together, each would depend on the others' records."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "pixel_values": standardised(inputs["pixel_values"])}


class StandardisingEach(DPCLIPTrainer):
    def _prepare_input(self, data):
        data = super()._prepare_input(data)
        return standardised(data) if isinstance(data, torch.Tensor) and data.dim() == 4 else data


def standardised(pixels):
    return (pixels - pixels.mean()) / pixels.std()


@pytest.mark.parametrize("kind", [Standardising, StandardisingEach])
def test_inputs_that_the_trainer_prepares_in_its_own_way_are_prepared_one_microbatch_at_a_time(tmp_path, kind):
    update, trainer = one_update(tmp_path, trainer_class=kind, **MANY)
    assert way(trainer) is OneByOne
    expected, _ = one_update(tmp_path, trainer_class=kind, vectorized=False, **MANY)
    assert_close(update, expected)
    plain, _ = one_update(tmp_path, **MANY)
    assert (update - plain).norm() > 0.005 * plain.norm()


def test_and_are_refused_in_chunks(tmp_path):
    with pytest.raises(ValueError, match="the trainer's own _prepare_inputs: choose a microbatch_size that divides"):
        Standardising(tiny_clip(), arguments(tmp_path, **IN_CHUNKS), train_dataset=pairs(64))


def test_also_where_the_trainer_was_made_before(tmp_path):
    trainer = DPCLIPTrainer(tiny_clip(), arguments(tmp_path, **IN_CHUNKS), train_dataset=pairs(64))
    trainer._prepare_inputs = lambda inputs: inputs
    with pytest.raises(ValueError, match="the trainer's own _prepare_inputs: choose a microbatch_size that divides"):
        trainer.train()
    assert trainer.privacy_spent().steps == 0
