"""Time of a private step of a model whose loss is a mean over records: all records in one pass, and one after another.

`CLIPForVisualQuestionAnswering`, every record clipped by itself, beside `transformers.Trainer` on the same batch. All
trainers live in one process and take turns; the ratio is the median over the turns of their time by the plain one's.

    python examples/benchmarks/vqa_step_time.py --model small --batch_size 64
"""

import argparse
import statistics
import tempfile

from common import (
    CONFIGS,
    RandomPairs,
    TrainerStep,
    Workload,
    make_parser,
    median_ratio,
    print_header,
    print_row,
    quieten,
    setting,
    take_turns,
)
from peft import get_peft_model
from torch import nn
from transformers import CLIPModel, Trainer, TrainingArguments

from hf_dpclip import CLIPForVisualQuestionAnswering, DPCLIPTrainer, DPTrainingArguments, lora_config


ANSWERS = ["yes", "no", "red", "green"]


class AnsweredQuestions(RandomPairs):
    """Noise in the shape of encoded images and questions, with answers."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "labels": index % len(ANSWERS)}


class OneAfterAnother(DPCLIPTrainer):
    """What is done for models of which less is known."""

    minimises_own_loss = False


def main():
    args = parse_arguments()
    quieten()
    columns = "parameters trained", "trainer", "step (s)", "ratio to plain"
    print_header(f"{setting(args)}, {args.turns} turns", *columns)
    for tuning in args.tuning:
        workload = Workload(args.model, tuning, args.batch_size, args.bf16)
        with tempfile.TemporaryDirectory() as folder:
            steps = {name: TrainerStep(trainer) for name, trainer in trainers(workload, folder).items()}
            seconds = dict(zip(steps, take_turns(list(steps.values()), args.turns)))
        for name, each in seconds.items():
            print_row(tuning, name, f"{statistics.median(each):.3f}", f"{median_ratio(each, seconds['plain']):.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="small", help="architecture, with random weights")
    parser.add_argument("--batch_size", type=int, default=64, help="records in a step (default: %(default)s)")
    tunings = ["head", "lora", "full"]
    parser.add_argument("--tuning", nargs="+", choices=tunings, default=tunings, help="which parameters are trained")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each trainer (default: %(default)s)")
    return parser.parse_args()


def trainers(workload: Workload, folder: str) -> dict[str, Trainer]:
    dataset = AnsweredQuestions(workload.config, workload.batch_size)
    common = workload.arguments(folder)
    private = DPTrainingArguments(**common, noise_multiplier=1.0, microbatch_size=1, accountant="rdp")
    return {
        "plain": Trainer(make_model(workload), TrainingArguments(**common), train_dataset=dataset),
        "private, one pass": DPCLIPTrainer(make_model(workload), private, train_dataset=dataset),
        "private, one pass per record": OneAfterAnother(make_model(workload), private, train_dataset=dataset),
    }


def make_model(workload: Workload) -> nn.Module:
    model = CLIPForVisualQuestionAnswering.from_clip(CLIPModel(workload.config), ANSWERS)
    if workload.tuning == "lora":
        return get_peft_model(model, lora_config(model))
    model.clip.requires_grad_(workload.tuning == "full")
    return model


if __name__ == "__main__":
    main()
