"""Encoders beside CLIP: each trains in full and with adapters, is saved, loads again, and takes the path it should."""

from contextlib import contextmanager

import pytest
import torch
from checks import flat_weights
from factories import (
    clap_processor,
    collate_with_loss,
    pairs,
    patch_pairs,
    sound_pairs,
    tiny_altclip,
    tiny_chinese_clip,
    tiny_clap,
    tiny_clip,
    tiny_dual_encoder,
    tiny_metaclip,
    tiny_siglip,
    tiny_siglip2,
    with_adapters,
)
from gradient_checks import as_contrastive, assert_close, assert_same, gradient, pieces
from peft import PeftModel, get_peft_model
from scripts import ROOT
from torch import nn
from torch.utils.data import default_collate
from transformers import CONFIG_MAPPING, RobertaConfig, VisionTextDualEncoderModel, XLMRobertaConfig

from hf_dpclip import PrivacyStatement, freeze_batch_norm, lora_config
from hf_dpclip.forward_pass import AllAtOnce, choose_forward_pass
from hf_dpclip.gradients import accumulate_chunked_gradient, group_microbatches, vectorization_obstacle


def frozen_clap():
    return freeze_batch_norm(tiny_clap())


# By class: how to make one, and its data.
ENCODERS = {
    "CLIPModel": (tiny_clip, pairs),
    "MetaClip2Model": (tiny_metaclip, pairs),
    "AltCLIPModel": (tiny_altclip, pairs),
    "ChineseCLIPModel": (tiny_chinese_clip, pairs),
    "VisionTextDualEncoderModel": (tiny_dual_encoder, pairs),
    "SiglipModel": (tiny_siglip, pairs),
    "Siglip2Model": (tiny_siglip2, patch_pairs),
    "ClapModel": (frozen_clap, sound_pairs),
}
KNOWN = [name for name in ENCODERS if name != "ClapModel"]
# Whose microbatches are computed all at once. SigLIP pools image patches by a layer whose weights are packed.
AT_ONCE = {
    "all parameters": [name for name in KNOWN if not name.startswith("Siglip")],
    "LoRA": KNOWN,
}
pytestmark = pytest.mark.usefixtures("same_initial_weights")
EACH_ENCODER = pytest.mark.parametrize("name", ENCODERS)
EACH_KNOWN_ENCODER = pytest.mark.parametrize("name", KNOWN)
EACH_WAY = pytest.mark.parametrize("trained", ["all parameters", "LoRA"])


def make(name, trained="all parameters"):
    model = ENCODERS[name][0]()
    return with_adapters(model) if trained == "LoRA" else model


def data(name, n=64, seed=0):
    """Records as tensors, with a mask of their texts, as tokenizers give it to all models but SigLIP."""
    dataset = ENCODERS[name][1](n, seed)
    if name == "SiglipModel":
        return dataset
    mask = torch.ones(n, dataset[0]["input_ids"].shape[0], dtype=torch.int64)
    return dataset.add_column("attention_mask", mask.tolist())


def batch(name, n, seed=0, length=7):
    """The seed and the inputs of a microbatch whose texts are `length` tokens long."""
    inputs = data(name, n, seed)[:]
    shortened = {column: inputs[column][:, -length:] for column in ("input_ids", "attention_mask") if column in inputs}
    return seed, inputs | shortened


def chosen_at_once(trainer):
    return isinstance(trainer._forward_pass, AllAtOnce) and trainer._forward_pass.possible


@torch.no_grad()
def embeddings(model, name):
    outputs = model.eval()(**data(name, 4, seed=1)[:])
    return torch.cat([value for key, value in outputs.items() if key.endswith("_embeds")])


# ---- Training, saving, loading ----


@EACH_WAY
@EACH_ENCODER
def test_two_private_steps_save_and_load_again(make_trainer, tmp_path, name, trained):
    model = make(name, trained)
    before = flat_weights(model)
    trainer = make_trainer(model, data(name), microbatch_size=4, learning_rate=0.01)
    trainer.train()
    assert (flat_weights(model) != before).float().mean() > 0.99
    assert chosen_at_once(trainer) == (name in AT_ONCE[trained])
    trainer.save_model(tmp_path / "saved")
    assert PrivacyStatement.load(tmp_path / "saved").spent == trainer.privacy_spent()
    if trained == "LoRA":
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(ENCODERS[name][0](), tmp_path / "saved")
    else:
        loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(embeddings(loaded, name), embeddings(model, name))


@pytest.mark.parametrize("text_tower", [True, False])
@EACH_ENCODER
def test_adapters_are_in_the_towers(name, text_tower):
    model = make(name)
    projections = {path for path, _ in model.named_children() if path.endswith("_projection")}
    parameters = dict(get_peft_model(model, lora_config(model, text_tower=text_tower)).named_parameters())
    adapted = {path.split(".")[2] for path in parameters if ".lora_" in path}
    of_text = {"text_model", *(path for path in projections if path.startswith("text"))}
    of_other = {"audio_model" if name == "ClapModel" else "vision_model", *(projections - of_text)}
    assert adapted == (of_text | of_other if text_tower else of_other)


# ---- The gradient of a microbatch is that of the microbatch alone ----


class Seen:
    """In the place of the mechanism: keeps the gradient of the first microbatch."""

    def __init__(self, model):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.first = None

    @contextmanager
    def microbatch(self):
        yield
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self.first = gradients if self.first is None else self.first

    def add(self, norms, weighted_sum):
        gradients = [*weighted_sum(torch.eye(len(norms))[0], [None] * len(self.parameters))]
        self.first = gradients if self.first is None else self.first
        assert torch.allclose(_flat(gradients).double().norm(), norms[0])

    def flat(self):
        return _flat(self.first)


def _flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@EACH_WAY
@EACH_ENCODER
def test_other_microbatches_do_not_move_the_gradient(make_trainer, name, trained):
    """Neither their records, nor their number, nor how many records one of them has."""
    trainer = make_trainer(make(name, trained), data(name), microbatch_size=4, max_steps=1)
    trainer.train()
    own = batch(name, 2, seed=1)
    others = [batch(name, 3, seed=2), batch(name, 4, seed=3)]
    neighbours = [batch(name, 4, seed=2), batch(name, 3, seed=4), batch(name, 5, seed=5)]
    first = first_gradient(trainer, [own, *others])
    assert_close(first_gradient(trainer, [own, *neighbours]), first)
    assert float(first.norm()) > 1e-4
    changed = first_gradient(trainer, [batch(name, 2, seed=6), *others])
    assert float((changed - first).norm() / first.norm()) > 0.1


def first_gradient(trainer, batches):
    seen = Seen(trainer.model)
    choose_forward_pass(trainer, seen, None, trainer._contrastive_model)(batches)
    return seen.flat()


@pytest.mark.parametrize(("trained", "name"), [(way, name) for way, names in AT_ONCE.items() for name in names])
def test_all_at_once_is_the_models_own_loss_one_by_one(name, trained):
    lengths = (7, 7, 7) if name.startswith("Siglip") else (7, 4, 6)
    sizes = enumerate(zip((2, 3, 3), lengths), start=1)
    assert_same(make(name, trained), [batch(name, n, seed, length) for seed, (n, length) in sizes])


@pytest.mark.parametrize("text_config", [RobertaConfig, XLMRobertaConfig])
def test_other_text_towers_of_dual_encoders(text_config):
    model = tiny_dual_encoder(text_config, max_position_embeddings=32)
    batches = [batch("CLIPModel", n, n, length) for n, length in ((2, 7), (3, 4), (4, 6))]
    assert vectorization_obstacle(model) is None
    contrastive = as_contrastive(model)
    (together,), others = group_microbatches(contrastive, batches)
    assert [seed for seed, _ in together] == [seed for seed, _ in batches] and others == []
    assert_same(model, batches)
    assert_same(with_adapters(model), batches)


@EACH_KNOWN_ENCODER
def test_the_size_of_the_largest_hidden_state(name):
    """But for a position that stands for the whole image, which some have beside the patches."""
    model, (_, inputs) = make(name), batch(name, 3)
    widest = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: widest.append(output.numel() // 3))
    model(**inputs)
    contrastive = as_contrastive(model)
    assert contrastive.hidden_state_size(inputs) <= max(widest) <= contrastive.hidden_state_size(inputs) * 5 / 4


@EACH_WAY
@EACH_KNOWN_ENCODER
def test_chunks_are_the_models_own_loss_on_the_whole(name, trained):
    model = make(name, trained).train()
    _, inputs = batch(name, 7)
    model(**inputs, return_loss=True).loss.backward()
    expected = gradient(model)
    contrastive = as_contrastive(model)
    accumulate_chunked_gradient(contrastive, pieces(inputs, 3), torch.Tensor.backward)
    assert_close(gradient(model), expected)


@EACH_KNOWN_ENCODER
def test_single_pairs_with_public_negatives(make_trainer, name):
    public = data(name, 5, seed=7)
    options = {"public_negatives": public, "data_collator": default_collate}
    trainer = make_trainer(make(name), data(name), options, microbatch_size=1)
    trainer.train()
    assert chosen_at_once(trainer) == (name in AT_ONCE["all parameters"])
    contrastive = trainer._contrastive_model
    trainer.model.eval()
    with torch.no_grad():
        images, texts = contrastive.encode(public[:])
        known = trainer.public_negatives._encode(contrastive)
    assert torch.allclose(known.images, images, atol=1e-6)
    assert torch.allclose(known.texts, texts, atol=1e-6)


def test_a_collator_may_ask_for_the_loss(make_trainer):
    options = {"data_collator": collate_with_loss}
    for settings in ({"microbatch_size": 4}, {"microbatch_size": 4, "static_shapes": True}):
        trainer = make_trainer(tiny_clip(), data("CLIPModel"), options, **settings)
        trainer.train()
        assert chosen_at_once(trainer)


# ---- What sends a model to the plain path ----


@pytest.mark.parametrize("name", ["AltCLIPModel", "SiglipModel"])
def test_texts_that_cannot_be_padded_are_not_put_together(make_trainer, name):
    trainer = make_trainer(make(name, "LoRA"), data(name), microbatch_size=4, max_steps=1)
    trainer.train()
    batches = [batch(name, 2, seed=1, length=5), batch(name, 3, seed=2, length=7), batch(name, 2, seed=3, length=5)]
    for _, inputs in batches:
        inputs.pop("attention_mask", None)
    expected = first_gradient(trainer, batches[:1])
    assert_close(first_gradient(trainer, batches), expected)
    short, long = [batches[0], batches[2]], [batches[1]]
    assert group_microbatches(trainer._contrastive_model, batches) == ([short, long], [])
    for group in (short, long):
        assert_same(trainer.model, group)


def clip_tower_padded_with_end_tokens():
    tower = tiny_clip().text_model
    tower.config.pad_token_id = tower.config.eos_token_id
    return tower


@pytest.mark.parametrize(
    "make_tower",
    [
        clip_tower_padded_with_end_tokens,
        pytest.param(
            lambda: tiny_siglip().text_model,
            id="SigLIP's",
            marks=pytest.mark.skipif(
                "siglip_text_model" not in CONFIG_MAPPING, reason="this transformers puts it into no dual encoder"
            ),
        ),
    ],
)
def test_what_pads_a_text_depends_on_the_tower_that_reads_it(make_tower):
    """A mask does not keep SigLIP's tower from reading the last position, nor CLIP's from looking for an end token."""
    model = VisionTextDualEncoderModel(vision_model=tiny_dual_encoder().vision_model, text_model=make_tower())
    batches = [batch("CLIPModel", 2, seed, length) for seed, length in ((1, 5), (2, 7), (3, 5))]
    for _, inputs in batches:
        inputs["input_ids"][0, -1] = 5
    contrastive = as_contrastive(model)
    assert group_microbatches(contrastive, batches) == ([[batches[0], batches[2]], [batches[1]]], [])


def test_attention_dropout_is_named(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr("hf_dpclip.forward_pass.logger.warning_once", said.append)
    model = tiny_dual_encoder(attention_probs_dropout_prob=0.1)
    trainer = make_trainer(model, data("VisionTextDualEncoderModel"), microbatch_size=4)
    trainer.train()
    assert not chosen_at_once(trainer)
    assert "random numbers outside of dropout layers" in said[0]


@pytest.mark.parametrize(
    "options", [{"microbatch_size": 16, "gradient_accumulation_steps": 2}, {"static_shapes": True}]
)
def test_what_needs_a_known_loss_is_refused_for_clap(make_trainer, options):
    with pytest.raises(ValueError, match="CLIPModel"):
        make_trainer(frozen_clap(), data("ClapModel"), **options)


# ---- BatchNorm ----


def test_batch_norm_is_refused_with_the_remedy(make_trainer):
    with pytest.raises(ValueError, match=r"audio_encoder.batch_norm .such modules: 1.*hf_dpclip.freeze_batch_norm"):
        make_trainer(tiny_clap(), data("ClapModel"))


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale(make_trainer):
    model = frozen_clap()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make_trainer(model, data("ClapModel"), learning_rate=0.01).train()
    after = model.state_dict()
    assert after.keys() == tiny_clap().state_dict().keys()
    moved = {key for key in before if "batch_norm" in key and not torch.equal(before[key], after[key])}
    assert moved == {f"audio_model.audio_encoder.batch_norm.{name}" for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm2d(3), (4, 3, 2, 2)),
        (nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
        (nn.SyncBatchNorm(3), (4, 3, 2, 2)),
    ],
    ids=str,
)
def test_a_frozen_layer_treats_every_record_by_itself(layer, shape):
    x = torch.randn(shape)
    expected = layer.eval()(x)
    model = freeze_batch_norm(nn.Sequential(layer.train())).train()
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x[:1]), expected[:1])
    assert freeze_batch_norm(model) is model and isinstance(layer, nn.modules.batchnorm._NormBase)


# ---- Sounds ----


def sounds(n, rate):
    noise = torch.randn(n, 150, generator=torch.Generator().manual_seed(0)).numpy()
    return [{"audio": {"array": sound, "sampling_rate": rate}, "text": "abc"[i % 3]} for i, sound in enumerate(noise)]


def test_clap_trains_on_sounds(make_trainer):
    options = {"processing_class": clap_processor()}
    trainer = make_trainer(frozen_clap(), sounds(64, rate=800), options, microbatch_size=4)
    trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_sounds_of_another_sampling_rate_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"has 400 samples per second, the model needs 800.*datasets.Audio"):
        make_trainer(frozen_clap(), sounds(64, rate=400), {"processing_class": clap_processor()})


# ---- What the documentation says ----


def test_the_documented_table_is_what_was_found():
    lines = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    documented = {name: cells for name, *cells in rows}
    ways = {True: "all at once", False: "one by one"}
    known = {True: ["yes", "yes"], False: ["no", "no"]}
    found = {name: [ways[name in AT_ONCE[trained]] for trained in AT_ONCE] + known[name in KNOWN] for name in ENCODERS}
    assert documented == found
