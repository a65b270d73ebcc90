"""`DPCLIPTrainer`: Hugging Face's `Trainer` with a differentially private gradient.

One step, from the dataset to the optimizer: `get_train_dataloader` deals Poisson-drawn microbatches out to forward
passes, `training_step` computes and clips the gradient of each, `_clip_grad_norm` (which the training loop calls once
before every optimizer step) releases their noisy sum. Everything else is the `Trainer`'s.

The class comes in layers, from the bottom: `evaluating` (on records that are not private), `publishing` (logs, saved
folders, the Hub), `runs` (counting steps over several calls of `train`), `searching` (hyperparameters), this one.
"""

import inspect
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from . import caveats, data_validation, validation
from .arguments import DPTrainingArguments
from .collators import AudioTextCollator, ImageTextCollator, PairCollator, default_collator
from .dataloader import ForwardBatchSampler, MicrobatchDataset, RecordNumbers, draws_samples, make_dataloader
from .forward_pass import choose_forward_pass, make_contrastive_model
from .gradients import contrastive_base
from .guard import StepGuard, check_loss_is_frozen, check_optimizer
from .models import base_model
from .modules_in_use import modules_in_use
from .planning import make_plan, planned_values, steps_per_epoch
from .privacy import GaussianMechanism, PoissonSampler, PrivacyPlan, Randomness, SecureGaussianMechanism
from .privacy_units import PrivacyUnits
from .public_negatives import PublicNegatives, collate_public_negatives
from .records import needs_processing
from .reporting import use_own_callbacks
from .searching import SearchingTrainer
from .seeding import preserved_generators
from .tokenizer_state import TokenizerState


class DPCLIPTrainer(SearchingTrainer):
    """
    [`~transformers.Trainer`] whose result is (ε, δ)-differentially private in its training dataset.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a `CLIPModel`, a `SiglipModel` or the like (`docs/encoders.md`), or
            any model that returns a loss.
        args ([`DPTrainingArguments`]): training and privacy arguments.
        data_collator (`Callable`, *optional*): collates the records of one microbatch. Defaults to
            [`ImageTextCollator`], or [`AudioTextCollator`] for CLAP, if `processing_class` is a processor and the
            dataset is not yet encoded.
        train_dataset: map-style dataset of the private records.
        public_negatives (`list[str]` or `datasets.Dataset`, *optional*): captions, images or pairs, not derived from
            the private records, with which every microbatch is contrasted too. Allows `microbatch_size=1`.
        kwargs: everything else that [`~transformers.Trainer`] takes.

    Raises `ValueError`, before any training, for whatever the guarantee would not cover.

    Attributes:
        plan ([`PrivacyPlan`]): the contract of the run.

    Formal guarantees:
        The weights after `steps` steps, with every log and checkpoint on the way, are a post-processing of `steps`
        releases of [`~privacy.GaussianMechanism`] on Poisson samples, hence `privacy_spent()` = (ε, δ) of `plan`.
        Several calls of `train` compose, and so do the trials of `hyperparameter_search`.
    """

    # Made when training begins, or earlier if the training data loader is asked for.
    _sampler: PoissonSampler | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DPTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        public_negatives: list[str] | datasets.Dataset | None = None,
        **kwargs,
    ):
        if not isinstance(args, DPTrainingArguments):
            raise ValueError(
                f"args must be DPTrainingArguments, which carry target_epsilon, not {type(args).__name__}."
            )
        validation.check_call(model, data_collator, train_dataset, processing_class)
        if processing_class is None and isinstance(data_collator, ImageTextCollator | AudioTextCollator):
            # To be saved beside the weights, which are of no use without it.
            processing_class = data_collator.processor
        self._tokenizer_state = TokenizerState(processing_class or data_collator)
        if data_collator is None and needs_processing(train_dataset, processing_class):
            data_collator = default_collator(processing_class)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        forward = inspect.signature(base_model(self.model).forward).parameters
        # The Trainer looks for `return_loss=True` as the default, which no contrastive model has any more.
        self.can_return_loss = "return_loss" in forward
        validation.check_environment(self)
        validation.check_overrides(self)
        validation.check_model(self.model)
        validation.warn_of_adapters_made_from_records(self.model)
        if data_collator is None:
            data_validation.check_encoded(self.contrastive_base, train_dataset)
        self._check_loss_is_known(public_negatives is not None)
        self.public_negatives = None if public_negatives is None else self._make_public_negatives(public_negatives)
        self._held_out = []
        if train_dataset is None:
            self._begin_first_run(None)
        else:
            plan, units = self._make_plan()
            self._begin_first_run(plan)
            self._remember_planned(units)
            if self.is_world_process_zero():
                caveats.warn(self, public_negatives)
        use_own_callbacks(self)

    # ---- The plan ----

    def begin_run(self) -> None:
        """As in [`RunningTrainer`]. Raises `ValueError` for arguments that construction would not have accepted."""
        self._check_has_plan()
        self.args.check()
        self._check_loss_is_known(self.public_negatives is not None)
        plan, units = self._make_plan()
        self._begin_run(plan)
        self._remember_planned(units)

    def _remember_planned(self, units: PrivacyUnits) -> None:
        """Remembers what the plan was made from, which must not change from now on."""
        self._units = units
        self._planned_values = planned_values(self.args)
        self._sampler = None

    # Random draws of a transform for private records must not show in weights initialised later, or in checkpoints.
    @preserved_generators()
    def _make_plan(self) -> tuple[PrivacyPlan, PrivacyUnits]:
        args = self.args
        self._held_out = []
        self._check_held_out(self.eval_dataset, "eval_dataset")
        microbatch_size = args.expected_batch_size // args.num_microbatches
        contrasts_in_batch = self.can_return_loss and self.compute_loss_func is None and self.public_negatives is None
        validation.check_negatives_exist(microbatch_size, contrasts_in_batch)
        data_validation.check_records(self.data_collator, self.train_dataset, "train_dataset")
        data_validation.check_records(self.data_collator, self.eval_dataset, "eval_dataset")
        batch = data_validation.first_batch(self._microbatch_dataset(), microbatch_size)
        data_validation.check_model_reads_pairs(base_model(self.model), self.data_collator, batch)
        if self.minimises_own_loss:
            data_validation.check_answers_are_learnt(base_model(self.model), self.data_collator, batch)
        if args.privacy_unit_column is None and not (args.non_private or args.log_private_statistics):
            data_validation.check_no_copies(self.train_dataset)
        units = PrivacyUnits(self.train_dataset, args.privacy_unit_column, args.max_records_per_unit)
        return make_plan(args, len(units)), units

    def _make_public_negatives(self, public: list[str] | datasets.Dataset) -> PublicNegatives:
        data_validation.check_public(self.train_dataset, public)
        size = self.args.per_device_train_batch_size
        chunks = collate_public_negatives(public, self.data_collator, self.processing_class, size)
        return PublicNegatives(chunks, self.args.public_negatives_gradient, self.args.public_negatives_steps)

    # ---- What is minimised ----

    @property
    def contrastive_base(self) -> PreTrainedModel | None:
        """The known contrastive model under the adapters, if the trainer minimises the model's own loss."""
        return contrastive_base(self.model) if self.minimises_own_loss else None

    @property
    def minimises_own_loss(self) -> bool:
        """Whether the loss is the one that the model returns for what was collated, and no other."""
        own = (DPCLIPTrainer.compute_loss, DPCLIPTrainer._prepare_inputs, DPCLIPTrainer._prepare_input)
        return self.compute_loss_func is None and not validation.is_overridden(self, *own)

    def _check_loss_is_known(self, has_public_negatives: bool) -> None:
        validation.check_loss_is_known(self.args, self.contrastive_base, has_public_negatives)

    # ---- One step ----

    def get_train_dataloader(self) -> DataLoader:
        """Forward batches of Poisson-drawn microbatches, the share of this process.

        Raises `ValueError` if there is no training dataset, or another one than was planned for.
        """
        self._check_has_plan()
        if self._sampler is None:
            self._draw_randomness()
        if self.train_dataset is not self._units.dataset:
            raise ValueError("the privacy plan was made for another train_dataset: make a new DPCLIPTrainer for this.")
        sampler = ForwardBatchSampler(
            self._sampler,
            self._units,
            steps_per_epoch(self.plan.num_examples, self.plan.expected_batch_size),
            self._planned_values["gradient_accumulation_steps"],
            self.args.process_index,
            self.args.world_size,
            self.args.microbatch_spans_processes,
        )
        # Chunks are read where they are computed.
        dataset = RecordNumbers(self._units.num_records) if self.args.chunked else self._microbatch_dataset()
        return make_dataloader(dataset, sampler, self.args)

    def num_examples(self, dataloader: DataLoader) -> int:
        """As in the `Trainer`; of the training data, n privacy units. How many records they have is not public."""
        return self.plan.num_examples if draws_samples(dataloader) else super().num_examples(dataloader)

    def prepare_mechanism(self) -> None:
        """Binds the mechanism to the model's trainable parameters. Called when training begins.

        Raises `ValueError` for a model, an optimizer or a data loader that the guarantee does not cover.
        """
        if not draws_samples(self.callback_handler.train_dataloader):
            raise ValueError(
                "get_train_dataloader was overridden, and what it returns does not draw the samples that the "
                "guarantee rests on: return what super().get_train_dataloader() gives."
            )
        validation.check_model(self.model)
        validation.check_overrides(self)
        # Once more, since methods can be replaced after construction.
        self._check_loss_is_known(self.public_negatives is not None)
        validation.set_precision()
        if self.public_negatives is not None:
            self.public_negatives.forget()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        check_optimizer(self.optimizer, parameters)
        process, num_processes = self.args.process_index, self.args.world_size
        mechanism = SecureGaussianMechanism if self.args.secure_noise else GaussianMechanism
        self._mechanism = mechanism(self.plan, parameters, self._noise, process, num_processes)
        in_use, held = modules_in_use(self)
        check_loss_is_frozen(in_use, parameters)
        self._guard = StepGuard(in_use, held, self._planned_values["gradient_accumulation_steps"])
        self._contrastive_model = make_contrastive_model(self)
        self._forward_pass = choose_forward_pass(
            self, self._mechanism, self._microbatch_dataset(), self._contrastive_model
        )

    def training_step(self, model: nn.Module, inputs: list[tuple[int, Any]], *_) -> torch.Tensor:
        """Adds the clipped gradients of the microbatches of one forward batch to the step's sum.

        Returns 0, unless `log_private_statistics` asks for the raw loss.
        """
        self.model.train()
        self.optimizer.train()
        with self._guard.forward_pass() as number:
            if number == 1 and self.public_negatives is not None:
                self.public_negatives.begin_step(self._contrastive_model)
            with self.reading_records():
                losses = self._forward_pass(inputs)
        empty_after = self.args.torch_empty_cache_steps
        if empty_after is not None and self.state.global_step % empty_after == 0:
            clear_device_cache()
        if losses and self.args.log_private_statistics:
            # The Trainer adds up forward passes and averages over processes: this gives the mean over microbatches.
            processes = 1 if self.args.microbatch_spans_processes else self.args.world_size
            return torch.stack(losses).sum() * processes / self.plan.num_microbatches
        return torch.zeros((), device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Releases the step's noisy gradient. Returns its norm, which may be logged, since it contains the noise."""
        if self.remaining_steps == 0:
            raise RuntimeError(f"another step would exceed target_epsilon={self.plan.target_epsilon}.")
        if self._steps_taken >= self._last_step:
            raise RuntimeError("another step would be more than were planned: a callback must not prolong training.")
        self._guard.check()
        check_optimizer(self.optimizer, self._mechanism.parameters)
        self._before_release()
        self._steps_taken += 1
        self._mechanism.release()
        self.keep_reasons()
        return nn.utils.get_total_norm([parameter.grad for parameter in self._mechanism.parameters])

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        """As in the `Trainer`; contrastive models are asked for their loss."""
        if self.can_return_loss:
            inputs = {"return_loss": True, **inputs}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _draw_randomness(self) -> None:
        """Makes fresh streams, from one root for all processes, so that they draw the same microbatches."""
        root = Randomness(*broadcast_object_list([Randomness(self.args.noise_seed).entropy]))
        self._sampler = PoissonSampler(self.plan, root.sampling())
        self._noise = root.noise(self.args.device, self.args.process_index)

    # ---- Set-up ----

    def _microbatch_dataset(self) -> MicrobatchDataset:
        """The records and their collator, without the columns that are not read, as in the `Trainer`."""
        dataset, collator = self.train_dataset, self.data_collator
        # A user's own loss, or preparation of inputs, may cut texts.
        longest = data_validation.longest_text(base_model(self.model), collator) if self.minimises_own_loss else None
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return MicrobatchDataset(dataset, collator, longest)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, PairCollator):
            # Once, however often this is called.
            self._signature_columns = [*dict.fromkeys([*self._signature_columns, *self.data_collator.columns])]
