"""Accuracy of answers to visual questions."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


ARTICLES = {"a", "an", "the"}
PUNCTUATION = ".,:;!?\"'()"


class VQAAccuracy(evaluate.Metric):
    """Mean of min(1, number of humans who gave the predicted answer / 3) over questions.

    `predictions` are answers, one for each question. `references` are lists of all human answers to each question (ten
    in VQA v2), or, where there is a single true answer, that answer as a plain string, which counts 1. A list of one
    answer is one human's: it counts 1/3.

    Answers are compared in lower case, without punctuation around words and without articles. The official script
    moreover spells numbers and contractions alike, and averages over all subsets of nine of the ten humans.

    Reference: Antol et al., VQA: Visual Question Answering (2015), section 3.

    Example:
        ```python
        VQAAccuracy().compute(predictions=["red"], references=[["red", "red", "pink"]])  # {"vqa_accuracy": 0.667}
        VQAAccuracy().compute(predictions=["red"], references=["Red."])  # {"vqa_accuracy": 1.0}
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        answer = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="answers; the true answer to each question, or a list of all human answers to it",
            features=[
                datasets.Features({"predictions": answer, "references": answer}),
                datasets.Features({"predictions": answer, "references": datasets.Sequence(answer)}),
            ],
        )

    def _compute(self, predictions: list[str], references: list[str] | list[list[str]]) -> dict[str, float]:
        return {
            "vqa_accuracy": float(np.mean([_score(answer, truth) for answer, truth in zip(predictions, references)]))
        }


def _score(prediction: str, reference: str | Sequence[str]) -> float:
    if isinstance(reference, str):
        return float(_normalised(prediction) == _normalised(reference))
    return min(1.0, sum(_normalised(prediction) == _normalised(answer) for answer in reference) / 3)


def _normalised(answer: str) -> list[str]:
    """The words to compare, without articles unless there is nothing else."""
    words = [word.strip(PUNCTUATION) for word in answer.lower().split()]
    return [word for word in words if word and word not in ARTICLES] or words
