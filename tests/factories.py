"""Models, datasets and arguments small enough for a training step to take milliseconds."""

import string

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from hf_dpclip import CLIPForVisualQuestionAnswering, DPTrainingArguments


try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ModuleNotFoundError:
    # Where it has no module of its own, it is the only one.
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


BOS, EOS, PAD = 48, 49, 0
VOCABULARY = 50
IMAGE_SIZE = 8
CAPTIONS = ["a cat", "a red dog", "u"]
ANSWERS = ["yes", "no", "red"]


def tiny_clip(seed: int = 0) -> CLIPModel:
    """A CLIP model of one layer per tower, the same weights for the same seed."""
    torch.manual_seed(seed)
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = CLIPConfig(
        text_config={**layer, **special, "vocab_size": VOCABULARY, "max_position_embeddings": 16},
        vision_config={**layer, "image_size": IMAGE_SIZE, "patch_size": 4},
        projection_dim=8,
    )
    return CLIPModel(config)


def tiny_clip_vqa(seed: int = 0) -> CLIPForVisualQuestionAnswering:
    """[`tiny_clip`] with a head for three answers."""
    return CLIPForVisualQuestionAnswering.from_clip(tiny_clip(seed), ANSWERS, head_hidden_size=8)


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


def pairs(n: int, seed: int = 0) -> Dataset:
    """`n` encoded image-text pairs of noise, as torch tensors."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 47, (n, 5), generator=generator)
    input_ids = torch.cat([torch.full((n, 1), BOS), words, torch.full((n, 1), EOS)], dim=1)
    pixel_values = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    columns = {"pixel_values": pixel_values.numpy(), "input_ids": input_ids.numpy()}
    return Dataset.from_dict(columns).with_format("torch")


def pictures(n: int, mode: str = "RGB") -> list[PILImage.Image]:
    """`n` different images of noise."""
    pixels = np.random.default_rng(0).integers(256, size=(n, 10, 12, 3), dtype=np.uint8)
    return [PILImage.fromarray(image).convert(mode) for image in pixels]


def raw_pairs(n: int = 3, image: str = "image", text: str = "text") -> Dataset:
    """`n` different images with captions, not yet encoded."""
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]
    return Dataset.from_dict({image: pictures(n), text: captions}).cast_column(image, Image())


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
