"""Metrics: their values, and that they are ordinary `evaluate` metrics that need no network."""

import evaluate
import numpy as np
import pytest
import torch

from hf_dpclip.metrics import ZeroShotAccuracy


SIMILARITIES = [[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.5, 0.4, 0.6], [-3.0, -1.0, -2.0]]


@pytest.mark.parametrize(
    ("labels", "accuracy"), [([0, 1, 2, 1], 1.0), ([1, 0, 0, 0], 0.0), ([0, 1, 1, 1], 0.75), ([0, 0, 0, 0], 0.25)]
)
def test_accuracy_is_the_share_of_images_nearest_to_their_own_prompt(labels, accuracy):
    assert ZeroShotAccuracy().compute(predictions=SIMILARITIES, references=labels) == {"accuracy": accuracy}


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_similarities_may_be_arrays(convert):
    computed = ZeroShotAccuracy().compute(predictions=convert(SIMILARITIES), references=convert([0, 1, 1, 1]))
    assert computed == {"accuracy": 0.75}


def test_batches_add_up():
    metric = ZeroShotAccuracy()
    metric.add_batch(predictions=SIMILARITIES[:3], references=[0, 1, 1])
    metric.add_batch(predictions=SIMILARITIES[3:], references=[1])
    assert metric.compute() == {"accuracy": 0.75}


def test_a_computed_metric_starts_over():
    metric = ZeroShotAccuracy()
    metric.compute(predictions=SIMILARITIES, references=[0, 0, 0, 0])
    assert metric.compute(predictions=SIMILARITIES[:1], references=[0]) == {"accuracy": 1.0}


class NumImages(ZeroShotAccuracy):
    """A second metric on the same inputs."""

    def _compute(self, predictions, references):
        return {"num_images": len(references)}


def test_it_combines_with_another_metric():
    combined = evaluate.combine([ZeroShotAccuracy(), NumImages()])
    computed = combined.compute(predictions=SIMILARITIES, references=[0, 1, 1, 1])
    assert computed == {"accuracy": 0.75, "num_images": 4}


def test_it_combines_with_itself_under_other_names():
    combined = evaluate.combine({"first": ZeroShotAccuracy(), "second": ZeroShotAccuracy()})
    computed = combined.compute(predictions=SIMILARITIES, references=[0, 1, 1, 1])
    assert computed == {"first_accuracy": 0.75, "second_accuracy": 0.75}
