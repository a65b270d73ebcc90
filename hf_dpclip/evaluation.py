"""Zero-shot evaluation of a contrastive model on held-out labelled images."""

import torch
from datasets import Dataset
from torch import nn
from transformers import ProcessorMixin

from .metrics import ZeroShotAccuracy


@torch.no_grad()
def zero_shot_accuracy(
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: Dataset,
    prompts: list[str],
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 256,
) -> float:
    """Share of images whose own class prompt is the most similar of all prompts.

    Args:
        model (`nn.Module`): returns `logits_per_image`.
        processor ([`~transformers.ProcessorMixin`]): tokenizer and image processor of the model.
        dataset (`Dataset`): held-out images and their class numbers; not the private training records.
        prompts (`list[str]`): one caption per class number.
        batch_size (`int`, *optional*, defaults to 256): images per forward pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    text = processor(text=prompts, padding=True, return_tensors="pt").to(device)
    metric = ZeroShotAccuracy()
    for start in range(0, len(dataset), batch_size):
        batch = dataset[start : start + batch_size]
        images = [image.convert("RGB") for image in batch[image_column]]
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        logits = model(pixel_values=pixel_values, **text).logits_per_image
        metric.add_batch(predictions=logits.float().cpu().numpy(), references=batch[label_column])
    model.train(was_training)
    return metric.compute()["accuracy"]
