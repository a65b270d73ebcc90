"""`DPTrainingArguments`: Hugging Face's `TrainingArguments` and the knobs of the privacy mechanism."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .argument_values import check_values
from .incompatible_options import check_options
from .privacy.accounting import ACCOUNTANTS
from .privacy.plan import CLIPPINGS


# With this reason, a model card shows no metrics.
STATISTICS_WERE_LOGGED = "log_private_statistics=True: raw statistics of the data were logged"


@dataclass
class DPTrainingArguments(TrainingArguments):
    """
    Arguments of [`DPCLIPTrainer`]. Those of [`~transformers.TrainingArguments`] keep their meaning; these are added.

    Exactly one of `target_epsilon` and `noise_multiplier` must be given, unless `non_private=True`. `max_grad_norm` is
    the clipping bound C, and `per_device_train_batch_size * gradient_accumulation_steps * world_size` is the expected
    batch size B of Poisson sampling.

    Args:
        target_epsilon (`float`, *optional*): the ε that the run may spend. The noise is calibrated to it.
        noise_multiplier (`float`, *optional*): σ = noise standard deviation / sensitivity. ε follows from it.
        target_delta (`float`, *optional*, defaults to `n ** -1.1`): δ, below 1/n.
        microbatch_size (`int`, *optional*): expected number of privacy units whose joint gradient is clipped as a
            whole. Divides `per_device_train_batch_size`, which is the default, or is a multiple of it, computed in
            chunks, that divides the expected batch size. 1 clips per example, for which a contrastive loss needs
            `public_negatives`.
        clipping (`str`, *optional*, defaults to `"flat"`): `"flat"` or `"automatic"`.
        accountant (`str`, *optional*, defaults to `"pld"`): `"pld"` or `"rdp"`.
        vectorized (`bool`, *optional*, defaults to `True`): computes the microbatches of a forward batch in one pass
            where that is known to give the same result. `False` computes each in its own pass, which takes longer, so
            that not even its rounding depends on the others (`docs/privacy.md`, "What remains").
        static_shapes (`bool`, *optional*): pads batches to a few fixed sizes, for `torch_compile`, and because
            cuDNN plans attention anew for every size of a batch. The result does not change. Defaults to `True` for
            `CLIPModel` and `MetaClip2Model` without dropout in bfloat16 on GPUs like H100 and B200, where PyTorch
            leaves attention to cuDNN, and to `False` otherwise.
        public_negatives_steps (`int`, *optional*, defaults to 1): optimizer steps for which the embeddings of public
            negatives are kept before they are encoded anew.
        public_negatives_gradient (`bool`, *optional*, defaults to `False`): lets the loss reach the encoders through
            the public negatives too. They are then encoded anew for each microbatch.
        privacy_unit_column (`str`, *optional*): column that says to whom a record belongs; all records with one value
            are protected together. By default every record is a unit of its own.
        max_records_per_unit (`int`, *optional*): a unit with more records takes part with so many of them, drawn anew
            each time. Bounds the memory of a microbatch; the guarantee still covers all records.
        secure_noise (`bool`, *optional*, defaults to `False`): draws the noise in float64 from the operating system's
            cryptographic generator, and releases only multiples of a public grid width.
        ledger_path (`str`, *optional*, defaults to `_privacy_ledger.jsonl` in `output_dir`): the file in which every
            run records what it spends. Runs that share it add up (`hf-dpclip ledger`). Inside `output_dir`, its path
            must begin with an underscore, since other files there are uploaded to the Hub.
        ledger_dataset (`str`, *optional*): a name for the training dataset in the ledger. Runs without a name count as
            runs on the same records.
        ledger_epsilon (`float`, *optional*): the ε that all runs on the dataset may spend together. A run that could
            exceed it is refused before its first step.
        noise_seed (`int`, *optional*): makes sampling and noise reproducible and the run NOT PRIVATE.
        non_private (`bool`, *optional*, defaults to `False`): trains without noise, for comparison.
        log_private_statistics (`bool`, *optional*, defaults to `False`): logs the raw training loss and the like, for
            debugging on public data; the run is NOT PRIVATE.

    Raises `ValueError` for combinations that guarantee nothing, and for options of the `Trainer` under which the
    guarantee would not hold.
    """

    target_epsilon: float | None = field(
        default=None, metadata={"help": "The epsilon the run may spend; the noise is calibrated to it."}
    )
    noise_multiplier: float | None = field(
        default=None, metadata={"help": "Noise standard deviation / sensitivity, instead of target_epsilon."}
    )
    target_delta: float | None = field(default=None, metadata={"help": "Delta, below 1/n. Defaults to n**-1.1."})
    microbatch_size: int | None = field(
        default=None,
        metadata={
            "help": "Expected number of examples whose joint gradient is clipped as a whole; divides "
            "per_device_train_batch_size, which is the default, or is a multiple of it. Smaller means more signal, "
            "fewer in-batch negatives."
        },
    )
    clipping: str = field(
        default="flat",
        metadata={"help": "flat: g * min(1, C/||g||); automatic: g * C/(||g|| + 0.01).", "choices": list(CLIPPINGS)},
    )
    accountant: str = field(
        default="pld", metadata={"help": "How epsilon is computed: pld (tight) or rdp.", "choices": list(ACCOUNTANTS)}
    )
    vectorized: bool = field(
        default=True, metadata={"help": "Compute microbatches together; False: each by itself, even in rounding."}
    )
    static_shapes: bool | None = field(
        default=None,
        metadata={
            "help": "Pad batches to a few fixed sizes, for torch_compile and cuDNN. The result does not change.",
            "nargs": "?",
            "const": True,
        },
    )
    public_negatives_steps: int = field(
        default=1, metadata={"help": "Steps for which the embeddings of public negatives are kept."}
    )
    public_negatives_gradient: bool = field(
        default=False, metadata={"help": "Train the encoders through the public negatives too; slower."}
    )
    privacy_unit_column: str | None = field(
        default=None, metadata={"help": "Column whose values (user or image ids) are protected as a whole."}
    )
    max_records_per_unit: int | None = field(
        default=None, metadata={"help": "At most so many records of a unit take part in a step, drawn anew each time."}
    )
    secure_noise: bool = field(
        default=False,
        metadata={"help": "Noise from the operating system's cryptographic generator, in float64, on a public grid."},
    )
    ledger_path: str | None = field(
        default=None,
        metadata={"help": "File that records what every run spends; by default in output_dir. Share it between runs."},
    )
    ledger_dataset: str | None = field(
        default=None, metadata={"help": "Name of the training dataset in the ledger, whose runs add up."}
    )
    ledger_epsilon: float | None = field(
        default=None, metadata={"help": "The epsilon that all runs on the dataset may spend together."}
    )
    noise_seed: int | None = field(
        default=None, metadata={"help": "Reproducible sampling and noise, for research. The run is NOT PRIVATE."}
    )
    non_private: bool = field(
        default=False, metadata={"help": "Train without noise, for comparison. The run is NOT PRIVATE."}
    )
    log_private_statistics: bool = field(
        default=False,
        metadata={"help": "Log the raw training loss, for debugging on public data. The run is NOT PRIVATE."},
    )

    def __post_init__(self):
        # Skipping the batches that an interrupted run saw makes no sense when every step draws anew.
        self.ignore_data_skip = True
        # Before the Trainer looks for the library.
        if self.deepspeed:
            raise ValueError("DeepSpeed reduces gradients before they are clipped: use DDP (torchrun).")
        if self.tf32:
            raise ValueError("tf32=True rounds the products that norms are made of: use bf16=True.")
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raises `ValueError` if arguments were changed to values that the constructor would not have accepted."""
        check_values(self)
        check_options(self)

    @property
    def expected_batch_size(self) -> int:
        """B, over all processes and accumulation steps."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def num_microbatches(self) -> int:
        """K."""
        return self.expected_batch_size // (self.microbatch_size or self.per_device_train_batch_size)

    @property
    def chunked(self) -> bool:
        """Whether a microbatch is larger than a forward batch, and computed in chunks."""
        return (self.microbatch_size or 0) > self.per_device_train_batch_size

    @property
    def microbatch_spans_processes(self) -> bool:
        """Whether all processes share every microbatch, since there are not equally many for each process."""
        return self.chunked and self.num_microbatches % self.world_size > 0

    @property
    def not_private_because(self) -> tuple[str, ...]:
        """The arguments because of which no guarantee holds, if any."""
        return tuple(
            reason
            for reason, holds in {
                "non_private=True: no noise was added": self.non_private,
                "noise_seed is set: the noise can be recomputed and subtracted": self.noise_seed is not None,
                STATISTICS_WERE_LOGGED: self.log_private_statistics,
            }.items()
            if holds
        )
