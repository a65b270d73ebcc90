"""Differentially private CLIP training for the Hugging Face ecosystem.

The public names are imported on first use, so that `import hf_dpclip` itself stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # The same names for type checkers, which do not run `__getattr__`.
    from .arguments import DPTrainingArguments as DPTrainingArguments
    from .averaging import WeightAveraging as WeightAveraging
    from .collators import AudioTextCollator as AudioTextCollator
    from .collators import ImageTextCollator as ImageTextCollator
    from .collators import VisualQuestionCollator as VisualQuestionCollator
    from .models import CLIPForVisualQuestionAnswering as CLIPForVisualQuestionAnswering
    from .models import CLIPVQAConfig as CLIPVQAConfig
    from .models import freeze_batch_norm as freeze_batch_norm
    from .models import lora_config as lora_config
    from .privacy import PrivacyPlan as PrivacyPlan
    from .privacy import PrivacySpent as PrivacySpent
    from .privacy import PrivacyStatement as PrivacyStatement
    from .trainer import DPCLIPTrainer as DPCLIPTrainer


__version__ = "0.1.0"

_MODULE_OF = {
    "AudioTextCollator": "collators",
    "CLIPForVisualQuestionAnswering": "models",
    "CLIPVQAConfig": "models",
    "DPCLIPTrainer": "trainer",
    "DPTrainingArguments": "arguments",
    "ImageTextCollator": "collators",
    "PrivacyPlan": "privacy",
    "PrivacySpent": "privacy",
    "PrivacyStatement": "privacy",
    "VisualQuestionCollator": "collators",
    "WeightAveraging": "averaging",
    "freeze_batch_norm": "models",
    "lora_config": "models",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
