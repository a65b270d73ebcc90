"""Models, datasets and arguments small enough for a training step to take milliseconds, and what ends a run early."""

import string

import numpy as np
import torch
from datasets import Dataset, Image
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from torch import nn
from torch.utils.data import default_collate
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BlipConfig,
    BlipForQuestionAnswering,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    TrainerCallback,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from hf_dpclip import CLIPForVisualQuestionAnswering, DPTrainingArguments, lora_config
from hf_dpclip.audit.small_clip import CLIPImageProcessorPil


BOS, EOS, PAD = 48, 49, 0
VOCABULARY = 50
IMAGE_SIZE = 8
CAPTIONS = ["a cat", "a red dog", "u"]
ANSWERS = ["yes", "no", "red"]


# What towers of all kinds have in common.
LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
IMAGE = {"image_size": IMAGE_SIZE, "patch_size": 4}
# Towers of the BERT family have dropout by default.
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# At the usual 0.02, so narrow a tower gives nearly the same embedding for every input.
WIDE = {"initializer_range": 0.3}

# A checkpoint after every step.
SAVING = {"save_strategy": "steps", "save_steps": 1}

SPECTRUM = {"time": 32, "mel": 8}
SAMPLING_RATE = 800


def tiny_clip(seed: int = 0) -> CLIPModel:
    """A CLIP model of one layer per tower, the same weights for the same seed."""
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=LAYER | TEXT, vision_config=LAYER | IMAGE, projection_dim=8))


def tiny_metaclip() -> MetaClip2Model:
    return MetaClip2Model(MetaClip2Config(text_config=LAYER | TEXT, vision_config=LAYER | IMAGE, projection_dim=8))


def tiny_altclip(**settings) -> AltCLIPModel:
    text = LAYER | TEXT | WITHOUT_DROPOUT | WIDE | {"project_dim": 16} | settings
    return AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=LAYER | IMAGE, projection_dim=8))


def tiny_chinese_clip() -> ChineseCLIPModel:
    text = LAYER | TEXT | WITHOUT_DROPOUT | WIDE
    return ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=LAYER | IMAGE, projection_dim=8))


def tiny_dual_encoder(text_config=BertConfig, **settings) -> VisionTextDualEncoderModel:
    """ViT and BERT, or another text tower."""
    image, text = (
        ViTConfig(**LAYER, **IMAGE, **WIDE),
        text_config(**(LAYER | TEXT | WITHOUT_DROPOUT | WIDE | settings)),
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=8)
    return VisionTextDualEncoderModel(config)


def tiny_siglip() -> SiglipModel:
    text = LAYER | TEXT | {"projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=LAYER | IMAGE))


def tiny_siglip2() -> Siglip2Model:
    text = LAYER | TEXT | {"projection_size": 16}
    return Siglip2Model(Siglip2Config(text_config=text, vision_config=LAYER | {"num_patches": 4, "patch_size": 4}))


def tiny_clap() -> ClapModel:
    """Text and audio; the audio tower has BatchNorm."""
    audio = {
        "spec_size": 16,
        "num_mel_bins": SPECTRUM["mel"],
        "patch_size": 2,
        "patch_stride": (2, 2),
        "window_size": 2,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": (1, 1),
        "num_attention_heads": (2, 2),
    }
    return ClapModel(ClapConfig(text_config=LAYER | TEXT | WITHOUT_DROPOUT, audio_config=audio, projection_dim=8))


def tiny_blip() -> BlipForQuestionAnswering:
    text = LAYER | TEXT | {"encoder_hidden_size": 16, "projection_dim": 8, "sep_token_id": EOS}
    return BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=LAYER | IMAGE, projection_dim=8))


def tiny_clip_vqa(seed: int = 0) -> CLIPForVisualQuestionAnswering:
    """[`tiny_clip`] with a head for three answers."""
    return CLIPForVisualQuestionAnswering.from_clip(tiny_clip(seed), ANSWERS, head_hidden_size=8)


def with_adapters(model: nn.Module, **settings) -> PeftModel:
    """The model with adapters that already do something."""
    model = get_peft_model(model, lora_config(model, r=4, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def tiny_processor() -> CLIPProcessor:
    """Tokenizer and image processor for [`tiny_clip`]: one token per letter from a to w, no torchvision."""
    letters = string.ascii_lowercase[:23]
    inside = {letter: number for number, letter in enumerate(letters, start=1)}
    last = {f"{letter}</w>": number for number, letter in enumerate(letters, start=24)}
    vocabulary = {**inside, **last, "<|startoftext|>": BOS, "<|endoftext|>": EOS}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
    )


def clap_processor(sampling_rate: int = SAMPLING_RATE) -> ClapProcessor:
    """Tokenizer and feature extractor for [`tiny_clap`], for sounds of a fifth of a second."""
    extractor = ClapFeatureExtractor(
        feature_size=SPECTRUM["mel"],
        sampling_rate=sampling_rate,
        hop_length=sampling_rate // 160,
        max_length_s=0.1875,
        fft_window_size=sampling_rate // 25,
        frequency_min=10,
        frequency_max=sampling_rate // 2,
        truncation="rand_trunc",
    )
    return ClapProcessor(feature_extractor=extractor, tokenizer=tiny_processor().tokenizer)


def pairs(n: int, seed: int = 0) -> Dataset:
    """`n` encoded image-text pairs of noise, as torch tensors."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = _texts(n, generator)
    pixel_values = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return _torch_dataset(pixel_values=pixel_values, input_ids=input_ids)


def patch_pairs(n: int, seed: int = 0) -> Dataset:
    """The same for Siglip2Model: images of two by two patches, or, every other one, of two by one and padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = _texts(n, generator)
    shapes = torch.tensor([[2, 2], [2, 1]]).repeat(n, 1)[:n]
    mask = (torch.arange(4) < shapes.prod(dim=1, keepdim=True)).long()
    pixel_values = torch.randn(n, 4, 3 * IMAGE["patch_size"] ** 2, generator=generator)
    return _torch_dataset(
        pixel_values=pixel_values, pixel_attention_mask=mask, spatial_shapes=shapes, input_ids=input_ids
    )


def sound_pairs(n: int, seed: int = 0) -> Dataset:
    """`n` encoded pairs of a sound and a text."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = _texts(n, generator)
    return _torch_dataset(
        input_features=torch.randn(n, 1, *SPECTRUM.values(), generator=generator), input_ids=input_ids
    )


def _texts(n: int, generator: torch.Generator) -> torch.Tensor:
    words = torch.randint(1, 47, (n, 5), generator=generator)
    return torch.cat([torch.full((n, 1), BOS), words, torch.full((n, 1), EOS)], dim=1)


def _torch_dataset(**columns: torch.Tensor) -> Dataset:
    return Dataset.from_dict({name: column.numpy() for name, column in columns.items()}).with_format("torch")


def collate_with_loss(records: list[dict]) -> dict:
    """As the contrastive example of transformers does, which asks the model for its loss."""
    return {**default_collate(records), "return_loss": True}


def pictures(n: int, mode: str = "RGB") -> list[PILImage.Image]:
    """`n` different images of noise."""
    pixels = np.random.default_rng(0).integers(256, size=(n, 10, 12, 3), dtype=np.uint8)
    return [PILImage.fromarray(image).convert(mode) for image in pixels]


def raw_pairs(n: int = 3, image: str = "image", text: str = "text") -> Dataset:
    """`n` different images with captions, not yet encoded."""
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]
    return with_texts(captions).rename_columns({"image": image, "text": text})


def with_texts(texts: list) -> Dataset:
    """Different images, one for each of the texts."""
    return Dataset.from_dict({"image": pictures(len(texts)), "text": texts}).cast_column("image", Image())


def other_raw_pairs(n: int) -> Dataset:
    """Pairs that show other images than the first eight [`raw_pairs`]."""
    return raw_pairs(n + 8).select(range(8, n + 8))


def answered_questions(n: int, seed: int = 0) -> Dataset:
    """[`pairs`] in which the text is a question, with the number of its answer."""
    return pairs(n, seed).add_column("labels", [number % len(ANSWERS) for number in range(n)])


def arguments(output_dir, **overrides) -> DPTrainingArguments:
    """Two quiet steps on the CPU that save nothing; σ = 1 unless `overrides` say otherwise."""
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "save_strategy": "no",
    }
    if not {"target_epsilon", "noise_multiplier", "non_private"} & overrides.keys():
        defaults["noise_multiplier"] = 1.0
    return DPTrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides})


class StopAfter(TrainerCallback):
    """Interrupts a run, orderly."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
