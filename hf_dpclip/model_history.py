"""What this process knows of the past of a model: a second trainer may be given it, or parts of it."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary, WeakSet

from torch import nn


# Modules that were found to have changed past the mechanism: they hold private data, whoever trains them next.
_distrusted: "WeakSet[nn.Module]" = WeakSet()
# The private steps in which modules were trained, by the id of the run.
_steps: "WeakKeyDictionary[nn.Module, dict[str, int]]" = WeakKeyDictionary()


def distrust(modules: Iterable[nn.Module]) -> None:
    """Remembers that modules changed past the mechanism, so that no trainer will take them again."""
    _distrusted.update(modules)


def check_trusted(model: nn.Module) -> None:
    """Raises `ValueError` for a model in which an earlier training left private data without noise."""
    if any(module in _distrusted for module in model.modules()):
        raise ValueError(
            "the model, or its loss, changed past the mechanism in an earlier training, and still holds private data: "
            "load it anew, and mend what that training was refused for."
        )


def remember_steps(model: nn.Module, run: str, steps: int) -> None:
    """Remembers how many steps of a run a model was trained in so far."""
    for module in model.modules():
        _steps.setdefault(module, {})[run] = steps


def steps_of(model: nn.Module) -> int:
    """In how many private steps of this process a model, or a part of it, was trained."""
    runs: dict[str, int] = {}
    for module in model.modules():
        runs |= _steps.get(module, {})
    return sum(runs.values())
