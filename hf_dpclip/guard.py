"""What must not change between the beginning of training and a release."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .model_history import check_trusted, distrust


class Snapshot:
    """What modules hold at one moment.

    Attributes:
        parameters (`list`): the id of each parameter.
        trained (`list`): whether each of them is trained.
        versions (`list`): the version of each parameter.
        gradients (`list`): the version of each parameter's gradient.
        buffers (`list`): each buffer, with a copy of its values.
    """

    def __init__(self, modules: nn.ModuleList):
        self.parameters, buffers = _fingerprint(modules)
        self.trained = _trained(modules.parameters())
        self.versions = _versions(modules.parameters())
        self.gradients = _gradient_versions(modules.parameters())
        self.buffers = [(buffer, buffer.clone()) for buffer in buffers]


class StepGuard:
    """Remembers what the guarantee rests on when training begins, and compares before every release.

    Args:
        modules (`nn.ModuleList`): the model in training, and the loss, of which only parameters may ever change.
        held (`nn.ModuleList`): other modules of the trainer, such as teachers, which must not change while gradients
            are computed, but may between steps.
        forward_passes (`int`): forward passes in one optimizer step, the gradient accumulation steps of the plan.
    """

    # Taken in the first forward pass of every step.
    _versions: list[tuple[int, int]]
    _held_before: Snapshot

    def __init__(self, modules: nn.ModuleList, held: nn.ModuleList, forward_passes: int):
        check_trusted(modules)
        check_trusted(held)
        self.modules = modules
        self.held = held
        self.forward_passes = forward_passes
        self._begun = self._completed = 0
        self._parameters = list(modules.parameters())
        self._at_start = Snapshot(modules)

    @contextmanager
    def forward_pass(self) -> Iterator[int]:
        """Every forward pass runs inside. Yields its number within the step, from 1.

        Raises `ValueError` for a hook on a parameter, such as trackers add when training has begun, and in torch's
        anomaly mode.
        """
        check_no_hooks(self._parameters)
        check_no_anomaly_mode()
        self._begun += 1
        if self._begun == 1:
            self._versions = _versions(self._parameters)
            self._held_before = Snapshot(self.held)
        yield self._begun
        self._completed += 1

    def check(self) -> None:
        """To be called before a release. Raises `RuntimeError` if something changed, or a forward pass is missing."""
        changes = self._changes()
        if changes:
            raise RuntimeError(changes[0][1])
        if self._at_start.trained != _trained(self._parameters):
            raise RuntimeError(
                "requires_grad changed during training, past the mechanism: make all parameters as they are to be "
                "before DPCLIPTrainer.train is called."
            )
        if not self._begun == self._completed == self.forward_passes:
            raise RuntimeError(
                f"a step had {self._begun} forward passes, of which {self._completed} came to an end, instead of "
                f"{self.forward_passes}: gradient_accumulation_steps is part of the privacy plan and must not change "
                "during training, and the error that ends a pass must end the run: a batch that is left out shows "
                "what was in it."
            )
        if self._held_before.gradients != _gradient_versions(self.held.parameters()):
            raise RuntimeError(
                "a module that the trainer holds, or its loss uses, received a gradient that is neither clipped nor "
                "noised: freeze it with requires_grad_(False), or use it within torch.no_grad()."
            )
        self._begun = self._completed = 0

    def distrust_if_changed(self) -> bool:
        """To be called when training ends, however it does, and before weights are saved. If modules changed past the
        mechanism, no trainer will take them again. Returns whether some did."""
        changes = self._changes()
        for modules, _ in changes:
            distrust(modules)
        return bool(changes)

    def _changes(self) -> list[tuple[nn.ModuleList, str]]:
        """Modules that changed past the mechanism in this step, each with what changed, and how to avoid that."""
        if self._begun == 0:
            # Between steps, the optimizer writes to parameters; and what comes after the last step is no release.
            return []
        found = ((self.modules, self._change_in_use()), (self.held, self._change_in_held()))
        return [(modules, change) for modules, change in found if change is not None]

    def _change_in_use(self) -> str | None:
        parameters, buffers = _fingerprint(self.modules)
        if parameters != self._at_start.parameters:
            return (
                "a parameter was added during training, or put in the place of another, past the mechanism: make all "
                "of them before DPCLIPTrainer.train is called."
            )
        if self._versions != _versions(self._parameters):
            return (
                "a parameter of the model was written to in the forward or backward pass, so it carries private data "
                "past the mechanism: use a model without max_norm, and no optimizer that steps in the backward pass."
            )
        if not _are_unchanged(buffers, self._at_start.buffers):
            return (
                "a buffer of the model or of the loss changed in the forward pass, so it keeps statistics of the "
                "private data outside the mechanism: use one without running statistics, queues or codebooks."
            )
        return None

    def _change_in_held(self) -> str | None:
        before, (parameters, buffers) = self._held_before, _fingerprint(self.held)
        same = parameters == before.parameters and _trained(self.held.parameters()) == before.trained
        same = same and _versions(self.held.parameters()) == before.versions
        if same and _are_unchanged(buffers, before.buffers):
            return None
        return (
            "a module that the trainer holds, or its loss uses, changed in the forward or backward pass, so it keeps "
            "what it sees of private data outside the mechanism: use one without running statistics, queues or "
            "codebooks, and move it to its device before training."
        )


def check_no_hooks(parameters: Iterable[nn.Parameter]) -> None:
    """Raises `ValueError` if a hook would see the gradient of a parameter before it is clipped and noised."""
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        raise ValueError(
            "a hook on a parameter would see its gradient before it is clipped and noised: remove it (and unset "
            "WANDB_WATCH)."
        )


def check_no_anomaly_mode() -> None:
    """Raises `ValueError` where torch would stop at a gradient that is not finite, which counts as zero here."""
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        raise ValueError(
            "torch's anomaly mode stops at a gradient that is not finite, and would so show that a record was drawn: "
            "leave out torch.autograd.set_detect_anomaly(True) and detect_anomaly()."
        )


def check_loss_is_frozen(modules: nn.ModuleList, parameters: list[nn.Parameter]) -> None:
    """Raises `ValueError` if the loss has something to train beside the `parameters` of the model."""
    if _has_others_to_train(modules.parameters(), parameters):
        raise ValueError(
            "the loss has trainable parameters that are not the model's: their gradients would be neither clipped nor "
            "noised. Make them part of the model, or freeze them with requires_grad_(False)."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Raises `ValueError` if the optimizer would step on parameters whose gradient does not pass the mechanism, or ask
    for another gradient within its step."""
    if _has_others_to_train((each for group in optimizer.param_groups for each in group["params"]), parameters):
        raise ValueError(
            "the optimizer holds trainable parameters that are not the model's: their gradients would be neither "
            "clipped nor noised. Make them part of the model, or remove them from the optimizer."
        )
    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        raise ValueError("LBFGS asks for several gradients in a step, and a step has one release: use AdamW or SGD.")


def _has_others_to_train(parameters: Iterable[nn.Parameter], known: list[nn.Parameter]) -> bool:
    ids = {id(parameter) for parameter in known}
    return any(parameter.requires_grad and id(parameter) not in ids for parameter in parameters)


def _fingerprint(model: nn.Module) -> tuple[list[int], list[Tensor]]:
    """The ids of all parameters, and the buffers.

    In one walk through the modules, since walks take a good part of a step of a small model.
    """
    modules = list(model.modules())
    parameters = [id(each) for module in modules for each in module._parameters.values() if each is not None]
    return parameters, [each for module in modules for each in module._buffers.values() if each is not None]


def _trained(parameters: Iterable[nn.Parameter]) -> list[bool]:
    return [parameter.requires_grad for parameter in parameters]


def _versions(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int]]:
    """Values that change when a parameter, trained or not, is replaced in memory or written to."""
    return [(parameter.data_ptr(), parameter._version) for parameter in parameters]


def _gradient_versions(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int] | None]:
    gradients = (parameter.grad for parameter in parameters)
    return [None if gradient is None else (gradient.data_ptr(), gradient._version) for gradient in gradients]


def _are_unchanged(buffers: list[Tensor], then: list[tuple[Tensor, Tensor]]) -> bool:
    """Compares values too: writing through `.data` leaves no other trace."""
    return len(buffers) == len(then) and all(
        buffer is before and torch.equal(buffer, values) for buffer, (before, values) in zip(buffers, then)
    )
