"""Options of `TrainingArguments` that break the guarantee: refused."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .privacy import LEDGER_NAME


if TYPE_CHECKING:
    from .arguments import DPTrainingArguments


def check_options(args: "DPTrainingArguments") -> None:
    """Raises `ValueError` for the first option that breaks the guarantee."""
    for refused, message in _incompatible(args):
        if refused:
            raise ValueError(message)
    _check_ledger_path(args)


def _incompatible(args: "DPTrainingArguments") -> list[tuple[bool, str]]:
    """For each such option, whether it is set, and the message that says what is wrong and how to mend it."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    steps_early = "layerwise" in optimizer or "lomo" in optimizer
    # Comet patches `Tensor.backward` to log what it is called on.
    comet_logs_losses = os.environ.get("COMET_AUTO_LOG_METRICS", "").lower() not in ("0", "false")
    # An object by now, whatever was given.
    accelerator_config: Any = args.accelerator_config
    return [
        (args.fp16, "fp16 scales the loss, and with it the gradients to be clipped: use bf16=True instead."),
        (bool(args.fsdp), "FSDP reduces gradients before they are clipped: use DDP (torchrun), with LoRA."),
        (args.parallelism_config is not None, "parallelism_config is not supported: use DDP (torchrun)."),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size changes the sampling probability during the run: set "
            "per_device_train_batch_size to what fits, and gradient_accumulation_steps for the rest.",
        ),
        (
            args.train_sampling_strategy != "random",
            f"train_sampling_strategy={args.train_sampling_strategy!r} replaces Poisson sampling: remove it.",
        ),
        (
            steps_early,
            f"optim={optimizer!r} updates weights during the backward pass, before the noise: use adamw_torch.",
        ),
        (
            args.include_num_input_tokens_seen != "no",
            "token counts reveal realised batch sizes: leave include_num_input_tokens_seen='no'.",
        ),
        (
            not args.skip_memory_metrics and not args.log_private_statistics,
            "memory metrics reveal realised batch sizes: leave skip_memory_metrics=True.",
        ),
        (
            accelerator_config.split_batches,
            "split_batches makes per_device_train_batch_size that of all processes together, and the sampling "
            "probability rests on that of each: leave it out, and divide per_device_train_batch_size by their number.",
        ),
        (
            bool(args.debug) and not args.log_private_statistics,
            f"debug={args.debug} prints activations of private records and stops where they overflow: remove it.",
        ),
        (
            "comet_ml" in (args.report_to or ()) and comet_logs_losses and not args.log_private_statistics,
            "Comet logs the raw loss of backward passes by itself: set COMET_AUTO_LOG_METRICS=0 in the environment "
            "before Python starts, or report to another tracker.",
        ),
        (
            args.n_gpu > 1,
            "torch.nn.DataParallel mixes the gradients of all GPUs before they are clipped: start one process per "
            "GPU with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES=0.",
        ),
    ]


def _check_ledger_path(args: "DPTrainingArguments"):
    path, folder = Path(args.ledger_path or LEDGER_NAME).resolve(), Path(args.output_dir or "").resolve()
    inside = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    if inside and not inside[0].startswith("_"):
        raise ValueError(
            f"ledger_path={args.ledger_path!r} is in output_dir, which push_to_hub uploads, and a ledger holds a "
            "fingerprint of the private records: keep it elsewhere, or let its name begin with an underscore, "
            "which uploads leave out."
        )
