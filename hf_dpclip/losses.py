"""The contrastive loss of CLIP, for one microbatch or for many at once."""

import torch
from torch import Tensor


def contrastive_losses(image_embeds: Tensor, text_embeds: Tensor, logit_scales: Tensor, sizes: list[int]) -> Tensor:
    """CLIP's symmetric cross entropy of each microbatch, whose pairs are contrasted with one another only.

    Args:
        image_embeds, text_embeds (`Tensor` of shape `[N, d]`): normalised embeddings, the rows of the first microbatch
            first; rows beyond `sum(sizes)` are ignored.
        logit_scales (`Tensor` of shape `[K]`): logarithm of the inverse temperature, one for each microbatch.
        sizes (`list[int]`): rows of each of the K microbatches, at least one.

    Returns the K losses in float32. What is not finite in one microbatch stays there, in the gradients too.

    Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3.
    """
    counts = torch.tensor(sizes, device=image_embeds.device)
    present = torch.arange(max(sizes), device=counts.device) < counts[:, None]
    images, texts = (_blocks(embeds[: sum(sizes)], present) for embeds in (image_embeds, text_embeds))
    logits = logit_scales.float().exp()[:, None, None] * (texts @ images.transpose(1, 2))
    over_images = logits.masked_fill(~present[:, None, :], -torch.inf).logsumexp(dim=2)
    over_texts = logits.masked_fill(~present[:, :, None], -torch.inf).logsumexp(dim=1)
    losses = (over_images + over_texts) / 2 - logits.diagonal(dim1=1, dim2=2)
    return losses.where(present, 0).sum(dim=1) / counts


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """The same for one microbatch, a scalar."""
    return contrastive_losses(image_embeds, text_embeds, logit_scale.view(1), [len(image_embeds)])[0]


def _blocks(embeds: Tensor, present: Tensor) -> Tensor:
    """`[N, d]` to `[K, M, d]`. Missing rows are zeros, not copies of others, whose gradients they could spoil."""
    blocks = embeds.new_zeros(*present.shape, embeds.shape[-1], dtype=torch.float32)
    return blocks.index_put(present.nonzero(as_tuple=True), embeds.float())
