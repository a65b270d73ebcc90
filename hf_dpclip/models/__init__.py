"""Model classes and configurations of ours."""

from .lora import lora_config


__all__ = ["lora_config"]
