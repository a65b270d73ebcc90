"""One forward and one backward pass per microbatch: right for every model and every loss."""

from collections.abc import Callable
from typing import Any

import torch


def accumulate_gradient(
    compute_loss: Callable[[dict[str, Any]], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    microbatch: dict[str, Any],
) -> torch.Tensor:
    """Leaves the gradient of the loss on one microbatch in `Parameter.grad`.

    Args:
        compute_loss (callable): from the microbatch's inputs to its scalar loss.
        backward (callable): runs the backward pass, e.g. `Accelerator.backward`.
        microbatch (`dict`): the inputs, collated; all of them take part in one loss.

    Returns the loss, detached. Raises `ValueError` for a loss that has no gradient or is not one number.
    """
    loss = compute_loss(microbatch)
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"the loss of a microbatch has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}: return "
            "one number that depends on the trainable parameters, e.g. the mean over records, and 0 * output.sum() "
            "where there is nothing to learn."
        )
    backward(loss)
    return loss.detach()
