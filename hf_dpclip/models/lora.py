"""A LoRA configuration for dual encoders that suits private training."""

import re
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..privacy.plan import is_whole
from .clip_vqa import CLIPForVisualQuestionAnswering


# Query and value layers, by their names in the dual encoders of `transformers`, and the projections into the shared
# space, which have two layers in CLAP.
_ADAPTED = re.compile(
    r"(.*\.)?(q_proj|v_proj|query|value|visual_projection|text_projection|(audio|text)_projection\.linear[12])"
)
# Layers of the text tower, and its projection.
_TEXT = re.compile(r"(.*\.)?text_(model|projection)(\..*)?")


def lora_config(
    model: nn.Module, r: int = 8, lora_alpha: int | None = None, text_tower: bool = True, **kwargs
) -> LoraConfig:
    """LoRA on the query, value and projection layers of both towers.

    The noise of a step grows with the root of the number of trainable parameters, so few is better. The projections
    are adapted like any other layer rather than trained in full. `logit_scale` stays frozen: one scalar whose gradient
    can take up most of the clipping norm, and which noise would move at random. The head of a
    [`CLIPForVisualQuestionAnswering`], which starts at random, is trained in full and saved with the adapters.

    Args:
        model (`nn.Module`): a `CLIPModel` or another dual encoder, or a [`CLIPForVisualQuestionAnswering`].
        r (`int`, *optional*, defaults to 8): rank.
        lora_alpha (`int`, *optional*, defaults to `2 * r`): scale.
        text_tower (`bool`, *optional*, defaults to `True`): whether the text tower is adapted too. Use `False` if the
            captions are a few class prompts: what the tower could learn from them is not worth its share of the
            clipping norm.
        kwargs: further fields of [`peft.LoraConfig`]; `target_modules` takes the place of the layers named above.

    Raises `ValueError` for what is no model, for a rank that is no whole number of at least 1, and if the model has
    none of these layers, or no text tower to leave out, or `target_modules` name what to leave out already.

    Example:
        ```python
        model = peft.get_peft_model(model, lora_config(model, r=8))
        ```
    """
    check_is_model(model)
    if not is_whole(r) or r < 1:
        raise ValueError(f"r={r!r} is not possible: the rank must be a whole number of at least 1, e.g. 8.")
    if holds_adapters(model):
        raise ValueError(
            "the model has adapters already, which get_peft_model puts into the very model that it is given: pass it "
            "as it was before, loaded anew."
        )
    matching = {name: module for name, module in model.named_modules() if _ADAPTED.fullmatch(name)}
    excluded = [
        name
        for name, module in matching.items()
        if not isinstance(module, nn.Linear) or (_TEXT.fullmatch(name) and not text_tower)
    ]
    chosen_by_caller = "target_modules" in kwargs
    if len(excluded) == len(matching) and not chosen_by_caller:
        raise ValueError(
            f"{type(model).__name__} has no query, value or projection layers that are known by name: pass a "
            "peft.LoraConfig with target_modules of your own to peft.get_peft_model."
        )
    named_by_caller = chosen_by_caller or "exclude_modules" in kwargs
    if not text_tower and (named_by_caller or not any(map(_TEXT.fullmatch, matching))):
        raise ValueError(
            f"text_tower=False leaves out the layers of {type(model).__name__} that are called text_model or "
            "text_projection: name those to leave out in exclude_modules alone, without text_tower=False."
        )
    if isinstance(model, CLIPForVisualQuestionAnswering):
        kwargs = {"modules_to_save": ["head"], **kwargs}
    if excluded and not chosen_by_caller:
        kwargs = {"exclude_modules": excluded, **kwargs}
    kwargs = {"target_modules": _ADAPTED.pattern, **kwargs}
    return LoraConfig(r=r, lora_alpha=2 * r if lora_alpha is None else lora_alpha, **kwargs)


def check_is_model(model: Any) -> None:
    """Raises `ValueError` for anything but a model, such as its name."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: load the model itself, as in CLIPModel.from_pretrained(name)."
        )


def holds_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters, or is one inside whose layers they were put, as `get_peft_model` does."""
    return _has_adapted_layers(model) or isinstance(model, PeftModel | PeftMixedModel)


def check_adapters_are_there(model: nn.Module) -> None:
    """Raises `ValueError` if the adapters of a `PeftModel` were taken out of it, so that it would save none."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        return
    # Modules that are trained in full may be all that is saved.
    if not (_has_adapted_layers(model) or any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())):
        raise ValueError(
            "the model's adapters are gone, as merge_and_unload() and unload() take them out of the very model that "
            "they are called on: save adapters first, or merge copy.deepcopy(trainer.model). What was merged is saved "
            "by merged.save_pretrained(folder), and its statement by trainer.privacy_statement().save(folder)."
        )


def _has_adapted_layers(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def base_model(model: nn.Module) -> nn.Module:
    """The model inside its adapters, or the model itself if it has none."""
    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    return model.get_base_model() if isinstance(model, PeftModel) else model
