"""Refusals of data: what cannot be sampled, collated or read by the model, and private records among public data."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, VisionTextDualEncoderModel
from transformers.tokenization_utils_base import LARGE_INTEGER

from .collators import ImageTextCollator, PairCollator, VisualQuestionCollator, tokenizer_of
from .dataloader import MicrobatchDataset
from .gradients import contrastive_base
from .models import CLIPForVisualQuestionAnswering
from .public_negatives import shared_rows
from .reading import apart
from .record_ids import RecordIds
from .records import first_record, has_random_access


# The number of private records that are collated at most, to see whether they can be.
COLLATED = 8
# Text models whose position ids begin after that of the padding token.
POSITIONS_BEHIND_PADDING = (
    "altclip_text_model",
    "camembert",
    "data2vec-text",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def check_dataset(dataset: Dataset, name: str = "train_dataset") -> None:
    """Raises `ValueError` for a dataset that Poisson sampling cannot draw from."""
    splits = dataset.values() if isinstance(dataset, dict) else ()
    if splits and all(isinstance(split, Dataset | datasets.Dataset) for split in splits):
        raise ValueError(f"{name} has several splits ({', '.join(dataset)}): pass one of them, as dataset['train'].")
    if type(dataset).__name__ == "DataFrame":
        library = type(dataset).__module__.split(".")[0]
        raise ValueError(f"{name} is a DataFrame: convert it with datasets.Dataset.from_{library}({name}).")
    if isinstance(dataset, dict | str):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, not a dataset: make one of columns with "
            "datasets.Dataset.from_dict, and load one by its name with hf_dpclip.data.load_pairs."
        )
    if not has_random_access(dataset):
        raise ValueError(
            f"{type(dataset).__name__} has no random access, which Poisson sampling needs: load the dataset with "
            "streaming=False, or materialise it with datasets.Dataset.from_generator."
        )
    check_not_empty(dataset, name)


def check_not_empty(dataset: Any, name: str) -> None:
    """Raises `ValueError` for a dataset without records, as far as its length is known."""
    if has_random_access(dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty: check the split, and what filters have left of it.")


def check_records(collator: Callable, collated: Dataset | dict[str, Dataset] | None, name: str) -> None:
    """Raises `ValueError`, with the name of the dataset, for records that a collator of ours cannot collate."""
    if isinstance(collated, dict):
        for key, dataset in collated.items():
            check_records(collator, dataset, f"{name}[{key!r}]")
    elif isinstance(collated, str):
        check_dataset(collated, name)
    elif isinstance(collator, PairCollator) and has_random_access(collated) and len(collated) > 0:
        try:
            collator.check_records(collated)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def first_batch(dataset: MicrobatchDataset, microbatch_size: int) -> dict[str, Any]:
    """The first records, collated: as many as a microbatch has, but few. Raises `ValueError` if they cannot be."""
    dataset = replace(dataset, dataset=apart(dataset.dataset))
    try:
        ((_, batch),) = dataset[[(0, np.arange(min(microbatch_size, COLLATED, len(dataset))))]]
    except ValueError:
        raise
    except Exception as error:
        # A user's own data_collator may raise anything.
        raise ValueError(
            f"the data_collator cannot collate the first records ({type(error).__name__}: {error}): "
            # The Trainer wraps that of records that are no table.
            f"{_how_to_collate(getattr(dataset.collator, 'data_collator', dataset.collator))}"
        ) from error
    return batch


def _how_to_collate(collator: Callable) -> str:
    if isinstance(collator, PairCollator):
        return (
            f"mend what their columns {collator.columns} hold, or name others; "
            "hf_dpclip.data.unusable_records(dataset, collator) says what is wrong with each record."
        )
    return (
        "pass an ImageTextCollator with the columns of the dataset, or one that makes the model's inputs of such "
        "records."
    )


def check_encoded(model: PreTrainedModel | None, dataset: Dataset | None) -> None:
    """Raises `ValueError` for records without a collator that lack the encoded inputs that the model reads."""
    if model is None or dataset is None:
        return
    names = [*first_record(dataset)]
    missing = [name for name in ("pixel_values", "input_ids") if name not in names]
    if missing:
        raise ValueError(
            f"records have no {missing[0]!r} (they have {names}), which {type(model).__name__} reads: pass a "
            "processor as processing_class to encode images and texts, or encode them before."
        )


def check_model_reads_pairs(model: nn.Module, collator: Callable, batch: dict[str, Any]) -> None:
    """Raises `ValueError` if the model cannot read the batches of an [`ImageTextCollator`], such as `batch`.

    `model` is the one without adapters. Sizes are compared for dual encoders, whose configuration is known.
    """
    if not isinstance(collator, ImageTextCollator):
        return
    parameters = inspect.signature(model.forward).parameters
    # In models of transformers, **kwargs are options of the attention.
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    reads_anything = anything and not isinstance(model, PreTrainedModel)
    columns = {"pixel_values": collator.image_column, "input_ids": collator.text_column}
    unread = [name for name, column in columns.items() if column is not None and name not in parameters]
    if unread and not reads_anything:
        raise ValueError(
            f"{type(model).__name__} reads no {unread[0]}: choose a model of images and texts, e.g. CLIPModel, or "
            "pass a data_collator that makes what it reads."
        )
    if isinstance(collator, VisualQuestionCollator) and isinstance(model, CLIPForVisualQuestionAnswering):
        _check_labels(collator.label2id, model.config.num_labels)
    base = _dual_encoder(model)
    if base is not None and collator.text_column is not None:
        _check_tokenizer(tokenizer_of(collator.processor), base.config.text_config)
    # A vision tower of another family may interpolate its positions.
    if base is not None and "pixel_values" in batch and not isinstance(base, VisionTextDualEncoderModel):
        _check_image_size(batch["pixel_values"], base.config.vision_config)


def longest_text(model: nn.Module, collator: Callable) -> int | None:
    """The number of tokens of a text that the model, without adapters, reads at most. `None` where that is not known,
    and for our collators, whose tokenizer cuts texts at it."""
    base = _dual_encoder(model)
    if base is None or isinstance(collator, PairCollator):
        return None
    read, modules = base.config.text_config, base.text_model.named_modules()
    # Where a table was made longer, the configuration may not say so.
    tables = [module for name, module in modules if isinstance(module, nn.Embedding) and "position_embedding" in name]
    return _num_positions(read) + max([0, *(table.num_embeddings - read.max_position_embeddings for table in tables)])


def _dual_encoder(model: nn.Module) -> PreTrainedModel | None:
    return model.clip if isinstance(model, CLIPForVisualQuestionAnswering) else contrastive_base(model)


def check_answers_are_learnt(model: nn.Module, collator: Callable, batch: dict[str, Any]) -> None:
    """Raises `ValueError` for a model with a loss of its own that asks for answers and is given none, or the other way
    round. `model` is the one without adapters."""
    reads_labels = "labels" in inspect.signature(model.forward).parameters
    if isinstance(collator, VisualQuestionCollator) and isinstance(model, PreTrainedModel) and not reads_labels:
        raise ValueError(
            f"{type(model).__name__} reads no labels, so it would not learn the answers that the "
            "VisualQuestionCollator gives: pass a model that answers questions, as "
            "CLIPForVisualQuestionAnswering.from_clip(clip, answers=[...]) makes, or an ImageTextCollator."
        )
    if isinstance(model, CLIPForVisualQuestionAnswering) and "labels" not in batch:
        raise ValueError(
            f"{type(model).__name__} learns from answers, and the batches have no labels (only {[*batch]}): pass "
            "data_collator=VisualQuestionCollator(processor, label2id=model.config.label2id), or give encoded records "
            "a column 'labels'."
        )


def check_no_copies(train_dataset: Any) -> None:
    """Raises `ValueError` if a dataset lists a record several times, as after oversampling."""
    ids = RecordIds().of(train_dataset)
    copies = len(ids) - len(np.unique(ids))
    if copies:
        raise ValueError(
            f"train_dataset lists records more than once (oversampled, or repeated), {copies} times in all, and each "
            "copy would be protected as if it were another record: list each once and raise num_train_epochs, or, in "
            "a datasets.Dataset, set privacy_unit_column to a column that is equal for all copies."
        )


def check_public(train_dataset: Dataset, public_negatives: list[str] | datasets.Dataset) -> None:
    """Raises `ValueError` for public negatives that are recognised as private records."""
    shared = shared_rows(train_dataset, public_negatives)
    if shared:
        raise ValueError(
            f"{shared} of the {len(public_negatives)} public_negatives are records of the private train_dataset: what "
            "they reveal is not covered by the guarantee. Give images and captions of another source, or remove these "
            "records from train_dataset."
        )


def _check_labels(label2id: dict[str, int], num_labels: int):
    beyond = [label for label in label2id.values() if not 0 <= label < num_labels]
    if beyond:
        raise ValueError(
            f"label2id has label {beyond[0]}, but the model gives {num_labels} answers: pass model.config.label2id."
        )


def _num_positions(read: PreTrainedConfig) -> int:
    behind_padding = read.model_type in POSITIONS_BEHIND_PADDING
    return read.max_position_embeddings - (read.pad_token_id + 1 if behind_padding else 0)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, read: PreTrainedConfig):
    longest = _num_positions(read)
    cut = tokenizer.model_max_length
    if cut > longest:
        cuts = "cuts no text, since it has no limit" if cut > LARGE_INTEGER else f"cuts texts at {cut} tokens"
        raise ValueError(
            f"the tokenizer {cuts}, but the model reads at most {longest} tokens: set "
            f"processor.tokenizer.model_max_length = {longest}."
        )
    if len(tokenizer) > read.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, the model {read.vocab_size}: use the processor that "
            "belongs to the model, from the same checkpoint."
        )


def _check_image_size(pixel_values: Tensor, read: PreTrainedConfig):
    if pixel_values.dim() != 4:
        # These are patches of images of any size.
        return
    made, wanted = list(pixel_values.shape[-2:]), np.broadcast_to(read.image_size, 2).tolist()
    if made != wanted:
        raise ValueError(
            f"the processor makes images of {made[0]} x {made[1]} pixels, the model reads {wanted[0]} x {wanted[1]}: "
            "use the processor that belongs to the model, from the same checkpoint."
        )
