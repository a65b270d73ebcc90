"""Finds the modules that take part in training: the model, the loss, and what else the trainer and its loss reach."""

import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer


# Attributes of a trainer in which no modules are looked for: the model, which may be another one than in the training
# before, and data.
NOT_HELD = (
    "model",
    "model_wrapped",
    "_forward_pass",
    "_contrastive_model",
    "_mechanism",
    "_guard",
    "train_dataset",
    "eval_dataset",
)
# How deeply containers, functions and objects are searched: enough for the list of losses of a method's object.
LEVELS = 3


def modules_in_use(trainer: Trainer) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The model and the loss, where it is a module, a method of one, or holds some; and other modules that the trainer
    holds, or that the loss or a `compute_loss` of its own reaches."""
    loss: Any = trainer.compute_loss_func
    given: list[Any] = []
    if isinstance(loss, functools.partial):
        loss, given = loss.func, [*loss.args, *loss.keywords.values()]
    loss = getattr(loss, "__self__", loss)
    own = {id(each): each for each in (trainer.model, loss, *given, *_attributes(loss)) if _is_module(each)}
    others = [value for name, value in vars(trainer).items() if name not in NOT_HELD]
    reached = _modules_within([*others, type(trainer).compute_loss])
    return nn.ModuleList(own.values()), nn.ModuleList(each for key, each in reached.items() if key not in own)


def _modules_within(values: Iterable[Any], levels: int = LEVELS) -> dict[int, nn.Module]:
    """The modules among the values and in what they are made of, by their `id`."""
    found: dict[int, nn.Module] = {}
    for value in values:
        if _is_module(value):
            found[id(value)] = value
        elif levels > 0:
            found |= _modules_within(_parts(value), levels - 1)
    return found


def _is_module(value: Any) -> bool:
    """By its type: `isinstance` asks for `__class__`, which may fail for a proxy."""
    return issubclass(type(value), nn.Module)


def _parts(value: Any) -> Iterable[Any]:
    """The elements of a container, and the objects that a callable refers to."""
    kind = type(value)
    if issubclass(kind, list | tuple | set):
        return value
    if issubclass(kind, dict):
        return dict.values(value)
    if issubclass(kind, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if kind is types.MethodType:
        return value.__func__, value.__self__, *_attributes(value.__self__)
    if kind is types.FunctionType:
        return _variables(value)
    return _attributes(value) if callable(value) and not issubclass(kind, type) else ()


def _attributes(value: Any) -> Iterable[Any]:
    """Attribute values, without calling a `__getattr__` that the object may have."""
    try:
        return object.__getattribute__(value, "__dict__").values()
    except AttributeError:
        return ()


def _variables(function: types.FunctionType) -> Iterable[Any]:
    """Variables of the enclosing functions and of the module that it uses, and its defaults."""
    try:
        around = inspect.getclosurevars(function)
    except ValueError:
        # A variable was deleted: the function cannot use it either.
        return ()
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return *around.nonlocals.values(), *around.globals.values(), *defaults
