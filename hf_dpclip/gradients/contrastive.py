"""Models with CLIP's or SigLIP's loss: their embeddings, temperature and padding."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AltCLIPModel,
    ChineseCLIPModel,
    CLIPModel,
    MetaClip2Model,
    PreTrainedModel,
    Siglip2Model,
    SiglipModel,
    VisionTextDualEncoderModel,
)

from ..losses import PublicEmbeddings, contrastive_losses, sigmoid_losses
from ..models import base_model
from .inputs import can_be_padded, caption_keys, num_rows, pad_batch, text_length, without_return_loss
from .vectorizable import VectorizableModel


# The models whose own loss is known, by loss. All return normalised `image_embeds` and `text_embeds`.
WITH_CLIP_LOSS = (CLIPModel, AltCLIPModel, ChineseCLIPModel, MetaClip2Model, VisionTextDualEncoderModel)
WITH_SIGMOID_LOSS = (SiglipModel, Siglip2Model)


class Negatives(Protocol):
    """Gives the embeddings of public negatives."""

    def embeddings(self, model: "ContrastiveModel") -> PublicEmbeddings: ...


@dataclass(eq=False, repr=False)
class ContrastiveModel(VectorizableModel):
    """A model with CLIP's or SigLIP's loss, as it is or with adapters.

    Args:
        model (`nn.Module`): the model as it is called: compiled, under autocast, with adapters.
        base (`PreTrainedModel`): the model inside, one of `WITH_CLIP_LOSS` or `WITH_SIGMOID_LOSS`.
        prepare_inputs (`Callable`): moves inputs to the device.
        static_shapes (`bool`): whether batches are padded to a few fixed sizes. The rows of padding take no part in
            the loss.
        public_negatives ([`Negatives`], *optional*): what every microbatch is contrasted with beside its own pairs.
    """

    public_negatives: Negatives | None = None

    @property
    def scalars(self) -> list[nn.Parameter]:
        """The parameters that turn similarities into logits: the logarithm of the scale, and SigLIP's bias."""
        return [self.base.logit_scale, self.base.logit_bias] if self._sigmoid else [self.base.logit_scale]

    @property
    def _sigmoid(self) -> bool:
        return isinstance(self.base, WITH_SIGMOID_LOSS)

    @property
    def embedding_size(self) -> int:
        config = self.base.config
        return config.vision_config.hidden_size if self._sigmoid else config.projection_dim

    @property
    def towers(self) -> PreTrainedModel:
        return self.base

    def prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs on the device, padded if shapes are static and it is known how."""
        inputs = self.prepare_inputs(without_return_loss(inputs))
        if not (self.static_shapes and can_be_padded(inputs)):
            return inputs
        length = self.padded_length(text_length(inputs))
        return pad_batch(inputs, static_rows(num_rows(inputs)), length, self.pad_token_id)

    def encode(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Normalised image and text embeddings, `[rows, d]` each."""
        outputs = self.model(**self.prepared(inputs))
        return outputs.image_embeds[: num_rows(inputs)], outputs.text_embeds[: num_rows(inputs)]

    def embed_images(self, inputs: dict[str, Any]) -> Tensor:
        """Normalised embeddings of images alone, `[rows, d]`, float32."""
        return F.normalize(self.base.get_image_features(**self.prepare_inputs(inputs)).pooler_output.float(), dim=1)

    def embed_texts(self, inputs: dict[str, Any]) -> Tensor:
        """Normalised embeddings of texts alone, `[rows, d]`, float32."""
        return F.normalize(self.base.get_text_features(**self.prepare_inputs(inputs)).pooler_output.float(), dim=1)

    def captions(self, inputs: dict[str, Any]) -> Tensor:
        """`[rows]`: keys that are equal where captions are."""
        return caption_keys(inputs, self.pad_token_id).to(self.base.logit_scale.device)

    def losses(
        self, image_embeds: Tensor, text_embeds: Tensor, scalars: list[Tensor], sizes: list[int], captions: Tensor
    ) -> Tensor:
        """The loss of each microbatch, `[K]`; each of `scalars` has one entry per microbatch."""
        function = sigmoid_losses if self._sigmoid else contrastive_losses
        public = None if self.public_negatives is None else self.public_negatives.embeddings(self)
        return function(image_embeds, text_embeds, *scalars, sizes, captions, public)

    def microbatch_losses(
        self, outputs: Any, inputs: dict[str, Any], scalars: list[Tensor], sizes: list[int]
    ) -> Tensor:
        return self.losses(outputs.image_embeds, outputs.text_embeds, scalars, sizes, self.captions(inputs))

    def loss(self, image_embeds: Tensor, text_embeds: Tensor, scalars: list[Tensor], captions: Tensor) -> Tensor:
        """The same for one microbatch, a scalar."""
        of_one = [each.view(1) for each in scalars]
        return self.losses(image_embeds, text_embeds, of_one, [len(image_embeds)], captions)[0]

    def compute_loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of one microbatch, a scalar, from its inputs."""
        return self.loss(*self.encode(inputs), self.scalars, self.captions(inputs))


def contrastive_base(model: nn.Module) -> PreTrainedModel | None:
    """The model inside its adapters, if it is one whose loss is known, with its own `forward`."""
    base = base_model(model)
    known = next((kind for kind in (*WITH_CLIP_LOSS, *WITH_SIGMOID_LOSS) if isinstance(base, kind)), None)
    return base if known is not None and type(base).forward is known.forward else None


def static_rows(rows: int) -> int:
    """The next larger of a few sizes. Poisson samples deviate by the root of their size: with steps of two deviations,
    rounded to powers of two, a handful of sizes occur."""
    step = max(8, 2 ** round(math.log2(2 * math.sqrt(rows))))
    return math.ceil(rows / step) * step
