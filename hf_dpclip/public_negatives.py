"""Public images and captions as negatives, with which even a single private pair can be contrasted."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, Image

from .collators import ImageTextCollator, encoded_texts
from .digests import column_digests
from .evaluation import in_evaluation_mode
from .gradients import ContrastiveModel
from .gradients.inputs import num_rows, without_return_loss
from .losses import PublicEmbeddings
from .records import shortened


# The inputs for images; all others are for texts.
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class PublicNegatives:
    """Encodes public negatives in chunks, with the current weights.

    They must not be derived from the private records: then they are constants of the mechanism, and a microbatch of
    one pair has something to be contrasted with, so that the sensitivity is C (`docs/privacy.md`, "Public negatives").

    Args:
        chunks (`list[dict]`): collated inputs of images, of captions, or of both side by side.
        with_gradient (`bool`): whether the loss reaches the encoders through the negatives too.
        steps (`int`): optimizer steps for which embeddings without gradient are kept.
    """

    def __init__(self, chunks: list[dict[str, Any]], with_gradient: bool = False, steps: int = 1):
        self.chunks = [without_return_loss(chunk) for chunk in chunks]
        self.with_gradient = with_gradient
        self.steps = steps
        self._steps_left = 0
        self._kept: PublicEmbeddings | None = None

    def __len__(self) -> int:
        """The number of public records."""
        return sum(num_rows(chunk) for chunk in self.chunks)

    def forget(self) -> None:
        """Drops embeddings that were made with other weights. To be called when training begins."""
        self._steps_left = 0

    def begin_step(self, model: ContrastiveModel) -> None:
        """To be called before the first forward pass of every optimizer step, whatever was drawn: the time at which
        negatives are encoded must not depend on the private records."""
        if self.with_gradient:
            return
        if self._steps_left == 0:
            self._kept, self._steps_left = self._encode_without_gradient(model), self.steps
        self._steps_left -= 1

    def embeddings(self, model: ContrastiveModel) -> PublicEmbeddings:
        """The current embeddings if they have gradients, else those of the last step in which they were encoded."""
        return self._encode(model) if self.with_gradient else self._kept

    @torch.no_grad()
    def _encode_without_gradient(self, model: ContrastiveModel) -> PublicEmbeddings:
        with in_evaluation_mode(model.base):
            return self._encode(model)

    def _encode(self, model: ContrastiveModel) -> PublicEmbeddings:
        nothing = torch.empty(0, model.embedding_size, device=model.base.logit_scale.device)
        images, texts, keys = [nothing], [nothing], [torch.empty(0, dtype=torch.int64, device=nothing.device)]
        for chunk in self.chunks:
            of_images = {name: value for name, value in chunk.items() if name in IMAGE_INPUTS}
            of_texts = {name: value for name, value in chunk.items() if name not in IMAGE_INPUTS}
            if of_images:
                images.append(model.embed_images(of_images))
            if of_texts:
                texts.append(model.embed_texts(of_texts))
                keys.append(model.captions(of_texts))
        captions = torch.cat(keys)
        embedded = torch.cat(images), torch.cat(texts)
        paired = len(embedded[0]) == len(captions)
        return PublicEmbeddings(*embedded, captions if paired else None, captions)


def collate_public_negatives(
    public: Sequence[str] | Dataset, collator: Callable, processor: Any, batch_size: int
) -> list[dict[str, Any]]:
    """The collated chunks of public captions, images or pairs.

    Args:
        public (`Sequence[str]` or `Dataset`): captions; or records with the private ones' column of images, that of
            captions, or both.
        collator (`Callable`): that of the private records.
        processor: tokenizer or processor, for captions.
        batch_size (`int`): records in a chunk.

    Raises `ValueError` for anything else, and if it is empty.
    """
    if isinstance(public, Sequence | Dataset) and len(public) == 0:
        raise ValueError("public_negatives is empty: give captions, images or pairs, or leave it out.")
    if isinstance(public, Sequence) and not isinstance(public, str):
        _check_captions(public)
        processor = collator.processor if isinstance(collator, ImageTextCollator) else processor
        if processor is None:
            raise ValueError("public_negatives are captions, which need processing_class=processor to be encoded.")
        return [dict(encoded_texts(processor, captions)) for captions in _batches(public, batch_size)]
    if isinstance(public, Dataset):
        if isinstance(collator, ImageTextCollator):
            collator = collator.for_public(public.column_names)
        return [dict(collator(records)) for records in _batches(public, batch_size)]
    raise ValueError(
        f"public_negatives is a {type(public).__name__}: give a list of captions, or a datasets.Dataset with the "
        "image column, the caption column or both."
    )


def _check_captions(captions: Sequence[Any]) -> None:
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"public_negatives[{number}] is {shortened(repr(caption))}, which is no caption: give a list of "
                "captions alone, or a datasets.Dataset with images."
            )


def shared_rows(private: Any, public: Any) -> int:
    """How many rows of a public dataset are recognised as private ones, by their images.

    Captions are not looked at: class prompts are public and stand in every labelled dataset.
    """
    if not isinstance(private, Dataset) or not isinstance(public, Dataset):
        return 0
    if private is public or private._fingerprint == public._fingerprint:
        return len(public)
    columns = [name for name in public.column_names if _holds_images(public, name) and _holds_images(private, name)]
    known = {name: {*column_digests(private, name)} - {None} for name in columns}
    return max((sum(digest in known[name] for digest in column_digests(public, name)) for name in columns), default=0)


def _holds_images(dataset: Dataset, column: str) -> bool:
    return column in dataset.column_names and (isinstance(dataset.features[column], Image) or column == "pixel_values")


def _batches(records: Any, size: int) -> Iterator[list]:
    for start in range(0, len(records), size):
        yield [records[row] for row in range(start, min(start + size, len(records)))]
