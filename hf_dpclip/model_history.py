"""What a model knows of its past: a second trainer may be given it, parts of it, or a copy.

Kept as attributes of its modules, since those are copied and pickled with them.
"""

from torch import nn


# Whether a module changed past the mechanism, so that it holds private data, whoever trains it next.
DISTRUSTED = "_changed_past_the_mechanism"
# The steps in which a module was trained, by the id of the run.
STEPS = "_steps_by_run"


def distrust(model: nn.Module) -> None:
    """Remembers that a model changed past the mechanism, so that no trainer will take it, or parts of it, again."""
    for module in model.modules():
        if module._parameters or module._buffers:
            setattr(module, DISTRUSTED, True)


def is_distrusted(model: nn.Module) -> bool:
    """Whether a model, or a part of it, changed past the mechanism."""
    return any(DISTRUSTED in vars(module) for module in model.modules())


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
        # A new dictionary: a copy of the model may share the old one.
        setattr(module, STEPS, {**vars(module).get(STEPS, {}), run: steps})


def steps_of(model: nn.Module) -> int:
    """In how many steps a model, or a part of it, was trained."""
    runs: dict[str, int] = {}
    for module in model.modules():
        runs |= vars(module).get(STEPS, {})
    return sum(runs.values())
