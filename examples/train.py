"""Fine-tune a CLIP model privately on image-text pairs or labelled images.

Without arguments, the tiny CLIP beside this script, which knows only synthetic pictures, learns from 4,000 real
handwritten digits at ε = 8:

    accelerate launch examples/train.py

Your own data and a model from the Hub:

    accelerate launch examples/train.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name path/to/pairs --image_column scan --caption_column report \
        --target_epsilon 3 --per_device_train_batch_size 64 --microbatch_size 8 --num_train_epochs 5
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, ImageTextCollator, lora_config
from hf_dpclip.data import caption_by_label, class_prompts, load_pairs
from hf_dpclip.evaluation import zero_shot_accuracy
from hf_dpclip.presets import PRESETS


TINY_CLIP = Path(__file__).parent / "tiny-clip"

# Chosen by measurement for the embedded default (see README.md); arguments on the command line take precedence.
DEFAULTS = {
    "output_dir": "outputs/private-clip",
    "target_epsilon": 8.0,
    "per_device_train_batch_size": 512,
    "microbatch_size": 8,
    "num_train_epochs": 10.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class ModelArguments:
    """What is fine-tuned."""

    model_name_or_path: str = field(default=str(TINY_CLIP), metadata={"help": "Dual encoder: Hub name or folder."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA adapters; 0 trains all parameters."})


@dataclass
class DataArguments:
    """What it learns from."""

    dataset_name: str = field(
        default="mnist-5k",
        metadata={
            "help": f"One of {', '.join(PRESETS)}; a Hub name; a folder saved by datasets; an image folder with "
            "metadata; or a .parquet, .csv or .json file."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images, or their paths."})
    caption_column: str | None = field(default=None, metadata={"help": "Column with the captions."})
    label_column: str | None = field(default=None, metadata={"help": "Column with class labels, instead of captions."})
    prompt_template: str | None = field(default=None, metadata={"help": "Caption of a class, e.g. 'a photo of a {}'."})
    train_split: str = field(default="train", metadata={"help": "Split with the private records."})
    eval_split: str | None = field(
        default="test", metadata={"help": "Split to evaluate on; held out if it is absent."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many private records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many records for evaluation."})
    compare_non_private: bool = field(default=True, metadata={"help": "Also train without privacy, to compare."})


def main():
    model_args, data_args, args = parse_arguments(sys.argv[1:])
    set_seed(args.seed)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    train_dataset, eval_dataset, prompts = load_data(data_args)

    def accuracy(model) -> float | None:
        if prompts is None:
            return None
        return zero_shot_accuracy(
            model, processor, eval_dataset, prompts, data_args.image_column, data_args.label_column
        )

    collator = ImageTextCollator(processor, data_args.image_column, data_args.caption_column)
    model = load_model(model_args)
    before = accuracy(model)
    trainer = DPCLIPTrainer(model, args, collator, train_dataset, processing_class=processor)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = accuracy(trainer.model)
    save(trainer, processor)

    baseline = None
    if data_args.compare_non_private and prompts is not None:
        baseline = accuracy(train_without_privacy(load_model(model_args), args, collator, train_dataset))
    if trainer.is_world_process_zero():
        report(trainer, before, after, baseline)
    PartialState().destroy_process_group()


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, DPTrainingArguments]:
    """The three groups of arguments, with `DEFAULTS` for what was not given."""
    parser = HfArgumentParser((ModelArguments, DataArguments, DPTrainingArguments))
    noise_given = any(argument.startswith(("--noise_multiplier", "--non_private")) for argument in argv)
    parser.set_defaults(**{name: value for name, value in DEFAULTS.items() if not (noise_given and "epsilon" in name)})
    return parser.parse_args_into_dataclasses(argv)


def load_model(model_args: ModelArguments):
    """The model to fine-tune: with adapters and everything else frozen, or in full."""
    model = AutoModel.from_pretrained(model_args.model_name_or_path)
    if model_args.lora_rank:
        return get_peft_model(model, lora_config(model, r=model_args.lora_rank))
    # One scalar whose gradient can take up most of the clipping norm, and which noise would move at random.
    model.logit_scale.requires_grad_(False)
    return model


def load_data(data_args: DataArguments) -> tuple[Dataset, Dataset, list[str] | None]:
    """The private records, those held out for evaluation, and a prompt for each class (`None` for captioned data)."""
    if data_args.dataset_name in PRESETS:
        preset = PRESETS[data_args.dataset_name]
        splits = preset.load()
        data_args.label_column = "label"
        data_args.prompt_template = data_args.prompt_template or preset.template
    else:
        splits = load_pairs(data_args.dataset_name, data_args.image_column)
    train, held_out = split(splits, data_args)
    if data_args.label_column is None:
        return train, held_out, None
    template = data_args.prompt_template or "a photo of a {}"
    train = caption_by_label(train, data_args.label_column, template)
    data_args.caption_column = "caption"
    return train, held_out, class_prompts(train.features[data_args.label_column].names, template)


def split(splits: DatasetDict, data_args: DataArguments) -> tuple[Dataset, Dataset]:
    """Private records and held-out records, cut down to the sizes asked for."""
    if data_args.train_split not in splits:
        raise ValueError(f"--train_split {data_args.train_split} is not in the dataset, which has {list(splits)}.")
    if data_args.eval_split not in splits:
        splits = splits[data_args.train_split].train_test_split(test_size=0.1, seed=0)
        data_args = DataArguments(
            max_train_samples=data_args.max_train_samples, max_eval_samples=data_args.max_eval_samples
        )
    train, held_out = splits[data_args.train_split], splits[data_args.eval_split]
    train = train.select(range(min(len(train), data_args.max_train_samples or len(train))))
    return train, held_out.select(range(min(len(held_out), data_args.max_eval_samples or len(held_out))))


def train_without_privacy(model, args: DPTrainingArguments, collator, train_dataset: Dataset):
    """What the same start, data and epochs give with the ordinary `Trainer`."""
    plain_args = TrainingArguments(
        output_dir=str(Path(args.output_dir, "non-private")),
        per_device_train_batch_size=min(args.per_device_train_batch_size, 64),
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        use_cpu=args.use_cpu,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
    )

    def with_loss(records):
        return {**collator(records), "return_loss": True}

    trainer = Trainer(model, plain_args, with_loss, train_dataset)
    trainer.train()
    return trainer.model


def save(trainer: DPCLIPTrainer, processor):
    """A folder that `from_pretrained` and `pipeline` open; adapters are saved apart and merged into the weights."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    if trainer.is_world_process_zero() and hasattr(trainer.model, "merge_and_unload"):
        trainer.model.save_pretrained(folder / "adapter")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).unlink()
        trainer.model.merge_and_unload().save_pretrained(folder)


def report(trainer: DPCLIPTrainer, before: float | None, after: float | None, baseline: float | None):
    """What was learnt, at what price, and how to load it."""
    spent, folder = trainer.privacy_spent(), trainer.args.output_dir
    print("\n***** Result *****")
    for name, value in {
        "before": before,
        f"after, at ε = {spent.epsilon:.3g}": after,
        "without privacy": baseline,
    }.items():
        if value is not None:
            print(f"  zero-shot accuracy on held-out images {name}: {value:.1%}")
    mark = (
        "" if not trainer.args.not_private_because else " NOT PRIVATE: " + "; ".join(trainer.args.not_private_because)
    )
    print(f"  privacy: ε = {spent.epsilon:.4g}, δ = {spent.delta:.3g} after {spent.steps} steps.{mark}")
    print(f'\n  from transformers import CLIPModel, CLIPProcessor\n  model = CLIPModel.from_pretrained("{folder}")')
    print(f'  processor = CLIPProcessor.from_pretrained("{folder}")')


if __name__ == "__main__":
    main()
