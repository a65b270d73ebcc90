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
        self._trainable, self._buffers = _fingerprint(model)

    def count_forward_pass(self) -> int:
        """To be called once in every forward pass. Returns how many there have been in this step."""
        self._seen += 1
        return self._seen

    def check(self) -> None:
        """To be called before a release. Raises `RuntimeError` if something changed."""
        trainable, buffers = _fingerprint(self.model)
        if self._trainable != trainable:
            raise RuntimeError("requires_grad changed during training: set it before DPCLIPTrainer.train is called.")
        if self._seen != self.forward_passes:
            raise RuntimeError(
                f"a step had {self._seen} forward passes instead of {self.forward_passes}: "
                "gradient_accumulation_steps is part of the privacy plan and must not change during training."
            )
        if self._buffers != buffers:
            raise RuntimeError(
                "a buffer of the model changed in the forward pass, so it keeps statistics of the private data "
                "outside the mechanism: use a model without running statistics, queues or codebooks."
            )
        self._seen = 0


def _fingerprint(model: nn.Module) -> tuple[list[int], list[tuple[int, int]]]:
    """Which parameters are trained, and what changes when a buffer is replaced or written to.

    In one walk through the modules, which takes a good part of the time that a step of a small model has.
    """
    modules = list(model.modules())
    parameters = (parameter for module in modules for parameter in module._parameters.values())
    buffers = (buffer for module in modules for buffer in module._buffers.values())
    trainable = [id(parameter) for parameter in parameters if parameter is not None and parameter.requires_grad]
    return trainable, [(id(buffer), buffer._version) for buffer in buffers if buffer is not None]
