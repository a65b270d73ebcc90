"""Three ways to turn a forward batch into clipped gradients in the mechanism, all with the same result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from .arguments import DPTrainingArguments
from .dataloader import DrawnMicrobatch, LoadedChunks, MicrobatchDataset
from .gradients import (
    ContrastiveModel,
    MeanLossModel,
    Microbatch,
    NotVectorizable,
    VectorizableModel,
    accumulate_chunked_gradient,
    accumulate_gradient,
    group_microbatches,
    mean_loss_base,
    microbatch_gradients,
    vectorization_obstacle,
)
from .gradients.vectorizable import WITH_CAUSAL_TEXTS
from .privacy import GaussianMechanism
from .seeding import preserved_generators, seeded


if TYPE_CHECKING:
    from .trainer import DPCLIPTrainer

logger = logging.get_logger(__name__)

# Major compute capabilities of the GPUs on which PyTorch leaves attention in bfloat16 to cuDNN.
WITH_CUDNN_ATTENTION = (9, 10)


@contextmanager
def without_collectives() -> Iterator[None]:
    """Raises `RuntimeError` if processes communicate inside, as in a loss that gathers embeddings: each computes a
    microbatch of its own, and a record would change the gradients of all of these."""
    before = _num_collectives()
    yield
    if _num_collectives() != before:
        raise RuntimeError(
            "the model or its loss gathers over processes, so that a record would change the gradients of all of them "
            "and not of its own microbatch alone: use a loss of what one process has. To contrast pairs of all "
            "processes, raise microbatch_size."
        )


def _num_collectives() -> int:
    """How many collective operations there have been so far, in all process groups."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0
    return sum(group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map)


@dataclass(frozen=True)
class OneByOne:
    """One forward and one backward pass per microbatch. Works for every model and every loss.

    Args:
        mechanism ([`~privacy.GaussianMechanism`]): receives the gradients.
        compute_loss (`Callable`): from the collated inputs of a microbatch to its loss.
        backward (`Callable`): runs the backward pass.
    """

    mechanism: GaussianMechanism
    compute_loss: Callable[[dict[str, Any]], Tensor]
    backward: Callable[[Tensor], None]

    def __call__(self, forward_batch: list[Microbatch]) -> list[Tensor]:
        """Adds the clipped gradients of the collated microbatches to the step's sum. Returns their losses."""
        losses = []
        for seed, microbatch in forward_batch:
            with self.mechanism.microbatch(), seeded(seed), without_collectives():
                losses.append(accumulate_gradient(self.compute_loss, self.backward, microbatch))
        return losses


@dataclass
class AllAtOnce:
    """One forward and one backward pass for all microbatches of a forward batch.

    How a microbatch is computed depends on the model and on the microbatch itself, never on what else was drawn.

    Args:
        one_by_one ([`OneByOne`]): takes over for good if the first pass shows that the model cannot be vectorized, and
            each time for microbatches whose inputs cannot.
        model ([`~gradients.VectorizableModel`]): the model in training.
    """

    one_by_one: OneByOne
    model: VectorizableModel
    # Whether the model can be vectorized, which is unknown before the first pass.
    possible: bool | None = field(default=None, init=False)

    def __call__(self, forward_batch: list[Microbatch]) -> list[Tensor]:
        """As [`OneByOne`]. Raises `RuntimeError` if the model could be vectorized before, and no longer can."""
        if self.possible is False:
            return self.one_by_one(forward_batch)
        groups, others = group_microbatches(self.model, forward_batch)
        try:
            losses = [loss for group in groups for loss in self._of_group(group)]
        except NotVectorizable as reason:
            # This was the very first group, so nothing was added yet. The microbatches are passed on as they were
            # drawn: dropout would draw other numbers for padded texts than in later passes, and which microbatches
            # are in this pass depends on the sizes of all.
            _log_why_one_by_one(str(reason))
            self.possible = False
            return self.one_by_one(forward_batch)
        return losses + self.one_by_one(others)

    def _of_group(self, microbatches: list[Microbatch]) -> list[Tensor]:
        try:
            losses, gradients = microbatch_gradients(self.model, microbatches, self.one_by_one.backward)
        except NotVectorizable as reason:
            if self.possible:
                raise RuntimeError(
                    f"microbatches could be computed all at once so far, and no longer: {reason}. What the model does "
                    "must not depend on the records, or on the step: let its forward pass be the same in all of them."
                ) from reason
            raise
        self.possible = True
        self.one_by_one.mechanism.add(gradients.norms, gradients.weighted_sum)
        return list(losses)


@dataclass(frozen=True)
class ChunkByChunk:
    """Microbatches larger than a forward batch: the exact gradient of each, in chunks of that size.

    Args:
        mechanism ([`~privacy.GaussianMechanism`]): receives the gradients.
        model ([`~gradients.ContrastiveModel`]): the model in training.
        dataset ([`MicrobatchDataset`]): reads and collates the records of a chunk.
        accelerator (`Accelerator`): runs the backward pass and gathers embeddings.
        args ([`DPTrainingArguments`]): the size of a chunk, and how data is loaded.
    """

    mechanism: GaussianMechanism
    model: ContrastiveModel
    dataset: MicrobatchDataset
    accelerator: Accelerator
    args: DPTrainingArguments

    def __call__(self, forward_batch: list[DrawnMicrobatch]) -> list[Tensor]:
        """As [`OneByOne`], from record numbers."""
        spans = self.args.microbatch_spans_processes
        adding = self.mechanism.spanning_microbatch if spans else self.mechanism.microbatch
        gathering = (self._gather, self.accelerator.process_index) if spans else ()
        losses = []
        for seed, records in forward_batch:
            chunks = LoadedChunks(self.dataset, seed, records, self.args)
            # Each iteration of a loader draws a random number, and how many there are depends on the records.
            with adding(), preserved_generators():
                losses.append(accumulate_chunked_gradient(self.model, chunks, self.accelerator.backward, *gathering))
        return losses

    def _gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes, which may have different numbers of them, and the index where its own begin."""
        count = torch.tensor([len(rows)], device=rows.device)
        counts = self.accelerator.gather(count).tolist()
        padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
        parts = self.accelerator.gather(padded).split(max(max(counts), 1))
        everyone = torch.cat([part[:count] for part, count in zip(parts, counts)])
        return everyone, sum(counts[: self.accelerator.process_index])


def make_contrastive_model(trainer: "DPCLIPTrainer") -> ContrastiveModel | None:
    """The model in training, if its loss is known to be CLIP's or SigLIP's."""
    base, static_shapes = trainer.contrastive_base, trainer.args.static_shapes
    if base is None:
        return None
    model = ContrastiveModel(
        _unwrapped_model(trainer), base, trainer._prepare_inputs, bool(static_shapes), trainer.public_negatives
    )
    if static_shapes is None:
        model.static_shapes = static_by_default(model, trainer.accelerator)
    return model


def static_by_default(model: ContrastiveModel, accelerator: Accelerator) -> bool:
    """Whether batches can be padded, and one of a new size costs more: cuDNN plans attention for each size, which may
    take longer than a step, and nearly every Poisson sample has a new size."""
    if accelerator.device.type != "cuda" or torch.version.hip is not None:
        return False
    narrow = accelerator.mixed_precision == "bf16" or model.base.dtype == torch.bfloat16
    in_cudnn = narrow and torch.cuda.get_device_capability(accelerator.device)[0] in WITH_CUDNN_ATTENTION
    return in_cudnn and isinstance(model.base, WITH_CAUSAL_TEXTS) and not model.has_dropout


def choose_forward_pass(
    trainer: "DPCLIPTrainer",
    mechanism: GaussianMechanism,
    dataset: MicrobatchDataset,
    contrastive: ContrastiveModel | None,
) -> OneByOne | AllAtOnce | ChunkByChunk:
    """The fastest of the three that gives the exact result for the trainer's model and loss."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.chunked:
        return ChunkByChunk(mechanism, contrastive, dataset, accelerator, args)
    if contrastive is None:
        model = _unwrapped_model(trainer)
        one_by_one = OneByOne(
            mechanism,
            lambda inputs: trainer.compute_loss(model, trainer._prepare_inputs(inputs)),
            accelerator.backward,
        )
    else:
        one_by_one = OneByOne(mechanism, contrastive.compute_loss, accelerator.backward)
    if args.num_microbatches * args.per_device_train_batch_size == args.expected_batch_size:
        return one_by_one
    vectorizable = contrastive or _make_mean_loss_model(trainer)
    reason = _obstacle(trainer, vectorizable)
    if reason is None:
        return AllAtOnce(one_by_one, vectorizable)
    _log_why_one_by_one(reason)
    if contrastive is not None:
        # Small microbatches have few sizes anyway, and would be padded to several times theirs.
        contrastive.static_shapes = bool(args.static_shapes)
    return one_by_one


def _make_mean_loss_model(trainer: "DPCLIPTrainer") -> MeanLossModel | None:
    base = mean_loss_base(trainer.model)
    if base is None or trainer.label_smoother is not None or not trainer.minimises_own_loss:
        return None
    return MeanLossModel(_unwrapped_model(trainer), base, trainer._prepare_inputs)


def _unwrapped_model(trainer: "DPCLIPTrainer") -> nn.Module:
    """Not through DDP, which would average gradients over processes before each is clipped."""
    return trainer.accelerator.unwrap_model(trainer.model_wrapped)


def _obstacle(trainer: "DPCLIPTrainer", vectorizable: VectorizableModel | None) -> str | None:
    if not trainer.args.vectorized:
        return "vectorized=False"
    if vectorizable is None:
        return "this model, loss or _prepare_inputs is not known to give the same result for several of them at once"
    if trainer.public_negatives is not None and trainer.args.public_negatives_gradient:
        return "public_negatives_gradient=True encodes the public negatives anew for each"
    if vectorizable.static_shapes and vectorizable.has_dropout:
        return "what dropout draws for one would depend on how far static_shapes=True pads all"
    return vectorization_obstacle(_unwrapped_model(trainer))


def _log_why_one_by_one(reason: str) -> None:
    """Logs once why a step takes longer than it could."""
    logger.warning_once(f"Microbatches are computed one after another: {reason}. The result is the same.")
