"""The datasets that the examples know by name, and the accuracy they are judged by."""

import gzip
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from factories import tiny_clip, tiny_processor
from PIL import Image as PILImage

from hf_dpclip.data import caption_by_label
from hf_dpclip.evaluation import zero_shot_accuracy
from hf_dpclip.presets import (
    CIFAR_OBJECTS,
    DIGITS,
    GARMENTS,
    PRESETS,
    load_easy_vqa,
    load_fashion_mnist,
    load_mnist_5k,
)


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
    assert set(splits["train"]["image_id"]).isdisjoint(splits["test"]["image_id"])
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


# ---- From the Hub ----

# Of each dataset: its configuration, its name for the images, its splits, and the names that it has for its classes.
ON_HUB = {
    "ylecun/mnist": (None, "image", ["train", "test"], [str(digit) for digit in range(10)]),
    "zalando-datasets/fashion_mnist": (None, "image", ["train", "test"], ["T - shirt / top", *GARMENTS[1:]]),
    "uoft-cs/cifar10": (None, "img", ["train", "test"], CIFAR_OBJECTS),
    "ufldl-stanford/svhn": ("cropped_digits", "image", ["train", "test", "extra"], [str(d) for d in range(10)]),
    "blanchon/EuroSAT_RGB": (None, "image", ["train", "test", "validation"], [f"cover {i}" for i in range(10)]),
}


def write_hub_folder(folder, config, image_column, splits, names, labels=(9, 0)):
    """A repository as the Hub keeps it: Parquet files, and a card that says which of them belong to which split."""
    features = Features({image_column: Image(), "label": ClassLabel(names=names), "filename": Value("string")})
    images = [PILImage.new("RGB", (8, 8), (value, 0, 0)) for value in range(len(labels))]
    records = {image_column: images, "label": list(labels), "filename": ["a.tif"] * len(labels)}
    for split in splits:
        path = folder / (config or "data") / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(records, features=features).to_parquet(path)
    files = [f"  - split: {split}\n    path: {config or 'data'}/{split}-*" for split in splits]
    card = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:", *files, "---"]
    (folder / "README.md").write_text("\n".join(card))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the Hub."""
    monkeypatch.setattr("hf_dpclip.data.load_dataset", lambda name, config: load_dataset(str(tmp_path / name), config))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_preset_of_the_hub_is_known_here():
    assert {name for name in PRESETS if "/" in name} == ON_HUB.keys()


@pytest.mark.parametrize("name", ON_HUB)
def test_datasets_of_the_hub_get_the_columns_and_the_class_names_of_presets(hub, name):
    write_hub_folder(hub / name, *ON_HUB[name])
    preset = PRESETS[name]
    splits = preset.load()
    assert splits.keys() == {"train", "test"}
    for split in splits.values():
        assert split.column_names == ["image", "label"]
        assert split["label"][:] == [9, 0]
        assert split[1]["image"].getpixel((0, 0)) == (1, 0, 0)
    names = splits["train"].features["label"].names
    assert len(set(names)) == 10
    assert caption_by_label(splits["test"], "label", preset.template)["caption"][0] == preset.template.format(names[9])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "image"}, r"columns \['image', 'label', 'filename'\]; expected were img and label"),
        ({"splits": ["train", "validation"]}, "splits train, validation; expected were train and test"),
        ({"names": ["cat", "dog"], "labels": (1, 0)}, "2 classes; expected were 10: airplane, automobile"),
        ({"labels": (3, -1)}, r"record 1 \(such records: 1\) has no label in column 'label'"),
        ({"labels": (None, 3)}, r"record 0 \(such records: 1\) has no label in column 'label'"),
    ],
)
def test_a_dataset_that_is_not_laid_out_as_expected_is_refused(hub, changes, message):
    layout = dict(zip(("config", "image_column", "splits", "names"), ON_HUB["uoft-cs/cifar10"]))
    write_hub_folder(hub / "uoft-cs/cifar10", **{**layout, **changes})
    with pytest.raises(ValueError, match=message):
        PRESETS["uoft-cs/cifar10"].load()


def test_a_dataset_that_the_hub_does_not_give_is_named():
    with pytest.raises(FileNotFoundError, match="uoft-cs/cifar10 is neither a file or folder here nor a dataset"):
        PRESETS["uoft-cs/cifar10"].load()


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
    model, processor, prompts = tiny_clip(), tiny_processor(), ["a", "b"]
    inputs = processor(
        text=prompts, images=[image.convert("RGB") for image in dark_and_bright["scan"]], return_tensors="pt"
    )
    with torch.no_grad():
        chosen = model.eval()(**inputs).logits_per_image.argmax(dim=1)
    expected = (chosen == torch.tensor(dark_and_bright["kind"])).float().mean().item()
    assert zero_shot_accuracy(model, processor, dark_and_bright, prompts, "scan", "kind") == expected


def test_an_image_that_is_missing_is_named(dark_and_bright):
    records = dark_and_bright.cast_column("scan", Image(decode=False)).to_list()
    records[2]["scan"] = None
    missing = Dataset.from_list(records, features=dark_and_bright.features)
    with pytest.raises(ValueError, match=r"column 'scan' holds nothing \(None\) where a PIL image is expected"):
        zero_shot_accuracy(Brightness(), tiny_processor(), missing, ["dark", "bright"], "scan", "kind", 3)


@pytest.mark.parametrize("damage", [lambda png: b"no image", lambda png: png[: len(png) // 2], lambda png: b""])
def test_an_image_that_cannot_be_decoded_is_named(dark_and_bright, damage):
    stored = dark_and_bright.cast_column("scan", Image(decode=False))
    records = stored.to_list()
    records[2]["scan"]["bytes"] = damage(records[2]["scan"]["bytes"])
    damaged = Dataset.from_list(records, features=stored.features).cast_column("scan", Image())
    with pytest.raises(ValueError, match=r"record 2 of the dataset cannot be read \(.+\): repair it, or leave it out"):
        zero_shot_accuracy(Brightness(), tiny_processor(), damaged, ["dark", "bright"], "scan", "kind", 3)
