"""Run under a launcher: a hyperparameter search, of which every process writes down what it saw.

python -m accelerate.commands.launch --multi_gpu --num_processes 2 searching.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState


sys.path.insert(0, str(Path(__file__).parents[1]))

from checks import flat_weights
from factories import SAVING, arguments, pairs, tiny_clip
from transformers import TrainerCallback

from hf_dpclip import DPCLIPTrainer


class Trials(TrainerCallback):
    """The settings and the last weights of each trial."""

    def __init__(self):
        self.settings, self.weights = [], []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.settings.append([args.learning_rate, args.per_device_train_batch_size])
        self.weights.append(flat_weights(model))


def space(trial) -> dict:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 8]),
    }


def refusal(act, *args, **kwargs) -> str:
    """The message with which something is refused."""
    try:
        act(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def search(folder: Path) -> dict:
    """Eight trials, enough for the pruner that is optuna's default, and a run with the best settings."""
    trials = Trials()
    args = arguments(folder, accountant="rdp", eval_strategy="steps", eval_steps=1, save_strategy="no")
    options = {"train_dataset": pairs(64), "eval_dataset": pairs(16, seed=1), "callbacks": [trials]}
    trainer = DPCLIPTrainer(args=args, model_init=lambda: tiny_clip(), **options)
    refused = refusal(trainer.hyperparameter_search, space, n_trials=2, backend="optuna", timeout=60)
    best = trainer.hyperparameter_search(space, n_trials=8, direction="minimize", backend="optuna")
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    torch.save(trials.weights, folder / f"weights-{args.process_index}.pt")
    statement = trainer.privacy_statement()
    return {
        "refused": refused,
        "best": [best.run_id, best.objective, best.hyperparameters],
        "settings": trials.settings,
        "runs": [[plan.expected_batch_size, steps] for plan, steps in statement.runs],
        "run": statement.run,
        "epsilon": statement.spent.epsilon,
    }


def different_plans(folder: Path) -> str:
    """Each process has a dataset of its own size."""
    args = arguments(folder, accountant="rdp")
    dataset = pairs(64 + int(os.environ["RANK"]))
    return refusal(DPCLIPTrainer(tiny_clip(), args, train_dataset=dataset).train)


def resume_what_was_finished(folder: Path) -> list[float]:
    """The steps that are left from a checkpoint of this trainer's own run count on every process."""
    args = arguments(folder, accountant="rdp", target_epsilon=3.0, **SAVING)
    trainer = DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64))
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return [trainer.privacy_spent().steps, trainer.privacy_spent().epsilon]


def main():
    folder, process = Path(sys.argv[1]), os.environ["RANK"]
    facts = {
        **search(folder),
        "different": different_plans(folder),
        "resumed": resume_what_was_finished(folder / "resumed"),
    }
    (folder / f"facts-{process}.json").write_text(json.dumps(facts), encoding="utf-8")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
