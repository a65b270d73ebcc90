"""A fine-tune to be audited: on labelled images, some of which are canaries with wrong labels."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from scipy import stats
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from ..arguments import DPTrainingArguments
from ..collators import ImageTextCollator, encoded_texts
from ..data import caption_by_label, class_prompts
from ..evaluation import in_evaluation_mode
from ..models import lora_config
from ..models.lora import holds_adapters
from ..presets import PRESETS
from ..trainer import DPCLIPTrainer
from .one_run import Canaries, RunAudit, audit_run
from .small_clip import small_clip, small_processor


UNCLIPPED = 1e6
# Without privacy, the white-box adversary looks at every 25th release: all would take longer than the training.
LOOK_EVERY = 25
# Expected batch size of a private run.
PRIVATE_BATCH = 256


@dataclass(frozen=True)
class Membership:
    """Membership inference on randomly split records, half of which were trained on.

    Args:
        members, others (`np.ndarray`): scores; larger ones speak for membership.
    """

    members: np.ndarray
    others: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the ROC curve: how often a member scores higher than another record."""
        wins = stats.mannwhitneyu(self.members, self.others).statistic
        return float(wins / (len(self.members) * len(self.others)))

    def true_positive_rate(self, false_positive_rate: float = 0.01) -> float:
        """Share of members found, at a threshold with this false positive rate."""
        return float(np.mean(self.members > np.quantile(self.others, 1 - false_positive_rate)))

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rates at all thresholds, ascending."""
        thresholds = np.sort(np.concatenate([self.members, self.others]))[::-1]
        return tuple(
            np.searchsorted(np.sort(-scores), -thresholds, side="right") / len(scores)
            for scores in (self.others, self.members)
        )


@dataclass(frozen=True)
class FineTuneAudit:
    """What an audited fine-tune showed.

    Args:
        run ([`RunAudit`]): by its canaries.
        canaries ([`Membership`]): the same canaries, by their final losses.
        membership ([`Membership`]): of ordinary records, by their final losses.
        accuracy (`float`): on the held-out records.
        start ([`Membership`]): of the same ordinary records, by their losses before training, which show how far the
            two halves differ by chance.
        accuracy_at_start (`float`): on the held-out records before training.
    """

    run: RunAudit
    canaries: Membership
    membership: Membership
    accuracy: float
    start: Membership
    accuracy_at_start: float

    def to_dict(self) -> dict[str, Any]:
        """What `hf-dpclip audit run --json` prints; ε is `None` if it is infinite."""
        values = dataclasses.asdict(self.run)
        if not math.isfinite(self.run.claimed_epsilon):
            values["claimed_epsilon"] = None
        rates = {"auc": self.membership.auc, "tpr_at_1%_fpr": self.membership.true_positive_rate()}
        return {**values, **rates, "auc_at_start": self.start.auc, "accuracy": self.accuracy}


@dataclass(frozen=True)
class FineTune:
    """The model, the data and the training of an audited run.

    Args:
        model_name_or_path (`str`, *optional*): a `CLIPModel`; by default a small one with random weights.
        dataset_name (`str`): one of the presets.
        num_members, num_canaries (`int`): ordinary records, of which as many more are held out, and canaries.
        lora_rank (`int`): 0 trains all parameters.
    """

    model_name_or_path: str | Path | None = None
    dataset_name: str = "mnist-5k"
    num_members: int = 600
    num_canaries: int = 300
    lora_rank: int = 0

    def audit(self, target_epsilon: float | None, max_steps: int | None = None) -> FineTuneAudit:
        """Trains and attacks.

        Args:
            target_epsilon (`float`, *optional*): ε of the run; `None` trains without privacy.
            max_steps (`int`, *optional*): defaults to a number at which the model learns well, or, without privacy, at
                which it memorises wrong labels.

        Raises `ValueError` for an unknown dataset, too few records, or no step, and as [`load_model`] does.
        """
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps={max_steps} is not possible: expected a whole number of at least 1.")
        if target_epsilon is not None and self.num_canaries + self.num_members < PRIVATE_BATCH:
            raise ValueError(
                f"{self.num_canaries} canaries and {self.num_members} other records are fewer than the "
                f"{PRIVATE_BATCH} of an expected batch: ask for more of them."
            )
        with TemporaryDirectory() as folder:
            return self._audit(self._arguments(folder, target_epsilon, max_steps))

    def _audit(self, args: DPTrainingArguments) -> FineTuneAudit:
        model, processor = self._model_and_processor()
        canaries, members, others, prompts = self.records()
        collator = ImageTextCollator(processor, text_column="caption")
        trainer = DPCLIPTrainer(
            model,
            args,
            collator,
            concatenate_datasets([members, canaries]),
            processing_class=processor,
            public_negatives=prompts,
        )
        of_canaries, *of_records = [LabelLosses(each, processor, prompts) for each in (canaries, members, others)]
        start, accuracy_at_start = _attack(trainer.model, *of_records)
        tossed = Canaries.toss(np.arange(len(members), len(members) + len(canaries)))
        every = LOOK_EVERY if args.non_private else 1
        run = audit_run(trainer, tossed, of_canaries, every=every)
        scores = of_canaries.scores(trainer.model)
        by_coin = Membership(scores[tossed.included], scores[~tossed.included])
        return FineTuneAudit(run, by_coin, *_attack(trainer.model, *of_records), start, accuracy_at_start)

    def records(self) -> tuple[Dataset, Dataset, Dataset, list[str]]:
        """Canaries, members and others, from one draw and without overlap, and the class prompts."""
        if min(self.num_canaries, self.num_members) < 1:
            raise ValueError(
                f"{self.num_canaries} canaries and {self.num_members} other records show nothing: give at least 1 of "
                "both, better hundreds."
            )
        dataset, template = drawn(self.dataset_name), PRESETS[self.dataset_name].template
        ends = np.cumsum([self.num_canaries, self.num_members, self.num_members])
        if ends[-1] > len(dataset):
            raise ValueError(
                f"{self.num_canaries} canaries and twice {self.num_members} records are more than the {len(dataset)} "
                f"of {self.dataset_name}: ask for fewer of them."
            )
        names = dataset.features["label"].names
        mislabelled = dataset.select(range(ends[0])).map(partial(_mislabel, classes=len(names)), with_indices=True)
        parts = mislabelled, dataset.select(range(ends[0], ends[1])), dataset.select(range(ends[1], ends[2]))
        captioned = [caption_by_label(part, "label", template) for part in parts]
        return *captioned, class_prompts(names, template)

    def _model_and_processor(self) -> tuple[nn.Module, Any]:
        path = self.model_name_or_path
        model, processor = (small_clip(), small_processor()) if path is None else load_model(path)
        model.logit_scale.requires_grad_(False)
        return get_peft_model(model, lora_config(model, r=self.lora_rank)) if self.lora_rank else model, processor

    @staticmethod
    def _arguments(output_dir: str, target_epsilon: float | None, max_steps: int | None) -> DPTrainingArguments:
        private = target_epsilon is not None
        return DPTrainingArguments(
            output_dir=output_dir,
            target_epsilon=target_epsilon,
            non_private=not private,
            # The theorem multiplies δ by the number of canaries: with 1/n, guesses would show nothing.
            target_delta=1e-6,
            max_grad_norm=1.0 if private else UNCLIPPED,
            per_device_train_batch_size=PRIVATE_BATCH if private else 64,
            max_steps=max_steps if max_steps is not None else 40 if private else 900,
            microbatch_size=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )


def load_model(name: str | Path) -> tuple[nn.Module, Any]:
    """A model and its processor. Raises `ValueError` if they cannot be loaded, and for adapters, which are loaded for
    inference."""
    try:
        model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={str(name)!r} is no model with a processor, neither a folder here nor on the Hub "
            f"({error}): name a CLIPModel with its processor, or leave it out for a small one."
        ) from error
    if holds_adapters(model):
        raise ValueError(
            f"model_name_or_path={str(name)!r} holds adapters, and all weights are to be audited: name the model that "
            "they were merged into, as PeftModel.from_pretrained(base, folder).merge_and_unload() gives it."
        )
    return model, processor


@cache
def drawn(dataset_name: str) -> Dataset:
    """All training records of a preset in a random order, the same each time. Raises `ValueError` if there is none."""
    if dataset_name not in PRESETS:
        raise ValueError(f"dataset_name={dataset_name!r} is not known: choose one of {', '.join(PRESETS)}.")
    return PRESETS[dataset_name].load()["train"].shuffle(seed=0)


class LabelLosses:
    """The loss of a model on each of some labelled images, contrasted with all class prompts.

    Args:
        dataset (`Dataset`): columns `image` and `label`.
        processor, prompts: of the model, and one caption per class.
    """

    def __init__(self, dataset: Dataset, processor: Any, prompts: list[str]):
        images = [image.convert("RGB") for image in dataset["image"]]
        self.pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
        self.texts = encoded_texts(processor, prompts)
        self.labels = torch.tensor(dataset["label"])

    def __call__(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(self._logits(model), self.labels.to(model.device), reduction="none")

    @torch.no_grad()
    def scores(self, model: nn.Module) -> np.ndarray:
        """Negative losses: larger scores speak for membership."""
        return -self(model).cpu().numpy()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of images nearest to the prompt of their label."""
        return float((self._logits(model).argmax(dim=1).cpu() == self.labels).float().mean())

    def _logits(self, model: nn.Module) -> Tensor:
        pixel_values, texts = self.pixel_values.to(model.device), self.texts.to(model.device)
        with in_evaluation_mode(model):
            return model(pixel_values=pixel_values, **texts).logits_per_image.float()


def _attack(model: nn.Module, members: LabelLosses, others: LabelLosses) -> tuple[Membership, float]:
    """Membership inference, and the accuracy on the records that were not trained on."""
    return Membership(members.scores(model), others.scores(model)), others.accuracy(model)


def _mislabel(record: dict[str, Any], number: int, classes: int) -> dict[str, Any]:
    """A wrong class, each of them equally often."""
    return {"label": (record["label"] + 1 + number % (classes - 1)) % classes}
