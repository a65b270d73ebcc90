"""Fine-tune a CLIP model privately on image-text pairs or labelled images.

Without arguments, the tiny CLIP beside this script, which knows only synthetic pictures, learns from 4,000 real
handwritten digits at ε = 8:

    accelerate launch examples/train.py

Your own data and a model from the Hub:

    accelerate launch examples/train.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name path/to/pairs.csv --image_column scan --caption_column report \
        --target_epsilon 3 --per_device_train_batch_size 64 --microbatch_size 8 --num_train_epochs 5

`--lora_rank 0` trains all parameters. `--help` lists every argument of `DPTrainingArguments` too.
"""

import copy
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, disable_progress_bars
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, ImageTextCollator, lora_config
from hf_dpclip.data import caption_by_label, class_prompts, hold_out, load_pairs
from hf_dpclip.evaluation import zero_shot_accuracy
from hf_dpclip.models import base_model
from hf_dpclip.presets import PRESETS
from hf_dpclip.privacy import LEDGER_NAME, STATEMENT_NAME
from hf_dpclip.privacy_section import CARD_NAME
from hf_dpclip.records import check_complete
from hf_dpclip.resuming import check_resumable, last_complete_checkpoint
from hf_dpclip.spending import ledger_of


TINY_CLIP = Path(__file__).parent / "tiny-clip"

# Chosen by measurement for the embedded data (docs/benchmarks.md); what is given on the command line goes first.
DEFAULTS = {
    "output_dir": "outputs/private-clip",
    "target_epsilon": 8.0,
    "per_device_train_batch_size": 512,
    "microbatch_size": 8,
    "num_train_epochs": 10.0,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 20,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}

# The captions of the embedded data are ten class prompts, which are public: one pair alone has something to be
# contrasted with. A run of two minutes needs no checkpoints.
EMBEDDED_DEFAULTS = {
    "public_negatives": "class_prompts",
    "microbatch_size": 1,
    "compare_non_private": True,
    "save_strategy": "no",
}


# Where records are expected that are not to be trained on.
EVAL_SPLITS = ("test", "validation")


@dataclass
class DataArguments:
    """Which records are private, and which are for evaluation."""

    image_column: str = field(default="image", metadata={"help": "Column with the images, or paths to them."})
    train_split: str = field(default="train", metadata={"help": "Split with the private records."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on; by default test, validation, or 10 %% of the private records."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many private records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on only so many records."})

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"--{name} {limit} is not possible: give 1 or more, or leave it out for all records.")


@dataclass
class ExampleArguments(DataArguments):
    """The model and the data."""

    model_name_or_path: str = field(default=str(TINY_CLIP), metadata={"help": "Dual encoder: Hub name or folder."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA adapters; 0 trains all parameters."})
    text_tower: bool = field(
        default=True,
        metadata={
            "help": "Whether the text tower has adapters too. Where captions are class prompts, it hardly needs them."
        },
    )
    dataset_name: str = field(
        default="mnist-5k",
        metadata={
            "help": f"One of {', '.join(PRESETS)}; a .csv, .json or .parquet file; a folder written by save_to_disk; "
            "a folder of images with a metadata.csv; or a dataset on the Hub."
        },
    )
    caption_column: str | None = field(default=None, metadata={"help": "Column with the captions."})
    label_column: str | None = field(default=None, metadata={"help": "Column with class labels, instead of captions."})
    prompt_template: str | None = field(default=None, metadata={"help": "Caption of a class: 'a photo of a {}'."})
    public_negatives: str | None = field(
        default=None,
        metadata={
            "help": "What every microbatch is contrasted with too, and what --microbatch_size 1 needs: class_prompts "
            "(if the names of the classes are public), or public captions or images, named as for --dataset_name, in "
            "the columns of the private ones."
        },
    )
    compare_non_private: bool = field(
        default=False,
        metadata={"help": "Also train without privacy. Its accuracy is not private. On for the embedded data."},
    )

    def __post_init__(self):
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank} is not possible: give 1 or more, or 0 for all parameters.")
        if not (self.lora_rank or self.text_tower):
            raise ValueError("--text_tower False is about adapters: give --lora_rank 1 or more with it.")
        super().__post_init__()


@dataclass
class Job:
    """Everything that is needed to train, checked."""

    arguments: ExampleArguments
    trainer: DPCLIPTrainer
    accuracy: Callable | None


def main():
    disable_progress_bars()
    with errors_in_one_line("train.py"):
        job = prepare(*parse_arguments(sys.argv[1:], ExampleArguments, DEFAULTS, EMBEDDED_DEFAULTS))
        score = job.accuracy or (lambda model: job.trainer.evaluate()["eval_loss"])
        # Also shows, before anything is spent, whether the held-out records can be evaluated.
        scores = {"before": score(job.trainer.model)}
        job.trainer.train(resume_from_checkpoint=job.trainer.args.resume_from_checkpoint)
        # Before anything that could fail: ε is spent.
        folder = save(job.trainer)
        scores["after"] = score(job.trainer.model)
        job.trainer.create_model_card()
    if job.arguments.compare_non_private and job.accuracy:
        scores["without privacy"] = job.accuracy(train_without_privacy(job))
    if job.trainer.is_world_process_zero():
        report(job, scores, folder)
    PartialState().destroy_process_group()


@contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """What says by itself what was wrong needs no traceback: wrong input, and packages that are missing."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(
            f"{program}: interrupted. What was spent stands in the ledger; "
            "--resume_from_checkpoint True goes on from the last checkpoint, if there is one."
        )


def parse_arguments(argv: list[str], example_arguments: type, defaults: dict, embedded_defaults: dict) -> tuple:
    """Both kinds of arguments, with `defaults` for what was not given, and further ones for the embedded data."""
    parser = HfArgumentParser((example_arguments, DPTrainingArguments), allow_abbrev=False)
    options = [argument.split("=")[0] for argument in argv if argument.startswith("--")]
    given = {option.removeprefix("--").replace("-", "_") for option in options}
    if "dataset_name" not in given:
        defaults = {**defaults, **embedded_defaults}
    if given & {"noise_multiplier", "non_private"}:
        defaults = {**defaults, "target_epsilon": None}
    parser.set_defaults(**defaults)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: no such option; --help lists all of them. Lists take commas: a,b.")
    return tuple(parsed)


def prepare(arguments: ExampleArguments, args: DPTrainingArguments) -> Job:
    """Loads model and data, and lets every part check what it was given before any work is done."""
    set_seed(args.seed)
    processor = load_processor(arguments.model_name_or_path)
    train_dataset, eval_dataset, prompts = load_data(arguments, args.privacy_unit_column)
    choose_folders(args, arguments.model_name_or_path, bool(arguments.lora_rank))
    trainer = DPCLIPTrainer(
        load_model(arguments),
        args,
        ImageTextCollator(processor, arguments.image_column, arguments.caption_column),
        train_dataset,
        eval_dataset,
        processor,
        public_negatives=load_public_negatives(arguments, prompts),
    )
    find_checkpoint(trainer)

    def accuracy(model) -> float:
        columns = arguments.image_column, arguments.label_column
        return zero_shot_accuracy(model, processor, eval_dataset, prompts, *columns)

    return Job(arguments, trainer, accuracy if prompts else None)


def choose_folders(args: DPTrainingArguments, start: str, has_adapters: bool) -> None:
    """Adapters live in a folder of their own; the merged model goes to the folder above."""
    named, folder = args.resume_from_checkpoint, args.output_dir
    if Path(folder).is_file():
        raise ValueError(f"--output_dir {folder} is a file: name a folder, which need not be there yet.")
    if has_adapters and Path(start).resolve() == Path(folder).resolve():
        raise ValueError(
            f"--output_dir {folder} is where training starts from: the merged model would replace the one that the "
            "adapters belong to. Name another folder."
        )
    if has_adapters:
        args.output_dir = str(Path(folder, "adapter"))
    # One for all runs that share the folder, with adapters or without; or that of a trainer of adapters by itself.
    ledgers = Path(folder, LEDGER_NAME), Path(folder, "adapter", LEDGER_NAME)
    args.ledger_path = args.ledger_path or str(next(filter(Path.is_file, ledgers), ledgers[0]))
    if named in ("True", "true") or (named and Path(named) in (Path(folder), Path(args.output_dir))):
        args.resume_from_checkpoint = True


def find_checkpoint(trainer: DPCLIPTrainer) -> None:
    """Puts the folder of the last checkpoint where one was asked for, and refuses one that does not fit before the
    evaluation that precedes training."""
    args = trainer.args
    if args.resume_from_checkpoint is True:
        args.resume_from_checkpoint = last_complete_checkpoint(args.output_dir)
    if args.resume_from_checkpoint:
        check_resumable(args.resume_from_checkpoint, trainer.plan)


def load_processor(name: str):
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {name} holds adapters only: name the model that they were merged into (the folder "
            "above, where this example made them), or the one that they belong to."
        )
    try:
        return AutoProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model_name_or_path {name} is neither a folder here nor on the Hub: {error}") from error
    except ValueError as error:
        raise ValueError(f"--model_name_or_path {name} is no model with a processor: {error}") from error


def load_model(arguments: ExampleArguments):
    """The model to fine-tune: adapters with everything else frozen, or all parameters but the temperature."""
    model = AutoModel.from_pretrained(arguments.model_name_or_path)
    if arguments.lora_rank:
        return get_peft_model(model, lora_config(model, r=arguments.lora_rank, text_tower=arguments.text_tower))
    # One scalar whose gradient can take up most of the clipping norm, and which noise would move at random.
    model.logit_scale.requires_grad_(False)
    return model


def load_data(arguments: ExampleArguments, unit: str | None) -> tuple[Dataset, Dataset, list[str] | None]:
    """The private records, held-out ones, and a prompt for each class (`None` where records have captions)."""
    splits = load_splits(arguments)
    columns = next(iter(splits.values())).column_names
    if arguments.label_column is None and arguments.caption_column is None:
        raise ValueError(
            f"{arguments.dataset_name} has the columns {columns}: name the one with the captions with "
            "--caption_column, or one of class labels with --label_column."
        )
    if arguments.label_column is None and arguments.caption_column not in columns:
        raise ValueError(
            f"--caption_column {arguments.caption_column} is not a column of {arguments.dataset_name}, which has "
            f"{columns}: name one, or name a column of class labels with --label_column."
        )
    text_column = arguments.label_column or arguments.caption_column
    train, held_out = private_and_held_out(splits, arguments, text_column, unit)
    if arguments.label_column is None and arguments.compare_non_private:
        raise ValueError("--compare_non_private compares accuracies: name a column of class labels, --label_column.")
    if arguments.label_column is None:
        return train, held_out, None
    template = arguments.prompt_template or "a photo of a {}"
    arguments.caption_column = "caption"
    train, held_out = (caption_by_label(split, arguments.label_column, template) for split in (train, held_out))
    return train, held_out, class_prompts(train.features[arguments.label_column].names, template)


def load_public_negatives(arguments: ExampleArguments, prompts: list[str] | None) -> list[str] | Dataset | None:
    name = arguments.public_negatives
    if name is None:
        return None
    if name != "class_prompts":
        public = next(iter(load_pairs(name, image_column=None).values()))
        if arguments.image_column not in public.column_names:
            return public
        return next(iter(load_pairs(name, arguments.image_column).values()))
    if prompts is None:
        raise ValueError(
            "--public_negatives class_prompts needs classes: name a column of class labels with --label_column, or a "
            "file of public captions."
        )
    return prompts


def load_splits(arguments: ExampleArguments) -> DatasetDict:
    if arguments.dataset_name not in PRESETS:
        try:
            return load_pairs(arguments.dataset_name, arguments.image_column)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Known by name are {', '.join(PRESETS)}.") from error
    preset = PRESETS[arguments.dataset_name]
    arguments.image_column, arguments.label_column = "image", "label"
    arguments.prompt_template = arguments.prompt_template or preset.template
    return preset.load()


def private_and_held_out(
    splits: DatasetDict, arguments: ExampleArguments, text_column: str, unit: str | None
) -> list[Dataset]:
    """The two datasets, complete, and cut down to the sizes asked for.

    Where the second has to be taken from the first, records of one `unit` (by default, of one image) stay together.
    """
    others = (name for name in EVAL_SPLITS if name in splits and name != arguments.train_split)
    eval_split = arguments.eval_split or next(others, None)
    for option, name in (("train_split", arguments.train_split), ("eval_split", eval_split)):
        if name is not None and name not in splits:
            raise ValueError(f"--{option} {name} is not a split of the dataset ({', '.join(splits)}).")
    if arguments.train_split == eval_split:
        raise ValueError(
            f"--eval_split {eval_split} is the split of the private records: name another one, or leave the "
            "option out, and 10 % of the records are held out."
        )
    pair = [splits[name] for name in (arguments.train_split, eval_split) if name is not None]
    for split in pair:
        # Before any are held out, while their numbers are those of the file.
        check_complete(split, arguments.image_column, text_column)
    if len(pair) == 1:
        # If there is no such unit, the trainer says so.
        column = unit if unit in pair[0].column_names else arguments.image_column
        pair = list(hold_out(pair[0], column).values())
    limits = arguments.max_train_samples, arguments.max_eval_samples
    return [_cut_down(dataset, limit or len(dataset)) for dataset, limit in zip(pair, limits)]


def _cut_down(dataset: Dataset, limit: int) -> Dataset:
    """From ten places: files are often sorted by class. Neighbours, who may be of one unit, stay together."""
    parts, shares = (np.array_split(range(size), 10) for size in (len(dataset), min(len(dataset), limit)))
    return dataset.select(np.concatenate([part[: len(share)] for part, share in zip(parts, shares)]).astype(int))


def non_private_arguments(args: DPTrainingArguments) -> TrainingArguments:
    """An ordinary batch size and learning rate for the same number of epochs."""
    return TrainingArguments(
        output_dir=str(Path(args.output_dir, "non-private")),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        learning_rate=1e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_pin_memory=args.dataloader_pin_memory,
        use_cpu=args.use_cpu,
        seed=args.seed,
    )


def train_without_privacy(job: Job):
    """What the same start, data and number of epochs give with the ordinary `Trainer` at an ordinary batch size."""
    collator = job.trainer.data_collator
    if job.trainer.is_world_process_zero():
        print("Training once more without privacy, to compare.")

    def with_loss(records):
        return {**collator(records), "return_loss": True}

    trainer = Trainer(
        load_model(job.arguments), non_private_arguments(job.trainer.args), with_loss, job.trainer.train_dataset
    )
    trainer.train()
    return trainer.model


def save(trainer: DPCLIPTrainer) -> Path:
    """A folder that `from_pretrained` and `pipeline` open: adapters are merged into the weights."""
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    if not isinstance(trainer.model, PeftModel):
        return folder
    if trainer.is_world_process_zero():
        merged = copy.deepcopy(trainer.model).merge_and_unload()
        for stale in (STATEMENT_NAME, CARD_NAME):
            # What an earlier run said of its weights must not stand beside these, whenever this is interrupted.
            Path(folder.parent, stale).unlink(missing_ok=True)
        merged.save_pretrained(folder.parent)
        trainer.processing_class.save_pretrained(folder.parent)
        shutil.copy(folder / STATEMENT_NAME, folder.parent)
    return folder.parent


def report(job: Job, scores: dict[str, float], folder: Path):
    """What was learnt, at what price, and how to load it."""
    statement = job.trainer.privacy_statement()
    pairs, held_out = job.trainer.args.per_device_eval_batch_size, len(job.trainer.eval_dataset)
    loss = f"contrastive loss on held-out pairs, {pairs} at a time (guessing: {loss_of_guessing(held_out, pairs):.3f})"
    measure = "zero-shot accuracy on held-out images" if job.accuracy else loss
    print(f"\n***** Result: {measure} *****")
    for name, value in scores.items():
        print(f"  {name:16} {value:.1%}" if job.accuracy else f"  {name:16} {value:.3f}")
    spent = statement.spent
    print(f"\nPrivacy: ε = {spent.epsilon:.4g} at δ = {spent.delta:.3g} after {spent.steps} steps.")
    print("".join(f"NOT PRIVATE: {reason}\n" for reason in statement.not_private_because))
    if any(map(math.isnan, scores.values())):
        print("A result is not a number: the model is of no use. A lower learning rate may help.\n")
    gain = scores["after"] - scores["before"] if job.accuracy else scores["before"] - scores["after"]
    if gain < 0:
        print(
            "The model is worse than before: a lower --learning_rate or a larger batch may help (docs/choosing.md).\n"
        )
    mention_other_runs(job.trainer)
    name = type(base_model(job.trainer.model)).__name__
    print(f"from transformers import AutoProcessor, {name}")
    print(f'model = {name}.from_pretrained("{folder}")')
    print(f'processor = AutoProcessor.from_pretrained("{folder}")')


def loss_of_guessing(num_pairs: int, batch_size: int) -> float:
    """The contrastive loss, averaged over pairs, where all pairs of a batch look alike."""
    whole, rest = divmod(num_pairs, batch_size)
    return (whole * batch_size * math.log(batch_size) + rest * math.log(max(rest, 1))) / num_pairs


def mention_other_runs(trainer: DPCLIPTrainer):
    """Whoever sees the results of several runs on the same records has seen more than the ε of one."""
    ledger = ledger_of(trainer)
    runs = len(ledger.runs())
    if runs > 1:
        print(f"{runs} runs are recorded here; what they spent together, `hf-dpclip ledger {ledger.path}` tells.\n")


if __name__ == "__main__":
    main()
