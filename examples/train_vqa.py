"""Teach a CLIP model privately to answer questions about images.

Without arguments, the tiny CLIP in `tiny-clip-shapes`, which knows synthetic pictures with captions and has seen no
question, learns from 38,575 questions about 4,000 pictures (package `easy-vqa`) at ε = 8. The privacy unit is an image
with all its questions:

    accelerate launch examples/train_vqa.py

Your own data, where each record is a unit of its own, and a model from the Hub:

    accelerate launch examples/train_vqa.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name path/to/questions.csv --image_column scan --question_column asked --answer_column finding \
        --answers "clear,fluid,fracture" --trained adapters --target_epsilon 3 --per_device_train_batch_size 256

`--help` lists every argument of `DPTrainingArguments` too.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from train import DEFAULTS as PAIR_DEFAULTS
from train import (
    DataArguments,
    choose_folders,
    errors_in_one_line,
    load_processor,
    mention_other_runs,
    non_private_arguments,
    parse_arguments,
    private_and_held_out,
    save,
)
from transformers import CLIPModel, Trainer, set_seed

from hf_dpclip import (
    CLIPForVisualQuestionAnswering,
    DPCLIPTrainer,
    DPTrainingArguments,
    VisualQuestionCollator,
    lora_config,
)
from hf_dpclip.data import load_pairs
from hf_dpclip.evaluation import vqa_accuracy
from hf_dpclip.metrics import VQAAccuracy
from hf_dpclip.presets import load_easy_vqa


EASY_VQA = "easy-vqa"
# What its author lists as possible, not what occurs in the private records.
EASY_VQA_ANSWERS = "yes,no,circle,rectangle,triangle,black,blue,brown,gray,green,red,teal,yellow"

# For the embedded data; what is given on the command line goes first.
DEFAULTS = {
    **PAIR_DEFAULTS,
    "output_dir": "outputs/private-vqa",
    "per_device_train_batch_size": 250,
    "per_device_eval_batch_size": 256,
    "microbatch_size": 1,
    "num_train_epochs": 6.0,
    "learning_rate": 2e-2,
}

EMBEDDED_DEFAULTS = {"compare_non_private": True, "privacy_unit_column": "image_id", "save_strategy": "no"}


@dataclass
class ExampleArguments(DataArguments):
    """The model and the data."""

    model_name_or_path: str = field(
        default=str(Path(__file__).parent / "tiny-clip-shapes"), metadata={"help": "CLIP model: Hub name or folder."}
    )
    trained: str = field(
        default="head",
        metadata={
            "help": "What learns: the head on frozen embeddings, adapters in the CLIP too, or all of it.",
            "choices": ["head", "adapters", "all"],
        },
    )
    dataset_name: str = field(
        default=EASY_VQA,
        metadata={
            "help": f"{EASY_VQA}; a .csv, .json or .parquet file; a folder written by save_to_disk; a folder of "
            "images with a metadata.csv; or a dataset on the Hub."
        },
    )
    question_column: str = field(default="question", metadata={"help": "Column with the questions."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answers."})
    answers: str | None = field(
        default=None,
        metadata={"help": "Public list of possible answers, separated by commas. Required for your own data."},
    )
    compare_non_private: bool = field(
        default=False,
        metadata={"help": "Also train without privacy, and without images. Not private. On for the embedded data."},
    )


def main():
    disable_progress_bars()
    with errors_in_one_line("train_vqa.py"):
        arguments, args = parse_arguments(sys.argv[1:], ExampleArguments, DEFAULTS, EMBEDDED_DEFAULTS)
        trainer = prepare(arguments, args)
        # Also shows, before anything is spent, whether the held-out records can be evaluated.
        trainer.evaluate()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        folder = save(trainer)
        scores = {"CLIP, private": trainer.evaluate()["eval_vqa_accuracy"]}
        trainer.create_model_card()
    if arguments.compare_non_private:
        scores |= without_privacy(trainer, arguments)
    if trainer.is_world_process_zero():
        report(trainer, scores, folder)
    PartialState().destroy_process_group()


def prepare(arguments: ExampleArguments, args: DPTrainingArguments) -> DPCLIPTrainer:
    """Loads model and data, and lets every part check what it was given before any work is done."""
    set_seed(args.seed)
    processor = load_processor(arguments.model_name_or_path)
    train_dataset, eval_dataset, answers = load_data(arguments, args.privacy_unit_column)
    choose_folders(args, arguments.model_name_or_path, arguments.trained == "adapters")
    model = load_model(arguments, answers)
    columns = arguments.image_column, arguments.question_column, arguments.answer_column
    names = dict(zip(("image_column", "text_column", "answer_column"), columns))
    return DPCLIPTrainer(
        model,
        args,
        VisualQuestionCollator(processor, label2id=model.config.label2id, **names),
        train_dataset,
        eval_dataset,
        processor,
        compute_metrics=partial(vqa_accuracy, id2label=model.config.id2label),
    )


def load_model(arguments: ExampleArguments, answers: list[str]):
    """A new head on the CLIP named, with only those parameters trainable that are to learn."""
    model = CLIPForVisualQuestionAnswering.from_clip(CLIPModel.from_pretrained(arguments.model_name_or_path), answers)
    if arguments.trained == "adapters":
        return get_peft_model(model, lora_config(model))
    model.clip.requires_grad_(arguments.trained == "all")
    return model


def load_data(arguments: ExampleArguments, unit: str | None) -> tuple[Dataset, Dataset, list[str]]:
    """The private records, held-out ones, and the possible answers, which are public."""
    if arguments.dataset_name == EASY_VQA:
        splits = load_easy_vqa()
        arguments.answers = arguments.answers or EASY_VQA_ANSWERS
    else:
        splits = load_pairs(arguments.dataset_name, arguments.image_column)
    if arguments.answers is None:
        raise ValueError(
            "--answers is missing: list what may be answered, as in --answers yes,no,red. A list made from the "
            "private records would give away answers that occur only once."
        )
    train, held_out = private_and_held_out(splits, arguments, arguments.question_column, unit)
    return train, held_out, [answer.strip() for answer in arguments.answers.split(",")]


def without_privacy(trainer: DPCLIPTrainer, arguments: ExampleArguments) -> dict[str, float]:
    """Accuracies of the ordinary `Trainer` on the same start and data, and of what can be had without the images."""
    if trainer.is_world_process_zero():
        print("Training once more without privacy, to compare.")
    model = load_model(arguments, arguments.answers.split(","))
    plain = Trainer(
        model,
        non_private_arguments(trainer.args),
        trainer.data_collator,
        trainer.train_dataset,
        trainer.eval_dataset,
        compute_metrics=trainer.compute_metrics,
    )
    plain.train()
    return {"CLIP, without privacy": plain.evaluate()["eval_vqa_accuracy"], **blind_baselines(trainer, arguments)}


def blind_baselines(trainer: DPCLIPTrainer, arguments: ExampleArguments) -> dict[str, float]:
    """Accuracies of the most frequent answer, and of a logistic regression on the words of the question."""
    columns = arguments.question_column, arguments.answer_column
    (questions, answers), (asked, truth) = (
        [dataset[column][:] for column in columns] for dataset in (trainer.train_dataset, trainer.eval_dataset)
    )
    most_frequent = Counter(answers).most_common(1)[0][0]
    words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(questions, answers)
    predictions = {
        "question only, without privacy": words.predict(asked).tolist(),
        "most frequent answer": [most_frequent] * len(truth),
    }
    return {
        name: VQAAccuracy().compute(predictions=predicted, references=truth)["vqa_accuracy"]
        for name, predicted in predictions.items()
    }


def report(trainer: DPCLIPTrainer, scores: dict[str, float], folder: Path):
    """What was learnt, at what price, and how to load it."""
    print("\n***** Result: accuracy of the answers to held-out questions *****")
    for name, value in scores.items():
        print(f"  {name:30} {value:.1%}")
    statement = trainer.privacy_statement()
    spent, unit = statement.spent, trainer.args.privacy_unit_column or "record"
    print(f"\nPrivacy of each {unit}: ε = {spent.epsilon:.4g} at δ = {spent.delta:.3g} after {spent.steps} steps.")
    print("".join(f"NOT PRIVATE: {reason}\n" for reason in statement.not_private_because))
    mention_other_runs(trainer)
    print("from hf_dpclip import CLIPForVisualQuestionAnswering")
    print(f'model = CLIPForVisualQuestionAnswering.from_pretrained("{folder}")')


if __name__ == "__main__":
    main()
