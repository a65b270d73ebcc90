"""Warnings when a trainer is made, on the console only, about what its guarantee does not cover."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .collators import AudioTextCollator, ImageTextCollator, tokenizer_of
from .digests import LOOKED_AT, file_digests, image_columns
from .model_history import steps_of
from .models import base_model
from .privacy import STATEMENT_NAME
from .privacy_section import NOT_PRIVATE
from .records import holds_texts
from .resuming import readable_statement


if TYPE_CHECKING:
    from .trainer import DPCLIPTrainer

logger = logging.get_logger(__name__)

# Texts whose tokens are counted, which takes less than a second.
COUNTED_TEXTS = 1_000


def warn(trainer: "DPCLIPTrainer", public_negatives: list[str] | Dataset | None) -> None:
    """Gives all warnings of this module. To be called before a tracker records the console."""
    dataset, collator, unit_column = trainer.train_dataset, trainer.data_collator, trainer.args.privacy_unit_column
    warn_of_private_start(trainer.model)
    warn_of_records(dataset, collator, unit_column)
    warn_of_private_captions(dataset, collator, public_negatives, unit_column)
    warn_of_evaluation_without_negatives(trainer)


def warn_of_records(dataset: Any, collator: Callable, unit_column: str | None) -> None:
    """Warns of what training makes less of than the records hold, or protects less than it may seem to."""
    if unit_column is None:
        warn_of_shared_images(dataset)
    warn_of_cut_texts(collator, dataset)


def warn_of_private_start(model: nn.Module) -> None:
    """Warns if the model comes from another private run, whose cost adds to that of this run: another trainer had it,
    it was loaded from the folder of such a run, or it has adapters that were trained before."""
    steps = steps_of(model)
    if steps:
        _warn_of_earlier(f"the model, or a part of it, was trained before, in {steps:,} steps")
    elif _has_trained_adapters(model):
        _warn_of_earlier("the adapters that the model has were trained before")
    # Towers may have been loaded one by one.
    parts = (module for module in base_model(model).modules() if isinstance(module, PreTrainedModel))
    for folder in dict.fromkeys(part.config._name_or_path for part in parts):
        statement = readable_statement(Path(folder)) if folder else None
        if statement is None or not (statement.steps or statement.not_private_because):
            continue
        spent = statement.spent
        cost = f"spent ε = {spent.epsilon:.4g} at δ = {spent.delta:.3g}"
        if statement.not_private_because:
            cost = f"is {NOT_PRIVATE} ({'; '.join(statement.not_private_because)})"
        _warn_of_earlier(f"the model starts from {folder}, which {cost}")


def _warn_of_earlier(training: str) -> None:
    logger.warning(
        f"{training}. If that was on the private records of this run, or of the same people, both costs add up, and "
        f"the {STATEMENT_NAME} of this run will count only its own: begin with the weights as they were before, or "
        "give both runs one ledger_path, which has the total. To go on with the other run, call train of its own "
        "trainer again, or use resume_from_checkpoint."
    )


def _has_trained_adapters(model: nn.Module) -> bool:
    """Whether LoRA's second factors, which begin at zero unless they are initialised otherwise, are no longer so."""
    if not isinstance(model, PeftModel):
        return False
    starts = [getattr(config, "init_lora_weights", None) for config in model.peft_config.values()]
    begin_at_zero = all(start in (True, "gaussian") for start in starts)
    return begin_at_zero and any("lora_B" in name and bool(each.any()) for name, each in model.named_parameters())


def warn_of_shared_images(dataset: Any) -> None:
    """Warns if records share their image with other ones, as captions of one image do.

    The message counts private records: it is for the console of whoever holds them, and is not part of any log.
    """
    if not isinstance(dataset, Dataset):
        return
    looked_at = dataset.select(range(min(len(dataset), LOOKED_AT)))
    for column in image_columns(dataset):
        shared = _records_that_share(looked_at, column)
        if shared:
            logger.warning(
                f"{shared:,} of the {len(looked_at):,} records looked at share their {column!r} with another record. "
                "Each record is protected by itself, which says less about an image with all its records: set "
                "privacy_unit_column to a column that names the image, or whom it shows. (For your eyes only: this "
                "counts private records.)"
            )


def warn_of_private_captions(
    private: Any, collator: Callable, public: list[str] | Dataset | None, unit_column: str | None = None
) -> None:
    """Warns of public captions that occur in the records of a single privacy unit, as captions taken from there do.

    Class prompts occur in many records. The message counts private records, and is not part of any log.
    """
    if public is None or not isinstance(collator, ImageTextCollator) or collator.text_column is None:
        return
    column = collator.text_column
    if not holds_texts(private, column) or (isinstance(public, Dataset) and not holds_texts(public, column)):
        return
    texts = _texts(private, column)
    if unit_column is not None:
        # Each caption of a unit once.
        texts = [caption for _, caption in {*zip(private.with_format(None)[unit_column][:], texts)}]
    times = Counter(texts)
    captions = _texts(public, column) if isinstance(public, Dataset) else public
    rare = sum(times[caption] == 1 for caption in captions)
    if rare:
        logger.warning(
            f"{rare:,} of the {len(public):,} public_negatives are the caption of one private "
            f"{unit_column or 'record'} each. If they were taken from there, the guarantee does not cover what they "
            "reveal: give captions of another source, or class prompts. (For your eyes only: this counts private "
            "records.)"
        )


def warn_of_cut_texts(collator: Callable, dataset: Any) -> None:
    """Warns if texts have more tokens than the model reads.

    The message counts private records: it is for the console of whoever holds them, and is not part of any log.
    """
    if not isinstance(collator, ImageTextCollator | AudioTextCollator) or collator.text_column is None:
        return
    column = collator.text_column
    if not holds_texts(dataset, column):
        return
    first = dataset.select_columns([column])[:COUNTED_TEXTS][column]
    # A user's own collator may handle missing texts.
    texts = [text for text in first if isinstance(text, str)]
    # A copy: a tokenizer remembers how it was called, and is saved with the weights.
    tokenizer = copy.deepcopy(tokenizer_of(collator.processor))
    limit = tokenizer.model_max_length
    cut = sum(len(tokens) > limit for tokens in tokenizer(texts, verbose=False)["input_ids"]) if texts else 0
    if cut:
        logger.warning(
            f"{cut:,} of the first {len(texts):,} texts have more than the {limit} tokens that the model reads; the "
            "rest of them is cut off. Let what matters come first, or make several records of one, with a "
            "privacy_unit_column that says which belong together. (For your eyes only: this counts private records.)"
        )


def warn_of_evaluation_without_negatives(trainer: "DPCLIPTrainer") -> None:
    """Warns if each pair of the evaluation data would be contrasted with none."""
    if trainer.eval_dataset is not None and trainer.contrastive_base is not None and trainer.args.eval_batch_size == 1:
        logger.warning(
            "per_device_eval_batch_size=1 contrasts each pair with none, so eval_loss does not tell how well they are "
            "told apart: set it to 2 or more, and the same wherever losses are compared."
        )


def _texts(dataset: Dataset, column: str) -> Iterable[str]:
    return dataset.with_format(None)[column][:]


def _records_that_share(dataset: Dataset, column: str) -> int:
    counts = Counter(file_digests(dataset, column))
    del counts[None]
    return sum(count for count in counts.values() if count > 1)
