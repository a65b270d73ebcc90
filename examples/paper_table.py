"""The Dp-CLIP paper's table, honestly accounted: datasets by arms by tuning by ε by seeds.

    python examples/paper_table.py --datasets mnist-5k --epsilons 8 --seeds 0 1 2

Each row is written as soon as it is measured, and rows that are in the file already are not measured again: a run can
be interrupted, continued, and split over days and machines. All arms of a dataset start from the same tiny CLIP beside
this script, which knows drawings only (of clothes for Fashion-MNIST, of digits and shapes for all others); or from any
other:

    python examples/paper_table.py --model_name_or_path openai/clip-vit-base-patch32 --rows outputs/vit.json \
        --learning_rate 1e-5

Arms: `zero_shot` (the start itself), `non_private` (the ordinary `Trainer`), `per_batch` (as in the paper: the whole
batch is one microbatch), `microbatch` (groups of 8 pairs; `--num_microbatches` changes that), `public_negatives`
(single pairs, contrasted with the class prompts). `mnist-5k` has 4,000 records, all other datasets what they have.
`results_report.py` makes tables and figures of the rows.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from train import TINY_CLIP, ExampleArguments, load_model, load_processor
from transformers import ProcessorMixin, Trainer, TrainingArguments, set_seed

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, ImageTextCollator, WeightAveraging
from hf_dpclip.collators import encoded_texts
from hf_dpclip.data import caption_by_label, class_prompts
from hf_dpclip.evaluation import zero_shot_accuracy
from hf_dpclip.presets import PRESETS


ROWS = Path(__file__).parents[1] / "docs" / "results" / "paper_table.json"
# What the arms start from: models that know drawings of what a dataset shows.
STARTS = {"fashion-mnist": TINY_CLIP.parent / "tiny-clip-clothes"}
LORA_RANKS = {"full": 0, "lora": 8}
# What makes two rows the same measurement. K is one of them: the arm `microbatch` is measured at several. Everything
# else of a recipe (learning rate, epochs, B) follows from these, or takes a file of its own.
KEY = ("dataset", "arm", "tuning", "epsilon", "num_microbatches", "seed")
# Pairs in one forward pass.
FORWARD_BATCH = 256
# C: most gradients of a single pair are longer, so that each of them counts about the same.
CLIPPING_NORM = 0.1
# Adam's second moment in private arms, which take few steps: after gradients have become short, the usual 0.999 would
# remember the long ones of the beginning to the end.
ADAM_BETA2 = 0.95
# Private arms are evaluated with averages of their weights.
AVERAGING_DECAY = 0.95
# Bytes of images that are encoded once and kept, rather than anew in every epoch.
KEPT = 4e9


@dataclass(frozen=True)
class Arm:
    """How a row is trained.

    Args:
        learning_rates (`dict`): by tuning.
        microbatch_size (`int`, *optional*): pairs clipped together; by default the whole batch.
    """

    learning_rates: dict[str, float]
    microbatch_size: int | None = None


PRIVATE_ARMS = {
    "per_batch": Arm({"full": 1e-4, "lora": 1e-3}),
    "microbatch": Arm({"full": 2e-3, "lora": 1e-2}, microbatch_size=8),
    "public_negatives": Arm({"full": 5e-3, "lora": 2e-2}, microbatch_size=1),
}
ARMS = ["zero_shot", "non_private", *PRIVATE_ARMS]
NON_PRIVATE_LEARNING_RATES = {"full": 1e-3, "lora": 1e-2}


@dataclass(frozen=True)
class Schedule:
    """B and epochs of the private arms; epochs of the other one."""

    batch_size: int
    epochs: int
    non_private_epochs: int


SMALL, LARGE = Schedule(512, 10, 10), Schedule(2048, 12, 4)
# K of the arm `microbatch`: between those of the other arms, with two pairs or more in each.
COUNTS = [2, 4, 8, 16, 32, 64, 128, 256]
# Below 20,000 records.
SMALL_DATASETS = ("mnist-5k", "blanchon/EuroSAT_RGB")


class EncodedPairs(torch.utils.data.Dataset):
    """Images encoded once, and the caption of each: what the collator would make of them again in every epoch."""

    def __init__(self, dataset: Dataset, prompts: list[str], processor: ProcessorMixin):
        texts = encoded_texts(processor, prompts)
        labels = torch.tensor(dataset["label"][:])
        images = [
            processor(images=[image.convert("RGB") for image in batch["image"]], return_tensors="pt")["pixel_values"]
            for batch in dataset.iter(batch_size=1000)
        ]
        self.columns = {"pixel_values": torch.cat(images), **{name: texts[name][labels] for name in texts}}

    def __len__(self) -> int:
        return len(self.columns["pixel_values"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


def main():
    disable_progress_bars()
    args = parse_arguments()
    for dataset in args.datasets:
        missing = [row for row in wanted_rows(args, dataset) if not is_measured(row, load_rows(args.rows))]
        task = Task(dataset, args) if missing else None
        for row in missing:
            add_row(args.rows, {**row, **task.measure(row), "command": command(row, args)})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=PRESETS, default=["mnist-5k"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--tuning", nargs="+", choices=LORA_RANKS, default=[*LORA_RANKS])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0], help="of the private arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of order and new weights; noise is fresh")
    counts = {"nargs": "+", "type": int, "choices": COUNTS}
    parser.add_argument("--num_microbatches", **counts, help="K of the arm microbatch (default: B/8)")
    parser.add_argument("--learning_rate", type=float, help="of all arms, instead of those for the tiny CLIP")
    parser.add_argument("--model_name_or_path", help="start of all arms (default: a tiny CLIP for each dataset)")
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON file with the rows (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop early, to try the script out")
    args = parser.parse_args()
    other_recipe = args.max_steps > 0 or args.learning_rate or args.model_name_or_path
    if args.rows == ROWS and other_recipe:
        parser.error(
            "another start, another learning rate, or fewer steps need a file of their own: --rows outputs/rows.json"
        )
    return args


def schedule_of(dataset: str) -> Schedule:
    return SMALL if dataset in SMALL_DATASETS else LARGE


def wanted_rows(args: argparse.Namespace, dataset: str) -> list[dict]:
    """What identifies each row that was asked for; arms without privacy have one row for all ε."""
    return [
        dict(zip(KEY, (dataset, arm, tuning, epsilon, num_microbatches, seed)))
        for arm in args.arms
        for tuning in args.tuning
        for epsilon in (args.epsilons if arm in PRIVATE_ARMS else [None])
        for num_microbatches in wanted_microbatches(args, dataset, arm)
        for seed in args.seeds
    ]


def wanted_microbatches(args: argparse.Namespace, dataset: str, arm: str) -> list[int | None]:
    """K of the rows of one arm."""
    if arm not in PRIVATE_ARMS:
        return [None]
    if arm == "microbatch" and args.num_microbatches:
        return args.num_microbatches
    batch_size = schedule_of(dataset).batch_size
    return [batch_size // (PRIVATE_ARMS[arm].microbatch_size or batch_size)]


def load_rows(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def is_measured(row: dict, rows: list[dict]) -> bool:
    return any(all(row[name] == known[name] for name in KEY) for known in rows)


def add_row(path: Path, row: dict) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([*load_rows(path), row], indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(json.dumps(row), flush=True)


def command(row: dict, args: argparse.Namespace) -> str:
    """What measures this row alone."""
    names = {"dataset": "datasets", "arm": "arms", "epsilon": "epsilons", "seed": "seeds"}
    asked = [
        name for name in KEY if row[name] is not None and (name != "num_microbatches" or row["arm"] == "microbatch")
    ]
    options = [f"--{names.get(name, name)} {row[name]}" for name in asked]
    if args.max_steps > 0:
        options.append(f"--max_steps {args.max_steps}")
    if args.learning_rate:
        options.append(f"--learning_rate {args.learning_rate}")
    if args.model_name_or_path:
        options.append(f"--model_name_or_path {args.model_name_or_path}")
    if args.rows != ROWS:
        options.append(f"--rows {args.rows}")
    return " ".join(["python examples/paper_table.py", *options])


class Task:
    """A dataset, encoded, and the model that all arms start from."""

    def __init__(self, dataset: str, args: argparse.Namespace):
        preset, self.args = PRESETS[dataset], args
        self.start = args.model_name_or_path or str(STARTS.get(dataset, TINY_CLIP))
        self.processor = load_processor(self.start)
        splits = preset.load()
        self.test = splits["test"]
        self.prompts = class_prompts(self.test.features["label"].names, preset.template)
        self.train = caption_by_label(splits["train"], "label", preset.template)
        self.collator = ImageTextCollator(self.processor, text_column="caption")
        if len(self.train) * self.collator([self.train[0]])["pixel_values"].nbytes <= KEPT:
            self.train, self.collator = EncodedPairs(self.train, self.prompts, self.processor), _stacked
        self.schedule = schedule_of(dataset)

    def measure(self, row: dict) -> dict:
        """The rest of a row: `accuracy` on the test split, and `delta`."""
        set_seed(row["seed"])
        model, plan = load_model(self._arguments(row)), None
        with tempfile.TemporaryDirectory() as folder:
            if row["arm"] == "non_private":
                self._train(model, row, folder)
            elif row["arm"] in PRIVATE_ARMS:
                plan = self._train_privately(model, row, folder)
        return {
            "delta": plan and plan.target_delta,
            "accuracy": zero_shot_accuracy(model, self.processor, self.test, self.prompts),
        }

    def _arguments(self, row: dict) -> ExampleArguments:
        # A few class prompts teach the text tower little, and what it learns takes up much of the clipping norm.
        text_tower = row["tuning"] == "full" or row["arm"] not in PRIVATE_ARMS
        return ExampleArguments(
            model_name_or_path=self.start, lora_rank=LORA_RANKS[row["tuning"]], text_tower=text_tower
        )

    def _train(self, model, row: dict, folder: str) -> None:
        args = TrainingArguments(
            **self._common(row, folder),
            per_device_train_batch_size=64,
            num_train_epochs=self.schedule.non_private_epochs,
            learning_rate=self.args.learning_rate or NON_PRIVATE_LEARNING_RATES[row["tuning"]],
        )
        Trainer(model, args, lambda records: {**self.collator(records), "return_loss": True}, self.train).train()

    def _train_privately(self, model, row: dict, folder: str):
        arm, schedule = PRIVATE_ARMS[row["arm"]], self.schedule
        # A microbatch of the whole batch is computed in chunks.
        args = DPTrainingArguments(
            **self._common(row, folder),
            per_device_train_batch_size=FORWARD_BATCH,
            gradient_accumulation_steps=schedule.batch_size // FORWARD_BATCH,
            microbatch_size=schedule.batch_size // row["num_microbatches"],
            num_train_epochs=schedule.epochs,
            learning_rate=self.args.learning_rate or arm.learning_rates[row["tuning"]],
            lr_scheduler_type="linear",
            adam_beta2=ADAM_BETA2,
            target_epsilon=row["epsilon"],
            max_grad_norm=CLIPPING_NORM,
        )
        trainer = DPCLIPTrainer(
            model,
            args,
            self.collator,
            self.train,
            processing_class=self.processor,
            public_negatives=self.prompts if row["arm"] == "public_negatives" else None,
            callbacks=[WeightAveraging(AVERAGING_DECAY)],
        )
        trainer.train()
        return trainer.plan

    def _common(self, row: dict, folder: str) -> dict:
        return {
            "output_dir": folder,
            "max_steps": self.args.max_steps,
            "seed": row["seed"],
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }


def _stacked(records: list[dict]) -> dict:
    return {name: torch.stack([record[name] for record in records]) for name in records[0]}


if __name__ == "__main__":
    main()
