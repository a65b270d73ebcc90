"""Contrastive losses of many microbatches at once. Pairs are contrasted only with others of their microbatch.

Pairs with the same caption are no negatives of one another: telling "a photo of a coat" from "a photo of a coat" would
teach the model that a right match is wrong. Public images and captions are negatives of every microbatch; they do not
depend on the private records, so they are constants of the mechanism (`docs/privacy.md`, "Public negatives").
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PublicEmbeddings:
    """Public images and captions, with which every microbatch is contrasted beside its own pairs.

    Args:
        images (`Tensor` of shape `[P, d]`): normalised embeddings of public images, P = 0 for none.
        texts (`Tensor` of shape `[Q, d]`): normalised embeddings of public captions, Q = 0 for none.
        captions_of_images (`Tensor` of shape `[P]`, *optional*): keys of the captions of the images, if they have any.
        captions_of_texts (`Tensor` of shape `[Q]`): keys of the captions.
    """

    images: Tensor
    texts: Tensor
    captions_of_images: Tensor | None
    captions_of_texts: Tensor


def contrastive_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    sizes: list[int],
    captions: Tensor | None = None,
    public: PublicEmbeddings | None = None,
) -> Tensor:
    """CLIP's symmetric cross entropy (InfoNCE) of each microbatch.

    Args:
        image_embeds, text_embeds (`Tensor` of shape `[N, d]`): normalised embeddings, the rows of the first microbatch
            first; rows beyond `sum(sizes)` are ignored.
        logit_scales (`Tensor` of shape `[K]`): logarithm of the inverse temperature, one for each microbatch.
        sizes (`list[int]`): rows of each of the K microbatches, at least one.
        captions (`Tensor` of shape `[N]`, *optional*): keys of the captions; by default all captions differ.
        public ([`PublicEmbeddings`], *optional*): further negatives.

    Returns the K losses in float32. Values that are not finite stay in their own microbatch, in the gradients too.

    Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3.
    """
    blocks = _Blocks(image_embeds, text_embeds, sizes, captions)
    scales = logit_scales.float().exp()[:, None, None]
    logits = scales * blocks.similarities()
    contrasted = logits.masked_fill(~blocks.contrasted(), -torch.inf)
    over_images, over_texts = [contrasted], [contrasted.transpose(1, 2)]
    if public is not None:
        for_texts, for_images = blocks.public_similarities(public)
        known_images, known_texts = blocks.same_as_public(public)
        over_images.append((scales * for_texts).masked_fill(known_images, -torch.inf))
        over_texts.append((scales * for_images).masked_fill(known_texts, -torch.inf))
    normalisers = _logsumexp(over_images) + _logsumexp(over_texts)
    return blocks.means(normalisers / 2 - logits.diagonal(dim1=1, dim2=2))


def _logsumexp(parts: list[Tensor]) -> Tensor:
    """Over the last dimension of all parts together."""
    # One microbatch may be large: a single part is not copied.
    together = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return together.logsumexp(dim=2)


def sigmoid_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    logit_biases: Tensor,
    sizes: list[int],
    captions: Tensor | None = None,
    public: PublicEmbeddings | None = None,
) -> Tensor:
    """SigLIP's loss of each microbatch: every image-text combination is a yes-or-no question of its own.

    Args and return value are those of [`contrastive_losses`], and `logit_biases` (`Tensor` of shape `[K]`).
    The right answer is yes for combinations with the pair's own caption.

    Reference: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), algorithm 1.
    """
    blocks = _Blocks(image_embeds, text_embeds, sizes, captions)
    scales, biases = logit_scales.float().exp()[:, None, None], logit_biases.float()[:, None, None]
    losses = _answers(scales * blocks.similarities() + biases, blocks.same())
    rows = losses.where(blocks.present[:, None, :], 0).sum(dim=2)
    if public is not None:
        for similarities, same in zip(blocks.public_similarities(public), blocks.same_as_public(public)):
            rows = rows + _answers(scales * similarities + biases, same).sum(dim=2)
    return blocks.means(rows)


def _answers(logits: Tensor, yes: Tensor) -> Tensor:
    return -F.logsigmoid(torch.where(yes, logits, -logits))


class _Blocks:
    """The rows of all microbatches, `[N, d]`, as one block for each, `[K, M, d]`.

    Missing rows are zeros, not copies of others, whose gradients they could spoil.
    """

    def __init__(self, image_embeds: Tensor, text_embeds: Tensor, sizes: list[int], captions: Tensor | None):
        self.num_rows = sum(sizes)
        counts = torch.tensor(sizes)
        present = torch.arange(max(sizes)) < counts[:, None]
        # Computed on the CPU: on an accelerator, the number of positions would take a wait for the device.
        device = image_embeds.device
        self.counts, self.present = counts.to(device), present.to(device)
        self._positions = tuple(numbers.to(device) for numbers in present.nonzero(as_tuple=True))
        self.images, self.texts = self._block(image_embeds.float()), self._block(text_embeds.float())
        if captions is None:
            captions = torch.arange(self.num_rows, device=self.counts.device)
        self.captions = self._block(captions)

    def _block(self, rows: Tensor) -> Tensor:
        blocks = rows.new_zeros(*self.present.shape, *rows.shape[1:])
        return blocks.index_put(self._positions, rows[: self.num_rows])

    def similarities(self) -> Tensor:
        """`[K, M, M]`, texts by images."""
        return self.texts @ self.images.transpose(1, 2)

    def same(self) -> Tensor:
        """`[K, M, M]`: whether two pairs have the same caption, a pair and itself included."""
        return self.captions[:, :, None] == self.captions[:, None, :]

    def contrasted(self) -> Tensor:
        """`[K, M, M]`: whether a pair is contrasted with another. Always with itself, even in rows of padding."""
        itself = torch.eye(self.present.shape[1], dtype=torch.bool, device=self.present.device)
        return itself | (self.present[:, None, :] & self.present[:, :, None] & ~self.same())

    def public_similarities(self, public: PublicEmbeddings) -> tuple[Tensor, Tensor]:
        """`[K, M, P]` of texts by public images, `[K, M, Q]` of images by public captions."""
        return self.texts @ public.images.float().T, self.images @ public.texts.float().T

    def same_as_public(self, public: PublicEmbeddings) -> tuple[Tensor, Tensor]:
        """`[K, M, P]` and `[K, M, Q]`: whether a pair's caption is that of the public image, or the public caption."""
        keys = self.captions[:, :, None]
        known_texts = keys == public.captions_of_texts
        if public.captions_of_images is None:
            return torch.zeros_like(keys, dtype=torch.bool), known_texts
        return keys == public.captions_of_images, known_texts

    def means(self, rows: Tensor) -> Tensor:
        """`[K, M]` to `[K]`: means over the pairs of each microbatch, without padding."""
        return rows.where(self.present, 0).sum(dim=1) / self.counts
