"""The functions that layers compute, with a backward pass that records parameter gradients by microbatch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .factored import Outer, Sparse


if TYPE_CHECKING:
    from .recording import Recording

# Elements of a tensor, 1 MiB, that fit into a CPU's cache beside a few others.
CACHED_ELEMENTS = 2**18


class RecordedLinear(Function):
    @staticmethod
    def forward(ctx, recording: "Recording", x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.recording, ctx.weight, ctx.bias = recording, weight, bias
        narrow = weight.to(x.dtype)
        # Only the weight's gradient needs the input.
        ctx.save_for_backward(x if is_trainable(weight) else None, narrow)
        return F.linear(x, narrow, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (x, narrow), recording = ctx.saved_tensors, ctx.recording
        rows = _rows(gradient)
        if x is not None:
            recording.record(ctx.weight, recording.spare.cheaper_form(Outer(_rows(x), rows, recording.layout)))
        recording.record_rows(ctx.bias, rows)
        of_input = gradient @ narrow if ctx.needs_input_grad[1] else None
        return None, of_input, None, None


class RecordedLayerNorm(Function):
    @staticmethod
    def forward(ctx, recording: "Recording", x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
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


class RecordedEmbedding(Function):
    @staticmethod
    def forward(ctx, recording: "Recording", indices: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        # Position ids may be one row for the whole batch. Each row looks them up for itself, to keep gradients apart.
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


class RecordedPatches(Function):
    """A convolution of the input images, which is a linear layer on their patches."""

    @staticmethod
    def forward(ctx, recording: "Recording", x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict) -> Tensor:
        ctx.recording, ctx.weight, ctx.bias, ctx.settings = recording, weight, bias, settings
        ctx.save_for_backward(x)
        return F.conv2d(x, weight, bias, **settings)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (x,), recording = ctx.saved_tensors, ctx.recording
        rows = gradient.flatten(2).transpose(1, 2)
        patches = F.unfold(x, ctx.weight.shape[2:], **ctx.settings).transpose(1, 2)
        recording.record(ctx.weight, recording.spare.cheaper_form(Outer(patches, rows, recording.layout)))
        recording.record_rows(ctx.bias, rows)
        return None, None, None, None, None


class RecordedExpand(Function):
    """A parameter repeated for every row of the batch."""

    @staticmethod
    def forward(ctx, recording: "Recording", parameter: Tensor, sizes: tuple) -> Tensor:
        ctx.recording, ctx.parameter = recording, parameter
        return parameter.detach().expand(*sizes)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.recording.record_rows(ctx.parameter, gradient.reshape(len(gradient), -1, *ctx.parameter.shape))
        return None, None, None


def is_trainable(tensor: Tensor | None) -> bool:
    """Whether it is a parameter that is trained."""
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _rows(tensor: Tensor) -> Tensor:
    """`[N, ..., d]` to `[N, T, d]`."""
    return tensor if tensor.dim() == 3 else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the batch small enough for intermediate results to stay in a CPU's cache."""
    first = tensors[0]
    size = max(1, CACHED_ELEMENTS // first[0].numel()) if first.device.type == "cpu" else len(first)
    return zip(*(tensor.split(size) for tensor in tensors))
