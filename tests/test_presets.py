"""The datasets that the examples know by name, and the accuracy they are judged by."""

import gzip
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from factories import tiny_clip, tiny_processor
from PIL import Image as PILImage

from hf_dpclip.evaluation import zero_shot_accuracy
from hf_dpclip.presets import DIGITS, GARMENTS, PRESETS, load_easy_vqa, load_fashion_mnist, load_mnist_5k


def test_mnist_is_split_evenly_into_private_and_held_out():
    splits = load_mnist_5k()
    assert (len(splits["train"]), len(splits["test"])) == (4000, 1000)
    assert splits["test"].features["label"].names == DIGITS
    assert np.bincount(splits["test"]["label"][:]).tolist() == [100] * 10
    assert splits["train"][0]["image"].size == (28, 28)


def write_idx(folder, prefix, images, labels):
    """Files in the layout of Fashion-MNIST's own."""
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))


def test_fashion_mnist_is_read_from_its_four_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    write_idx(tmp_path, "train", images[:4], np.array([9, 0, 1, 2], dtype=np.uint8))
    write_idx(tmp_path, "t10k", images[4:], np.array([3, 4], dtype=np.uint8))
    splits = load_fashion_mnist(tmp_path)
    assert splits["train"]["label"][:] == [9, 0, 1, 2]
    assert splits["test"].features["label"].names == GARMENTS
    assert np.array_equal(np.asarray(splits["test"][1]["image"]), images[5])


def test_easy_vqa_has_the_splits_of_its_package():
    splits = load_easy_vqa()
    assert {name: len(split) for name, split in splits.items()} == {"train": 38_575, "test": 9_673}
    assert [len(set(split["image_id"])) for split in splits.values()] == [4000, 1000]
    record = splits["test"][1]
    assert (record["question"], record["answer"], record["image_id"]) == (
        "what is the color of the triangle?",
        "red",
        0,
    )
    red, green, blue = np.asarray(record["image"]).reshape(-1, 3).T
    assert record["image"].size == (64, 64) and ((red > 200) & (green < 50) & (blue < 50)).any()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        load_easy_vqa()


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path)


def test_every_preset_has_a_place_for_the_class_name():
    assert all("{}" in preset.template for preset in PRESETS.values())


class Brightness(torch.nn.Module):
    """Finds bright images similar to the second prompt and dark ones to the first."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixel_values, **text):
        brightness = pixel_values.mean(dim=(1, 2, 3))
        return type("Outputs", (), {"logits_per_image": torch.stack([-brightness, brightness], dim=1) * self.weight})


@pytest.fixture
def dark_and_bright():
    features = Features({"scan": Image(), "kind": ClassLabel(names=["dark", "bright"])})
    images = [PILImage.new("L", (8, 8), value) for value in (0, 10, 250, 255)]
    return Dataset.from_dict({"scan": images, "kind": [0, 0, 1, 0]}, features=features)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_zero_shot_accuracy_counts_images_whose_own_prompt_wins(dark_and_bright, batch_size):
    prompts = ["dark", "bright"]
    model = Brightness()
    accuracy = zero_shot_accuracy(model, tiny_processor(), dark_and_bright, prompts, "scan", "kind", batch_size)
    assert accuracy == 0.75
    assert model.training


def test_zero_shot_accuracy_runs_a_real_model(dark_and_bright):
    accuracy = zero_shot_accuracy(tiny_clip(), tiny_processor(), dark_and_bright, ["a", "b"], "scan", "kind")
    assert 0 <= accuracy <= 1
