"""Finds functions of the libraries that were replaced by others, which may mix the rows of a batch."""

import sys
from collections.abc import Iterator
from functools import partial, partialmethod
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Packages whose functions are taken to be what they were when they were read for this library.
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "hf_dpclip",
    "safetensors",
    "typing_extensions",
    *sys.stdlib_module_names,
)


def replaced_function(model: nn.Module, files: tuple[str, ...]) -> str | None:
    """The name of a function that a forward pass of the model may call and that none of the libraries wrote, such as a
    patched `forward` of a class, if there is one.

    Args:
        model (`nn.Module`): its classes, with those they inherit from, are looked at.
        files (`tuple[str, ...]`): names of Python modules, which are looked at if the model's classes come from there.
    """
    classes = {kind for module in model.modules() for kind in type(module).__mro__ if _package(kind) in LIBRARIES}
    imported = [sys.modules[name] for name in sorted({kind.__module__ for kind in classes}.intersection(files))]
    for place in (*classes, *imported, F, torch.Tensor, torch):
        for name, value in vars(place).items():
            if _is_foreign(value):
                return f"{place.__name__}.{name}"
    configs = (vars(module).get("config") for module in model.modules())
    names = {config._attn_implementation for config in configs if isinstance(config, PreTrainedConfig)}
    # Those of the Hub are named after whoever wrote them.
    own = [name for name in names if name is not None and "/" not in name]
    return next((f"the attention {name!r}" for name in own if _is_foreign(ALL_ATTENTION_FUNCTIONS.get(name))), None)


def _is_foreign(value: Any) -> bool:
    """Whether it can be called, and was written elsewhere, or wraps what was."""
    return any(_package(each) not in LIBRARIES for each in _wrapped(value))


def _wrapped(value: Any) -> Iterator[Any]:
    """The value, and what its decorators were put around."""
    while callable(value) or isinstance(value, partialmethod):
        yield value
        if isinstance(value, partial | partialmethod):
            value = value.func
        else:
            value = vars(value).get("__wrapped__") if isinstance(value, FunctionType) else None


def _package(value: Any) -> str:
    """Of a function, by its file: decorators copy what it says of itself."""
    if isinstance(value, FunctionType):
        name = value.__globals__["__name__"]
    else:
        name = value.__module__ if isinstance(value, type) else type(value).__module__
    return name.partition(".")[0]
