"""Model classes and configurations of ours."""

from .clip_vqa import CLIPForVisualQuestionAnswering, CLIPVQAConfig
from .lora import lora_config


__all__ = ["CLIPForVisualQuestionAnswering", "CLIPVQAConfig", "lora_config"]
