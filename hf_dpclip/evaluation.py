"""Evaluation on held-out records: zero-shot classification, and `compute_metrics` for a trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, ProcessorMixin

from .collators import encoded_texts
from .metrics import RetrievalRecall, VQAAccuracy, ZeroShotAccuracy
from .privacy.sampling import split_by_label
from .records import UNDECODABLE, check_image, unreadable, unreadable_message


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside, and in its earlier mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def zero_shot_accuracy(
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: Dataset,
    prompts: list[str],
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 256,
) -> float:
    """Share of images whose own class prompt is the most similar of all prompts.

    Args:
        model (`nn.Module`): returns `logits_per_image`.
        processor ([`~transformers.ProcessorMixin`]): tokenizer and image processor of the model.
        dataset (`Dataset`): held-out images and their class numbers; not the private training records.
        prompts (`list[str]`): one caption per class number.
        batch_size (`int`, *optional*, defaults to 256): images per forward pass.

    Raises `ValueError` for missing columns or prompts, and for an image that cannot be decoded: it names its record.
    """
    missing = [column for column in (image_column, label_column) if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r} (it has {dataset.column_names}): name its own with "
            "image_column=... and label_column=..."
        )
    if not prompts:
        raise ValueError("there are no prompts to choose from: give one for each class.")
    if len(dataset) == 0:
        raise ValueError("the dataset has no records: give images to be classified.")
    device = next(model.parameters()).device
    text = encoded_texts(processor, prompts).to(device)
    metric = ZeroShotAccuracy()
    with in_evaluation_mode(model):
        for start in range(0, len(dataset), batch_size):
            batch = _decoded(dataset, range(start, min(start + batch_size, len(dataset))))
            images = [check_image(image, image_column).convert("RGB") for image in batch[image_column]]
            pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
            logits = model(pixel_values=pixel_values, **text).logits_per_image
            metric.add_batch(predictions=logits.float().cpu().numpy(), references=batch[label_column])
    return metric.compute()["accuracy"]


def keep_embeddings(outputs: tuple, labels: tuple) -> tuple[Tensor, Tensor]:
    """`preprocess_logits_for_metrics` for [`retrieval_recall`]: embeddings of images and texts, `[rows, d]` each.

    Without it the `Trainer` gathers the hidden states of both towers and similarities within batches too.

    Args:
        outputs (`tuple`): what a `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel` returns, without the loss.
    """
    _, _, text_embeds, image_embeds, *_ = outputs
    return image_embeds, text_embeds


def retrieval_recall(
    prediction: EvalPrediction, image_ids: Sequence | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """`compute_metrics` for image-text retrieval among all records of `eval_dataset`.

    Args:
        prediction ([`~transformers.EvalPrediction`]): embeddings, as [`keep_embeddings`] returns them.
        image_ids (`Sequence`, *optional*): of each record, which image it shows, in the order of the dataset. By
            default every record has an image of its own.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): as in [`~metrics.RetrievalRecall`].

    Raises `ValueError` if there is not one id for each record.

    Example:
        ```python
        trainer = DPCLIPTrainer(
            model,
            args,
            collator,
            train_dataset,
            eval_dataset=held_out,
            compute_metrics=functools.partial(retrieval_recall, image_ids=held_out["image_id"]),
            preprocess_logits_for_metrics=keep_embeddings,
        )
        trainer.evaluate()  # {"eval_image_to_text_recall@1": 0.41, ...}
        ```
    """
    if len(prediction.predictions) != 2:
        raise ValueError(
            f"retrieval_recall needs embeddings of images and texts, not {len(prediction.predictions)} outputs: pass "
            "preprocess_logits_for_metrics=keep_embeddings to the trainer."
        )
    images, texts = tuple(prediction.predictions)
    if image_ids is not None:
        images, texts = _by_image(images, texts, image_ids)
    # In memory: every process of a trainer computes all by itself, and would wait for the files of the others.
    return RetrievalRecall(ks=ks, keep_in_memory=True).compute(predictions=images, references=texts)


def vqa_accuracy(prediction: EvalPrediction, id2label: dict[int, str]) -> dict[str, float]:
    """`compute_metrics` for [`CLIPForVisualQuestionAnswering`], whose labels are the single true answers.

    Args:
        prediction ([`~transformers.EvalPrediction`]): logits of shape `[records, num_labels]`, and labels.
        id2label (`dict[int, str]`): the answers, `model.config.id2label`.

    Example:
        ```python
        compute_metrics = functools.partial(vqa_accuracy, id2label=model.config.id2label)
        trainer = DPCLIPTrainer(model, args, collator, train_dataset, held_out, compute_metrics=compute_metrics)
        ```
    """
    answers = [id2label[label] for label in np.argmax(prediction.predictions, axis=-1).tolist()]
    references = [id2label[label] for label in np.asarray(prediction.label_ids).tolist()]
    return VQAAccuracy(keep_in_memory=True).compute(predictions=answers, references=references)


def _decoded(dataset: Dataset, rows: range) -> dict[str, list]:
    """The columns of some records. Raises `ValueError` that names the record with an image that cannot be decoded."""
    try:
        return dataset[rows]
    except UNDECODABLE as error:
        row, cause = next(unreadable(dataset, rows), (rows.start, error))
        raise ValueError(unreadable_message(dataset, row, cause)) from cause


def _by_image(images: np.ndarray, texts: np.ndarray, image_ids: Sequence) -> tuple[np.ndarray, list[np.ndarray]]:
    """One embedding per image, and for each image those of its captions."""
    if len(image_ids) != len(images):
        raise ValueError(f"there are {len(image_ids)} image_ids for {len(images)} records: give one for each.")
    _, first, image_of_row = np.unique(image_ids, return_index=True, return_inverse=True)
    return images[first], split_by_label(texts, image_of_row, len(first))
