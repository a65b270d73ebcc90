"""What is known of a model whose loss is CLIP's: embeddings, temperature, and how inputs may be filled up."""

import math
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPModel

from ..losses import contrastive_loss
from .inputs import filled_up, num_rows, text_length


# Texts are filled up to multiples of this where shapes are static.
TEXT_STEP = 16


class ContrastiveModel:
    """A `CLIPModel`, as it is or with adapters.

    Args:
        model (`nn.Module`): the model as it is called: compiled, under autocast, with adapters.
        clip (`CLIPModel`): the model inside.
        prepare_inputs (`Callable`): moves inputs to the device.
        static_shapes (`bool`): whether batches are filled up to a few fixed sizes. The rows that fill them do not take
            part in the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        clip: CLIPModel,
        prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]],
        static_shapes: bool = False,
    ):
        self.model = model
        self.clip = clip
        self.prepare_inputs = prepare_inputs
        self.static_shapes = static_shapes

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    @property
    def embedding_size(self) -> int:
        return self.clip.config.projection_dim

    @property
    def pad_token_id(self) -> int:
        return self.clip.config.text_config.pad_token_id

    def prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs on the device, filled up if shapes are static."""
        inputs = self.prepare_inputs(inputs)
        if not self.static_shapes:
            return inputs
        longest = self.clip.config.text_config.max_position_embeddings
        length = min(_next_multiple(text_length(inputs), TEXT_STEP), longest)
        return filled_up(inputs, static_rows(num_rows(inputs)), length, self.pad_token_id)

    def encode(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Normalised image and text embeddings, `[rows, d]` each."""
        outputs = self.model(**self.prepared(inputs))
        return outputs.image_embeds[: num_rows(inputs)], outputs.text_embeds[: num_rows(inputs)]

    def compute_loss(self, inputs: dict[str, Any]) -> Tensor:
        """The contrastive loss of one microbatch, a scalar."""
        return contrastive_loss(*self.encode(inputs), self.logit_scale)


def contrastive_base(model: nn.Module) -> CLIPModel | None:
    """The `CLIPModel` in a model, if there is one and it has the loss that it came with."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base if isinstance(base, CLIPModel) and type(base).forward is CLIPModel.forward else None


def static_rows(rows: int) -> int:
    """The next of a few sizes. Poisson samples deviate by the root of their size; steps of two deviations, in powers
    of two, make a handful of sizes do."""
    step = max(8, 2 ** round(math.log2(2 * math.sqrt(rows))))
    return _next_multiple(rows, step)


def _next_multiple(number: int, factor: int) -> int:
    return math.ceil(number / factor) * factor
