"""Model classes and configurations of ours."""

from .clip_vqa import CLIPForVisualQuestionAnswering, CLIPVQAConfig
from .lora import base_model, lora_config


__all__ = ["CLIPForVisualQuestionAnswering", "CLIPVQAConfig", "base_model", "lora_config"]
