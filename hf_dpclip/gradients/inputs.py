"""Batches of encoded pairs: putting them together and filling them up."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class NotVectorizable(Exception):
    """Why microbatches have to be computed one after another. The result is the same, the time is not."""


def pairs_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without the request for a loss that collators of contrastive models add: the loss is computed here."""
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
    """`[rows]`, int64: equal for equal texts, however far they are filled up; different texts differ, but for chance.

    Hashes, since texts of different chunks, or private and public ones, are never seen side by side.
    """
    input_ids = inputs["input_ids"].long()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_text = inputs["attention_mask"] != 0 if "attention_mask" in inputs else input_ids != pad_token_id
    # Texts may also be filled up with their last token: of its repetitions at the end, one counts.
    last = (positions * in_text).amax(dim=1, keepdim=True)
    ends_before = ((input_ids != input_ids.gather(1, last)) & in_text) * positions
    in_text = in_text & (positions <= ends_before.amax(dim=1, keepdim=True) + 1)
    # Multilinear hashing modulo 2^64, with a random odd factor for each position.
    factors = np.random.Generator(np.random.PCG64(0)).integers(2**63, size=len(positions)) * 2 + 1
    return ((input_ids + 1) * in_text * torch.from_numpy(factors).to(input_ids.device)).sum(dim=1)


def concatenated(batches: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """One batch of all rows; texts are filled up on the right to the longest.

    Raises `NotVectorizable` if batches have different inputs, if other tensors differ in more than their first
    dimension, or if a value is not a tensor.
    """
    if not all("input_ids" in batch for batch in batches):
        raise NotVectorizable("a batch has no input_ids")
    if any(batch.keys() != batches[0].keys() for batch in batches):
        # An attention_mask that only some have would be lost to them, or not, depending on the others.
        raise NotVectorizable("a batch has other inputs than the next")
    length = max(text_length(batch) for batch in batches)
    batches = [_lengthened(batch, length, pad_token_id) for batch in batches]
    for name, value in batches[0].items():
        if not all(_stackable(value, batch.get(name)) for batch in batches):
            raise NotVectorizable(f"the input {name} of one microbatch does not fit that of another")
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def filled_up(inputs: dict[str, Any], rows: int, length: int, pad_token_id: int) -> dict[str, Any]:
    """The batch with its first pair repeated until there are `rows`, and texts filled up to `length`."""
    inputs = _lengthened(inputs, length, pad_token_id)
    missing = rows - num_rows(inputs)
    if missing == 0:
        return inputs
    return {name: torch.cat([value, value[:1].expand(missing, *value.shape[1:])]) for name, value in inputs.items()}


def end_in_filler(input_ids: Tensor, lengths: Tensor, end_token_id: int) -> bool:
    """Whether CLIP would read any of the texts beyond its own length, up to a token that fills it up.

    It reads up to the first end token, or, where its configuration is an old one, to the largest token; a text without
    its end token may have none of its own.

    Args:
        input_ids (`Tensor` of shape `[rows, tokens]`): filled up.
        lengths (`Tensor` of shape `[rows]`): tokens of each text before that.
        end_token_id (`int`): the model's.
    """
    candidates = (input_ids.int(), (input_ids == end_token_id).int())
    return bool(torch.stack([each.argmax(dim=1) >= lengths for each in candidates]).any())


def _lengthened(inputs: dict[str, Any], length: int, pad_token_id: int) -> dict[str, Any]:
    missing = length - text_length(inputs)
    if missing == 0:
        return inputs
    fillers = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    return {
        name: F.pad(value, (0, missing), value=fillers[name]) if name in fillers else value
        for name, value in inputs.items()
    }


def _stackable(value: Any, other: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape[1:] == other.shape[1:]
