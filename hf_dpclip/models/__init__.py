"""Model classes and configurations of ours."""

from .batch_norm import freeze_batch_norm
from .clip_vqa import CLIPForVisualQuestionAnswering, CLIPVQAConfig
from .lora import base_model, lora_config


__all__ = ["CLIPForVisualQuestionAnswering", "CLIPVQAConfig", "base_model", "freeze_batch_norm", "lora_config"]
