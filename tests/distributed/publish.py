"""Trains and publishes to the Hub at HF_ENDPOINT, reads back, and writes down what it got, for the tests to judge.

python publish.py FOLDER
python -m torch.distributed.run --nproc_per_node 2 publish.py FOLDER

One process also tries every strategy, privacy and revisions of repositories, and asks `hf-dpclip card` of each.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, Image
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import CLIPModel
from transformers.trainer_utils import HubStrategy


sys.path.insert(0, str(Path(__file__).parents[1]))

from factories import SAVING, answered_questions, arguments, pairs, tiny_clip, tiny_clip_vqa, tiny_processor
from PIL import Image as PILImage

from hf_dpclip import CLIPForVisualQuestionAnswering, DPCLIPTrainer, lora_config
from hf_dpclip.cli import main as command_line
from hf_dpclip.data import load_pairs


STRATEGIES = [strategy.value for strategy in HubStrategy]


def train(folder: Path, name: str, model, dataset=pairs, **overrides) -> DPCLIPTrainer:
    """Two steps, each saved."""
    settings = {"accountant": "rdp", **SAVING, "logging_steps": 1}
    args = arguments(folder / name, **{**settings, **overrides})
    options = {"train_dataset": dataset(64), "eval_dataset": dataset(8, seed=1), "processing_class": tiny_processor()}
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
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = train(folder, "full", tiny_clip(), hub_model_id=f"me/full{suffix}", **evaluated)
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


def push_vqa(folder: Path) -> None:
    settings = {"hub_model_id": "me/vqa", "dataset": answered_questions}
    trainer = train(folder, "vqa", tiny_clip_vqa(), **settings)
    trainer.push_to_hub()
    write(folder, "vqa", trainer.model, lambda: CLIPForVisualQuestionAnswering.from_pretrained("me/vqa"))


def push_while_training(folder: Path) -> None:
    """Each strategy, for all parameters and for adapters."""
    always = {"push_to_hub": True, "hub_always_push": True}
    for strategy in STRATEGIES:
        trainer = train(folder, strategy, tiny_clip(), hub_strategy=strategy, hub_model_id=f"me/{strategy}", **always)
        trainer.push_to_hub()
    base = CLIPModel.from_pretrained("me/base-1")
    adapters = get_peft_model(base, lora_config(base))
    trainer = train(folder, "adapters", adapters, hub_strategy="all_checkpoints", hub_model_id="me/adapters", **always)
    trainer.push_to_hub()


def push_privately(folder: Path) -> None:
    train(folder, "secret", tiny_clip(), hub_model_id="me/secret", hub_private_repo=True).push_to_hub()


def push_a_revision(folder: Path) -> None:
    api = HfApi()
    api.create_repo("me/revised")
    api.create_branch("me/revised", branch="v2")
    trainer = train(folder, "revised", tiny_clip(), hub_model_id="me/revised", hub_revision="v2")
    trainer.push_to_hub()
    write(folder, "revised", trainer.model, lambda: CLIPModel.from_pretrained("me/revised", revision="v2"))


def push_edits() -> None:
    """Copies of a published model whose card or statement was edited, or is missing."""
    api = HfApi()
    card, statement = (
        Path(api.hf_hub_download("me/full-1", name)).read_text() for name in ("README.md", "privacy.json")
    )
    epsilon = json.loads(statement)["epsilon"]
    edits = {
        "edited-card": {"README.md": card.replace(f"({epsilon:.4g}, ", "(0.1, "), "privacy.json": statement},
        "edited-statement": {"README.md": card, "privacy.json": statement.replace(str(epsilon), "0.1")},
        "no-card": {"privacy.json": statement},
        "no-statement": {"README.md": card},
    }
    for name, files in edits.items():
        api.create_repo(f"me/{name}")
        for path, text in files.items():
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=f"me/{name}")


def push_dataset() -> list[str]:
    """The captions of a dataset that went to the Hub and came back."""
    images = [PILImage.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 128, 255)]
    columns = {"image": images, "text": ["black", "brown", "red"]}
    Dataset.from_dict(columns).cast_column("image", Image()).push_to_hub("me/pairs")
    train_split = load_pairs("me/pairs")["train"]
    return [f"{pair['text']} {pair['image'].getpixel((0, 0))[0]}" for pair in train_split]


def ask(*options: str) -> tuple[int, str]:
    """The exit code of `hf-dpclip card`, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = command_line(["card", *options])
    return code, printed.getvalue()


def publish_everything(folder: Path) -> None:
    """What takes one process only."""
    push_vqa(folder)
    push_while_training(folder)
    push_privately(folder)
    push_a_revision(folder)
    push_edits()
    models = ["full-1", "lora-1", "vqa", *STRATEGIES, "adapters", "secret", "revised", "nowhere"]
    answers = {
        name: ask(f"me/{name}") for name in (*models, "edited-card", "edited-statement", "no-card", "no-statement")
    }
    answers["revision"] = ask("me/revised", "--revision", "v2")
    facts = {"answers": answers, "pairs": push_dataset()}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def main():
    folder = Path(sys.argv[1])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    push_full(folder, f"-{processes}")
    push_adapters(folder, f"-{processes}")
    if processes == 1:
        publish_everything(folder)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
