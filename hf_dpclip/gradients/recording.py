"""Sees every use of a trainable parameter in a forward pass and keeps, in the backward pass, what tells the gradients
of microbatches apart, instead of adding them up in `Parameter.grad`.

A use that is not known here is left alone: its gradient arrives in `Parameter.grad`, where the caller finds it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .factored import Dense, Outer, SpareMemory, Sparse
from .layout import Layout


# Elements of a tensor that stay in a CPU's cache beside a few others: 1 MiB.
CACHED_ELEMENTS = 2**18


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
        # Half a copy of the gradient: an input that several layers share counts as memory of each, though it is kept
        # once, and what that hides may come to as much again.
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
        if _trainable(parameter):
            self.gradients[id(parameter)].append(gradients)

    def record_rows(self, parameter: Tensor | None, rows: Tensor) -> None:
        """`rows` is `[N, T, *parameter]`: one gradient for each place where the parameter was added or multiplied."""
        if _trainable(parameter):
            self.record_sums(parameter, rows.sum(dim=1))

    def record_sums(self, parameter: Tensor | None, rows: Tensor) -> None:
        """`rows` is `[N, *parameter]`: one gradient for each row of the batch."""
        if _trainable(parameter):
            self.record(parameter, Dense(self.layout.sum_rows(rows)))

    def holds(self, tensor: Tensor) -> bool:
        """Whether dimension 0 of a tensor is the batch's."""
        return tensor.dim() > 1 and tensor.shape[0] == self.layout.num_rows


class _RecordedParameter(nn.Parameter):
    """What trainable parameters are for the time of a forward pass: a function that is given one is interpreted.

    All others run as fast as ever, which they would not under a mode that looks at every function.
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


class _Linear(Function):
    @staticmethod
    def forward(ctx, recording: Recording, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.recording, ctx.weight, ctx.bias = recording, weight, bias
        narrow = weight.to(x.dtype)
        # The input is kept for the weight's gradient alone.
        ctx.save_for_backward(x if _trainable(weight) else None, narrow)
        return F.linear(x, narrow, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (x, narrow), recording = ctx.saved_tensors, ctx.recording
        rows = _rows(gradient)
        if x is not None:
            recording.record(ctx.weight, recording.spare.cheaper(Outer(_rows(x), rows, recording.layout)))
        if ctx.bias is not None:
            recording.record_rows(ctx.bias, rows)
        of_input = gradient @ narrow if ctx.needs_input_grad[1] else None
        return None, of_input, None, None


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, recording: Recording, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, inverse_deviation = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.recording, ctx.weight, ctx.bias = recording, weight, bias
        ctx.save_for_backward(x, mean, inverse_deviation)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (x, mean, inverse_deviation), recording, weight = ctx.saved_tensors, ctx.recording, ctx.weight
        sums = [
            (_rows((x - mean).mul_(inverse_deviation).mul_(gradient)).sum(dim=1), _rows(gradient).sum(dim=1))
            for x, mean, inverse_deviation, gradient in _parts(x, mean, inverse_deviation, gradient)
        ]
        of_weight, of_bias = map(torch.cat, zip(*sums))
        recording.record_sums(weight, of_weight)
        recording.record_sums(ctx.bias, of_bias)
        of_input = torch.ops.aten.native_layer_norm_backward(
            gradient, x, weight.shape, mean, inverse_deviation, weight, ctx.bias, [True, False, False]
        )
        return None, of_input[0], None, None, None


class _Embedding(Function):
    @staticmethod
    def forward(ctx, recording: Recording, indices: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        # One row of positions serves the whole batch. It is looked up for each, so that gradients stay apart.
        indices = indices.expand(recording.layout.num_rows, *indices.shape[1:])
        ctx.recording, ctx.weight, ctx.padding_idx = recording, weight, padding_idx
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (indices,), recording, weight = ctx.saved_tensors, ctx.recording, ctx.weight
        if ctx.padding_idx is not None:
            # The row of padding is not trained.
            gradient = gradient.masked_fill((indices == ctx.padding_idx)[..., None], 0)
        recording.record(weight, Sparse(indices, gradient, len(weight), recording.layout))
        return None, None, None, None


class _Patches(Function):
    """A convolution of the input images, as the linear layer on their patches that it is."""

    @staticmethod
    def forward(ctx, recording: Recording, x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict) -> Tensor:
        ctx.recording, ctx.weight, ctx.bias, ctx.settings = recording, weight, bias, settings
        ctx.save_for_backward(x)
        return F.conv2d(x, weight, bias, **settings)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (x,), recording = ctx.saved_tensors, ctx.recording
        rows = gradient.flatten(2).transpose(1, 2)
        patches = F.unfold(x, ctx.weight.shape[2:], **ctx.settings).transpose(1, 2)
        recording.record(ctx.weight, recording.spare.cheaper(Outer(patches, rows, recording.layout)))
        recording.record_rows(ctx.bias, rows)
        return None, None, None, None, None


class _Expand(Function):
    """A parameter repeated for every row of the batch."""

    @staticmethod
    def forward(ctx, recording: Recording, parameter: Tensor, sizes: tuple) -> Tensor:
        ctx.recording, ctx.parameter = recording, parameter
        return parameter.detach().expand(*sizes)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.recording.record_rows(ctx.parameter, gradient.reshape(len(gradient), -1, *ctx.parameter.shape))
        return None, None, None


# The interpreters take the arguments of the functions that they stand for.


def _linear(recording: Recording, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if recording.holds(input) and _recordable(weight, bias):
        return _Linear.apply(recording, _autocast(input), weight, bias)
    return F.linear(input, weight, bias)


def _layer_norm(recording, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
    known = weight is not None and len(normalized_shape) == 1
    if recording.holds(input) and known and _recordable(weight, bias):
        return _LayerNorm.apply(recording, input.to(weight.dtype), weight, bias, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def _embedding(
    recording, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
) -> Tensor:
    simple = (padding_idx or 0) >= 0 and max_norm is None and not scale_grad_by_freq and not sparse
    if input.dim() == 2 and input.shape[0] in (1, recording.layout.num_rows) and _trainable(weight) and simple:
        return _Embedding.apply(recording, input, weight, padding_idx)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _conv2d(recording, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    simple = groups == 1 and not isinstance(padding, str) and not input.requires_grad
    if recording.holds(input) and simple and _recordable(weight, bias):
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        return _Patches.apply(recording, _autocast(input), weight, bias, settings)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _expand(recording: Recording, tensor: Tensor, *sizes: int) -> Tensor:
    expanded = torch.Tensor.expand(tensor, *sizes)
    if _trainable(tensor) and recording.holds(expanded) and _repeated(tensor, expanded):
        return _Expand.apply(recording, tensor, expanded.shape)
    return expanded


def _add(recording: Recording, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    if _trainable(other) and recording.holds(input) and _repeated(other, input) and alpha == 1:
        return input + _Expand.apply(recording, other, input.shape)
    return torch.Tensor.add(input, other, alpha=alpha)


def _dropout(recording: Recording, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    if not training or p in (0, 1) or not recording.holds(input):
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
    """Whether the batch is as large as the tensor repeated, whole, along new dimensions or a first one of size 1."""
    more = batch.dim() - tensor.dim()
    if more == 0:
        return tensor.shape == (1, *batch.shape[1:])
    return more > 0 and batch.shape[more:] == tensor.shape


def _trainable(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _recordable(*parameters: Tensor | None) -> bool:
    """Whether some are trainable, and none was computed from trainable ones, whose gradients would not be recorded."""
    computed = any(each is not None and each.requires_grad and not _trainable(each) for each in parameters)
    return not computed and any(_trainable(each) for each in parameters)


def _rows(tensor: Tensor) -> Tensor:
    """`[N, ..., d]` to `[N, T, d]`."""
    return tensor if tensor.dim() == 3 else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the batch, as many at a time as a CPU's cache holds, so that what is made of them stays there."""
    first = tensors[0]
    size = max(1, CACHED_ELEMENTS // first[0].numel()) if first.device.type == "cpu" else len(first)
    return zip(*(tensor.split(size) for tensor in tensors))


def _autocast(tensor: Tensor) -> Tensor:
    """In the dtype in which autocast would compute, so that it is this that is kept and not a wider copy."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
