"""Batches of encoded pairs: concatenating and padding them."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# The inputs that are as long as the texts, and what they are padded with; `input_ids` with the padding token.
TEXT_PADDING = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0}


def without_return_loss(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without the request for a loss, which some collators of contrastive models add: the loss is computed here."""
    return {name: value for name, value in inputs.items() if name != "return_loss"}


def num_rows(inputs: dict[str, Any]) -> int:
    """Pairs in a batch, the first dimension of its tensors.

    Raises `ValueError` if they have several: whatever was cut or shifted would pair records of different microbatches.
    """
    rows = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"the data_collator returned tensors of different numbers of rows, {rows}: return as many images as "
            "texts, in the same order."
        )
    return next(iter(rows.values()))


def text_length(inputs: dict[str, Any]) -> int:
    """Tokens of the longest text."""
    return inputs["input_ids"].shape[1]


def caption_keys(inputs: dict[str, Any], pad_token_id: int) -> Tensor:
    """`[rows]`, int64: equal for equal texts, however they are padded; different for others, but for chance.

    Hashes, since texts of different chunks, or private and public ones, are never seen side by side.
    """
    input_ids = inputs["input_ids"].long()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_text = inputs["attention_mask"] != 0 if "attention_mask" in inputs else input_ids != pad_token_id
    # Texts may also be padded with their last token: of its repetitions at the end, only one counts.
    last = (positions * in_text).amax(dim=1, keepdim=True)
    ends_before = ((input_ids != input_ids.gather(1, last)) & in_text) * positions
    in_text = in_text & (positions <= ends_before.amax(dim=1, keepdim=True) + 1)
    # Multilinear hashing modulo 2^64, with a random odd factor for each position.
    factors = np.random.Generator(np.random.PCG64(0)).integers(2**63, size=len(positions)) * 2 + 1
    return ((input_ids + 1) * in_text * torch.from_numpy(factors).to(input_ids.device)).sum(dim=1)


def row_shapes(inputs: dict[str, Any]) -> frozenset:
    """Equal for batches whose rows have the same inputs, dtypes and shapes, but for the length of their texts."""
    return frozenset(
        (name, value.dtype, value.shape[2:] if name in TEXT_PADDING else value.shape[1:])
        for name, value in inputs.items()
    )


def pad_texts(inputs: dict[str, Any], length: int, pad_token_id: int) -> dict[str, Any]:
    """The batch with texts padded to `length` tokens."""
    missing = length - text_length(inputs)
    if missing == 0:
        return inputs
    padding = TEXT_PADDING | {"input_ids": pad_token_id}
    return {
        name: F.pad(value, (0, missing), value=padding[name]) if name in padding else value
        for name, value in inputs.items()
    }


def concatenated(batches: list[dict[str, Any]], length: int, pad_token_id: int) -> dict[str, Any]:
    """One batch of all rows, from batches of equal [`row_shapes`], with texts padded to `length` tokens."""
    batches = [pad_texts(batch, length, pad_token_id) for batch in batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def pad_batch(inputs: dict[str, Any], rows: int, length: int, pad_token_id: int) -> dict[str, Any]:
    """The batch with its first pair repeated until there are `rows`, and texts padded to `length`."""
    inputs = pad_texts(inputs, length, pad_token_id)
    missing = rows - num_rows(inputs)
    if missing == 0:
        return inputs
    return {name: torch.cat([value, value[:1].expand(missing, *value.shape[1:])]) for name, value in inputs.items()}


def can_be_padded(inputs: dict[str, Any]) -> bool:
    """Whether it is known how to pad each of the inputs."""
    known = ("pixel_values", *TEXT_PADDING)
    return all(name in known and isinstance(value, Tensor) for name, value in inputs.items())


def is_read_into_padding(input_ids: Tensor, lengths: Tensor, end_token_id: int) -> Tensor:
    """`[rows]`: whether CLIP would read a text beyond its own length, up to a padding token.

    It reads up to the first end token, or, under an old configuration, up to the largest token. A text that lacks its
    end token may reach neither before its padding.

    Args:
        input_ids (`Tensor` of shape `[rows, tokens]`): padded, each text by at least one token.
        lengths (`Tensor` of shape `[rows]`): tokens of each text without padding.
        end_token_id (`int`): the model's.
    """
    candidates = (input_ids.int(), (input_ids == end_token_id).int())
    return torch.stack([each.argmax(dim=1) >= lengths for each in candidates]).any(dim=0)
