"""What this process knows of the past of a model: a second trainer may be given it, or parts of it."""

from weakref import WeakKeyDictionary, WeakSet

from torch import nn


# Modules that were found to have changed past the mechanism: they hold private data, whoever trains them next.
_distrusted: "WeakSet[nn.Module]" = WeakSet()
# The steps in which modules were trained, by the id of the run.
_steps: "WeakKeyDictionary[nn.Module, dict[str, int]]" = WeakKeyDictionary()


def distrust(model: nn.Module) -> None:
    """Remembers that a model changed past the mechanism, so that no trainer will take it, or parts of it, again."""
    _distrusted.update(module for module in model.modules() if module._parameters or module._buffers)


def is_distrusted(model: nn.Module) -> bool:
    """Whether a model, or a part of it, changed past the mechanism."""
    return any(module in _distrusted for module in model.modules())


def check_trusted(model: nn.Module) -> None:
    """Raises `ValueError` for a model in which an earlier training left private data without noise."""
    if is_distrusted(model):
        raise ValueError(
            "the model, or its loss, changed past the mechanism in an earlier training, and still holds private data: "
            "load it anew, and mend what that training was refused for."
        )


def remember_steps(model: nn.Module, run: str, steps: int) -> None:
    """Remembers how many steps of a run a model was trained in so far."""
    for module in model.modules():
        _steps.setdefault(module, {})[run] = steps


def steps_of(model: nn.Module) -> int:
    """In how many steps of this process a model, or a part of it, was trained."""
    runs: dict[str, int] = {}
    for module in model.modules():
        runs |= _steps.get(module, {})
    return sum(runs.values())
