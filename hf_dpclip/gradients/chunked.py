"""The exact gradient of one microbatch that does not fit into memory, chunk by chunk and over several processes."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..seeding import seeded
from .contrastive import ContrastiveModel


# From the rows of this process to those of all processes, and the index at which its own begin.
Gather = Callable[[Tensor], tuple[Tensor, int]]
# Up to so many chunks, on a single process, the graph of the last one is kept for the second pass. With more chunks,
# that saves little, and it would be in memory together with the logits of all pairs, which take as much.
FEW_CHUNKS = 8


class Chunks(Protocol):
    """The seed of the randomness and the collated inputs of each chunk, the same in every iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]: ...


def accumulate_chunked_gradient(
    model: ContrastiveModel,
    chunks: Chunks,
    backward: Callable[[Tensor], None],
    gather: Gather | None = None,
    process: int = 0,
) -> Tensor:
    """Leaves the gradient of the contrastive loss on all chunks together in `Parameter.grad`.

    The loss needs the embeddings only, which are small. They are computed chunk by chunk without a graph; the gradient
    of the loss with respect to them is carried on to the parameters in a second pass, again chunk by chunk. If there
    are few chunks, the last keeps its graph and is computed only once; on several processes, only a single one does.

    Args:
        model ([`ContrastiveModel`]): the model in training.
        chunks ([`Chunks`]): those of the microbatch, or of this process's share of it.
        backward (`Callable`): runs the backward pass, e.g. `Accelerator.backward`.
        gather (`Callable`, *optional*): concatenates the rows of all processes, where a microbatch spans several.
            What is left in `Parameter.grad` is then this process's part of the gradient, a sum over processes.
        process (`int`): its rank. Only process 0 has the gradient of the model's `scalars`.

    Returns the loss, detached; 0 if there is no pair in any chunk.

    Reference: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (2021).
    """
    keeps_last = 0 < len(chunks) <= (1 if gather else FEW_CHUNKS)
    embeddings, captions = _embeddings(model, chunks, keeps_last)
    own = torch.cat([_no_rows(model), *(chunk.detach().float() for chunk in embeddings)])
    rows, first = gather(own) if gather else (own, 0)
    if len(rows) == 0:
        return torch.zeros((), device=own.device)
    captions, _ = gather(captions) if gather else (captions, 0)
    rows.requires_grad_()
    scalars = model.scalars if process == 0 else [each.detach() for each in model.scalars]
    loss = model.loss(*rows.chunk(2, dim=1), scalars, captions)
    backward(loss)
    parts = list(rows.grad[first : first + len(own)].split([len(chunk) for chunk in embeddings]))
    if keeps_last:
        _backward(embeddings.pop(), parts.pop())
    # `parts` comes first in `zip`: when none is left, no chunk is read.
    for part, (seed, inputs) in zip(parts, chunks):
        _backward(_encode(model, seed, inputs), part)
    return loss.detach()


def _no_rows(model: ContrastiveModel) -> Tensor:
    return torch.empty(0, 2 * model.embedding_size, device=model.base.logit_scale.device)


def _embeddings(model: ContrastiveModel, chunks: Chunks, keeps_last: bool) -> tuple[list[Tensor], Tensor]:
    """`[rows, 2 d]` of each chunk, image embeddings beside those of the texts; and the captions' keys of all."""
    embeddings = []
    captions = [torch.empty(0, dtype=torch.int64, device=model.base.logit_scale.device)]
    for number, (seed, inputs) in enumerate(chunks, start=1):
        with torch.set_grad_enabled(keeps_last and number == len(chunks)):
            embeddings.append(_encode(model, seed, inputs))
        captions.append(model.captions(inputs))
    return embeddings, torch.cat(captions)


def _encode(model: ContrastiveModel, seed: int, inputs: dict[str, Any]) -> Tensor:
    with seeded(seed):
        return torch.cat(model.encode(inputs), dim=1)


def _backward(embeddings: Tensor, gradients: Tensor) -> None:
    """From the gradient with respect to embeddings to that with respect to the parameters, if any are trained."""
    if embeddings.requires_grad:
        embeddings.backward(gradients.to(embeddings.dtype))
