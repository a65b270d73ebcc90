"""Intercepts every use of a trainable parameter in a forward pass, so that the backward pass keeps the gradients of
microbatches apart, instead of adding them up in `Parameter.grad`.

A use that is not known here is left alone: its gradient arrives in `Parameter.grad`, where the caller finds it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .factored import Dense, Outer, SpareMemory, Sparse
from .functions import (
    RecordedEmbedding,
    RecordedExpand,
    RecordedLayerNorm,
    RecordedLinear,
    RecordedPatches,
    is_trainable,
)
from .layout import Layout


class Recording:
    """Context in which the forward pass runs.

    Args:
        parameters (`Iterable[nn.Parameter]`): the trainable ones, whose uses are recorded.
        layout ([`Layout`]): the microbatches; dimension 0 of what a layer sees is the batch's.
        generators (`list[torch.Generator]`): one per microbatch, for dropout, which then finds the rows of each in the
            shape that they would have alone; none if there is no dropout.

    Attributes:
        gradients (`dict[int, list[Dense | Outer | Sparse]]`): by `id` of the parameter, one entry for each use
            that the loss depends on, complete after the backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], layout: Layout, generators: list[torch.Generator]):
        self.parameters = list(parameters)
        self.layout = layout
        self.generators = generators
        # Half a copy of the gradient. An input that several layers share is counted as a factor of each, though it is
        # kept once, so the memory in use may be larger by as much again.
        self.spare = SpareMemory(sum(parameter.numel() for parameter in self.parameters) // 2)
        self.gradients: dict[int, list[Dense | Outer | Sparse]] = defaultdict(list)
        self._contexts = ExitStack()

    def __enter__(self) -> "Recording":
        self._contexts.enter_context(_uses_recorded(self))
        if self.generators:
            self._contexts.enter_context(_Dropouts(self))
        return self

    def __exit__(self, *exception) -> None:
        self._contexts.close()

    def record(self, parameter: Tensor | None, gradients: Dense | Outer | Sparse) -> None:
        """Keeps the gradients of one use of a parameter, if it is trained."""
        if is_trainable(parameter):
            self.gradients[id(parameter)].append(gradients)

    def record_rows(self, parameter: Tensor | None, rows: Tensor) -> None:
        """`rows` is `[N, T, *parameter]`: one gradient for each place where the parameter was added or multiplied."""
        if is_trainable(parameter):
            self.record_sums(parameter, rows.sum(dim=1))

    def record_sums(self, parameter: Tensor | None, rows: Tensor) -> None:
        """`rows` is `[N, *parameter]`: one gradient for each row of the batch."""
        if is_trainable(parameter):
            self.record(parameter, Dense(self.layout.sum_rows(rows)))

    def has_batch_dimension(self, tensor: Tensor) -> bool:
        """Whether dimension 0 of a tensor is the batch's."""
        return tensor.dim() > 1 and tensor.shape[0] == self.layout.num_rows


class _RecordedParameter(nn.Parameter):
    """The class of trainable parameters during a forward pass: functions that take one go through an interpreter.

    All other functions run at full speed, as they would not under a `TorchFunctionMode`, which sees every function.
    """

    recording: Recording

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        interpret = _INTERPRETERS.get(function)
        with torch._C.DisableTorchFunctionSubclass():
            if interpret is None:
                return function(*args, **(kwargs or {}))
            return interpret(cls.recording, *args, **(kwargs or {}))


@contextmanager
def _uses_recorded(recording: Recording) -> Iterator[None]:
    kinds = [type(parameter) for parameter in recording.parameters]
    _RecordedParameter.recording = recording
    try:
        for parameter in recording.parameters:
            parameter.__class__ = _RecordedParameter
        yield
    finally:
        del _RecordedParameter.recording
        for parameter, kind in zip(recording.parameters, kinds):
            parameter.__class__ = kind


class _Dropouts(TorchFunctionMode):
    """Lets dropout draw from the generators of the microbatches."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.dropout:
            return _dropout(self.recording, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


# The interpreters take the arguments of the functions that they replace.


def _linear(recording: Recording, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if recording.has_batch_dimension(input) and _recordable(weight, bias):
        return RecordedLinear.apply(recording, _autocast(input), weight, bias)
    return F.linear(input, weight, bias)


def _layer_norm(recording, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
    known = weight is not None and len(normalized_shape) == 1
    if recording.has_batch_dimension(input) and known and _recordable(weight, bias):
        return RecordedLayerNorm.apply(recording, input.to(weight.dtype), weight, bias, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def _embedding(
    recording, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
) -> Tensor:
    simple = (padding_idx or 0) >= 0 and max_norm is None and not scale_grad_by_freq and not sparse
    if input.dim() == 2 and input.shape[0] in (1, recording.layout.num_rows) and is_trainable(weight) and simple:
        return RecordedEmbedding.apply(recording, input, weight, padding_idx)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _conv2d(recording, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    simple = groups == 1 and not isinstance(padding, str) and not input.requires_grad
    if recording.has_batch_dimension(input) and simple and _recordable(weight, bias):
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        return RecordedPatches.apply(recording, _autocast(input), weight, bias, settings)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _expand(recording: Recording, tensor: Tensor, *sizes: int) -> Tensor:
    expanded = torch.Tensor.expand(tensor, *sizes)
    if is_trainable(tensor) and recording.has_batch_dimension(expanded) and _repeated(tensor, expanded):
        return RecordedExpand.apply(recording, tensor, expanded.shape)
    return expanded


def _add(recording: Recording, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    if is_trainable(other) and recording.has_batch_dimension(input) and _repeated(other, input) and alpha == 1:
        return input + RecordedExpand.apply(recording, other, input.shape)
    return torch.Tensor.add(input, other, alpha=alpha)


def _dropout(recording: Recording, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    if not training or p in (0, 1) or not recording.has_batch_dimension(input):
        return F.dropout(input, p, training, inplace)
    kept = torch.zeros_like(input, memory_format=torch.contiguous_format)
    for block, generator in zip(kept.split(recording.layout.sizes), recording.generators):
        block.bernoulli_(1 - p, generator=generator)
    return input * kept.div_(1 - p)


_INTERPRETERS = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.conv2d: _conv2d,
    torch.Tensor.expand: _expand,
    torch.Tensor.add: _add,
}


def _repeated(tensor: Tensor, batch: Tensor) -> bool:
    """Whether broadcasting the tensor along new dimensions, or a first one of size 1, gives the batch's shape."""
    more = batch.dim() - tensor.dim()
    if more == 0:
        return tensor.shape == (1, *batch.shape[1:])
    return more > 0 and batch.shape[more:] == tensor.shape


def _recordable(*parameters: Tensor | None) -> bool:
    """Whether some are trainable, and none was computed from trainable ones: those gradients would not be recorded."""
    computed = any(each is not None and each.requires_grad and not is_trainable(each) for each in parameters)
    return not computed and any(is_trainable(each) for each in parameters)


def _autocast(tensor: Tensor) -> Tensor:
    """In the dtype in which autocast would compute, so that this is what is kept, not a wider copy."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
