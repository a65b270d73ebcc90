"""What must not change between the beginning of training and a release."""

from torch import nn


class StepGuard:
    """Remembers what the guarantee rests on when training begins, and compares before every release.

    Args:
        model (`nn.Module`): the model in training.
        forward_passes (`int`): forward passes in one optimizer step, the gradient accumulation steps of the plan.
    """

    def __init__(self, model: nn.Module, forward_passes: int):
        self.model = model
        self.forward_passes = forward_passes
        self._seen = 0
        self._trainable = _identities_of_trainable(model)
        self._buffers = _versions_of_buffers(model)

    def count_forward_pass(self) -> None:
        """To be called once in every forward pass."""
        self._seen += 1

    def check(self) -> None:
        """To be called before a release. Raises `RuntimeError` if something changed."""
        if self._trainable != _identities_of_trainable(self.model):
            raise RuntimeError("requires_grad changed during training: set it before DPCLIPTrainer.train is called.")
        if self._seen != self.forward_passes:
            raise RuntimeError(
                f"a step had {self._seen} forward passes instead of {self.forward_passes}: "
                "gradient_accumulation_steps is part of the privacy plan and must not change during training."
            )
        if self._buffers != _versions_of_buffers(self.model):
            raise RuntimeError(
                "a buffer of the model changed in the forward pass, so it keeps statistics of the private data "
                "outside the mechanism: use a model without running statistics, queues or codebooks."
            )
        self._seen = 0


def _identities_of_trainable(model: nn.Module) -> list[int]:
    return [id(parameter) for parameter in model.parameters() if parameter.requires_grad]


def _versions_of_buffers(model: nn.Module) -> list[tuple[int, int]]:
    """Changes when a buffer is replaced or written to."""
    return [(id(buffer), buffer._version) for buffer in model.buffers()]
