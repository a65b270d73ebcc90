"""Which microbatches of a forward batch are computed together."""

from collections import defaultdict
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .inputs import concatenated, num_rows, pad_texts, row_shapes, text_length, without_return_loss
from .vectorizable import VectorizableModel


# The seed of a microbatch's randomness, and its collated inputs.
Microbatch = tuple[int, dict[str, Any]]
# Elements of a pass's largest hidden state, 16 MiB, above which two passes are faster than one on a CPU: larger states
# do not fit into its caches, and glibc asks the system for their memory anew each time.
CPU_STATE = 2**22


def group_microbatches(
    model: VectorizableModel, microbatches: list[Microbatch]
) -> tuple[list[list[Microbatch]], list[Microbatch]]:
    """Groups of microbatches that share a pass, and the other microbatches, which are computed one by one.

    Which of the two a microbatch belongs to, and how long its texts are, depend on nothing but the microbatch itself.
    """
    by_shape: dict[frozenset, list[Microbatch]] = defaultdict(list)
    others: list[Microbatch] = []
    for microbatch in microbatches:
        inputs = without_return_loss(microbatch[1])
        (by_shape[row_shapes(inputs)] if _is_vectorizable(model, inputs) else others).append(microbatch)
    by_length = [group for similar in by_shape.values() for group in _by_length(model, similar)]
    return [group for each in by_length for group in _split_for_cache(model, each)], others


def _is_vectorizable(model: VectorizableModel, inputs: dict[str, Any]) -> bool:
    """Whether the inputs have all that the loss needs, and only tensors with one row per record."""
    has_rows = all(isinstance(value, Tensor) and value.dim() > 0 for value in inputs.values())
    return has_rows and model.needed_inputs <= inputs.keys()


def _by_length(model: VectorizableModel, microbatches: list[Microbatch]) -> list[list[Microbatch]]:
    """Groups of one text length, with texts padded where that does not change what the model makes of them.

    The padded length follows from the microbatch itself, not from longer texts that happened to be drawn beside it:
    tensors of other shapes are rounded in other ways.
    """
    lengths = [text_length(inputs) for _, inputs in microbatches]
    padded = [model.padded_length(length) for length in lengths]
    if padded != lengths:
        changed = _changed_by_padding(model, microbatches)
        padded = [length if is_changed else more for length, more, is_changed in zip(lengths, padded, changed)]
    groups: dict[int, list[Microbatch]] = defaultdict(list)
    for length, (seed, inputs) in zip(padded, microbatches):
        groups[length].append((seed, pad_texts(inputs, length, model.pad_token_id)))
    return list(groups.values())


def _changed_by_padding(model: VectorizableModel, microbatches: list[Microbatch]) -> list[bool]:
    """For each microbatch, whether padding its texts would change what the model makes of them."""
    if model.has_dropout:
        # What is drawn depends on the shape.
        return [True] * len(microbatches)
    names = ("input_ids", "attention_mask")
    texts = [{name: inputs[name] for name in names if name in inputs} for _, inputs in microbatches]
    lengths, sizes = [text_length(each) for each in texts], [len(each["input_ids"]) for each in texts]
    padded = concatenated(texts, max(lengths) + 1, model.pad_token_id)
    of_row = torch.tensor(lengths).repeat_interleave(torch.tensor(sizes)).to(padded["input_ids"].device)
    # One question to the device for all of them.
    changed = model.changed_by_padding(padded, of_row).cpu()
    return [bool(rows.any()) for rows in changed.split(sizes)]


def _split_for_cache(model: VectorizableModel, microbatches: list[Microbatch]) -> list[list[Microbatch]]:
    """On a CPU, splits a group into smaller ones of about equally many rows, whose hidden states exceed `CPU_STATE` by
    less than that of one microbatch."""
    if model.trainable[0].device.type != "cpu":
        return [microbatches]
    # Microbatches of one size are multiplied together, and so stay together.
    in_order = sorted(microbatches, key=lambda microbatch: num_rows(microbatch[1]))
    ends = list(accumulate(num_rows(inputs) for _, inputs in in_order))
    # All images of a group have the same shape.
    longest = max((inputs for _, inputs in microbatches), key=text_length)
    count = ceil(ends[-1] * model.hidden_state_size(longest) / CPU_STATE)
    if count == 1:
        return [microbatches]
    groups: dict[int, list[Microbatch]] = defaultdict(list)
    for end, microbatch in zip(ends, in_order):
        groups[(end - 1) * count // ends[-1]].append(microbatch)
    return list(groups.values())
