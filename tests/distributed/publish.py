"""Trains and publishes to the Hub at HF_ENDPOINT, reads back, and writes down what it got, for the tests to judge.

python publish.py FOLDER
python -m torch.distributed.run --nproc_per_node 2 publish.py FOLDER
"""

import sys
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import CLIPModel


sys.path.insert(0, str(Path(__file__).parents[1]))

from factories import arguments, pairs, tiny_clip, tiny_processor

from hf_dpclip import DPCLIPTrainer, lora_config


def train(folder: Path, name: str, model, **overrides) -> DPCLIPTrainer:
    """Two steps, each saved."""
    settings = {"accountant": "rdp", "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    args = arguments(folder / name, **{**settings, "eval_steps": 1, "logging_steps": 1, **overrides})
    options = {"train_dataset": pairs(64), "eval_dataset": pairs(8, seed=1), "processing_class": tiny_processor()}
    trainer = DPCLIPTrainer(model, args, **options)
    trainer.train()
    return trainer


def write(folder: Path, name: str, pushed, load) -> None:
    """The weights of the trained model, and those that the Hub gives back, both from process 0."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        for kind, model in {"pushed": pushed, "loaded": load()}.items():
            tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
            save_file(tensors, folder / f"{name}-{kind}.safetensors")


def push_full(folder: Path, suffix: str) -> None:
    trainer = train(folder, "full", tiny_clip(), hub_model_id=f"me/full{suffix}")
    trainer.push_to_hub(dataset_tags="me/scans", dataset="Scans")
    write(folder, "full", trainer.model, lambda: CLIPModel.from_pretrained(f"me/full{suffix}"))


def push_adapters(folder: Path, suffix: str) -> None:
    state = PartialState()
    if state.is_main_process:
        tiny_clip().push_to_hub(f"me/base{suffix}")
    state.wait_for_everyone()
    base = CLIPModel.from_pretrained(f"me/base{suffix}")
    trainer = train(folder, "lora", get_peft_model(base, lora_config(base)), hub_model_id=f"me/lora{suffix}")
    trainer.push_to_hub()

    def load():
        return PeftModel.from_pretrained(CLIPModel.from_pretrained(f"me/base{suffix}"), f"me/lora{suffix}")

    write(folder, "lora", trainer.model, load)


def main():
    folder = Path(sys.argv[1])
    suffix = f"-{PartialState().num_processes}"
    push_full(folder, suffix)
    push_adapters(folder, suffix)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
