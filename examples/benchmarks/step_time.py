"""Time of a private training step relative to `transformers.Trainer` on the same model and batch.

Both trainers live in one process and take turns, so that whatever else the machine does hits both; the ratio is the
median over the turns. n = B, hence every step sees the whole batch, as the plain trainer's does.

    python examples/benchmarks/step_time.py --model vit-b-32 --batch_size 16
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, lora_config


CONFIGS = {
    "vit-b-32": CLIPConfig(),
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


class Stopwatch(TrainerCallback):
    """Seconds from the first forward pass of each step to the end of its optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def main():
    args = parse_arguments()
    logging.set_verbosity_error()
    print(f"{args.model}, batch {args.batch_size}, {torch.get_num_threads()} threads, {args.turns} turns\n")
    print("| parameters trained | microbatches K | plain (s) | private (s) | ratio |\n|---|---|---|---|---|")
    for tuning in args.tuning:
        for num_microbatches in args.num_microbatches:
            plain, private = measure(args, tuning, num_microbatches)
            ratio = statistics.median(ours / theirs for theirs, ours in zip(plain, private))
            medians = f"{statistics.median(plain):.3f} | {statistics.median(private):.3f}"
            print(f"| {tuning} | {num_microbatches} | {medians} | {ratio:.3f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="vit-b-32", help="architecture, with random weights")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs in a step")
    parser.add_argument("--num_microbatches", type=int, nargs="+", default=[1], help="K; each divides the batch size")
    parser.add_argument("--tuning", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each trainer")
    return parser.parse_args()


def measure(args: argparse.Namespace, tuning: str, num_microbatches: int) -> tuple[list[float], list[float]]:
    """Seconds of each measured step of the plain and of the private trainer, turn by turn."""
    config = CONFIGS[args.model]
    dataset = random_pairs(config, args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": args.batch_size,
            "max_steps": 1,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        plain = Trainer(model(config, tuning), TrainingArguments(**common), with_loss, dataset)
        size = args.batch_size // num_microbatches
        private_args = DPTrainingArguments(**common, noise_multiplier=1.0, microbatch_size=size)
        private = DPCLIPTrainer(model(config, tuning), private_args, train_dataset=dataset)
        return take_turns([plain, private], args.turns)


def take_turns(trainers: list[Trainer], turns: int) -> list[list[float]]:
    """One step of each trainer after another; the first turns allocate memory and are left out."""
    watches = [Stopwatch() for _ in trainers]
    for trainer, watch in zip(trainers, watches):
        trainer.add_callback(watch)
    for _ in range(turns + 2):
        for trainer in trainers:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
    return [watch.seconds[2:] for watch in watches]


def model(config: CLIPConfig, tuning: str):
    torch.manual_seed(0)
    clip = CLIPModel(config)
    return get_peft_model(clip, lora_config(clip)) if tuning == "lora" else clip


def random_pairs(config: CLIPConfig, size: int) -> Dataset:
    """Noise in the shape of encoded pairs."""
    side = config.vision_config.image_size
    input_ids = torch.randint(1, 1000, (size, TEXT_LENGTH))
    input_ids[:, -1] = config.text_config.eos_token_id
    columns = {"pixel_values": torch.randn(size, 3, side, side).numpy(), "input_ids": input_ids.numpy()}
    return Dataset.from_dict(columns).with_format("torch")


def with_loss(records: list[dict]) -> dict:
    """A batch for the plain trainer, which does not ask a contrastive model for its loss."""
    batch = {name: torch.stack([record[name] for record in records]) for name in records[0]}
    return {**batch, "return_loss": True}


if __name__ == "__main__":
    main()
