"""The exact gradient of one microbatch that does not fit into memory, chunk by chunk and over several processes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..seeding import seeded
from .contrastive import ContrastiveModel


# From the rows of this process to those of all processes, and the number of the first own one among them.
Gather = Callable[[Tensor], tuple[Tensor, int]]


def accumulate_chunked_gradient(
    model: ContrastiveModel,
    chunks: Iterable[tuple[int, dict[str, Any]]],
    backward: Callable[[Tensor], None],
    gather: Gather | None = None,
    process: int = 0,
) -> Tensor:
    """Leaves the gradient of the contrastive loss on all chunks together in `Parameter.grad`.

    The loss needs the embeddings only, which are small. They are computed chunk by chunk without a graph; the gradient
    of the loss with respect to them is carried on to the parameters in a second pass, again chunk by chunk.

    Args:
        model ([`ContrastiveModel`]): the model in training.
        chunks (`Iterable`): the seed of the randomness and the collated inputs of each chunk. Gone through twice, and
            must give the same twice.
        backward (`Callable`): runs the backward pass, e.g. `Accelerator.backward`.
        gather (`Callable`, *optional*): puts the rows of all processes together, where a microbatch spans several
            processes. What is then left in `Parameter.grad` is this process's part of the sum.

    Returns the loss, detached; 0 if there is no pair in any chunk.

    Reference: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (2021).
    """
    own, captions = _embeddings(model, chunks)
    rows, first = gather(own) if gather else (own, 0)
    if len(rows) == 0:
        return torch.zeros((), device=own.device)
    captions, _ = gather(captions) if gather else (captions, 0)
    rows.requires_grad_()
    temperature = model.temperature if process == 0 else [each.detach() for each in model.temperature]
    loss = model.loss(*rows.chunk(2, dim=1), temperature, captions)
    backward(loss)
    _carry_on(model, chunks, rows.grad[first : first + len(own)])
    return loss.detach()


def _embeddings(model: ContrastiveModel, chunks: Iterable[tuple[int, dict[str, Any]]]) -> tuple[Tensor, Tensor]:
    """`[rows, 2 d]`: the image embeddings of all chunks, and beside them the text embeddings; the captions' keys."""
    device = model.base.logit_scale.device
    embeddings = [torch.empty(0, 2 * model.embedding_size, device=device)]
    captions = [torch.empty(0, dtype=torch.int64, device=device)]
    with torch.no_grad():
        for seed, inputs in chunks:
            with seeded(seed):
                embeddings.append(torch.cat(model.encode(inputs), dim=1).float())
            captions.append(model.captions(inputs))
    return torch.cat(embeddings), torch.cat(captions)


def _carry_on(model: ContrastiveModel, chunks: Iterable[tuple[int, dict[str, Any]]], gradients: Tensor) -> None:
    """From the gradient with respect to the embeddings to that with respect to the parameters."""
    first = 0
    for seed, inputs in chunks:
        with seeded(seed):
            embeddings = torch.cat(model.encode(inputs), dim=1)
        embeddings.backward(gradients[first : first + len(embeddings)].to(embeddings.dtype))
        first += len(embeddings)
