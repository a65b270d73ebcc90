"""What has to be known of a model for many microbatches to be computed at once, and models whose loss is a mean."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel, MetaClip2Model, PreTrainedModel

from ..models import CLIPForVisualQuestionAnswering, base_model
from .inputs import is_read_into_padding, text_length
from .layout import Layout


# Models that read a text from its beginning to its end token only, so that what follows changes nothing.
WITH_CAUSAL_TEXTS = (CLIPModel, MetaClip2Model)
# The modules that define such text towers, which other models may have too.
CAUSAL_TEXTS = tuple(model.__module__ for model in WITH_CAUSAL_TEXTS)
# The modules of text towers whose embedding is that of the first position, and for which a mask says where texts end.
FIRST_POSITION_TEXTS = (
    "transformers.models.altclip.modeling_altclip",
    "transformers.models.bert.modeling_bert",
    "transformers.models.chinese_clip.modeling_chinese_clip",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
)

# Texts are padded to multiples of these: the second where shapes are static, the first elsewhere.
TEXT_STEP, STATIC_TEXT_STEP = 8, 16


@dataclass(eq=False, repr=False)
class VectorizableModel:
    """A model in training. Subclasses know its loss, and the `needed_inputs` that computing it takes.

    Args:
        model (`nn.Module`): the model as it is called: compiled, under autocast, with adapters.
        base (`PreTrainedModel`): the model inside.
        prepare_inputs (`Callable`): moves inputs to the device.
        static_shapes (`bool`): whether batches are padded to a few fixed sizes.
    """

    needed_inputs = frozenset({"input_ids", "pixel_values"})

    model: nn.Module
    base: PreTrainedModel
    prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]]
    static_shapes: bool = False

    @cached_property
    def trainable(self) -> list[nn.Parameter]:
        """All trainable parameters, which must stay the same ones during training."""
        return [parameter for parameter in self.base.parameters() if parameter.requires_grad]

    @cached_property
    def has_dropout(self) -> bool:
        """Whether any layer draws random numbers in training."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())

    @property
    def scalars(self) -> list[nn.Parameter]:
        """Parameters of one element that the loss reads itself, beside the outputs of the model."""
        return []

    @property
    def towers(self) -> PreTrainedModel:
        """The model that has `text_model` and `vision_model`, and a configuration with one part for each."""
        raise NotImplementedError

    @property
    def pad_token_id(self) -> int:
        """The token with which texts are padded."""
        return self.towers.config.text_config.pad_token_id

    @property
    def end_token_id(self) -> int:
        """The token up to which texts are read, if the text tower is among `CAUSAL_TEXTS`."""
        return self.towers.config.text_config.eos_token_id

    def hidden_state_size(self, inputs: dict[str, Any]) -> int:
        """Elements of the largest hidden state of one row: of all positions of its text, or all patches of its image,
        in the widest layer."""
        vision, text = self.towers.config.vision_config, self.towers.config.text_config
        # Patches need not be square.
        patch = vision.num_channels * int(np.prod(np.broadcast_to(vision.patch_size, 2)))
        patches = inputs["pixel_values"][0].numel() // patch
        return max(patches * vision.intermediate_size, text_length(inputs) * text.intermediate_size)

    def padded_length(self, length: int) -> int:
        """The length to which a text of `length` tokens is padded, so that few lengths occur."""
        step = STATIC_TEXT_STEP if self.static_shapes else TEXT_STEP
        longest = self.towers.config.text_config.max_position_embeddings
        return max(length, min(math.ceil(length / step) * step, longest))

    def changed_by_padding(self, texts: dict[str, Tensor], lengths: Tensor) -> Tensor:
        """`[rows]`: whether padding a text on the right would change what the model makes of it.

        Args:
            texts (`dict`): `input_ids`, and `attention_mask` if there is one, padded by at least one token.
            lengths (`Tensor` of shape `[rows]`): tokens of each text without padding.
        """
        mask = texts.get("attention_mask")
        changed = torch.zeros_like(lengths, dtype=torch.bool)
        tower = type(self.towers.text_model).__module__
        if tower in CAUSAL_TEXTS:
            changed |= is_read_into_padding(texts["input_ids"], lengths, self.end_token_id)
        elif tower not in FIRST_POSITION_TEXTS or mask is None:
            changed |= True
        if mask is not None:
            # A position that may attend to nothing attends to everything. If all may attend to the first, none does.
            changed |= mask[:, 0] == 0 if mask.dim() == 2 else True
        return changed

    def prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs as the model is given them."""
        raise NotImplementedError

    def microbatch_losses(
        self, outputs: Any, inputs: dict[str, Any], scalars: list[Tensor], sizes: list[int]
    ) -> Tensor:
        """The loss of each microbatch, `[K]`.

        Args:
            outputs: what the model returned for all microbatches together.
            inputs (`dict`): the inputs of all, one microbatch after another, before they were prepared.
            scalars (`list[Tensor]` of shape `[K]`): each of the model's `scalars`, repeated for each microbatch.
            sizes (`list[int]`): rows of each.
        """
        raise NotImplementedError


class MeanLossModel(VectorizableModel):
    """A model whose loss is the mean of `record_losses`, each of which depends on its own record only."""

    base: CLIPForVisualQuestionAnswering
    needed_inputs = frozenset({"input_ids", "pixel_values", "labels"})

    @property
    def towers(self) -> PreTrainedModel:
        return self.base.clip

    def prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.prepare_inputs(inputs)

    def microbatch_losses(
        self, outputs: Any, inputs: dict[str, Any], scalars: list[Tensor], sizes: list[int]
    ) -> Tensor:
        losses = self.base.record_losses(outputs.logits, inputs["labels"].to(outputs.logits.device))
        sums = Layout(sizes, len(losses), losses.device).sum_rows(losses)
        return sums / torch.tensor(sizes, device=losses.device)


def mean_loss_base(model: nn.Module) -> CLIPForVisualQuestionAnswering | None:
    """The model inside its adapters, if it is one whose loss is such a mean, with its own `forward`."""
    base = base_model(model)
    known = CLIPForVisualQuestionAnswering
    return base if isinstance(base, known) and type(base).forward is known.forward else None
