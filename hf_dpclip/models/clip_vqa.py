"""Visual question answering with CLIP: a small head on the embeddings of image and question."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForVisualQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput


class CLIPVQAConfig(PreTrainedConfig):
    """
    Configuration of [`CLIPForVisualQuestionAnswering`].

    Args:
        clip_config (`CLIPConfig` or `dict`, *optional*): the CLIP inside. Defaults to that of ViT-B/32.
        head_hidden_size (`int`, *optional*, defaults to 128): width of the head's hidden layer.
        kwargs: further fields of [`~transformers.PreTrainedConfig`]: `id2label` names the answers.
    """

    model_type = "clip_vqa"
    sub_configs = {"clip_config": CLIPConfig}  # noqa: RUF012

    def __init__(self, clip_config: CLIPConfig | dict | None = None, head_hidden_size: int = 128, **kwargs):
        self.clip_config = clip_config if isinstance(clip_config, CLIPConfig) else CLIPConfig(**(clip_config or {}))
        self.head_hidden_size = head_hidden_size
        super().__init__(**kwargs)


class AnswerHead(nn.Module):
    """Logits of the answers, `[records, num_labels]`, from embeddings of images and questions, `[records, d]` each.

    It reads both, and their elementwise product, which shows what they have in common ("is there a *red* shape?").
    """

    def __init__(self, config: CLIPVQAConfig):
        super().__init__()
        size = config.clip_config.projection_dim
        self.image_norm = nn.LayerNorm(size)
        self.question_norm = nn.LayerNorm(size)
        self.hidden = nn.Linear(3 * size, config.head_hidden_size)
        self.activation = nn.GELU()
        self.classifier = nn.Linear(config.head_hidden_size, config.num_labels)

    def forward(self, images: Tensor, questions: Tensor) -> Tensor:
        images, questions = self.image_norm(images), self.question_norm(questions)
        fused = torch.cat([images, questions, images * questions], dim=-1)
        return self.classifier(self.activation(self.hidden(fused)))


class CLIPForVisualQuestionAnswering(PreTrainedModel):
    """
    CLIP that chooses one of a fixed set of answers to a question about an image.

    The loss is a mean over records, none of which sees another. With `microbatch_size=1` each record is therefore
    clipped by itself: ordinary per-example DP-SGD, Δ = C (`docs/privacy.md`, "The theorem").

    Args:
        config ([`CLIPVQAConfig`]): the CLIP inside, the head, and the answers.

    Example:
        ```python
        clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        model = CLIPForVisualQuestionAnswering.from_clip(clip, answers=["yes", "no", "red"])
        batch = VisualQuestionCollator(processor, label2id=model.config.label2id)([train_dataset[0]])
        model(**batch).loss
        ```
    """

    config_class = CLIPVQAConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: CLIPVQAConfig):
        super().__init__(config)
        self.clip = CLIPModel(config.clip_config)
        # This loss does not use the temperature of a contrastive one, but noise would still change it.
        del self.clip.logit_scale
        self.head = AnswerHead(config)
        self.post_init()

    @classmethod
    def from_clip(cls, clip: CLIPModel, answers: list[str], **kwargs) -> "CLIPForVisualQuestionAnswering":
        """A model with the weights of `clip`, copied, and a new head.

        Args:
            clip (`CLIPModel`): where to start.
            answers (`list[str]`): what may be answered. The label of an answer is its position here.
            kwargs: further fields of [`CLIPVQAConfig`].

        Raises `ValueError` if an answer occurs twice, and for anything but a `CLIPModel` and a list or tuple of
        strings.
        """
        if not isinstance(clip, CLIPModel):
            raise ValueError(
                f"clip is a {type(clip).__name__}, not a CLIPModel: load one with CLIPModel.from_pretrained; merge "
                "adapters first, with merge_and_unload()."
            )
        # The strings of a set have another order, and so other labels, in every process.
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(
                f"answers must be a list of strings, as in answers=['yes', 'no'], not {answers!r}: the label of an "
                "answer is its place in the list, so give those of a set an order, as in sorted(answers)."
            )
        if not answers or len(set(answers)) < len(answers):
            raise ValueError(f"answers must be at least one and differ from one another, not {answers}.")
        labels = {answer: label for label, answer in enumerate(answers)}
        model = cls(CLIPVQAConfig(clip.config.to_dict(), id2label=dict(enumerate(answers)), label2id=labels, **kwargs))
        # Where the weights come from, for whoever asks what they have cost.
        model.clip.config._name_or_path = clip.config._name_or_path
        model.clip.load_state_dict({k: v for k, v in clip.state_dict().items() if k != "logit_scale"})
        return model.to(clip.dtype)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of all answers, `[records, num_labels]`, and the mean cross entropy if `labels` are given.

        Args:
            pixel_values (`Tensor` of shape `[records, channels, height, width]`): images.
            input_ids, attention_mask (`Tensor` of shape `[records, length]`): questions.
            labels (`Tensor` of shape `[records]`, *optional*): numbers of the right answers.
        """
        images = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        questions = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        logits = self.head(images, questions)
        loss = None if labels is None else self.record_losses(logits, labels).mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @staticmethod
    def record_losses(logits: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of each record, `[records]`, float32. The loss is their mean."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # Keeps activations of the same size for any width: small ones would drown in noise.
            init.normal_(module.weight, std=module.in_features**-0.5)


AutoConfig.register(CLIPVQAConfig.model_type, CLIPVQAConfig)
AutoModelForVisualQuestionAnswering.register(CLIPVQAConfig, CLIPForVisualQuestionAnswering)
