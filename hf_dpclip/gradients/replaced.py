"""Finds functions of the libraries that were replaced by others, which may mix the rows of a batch."""

import sys
from collections.abc import Iterator
from functools import partial, partialmethod
from inspect import getattr_static
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._C import TensorBase
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Packages whose functions are taken to be what they were when they were read for this library. Mocks stand for others.
LIBRARIES = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "hf_dpclip",
    "safetensors",
    "typing_extensions",
    *sys.stdlib_module_names,
} - {"unittest"}
# Methods of all models that take part in a forward pass. Others load, save, or are shown.
TAKING_PART = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
# Functions of torch that do not.
NOT_TAKING_PART = ("load", "save", "compile")
# How names begin that torch.compile adds to a module for what it made of it, which nothing else calls.
COMPILED = "__compiled_fn"


def replaced_function(model: nn.Module, files: tuple[str, ...]) -> str | None:
    """The name of a function that a forward pass of the model may call and that none of the libraries wrote, such as a
    patched `forward` of a class, if there is one.

    Args:
        model (`nn.Module`): its classes, with those they inherit from, are looked at.
        files (`tuple[str, ...]`): names of Python modules, which are looked at if the model's classes come from there.
    """
    return next((name for name, value in _called(model, files) if _is_foreign(value)), None)


def _called(model: nn.Module, files: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a forward pass may call, with its name, and more that is no function."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__ if _package(kind) in LIBRARIES}
    attention = dict(_attention_functions(model))
    yield from ((f"the attention {name!r}", function) for name, function in attention.items())
    for kind in classes:
        yield from (each for each in _members(kind) if takes_part(each[0].rpartition(".")[2]))
    names = {kind.__module__ for kind in classes}.intersection(files)
    names |= {function.__module__ for function in attention.values() if isinstance(function, FunctionType)}
    for place in (F, *(sys.modules[name] for name in sorted(names))):
        yield from (each for each in _members(place) if not each[0].rpartition(".")[2].startswith(COMPILED))
    # Others are no methods of tensors, but were added to them.
    yield from (("Tensor." + name, value) for name, value in vars(torch.Tensor).items() if name in vars(TensorBase))
    yield from ((f"torch.{name}", value) for name, value in vars(torch).items() if name not in NOT_TAKING_PART)


def takes_part(name: str) -> bool:
    """Whether a method of that name may take part in a forward pass."""
    return name in TAKING_PART or not hasattr(PreTrainedModel, name)


def _members(place: Any) -> Iterator[tuple[str, Any]]:
    return ((f"{place.__name__}.{name}", value) for name, value in vars(place).items())


def _attention_functions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for module in model.modules():
        config = vars(module).get("config")
        name = config._attn_implementation if isinstance(config, PreTrainedConfig) else None
        # Those of the Hub are named after whoever wrote them.
        if name in ALL_ATTENTION_FUNCTIONS and "/" not in name:
            yield name, ALL_ATTENTION_FUNCTIONS[name]


def _is_foreign(value: Any) -> bool:
    """Whether it can be called, and was written elsewhere, or wraps what was. Classes are not looked at."""
    if isinstance(value, type) or not (callable(value) or isinstance(value, partialmethod)):
        return False
    return _package(value) not in LIBRARIES or any(map(_is_foreign, _inner(value)))


def _inner(value: Any) -> list[Any]:
    """What a decorator was put around, or what a method belongs to."""
    if isinstance(value, partial | partialmethod):
        return [value.func]
    if isinstance(value, MethodType):
        return [value.__func__]
    return [getattr_static(value, "__wrapped__", None)]


def _package(value: Any) -> str:
    """Of a function, by its file: decorators copy what it says of itself. Of a method, by its object, which for a
    function that is written in C may be its file too."""
    # What C functions belong to that are bound in other ways says nothing of where they come from.
    is_bound_in_c = isinstance(value, BuiltinMethodType) and isinstance(value.__self__, type | ModuleType)
    if isinstance(value, MethodType) or is_bound_in_c:
        value = value.__self__
    if isinstance(value, FunctionType):
        # Code that was made at run time may have none.
        name = value.__globals__.get("__name__", "")
    elif isinstance(value, ModuleType):
        name = value.__name__
    else:
        name = value.__module__ if isinstance(value, type) else type(value).__module__
    return name.partition(".")[0]
