"""Metrics: their values, and that they are ordinary `evaluate` metrics that need no network."""

import re
from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch

from hf_dpclip.metrics import RetrievalRecall, VQAAccuracy, ZeroShotAccuracy


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


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_prompt_is_refused_not_counted_as_wrong(label):
    message = re.escape(f"the label of image 2 (such images: 1) is {label}, and there are 3 prompts")
    with pytest.raises(ValueError, match=message):
        ZeroShotAccuracy(keep_in_memory=True).compute(predictions=SIMILARITIES, references=[0, 1, label, 1])


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


# ---- Retrieval ----

IMAGES = np.eye(4, dtype=np.float32)
# The captions of images 0 and 1 are swapped; image 2 has two captions, of which the second is nearest to image 3.
CAPTIONS = [[IMAGES[1]], [IMAGES[0]], [IMAGES[2], [0, 0, 0.6, 0.8]], [IMAGES[3]]]
RECALL = {
    "image_to_text_recall@1": 2 / 4,
    "image_to_text_recall@2": 2 / 4,
    "text_to_image_recall@1": 2 / 5,
    "text_to_image_recall@2": 3 / 5,
}


def test_recall_counts_own_captions_and_own_images_among_the_nearest():
    assert RetrievalRecall(ks=(1, 2)).compute(predictions=IMAGES, references=CAPTIONS) == RECALL


def test_recall_in_batches_is_that_of_all_candidates_together():
    metric = RetrievalRecall(ks=(1, 2))
    metric.add_batch(predictions=IMAGES[:3], references=CAPTIONS[:3])
    metric.add_batch(predictions=IMAGES[3:], references=CAPTIONS[3:])
    assert metric.compute() == RECALL


def test_recall_from_several_processes_is_that_of_all_candidates_together(tmp_path):
    def share(process):
        options = {"num_process": 2, "process_id": process, "cache_dir": str(tmp_path)}
        metric = RetrievalRecall(ks=(1, 2), **options)
        metric.add_batch(predictions=IMAGES[process::2], references=CAPTIONS[process::2])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(share, range(2))) == [RECALL, None]


def test_recall_agrees_with_a_ranking_of_random_embeddings():
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(2, 40, 3))
    computed = RetrievalRecall(ks=(1, 7)).compute(predictions=images, references=texts)
    cosines = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    for way, rows in {"image_to_text": cosines, "text_to_image": cosines.T}.items():
        places = np.argsort(np.argsort(-rows, axis=1), axis=1).diagonal()
        assert [computed[f"{way}_recall@{k}"] for k in (1, 7)] == [np.mean(places < k) for k in (1, 7)]


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_one_caption_per_image_needs_no_list(convert):
    computed = RetrievalRecall(ks=(1, 4)).compute(predictions=convert(IMAGES), references=convert(3 * IMAGES))
    assert set(computed.values()) == {1.0}


@pytest.mark.parametrize("worthless", [np.ones((4, 4)), np.full((4, 4), np.nan), np.zeros((4, 4))])
def test_embeddings_that_tell_nothing_apart_find_nothing(worthless):
    computed = RetrievalRecall(ks=(1, 3)).compute(predictions=worthless, references=worthless)
    assert set(computed.values()) == {0.0}


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (IMAGES, IMAGES, "recall@10 needs at least 10 candidates, and there are 4 images: choose smaller ones"),
        (IMAGES, [[IMAGES[0]], [], [IMAGES[0]], [IMAGES[0]]], "1 of 4 images have no caption"),
        (IMAGES, IMAGES[:, :3], "image embeddings have 4 coordinates and text embeddings 3"),
        (IMAGES, IMAGES[:3], "Mismatch in the number of predictions (4) and references (3)"),
    ],
)
def test_impossible_recall_is_refused(images, captions, message):
    ks = (1, 5, 10) if "recall@10" in message else (1,)
    with pytest.raises(ValueError, match=re.escape(message)):
        RetrievalRecall(ks=ks, keep_in_memory=True).compute(predictions=images, references=captions)


@pytest.mark.parametrize("ks", [(), (0,), (1.5,)])
def test_impossible_k_is_refused_at_once(ks):
    with pytest.raises(ValueError, match="give whole numbers of at least 1"):
        RetrievalRecall(ks=ks)


def test_recalls_combine():
    combined = evaluate.combine([RetrievalRecall(ks=(k,), keep_in_memory=True) for k in (1, 2)])
    assert combined.compute(predictions=IMAGES, references=CAPTIONS) == RECALL
    combined.add_batch(predictions=IMAGES, references=CAPTIONS)
    assert combined.compute() == RECALL


# ---- Answers ----


@pytest.mark.parametrize(
    ("answer", "humans", "accuracy"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 3 + ["pink"] * 7, 1.0),
        ("red", ["red"] * 2 + ["pink"] * 8, 2 / 3),
        ("red", ["pink"] * 9 + ["red"], 1 / 3),
        ("red", ["pink"] * 10, 0.0),
        ("red", ["red"], 1 / 3),
        ("red", "red", 1.0),
        ("red", "pink", 0.0),
        ("the red", "Red.", 1.0),
        ("3.5", "35", 0.0),
        ("a", "the", 0.0),
        ("", "a", 0.0),
    ],
)
def test_three_humans_or_the_single_truth_make_an_answer_right(answer, humans, accuracy):
    computed = VQAAccuracy().compute(predictions=[answer], references=[humans])
    assert computed == {"vqa_accuracy": pytest.approx(accuracy)}


def test_answers_in_batches_are_averaged():
    metric = VQAAccuracy()
    metric.add_batch(predictions=["red", "two"], references=["red", "three"])
    metric.add_batch(predictions=["yes"], references=["yes"])
    assert metric.compute() == {"vqa_accuracy": pytest.approx(2 / 3)}


def test_answers_combine_with_another_metric_on_answers():
    class ExactMatch(VQAAccuracy):
        def _compute(self, predictions, references):
            return {"exact_match": float(np.mean([a == b for a, b in zip(predictions, references)]))}

    combined = evaluate.combine([VQAAccuracy(), ExactMatch()])
    computed = combined.compute(predictions=["Red", "two"], references=["red", "two"])
    assert computed == {"vqa_accuracy": 1.0, "exact_match": 0.5}
