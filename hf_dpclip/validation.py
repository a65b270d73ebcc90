"""Refusals: what the guarantee does not cover is an error before the first step, with the remedy in its message."""

import os
from collections.abc import Callable
from typing import Any

import datasets
import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from .arguments import DPTrainingArguments
from .data_validation import check_dataset
from .digests import image_columns
from .evaluating import EvaluatingTrainer
from .gradients import contrastive_base
from .gradients.vectorizable import WITH_CAUSAL_TEXTS
from .guard import check_no_hooks
from .model_history import check_trusted
from .models.lora import check_is_model


logger = logging.get_logger(__name__)

# Initialisations of LoRA weights that peft computes from activations or gradients.
MADE_FROM_RECORDS = ("eva", "corda", "lora_ga")
# The metrics of an evaluation without `compute_metrics`.
DEFAULT_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")


def check_call(
    model: nn.Module | None, data_collator: Callable | None, train_dataset: Dataset | None, processing_class: Any
) -> None:
    """Raises `ValueError` for arguments of [`DPCLIPTrainer`] of the wrong type, often in the wrong order."""
    if model is not None:
        check_is_model(model)
    if model is not None and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "parameters of the model are on the meta device, without values: load them with from_pretrained, outside "
            "torch.device('meta') and init_empty_weights."
        )
    if model is not None and is_compiled_module(model):
        raise ValueError(
            "the model was compiled before, which hides what it is: pass the model itself, with torch_compile=True "
            "among the arguments, or compiled in place by model.compile()."
        )
    if data_collator is not None and not callable(data_collator):
        raise ValueError(
            f"data_collator is a {type(data_collator).__name__}, which cannot be called: pass datasets as "
            "train_dataset=... and eval_dataset=..."
        )
    if train_dataset is not None:
        check_dataset(train_dataset)
    # A transform may encode them.
    is_table = isinstance(train_dataset, datasets.Dataset) and train_dataset.format["type"] != "custom"
    raw = image_columns(train_dataset) if is_table else []
    if raw and data_collator is None and not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"train_dataset has raw images (column {raw[0]!r}), which the processing_class, "
            f"{type(processing_class).__name__}, does not encode: pass a processor, as AutoProcessor.from_pretrained "
            "gives, or a data_collator."
        )


def check_model(model: nn.Module) -> None:
    """Raises `ValueError` for models that learn from records in other ways than by the noisy gradient."""
    was_training = model.training
    leaking = [name for name, module in model.train().named_modules() if _keeps_statistics(module)]
    model.train(was_training)
    if leaking:
        raise ValueError(
            f"{leaking[0]} (such modules: {len(leaking)}) keeps running statistics of the private data outside the "
            "mechanism: freeze those it came with by hf_dpclip.freeze_batch_norm(model), or replace BatchNorm by "
            "GroupNorm or LayerNorm."
        )
    renormalised = [name for name, module in model.named_modules() if vars(module).get("max_norm") is not None]
    if renormalised:
        module = model.get_submodule(renormalised[0])
        raise ValueError(
            f"{renormalised[0]} has max_norm={module.max_norm}, with which it rewrites the rows that it looks up, "
            "past the mechanism: set max_norm to None."
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter: set requires_grad=True on those to be trained; load adapters with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if len({parameter.device for parameter in trainable}) > 1 or any(isinstance(p, DTensor) for p in trainable):
        raise ValueError(
            "trainable parameters are spread over devices: load the model without device_map or sharding."
        )
    if isinstance(model, PeftModel) and type(model) is not PeftModel and contrastive_base(model) is not None:
        raise ValueError(
            f"adapters with a task_type make a {type(model).__name__}, which calls the model in a way that it does "
            "not understand: leave task_type out of the LoraConfig."
        )
    # A sum is much faster than asking every element.
    if not all(parameter.detach().sum(dtype=torch.float32).isfinite() for parameter in trainable):
        raise ValueError(
            "the model has trainable parameters that are not finite, from which nothing can be learnt: load other "
            "weights, or train with a smaller learning rate."
        )
    check_no_hooks(trainable)
    check_trusted(model)


def set_precision() -> None:
    """Takes back settings that let torch round float32 factors, which would make the norms for clipping too small."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Raised if it was set by the newer API of torch, as transformers does for torch_compile.
        precision = "tf32"
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        logger.warning(
            f"torch.set_float32_matmul_precision({precision!r}) (or TF32) rounds the products of which norms are "
            "made, so that gradients would exceed C: it is set back to 'highest'. Use bf16=True to train faster."
        )


def warn_of_adapters_made_from_records(model: nn.Module) -> None:
    """Warns of LoRA starting weights that were computed from records, which the guarantee does not cover."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else []
    made = [kind for config in configs if (kind := getattr(config, "init_lora_weights", None)) in MADE_FROM_RECORDS]
    if made:
        logger.warning(
            f"init_lora_weights={made[0]!r} computes the starting weights of LoRA from records, without noise: make "
            "sure that those were public ones. The guarantee does not hold for them."
        )


def check_environment(trainer: Trainer) -> None:
    """Raises `ValueError` for unsupported launcher settings, which the arguments do not show, and devices."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched != trainer.args.world_size:
        raise ValueError(
            f"the launcher started {launched} processes of which TrainingArguments know {trainer.args.world_size}, so "
            "each would train a model of its own: on a machine without GPUs, add use_cpu=True (--use_cpu)."
        )
    kind = trainer.args.device.type
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f"{kind} devices are not supported (Apple's mps has no float64, in which norms are measured, and the "
            "generator states of others are not preserved): train on what PyTorch calls cuda, or add use_cpu=True "
            "(--use_cpu)."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "the launcher enabled FSDP or DeepSpeed, which reduce unclipped gradients: choose DDP instead."
        )
    if trainer.accelerator.parallelism_config is not None:
        raise ValueError("the launcher enabled tensor, context or sequence parallelism: choose DDP instead.")
    if trainer.accelerator.mixed_precision == "fp8":
        raise ValueError(
            "the launcher enabled fp8, which scales by the largest values that it has seen of private data: use "
            "--mixed_precision bf16 or no instead."
        )
    if trainer.accelerator.scaler is not None:
        raise ValueError("the launcher enabled fp16 loss scaling: use --mixed_precision bf16 or no instead.")


def check_overrides(trainer: Trainer) -> None:
    """Raises `ValueError` if the trainer overrides what decides on which batches there are."""
    for own in (Trainer.get_batch_samples, Trainer._get_train_sampler):
        if is_overridden(trainer, own):
            raise ValueError(
                f"{own.__name__} is overridden, but the guarantee rests on a release for every batch that is drawn, "
                "also an empty one: leave it as it is, and change what a batch holds in the data_collator."
            )


def check_negatives_exist(microbatch_size: int, in_batch_negatives_only: bool) -> None:
    """Raises `ValueError` where a microbatch of a single pair would have no negatives."""
    if microbatch_size == 1 and in_batch_negatives_only:
        raise ValueError(
            "microbatch_size=1 leaves a contrastive loss without negatives, so there is nothing to learn from: pass "
            "public_negatives (captions or images that are not private), or choose a microbatch_size (by default "
            "per_device_train_batch_size) of at least 2; 8 is a good start."
        )


def check_loss_is_known(
    args: DPTrainingArguments, contrastive_base: PreTrainedModel | None, public_negatives: bool
) -> None:
    """Raises `ValueError` for arguments that need a known contrastive loss if the loss is not known."""
    if args.chunked and contrastive_base is None:
        raise ValueError(
            f"microbatch_size={args.microbatch_size} is larger than per_device_train_batch_size="
            f"{args.per_device_train_batch_size}; chunks of a microbatch can only be put together again for "
            "CLIPModel, SiglipModel and the like (docs/encoders.md) with their own loss and the trainer's own "
            "_prepare_inputs: choose a microbatch_size that divides per_device_train_batch_size."
        )
    if args.static_shapes and not isinstance(contrastive_base, WITH_CAUSAL_TEXTS):
        # Other models are not always told where a text ends.
        raise ValueError(
            "static_shapes=True needs CLIPModel or MetaClip2Model with its own loss and the trainer's own "
            "_prepare_inputs: remove it."
        )
    if public_negatives and contrastive_base is None:
        raise ValueError(
            "public_negatives need CLIPModel, SiglipModel or the like (docs/encoders.md) with its own loss and the "
            "trainer's own _prepare_inputs: leave them out."
        )
    if args.chunked and args.public_negatives_gradient:
        raise ValueError(
            "public_negatives_gradient=True cannot be combined with a microbatch_size larger than "
            "per_device_train_batch_size: remove one or the other."
        )


def check_best_metric(trainer: Trainer) -> None:
    """Raises `ValueError` if the best model is to be chosen by a metric that evaluation does not give."""
    metric, evaluated = trainer.args.metric_for_best_model, trainer.eval_dataset
    others = is_overridden(trainer, Trainer.evaluate, EvaluatingTrainer.evaluation_loop)
    others = others or any(map(_may_add_metrics, trainer.callback_handler.callbacks))
    if trainer.args.eval_strategy == "no" or trainer.compute_metrics is not None or others:
        return
    prefixes = [f"{name}_" for name in evaluated] if isinstance(evaluated, dict) else [""]
    given = [prefix + name for prefix in prefixes for name in DEFAULT_METRICS]
    if metric is not None and metric.removeprefix("eval_") not in given:
        raise ValueError(
            f"metric_for_best_model={metric!r} is not among what evaluation gives ({', '.join(given)}): choose one of "
            "these, or pass compute_metrics."
        )


def check_search(backend: HPSearchBackend, settings: dict[str, Any], num_processes: int) -> None:
    """Raises `ValueError` for a hyperparameter search with trials that a process of this trainer would not count."""
    if backend == HPSearchBackend.RAY or settings.get("n_jobs", 1) != 1:
        raise ValueError(
            "trials that run side by side do not know what the others spend: use backend='optuna' (or 'wandb') with "
            "n_jobs=1, one trial after another."
        )
    if settings.get("load_if_exists"):
        raise ValueError(
            "a study that is continued chooses among trials that this trainer has not counted: begin a new one, "
            "without load_if_exists."
        )
    if num_processes == 1:
        return
    if backend != HPSearchBackend.OPTUNA:
        raise ValueError(
            "on several processes each would have trials of its own: use backend='optuna', or one process."
        )
    known_to_one = [name for name in ("pruner", "timeout", "catch") if settings.get(name)]
    if known_to_one:
        raise ValueError(
            f"{known_to_one[0]} ends a trial or the search on process 0 only, and the others would wait forever: "
            "leave it out, or search on one process."
        )


def check_trials_are_evaluated(trainer: Trainer) -> None:
    """Raises `ValueError` if the trials of a search would have no evaluation to compare them by."""
    others = is_overridden(trainer, Trainer.evaluate, EvaluatingTrainer.get_eval_dataloader)
    if trainer.eval_dataset is None and not others:
        raise ValueError(
            "a hyperparameter search compares trials by their evaluation, and each of them spends ε before: pass an "
            "eval_dataset of records that are not private."
        )


def is_overridden(trainer: Trainer, *methods: Callable) -> bool:
    """Whether the trainer overrides one of these methods, in a subclass or by itself."""
    return any(getattr(getattr(trainer, own.__name__), "__func__", None) is not own for own in methods)


def _may_add_metrics(callback: TrainerCallback) -> bool:
    """Whether it is a callback of the user's own that receives the metrics, and may add to them."""
    of_a_library = type(callback).__module__.split(".")[0] in ("transformers", "hf_dpclip")
    return not of_a_library and type(callback).on_evaluate is not TrainerCallback.on_evaluate


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats and module.training
