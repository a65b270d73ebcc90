"""Smoke test of an installed hf_dpclip: what is in its files (arguments: sdist and wheel), and one private run."""

import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import CLIPConfig, CLIPModel

import hf_dpclip
from hf_dpclip import DPCLIPTrainer, DPTrainingArguments, PrivacyStatement
from hf_dpclip.metrics import RetrievalRecall


def check_files(*distributions: str) -> None:
    """Every module of the package is in both, with the marker of its types; tests and examples are in neither."""
    sources = Path(hf_dpclip.__file__).parent
    modules = {f"hf_dpclip/{path.relative_to(sources)}" for path in sources.rglob("*.py")} | {"hf_dpclip/py.typed"}
    for path in distributions:
        names = names_in(path)
        assert modules <= names, f"{path} lacks {sorted(modules - names)}"
        assert not [name for name in names if name.startswith(("tests/", "examples/", ".ci/"))], path


def names_in(path: str) -> set[str]:
    if path.endswith(".whl"):
        return set(zipfile.ZipFile(path).namelist())
    return {name.partition("/")[2] for name in tarfile.open(path).getnames()}


def tiny_clip() -> CLIPModel:
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
    image = {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=layer | text, vision_config=layer | image, projection_dim=8))


def pairs(n: int) -> Dataset:
    input_ids = torch.cat([torch.randint(1, 47, (n, 4)), torch.full((n, 1), 49)], dim=1)
    columns = {"pixel_values": torch.randn(n, 3, 8, 8).numpy(), "input_ids": input_ids.numpy()}
    return Dataset.from_dict(columns).with_format("torch")


def private_run(folder: str) -> None:
    settings = {"per_device_train_batch_size": 8, "microbatch_size": 4, "max_steps": 2, "use_cpu": True}
    args = DPTrainingArguments(folder, target_epsilon=3.0, report_to="none", save_strategy="no", **settings)
    trainer = DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64))
    trainer.train()
    trainer.save_model()
    CLIPModel.from_pretrained(folder)
    statement = PrivacyStatement.load(folder)
    assert 2.9 < statement.spent.epsilon <= 3.0 and not statement.not_private_because


def main() -> None:
    assert "site-packages" in hf_dpclip.__file__, f"{hf_dpclip.__file__} is not what was installed"
    check_files(*sys.argv[1:])
    for name in hf_dpclip.__all__:
        getattr(hf_dpclip, name)
    recall = RetrievalRecall(ks=(1,)).compute(predictions=torch.eye(3).tolist(), references=torch.eye(3).tolist())
    assert set(recall.values()) == {1.0}
    with tempfile.TemporaryDirectory() as folder:
        private_run(folder)
    libraries = ("torch", "transformers", "accelerate", "datasets", "peft")
    print("smoke run of hf_dpclip", version("hf_dpclip"), *(f"{name} {version(name)}" for name in libraries))


if __name__ == "__main__":
    main()
