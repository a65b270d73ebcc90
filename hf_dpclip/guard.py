"""What must not change between the beginning of training and a release."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


class StepGuard:
    """Remembers what the guarantee rests on when training begins, and compares before every release.

    Args:
        modules (`nn.Module`): the model in training, and whatever else takes part in a step.
        forward_passes (`int`): forward passes in one optimizer step, the gradient accumulation steps of the plan.
    """

    def __init__(self, modules: nn.Module, forward_passes: int):
        self.modules = modules
        self.forward_passes = forward_passes
        self._seen = 0
        self._known, buffers = _fingerprint(modules)
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._parameters = list(modules.parameters())
        self._values: list[tuple[int, int]] = []

    def count_forward_pass(self) -> int:
        """To be called once in every forward pass, before it. Returns how many there have been in this step.

        Raises `ValueError` for a hook on a parameter, as trackers add them when training has begun.
        """
        check_no_hooks(self._parameters)
        self._seen += 1
        if self._seen == 1:
            self._values = self._versions()
        return self._seen

    def check(self) -> None:
        """To be called before a release. Raises `RuntimeError` if something changed."""
        known, buffers = _fingerprint(self.modules)
        if self._known != known:
            raise RuntimeError(
                "requires_grad changed during training, or a parameter was added or put in the place of another, past "
                "the mechanism: make all of them as they are to be before DPCLIPTrainer.train is called."
            )
        if self._seen != self.forward_passes:
            raise RuntimeError(
                f"a step had {self._seen} forward passes instead of {self.forward_passes}: "
                "gradient_accumulation_steps is part of the privacy plan and must not change during training."
            )
        if self._values != self._versions():
            raise RuntimeError(
                "a parameter of the model was written to in the forward or backward pass, so it carries private data "
                "past the mechanism: use a model without max_norm, and no optimizer that steps in the backward pass."
            )
        if len(buffers) != len(self._buffers) or not all(
            _unchanged(buffer, *then) for buffer, then in zip(buffers, self._buffers)
        ):
            raise RuntimeError(
                "a buffer of the model or of the loss changed in the forward pass, so it keeps statistics of the "
                "private data outside the mechanism: use one without running statistics, queues or codebooks."
            )
        self._seen = 0

    def _versions(self) -> list[tuple[int, int]]:
        """What changes when a parameter, trained or not, is replaced in memory or written to."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]


def modules_in_use(trainer: Trainer) -> nn.ModuleList:
    """The model, the loss where it is a module or one of its methods, and the modules that the loss holds, or the
    trainer, whose `compute_loss` may be overridden."""
    loss: Any = trainer.compute_loss_func
    given: list[Any] = []
    if isinstance(loss, functools.partial):
        loss, given = loss.func, [*loss.args, *loss.keywords.values()]
    loss = getattr(loss, "__self__", loss)
    held = [value for holder in (trainer, loss) for value in getattr(holder, "__dict__", {}).values()]
    in_use = {id(each): each for each in (trainer.model, loss, *given, *held) if isinstance(each, nn.Module)}
    return nn.ModuleList(in_use.values())


def check_no_hooks(parameters: Iterable[nn.Parameter]) -> None:
    """Raises `ValueError` if anybody would see the gradient of a parameter before it is clipped and noised."""
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        raise ValueError(
            "a hook on a parameter would see its gradient before it is clipped and noised: remove it (and unset "
            "WANDB_WATCH)."
        )


def _fingerprint(model: nn.Module) -> tuple[list[tuple[int, bool]], list[Tensor]]:
    """Which parameters there are, which of them are trained, and the buffers.

    In one walk through the modules, which takes a good part of the time that a step of a small model has.
    """
    modules = list(model.modules())
    parameters = (parameter for module in modules for parameter in module._parameters.values())
    buffers = (buffer for module in modules for buffer in module._buffers.values())
    known = [(id(parameter), parameter.requires_grad) for parameter in parameters if parameter is not None]
    return known, [buffer for buffer in buffers if buffer is not None]


def _unchanged(buffer: Tensor, before: Tensor, values: Tensor) -> bool:
    """By its values: those written through `.data` leave no other trace."""
    return buffer is before and torch.equal(buffer, values)
