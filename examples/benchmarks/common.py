"""What the benchmarks share: models with random weights, pairs of noise, trainers that take turns, tables."""

import argparse
import contextlib
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, lora_config
from hf_dpclip.markdown import table_head, table_row


CONFIGS = {
    "vit-b-32": CLIPConfig(),
    "vit-l-14": CLIPConfig(
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        projection_dim=768,
    ),
    "small": CLIPConfig(
        text_config={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 4,
        },
        projection_dim=64,
    ),
}
TEXT_LENGTH = 16
NUM_IMAGES = 64
WARM_UP_STEPS = 2
MIB = 2**20

# Takes one optimizer step and returns its seconds.
Step = Callable[[], float]


@dataclass(frozen=True)
class Workload:
    """What all trainers of one comparison are given.

    n = B, hence every step sees the whole dataset, privately drawn or not.

    Args:
        architecture (`str`): a key of `CONFIGS`.
        tuning (`str`): `"lora"` or `"full"`.
        batch_size (`int`): B, the pairs of one optimizer step, over all processes.
        bf16 (`bool`, *optional*): mixed precision.
        forward_batch_size (`int`, *optional*): pairs in one forward pass of one process; by default all of its share.
        steps (`int`): optimizer steps in one run of a trainer, the last of which is measured. A run begins with an
            empty cache of GPU memory, which the first step fills.
    """

    architecture: str
    tuning: str
    batch_size: int
    bf16: bool = False
    forward_batch_size: int | None = None
    steps: int = 1

    @property
    def config(self) -> CLIPConfig:
        return CONFIGS[self.architecture]

    def model(self) -> nn.Module:
        """The same random weights at every call."""
        torch.manual_seed(0)
        clip = CLIPModel(self.config)
        return get_peft_model(clip, lora_config(clip)) if self.tuning == "lora" else clip

    def dataset(self) -> "RandomPairs":
        return RandomPairs(self.config, self.batch_size)

    def arguments(self, folder: str) -> dict:
        """Fields of `TrainingArguments`: one run, no output."""
        share = self.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
        forward_batch_size = self.forward_batch_size or share
        return {
            "output_dir": folder,
            "per_device_train_batch_size": forward_batch_size,
            "gradient_accumulation_steps": share // forward_batch_size,
            "max_steps": self.steps,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),  # bf16 asks for it
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def plain_trainer(self, folder: str) -> Trainer:
        return Trainer(self.model(), TrainingArguments(**self.arguments(folder)), collate_with_loss, self.dataset())

    def private_trainer(self, folder: str, microbatch_size: int, **options) -> DPCLIPTrainer:
        """`options` are further ones of `DPTrainingArguments`."""
        args = DPTrainingArguments(
            **self.arguments(folder),
            **options,
            noise_multiplier=1.0,
            microbatch_size=microbatch_size,
            accountant="rdp",  # the faster one: ε is computed whenever a run ends, which here is after every step
        )
        return DPCLIPTrainer(self.model(), args, train_dataset=self.dataset())


class RandomPairs(Dataset):
    """Noise in the shape of encoded pairs: few images, which come again and again, so that they take up neither memory
    nor time, and for each pair a text of its own."""

    def __init__(self, config: CLIPConfig, size: int):
        side = config.vision_config.image_size
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(NUM_IMAGES, config.vision_config.num_channels, side, side, generator=generator)
        self.end_of_text = config.text_config.eos_token_id
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        input_ids = torch.randint(1, 1000, (TEXT_LENGTH,), generator=generator)
        input_ids[-1] = self.end_of_text
        return {"pixel_values": self.images[index % NUM_IMAGES], "input_ids": input_ids}


def collate_with_loss(records: list[dict]) -> dict:
    """A batch for the plain trainer, which does not ask a contrastive model for its loss."""
    batch = {name: torch.stack([record[name] for record in records]) for name in records[0]}
    return {**batch, "return_loss": True}


class TrainerStep(TrainerCallback):
    """The last optimizer step of a run of a `Trainer`, from the first forward pass to the zeroed gradients.

    Loading the batch comes before and is not counted.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        trainer.add_callback(self)

    def __call__(self) -> float:
        # The Trainer prints a summary of every run.
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.train()
        return self._seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds = now() - self._start


def now() -> float:
    """Seconds, once everything that was asked of the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(action: Callable[[], None]) -> float:
    """Seconds that `action` takes."""
    start = now()
    action()
    return now() - start


def take_turns(steps: list[Step], turns: int, warm: bool = False) -> list[list[float]]:
    """Seconds of each step, one of each after another, so that whatever else the machine does hits all of them.

    The first steps of each allocate memory and are left out, unless they are `warm` already.
    """
    for step in [] if warm else steps:
        warm_up(step)
    return [list(each) for each in zip(*([step() for step in steps] for _ in range(turns)))]


def warm_up(step: Step, runs: int = WARM_UP_STEPS) -> None:
    for _ in range(runs):
        step()


def median_ratio(seconds: list[float], baseline: list[float]) -> float:
    """Median over the turns of the ratio within one turn."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, baseline))


def quieten() -> None:
    """Only the table is to be printed, whatever the libraries warn of at every step."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def print_header(title: str, *columns: str) -> None:
    print(f"{title}\n\n{table_head(*columns)}", flush=True)


def print_row(*cells) -> None:
    print(table_row(*cells), flush=True)


def setting(args: argparse.Namespace) -> str:
    """What the numbers depend on, for a table's title."""
    precision = "bfloat16" if args.bf16 else "float32"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{args.model}, batch {args.batch_size}, {precision}, {device}, torch {torch.__version__}"


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_workload_arguments(parser: argparse.ArgumentParser, num_microbatches: list[int]) -> None:
    parser.add_argument("--model", choices=CONFIGS, default="vit-b-32", help="architecture, with random weights")
    parser.add_argument("--batch_size", type=int, default=16, help="B, pairs in a step (default: %(default)s)")
    parser.add_argument(
        "--num_microbatches",
        type=int,
        nargs="+",
        default=num_microbatches,
        metavar="K",
        help="microbatches in a step; each divides the batch size (default: %(default)s)",
    )
    parser.add_argument(
        "--tuning", nargs="+", choices=["lora", "full"], default=["lora", "full"], help="which parameters are trained"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
