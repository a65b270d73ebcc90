"""Zero-shot classification accuracy."""

import datasets
import evaluate
import numpy as np


class ZeroShotAccuracy(evaluate.Metric):
    """Share of images whose own class prompt is the most similar of all class prompts.

    `predictions` are rows of image-to-prompt similarities, of shape `(num_images, num_classes)`; `references` are
    class numbers. Usable with `evaluate.combine`, without a network.

    `compute` raises `ValueError` for a reference that is no class number, such as the -1 of a held-back label, which
    would count as a wrong answer.

    Example:
        ```python
        ZeroShotAccuracy().compute(predictions=logits_per_image, references=labels)  # {"accuracy": 0.93}
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="similarities of each image to all class prompts; class numbers",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        similarities, labels = np.asarray(predictions), np.asarray(references)
        unknown = np.flatnonzero((labels < 0) | (labels >= similarities.shape[1]))
        if len(unknown):
            raise ValueError(
                f"the label of image {unknown[0]} (such images: {len(unknown)}) is {labels[unknown[0]]}, and there "
                f"are {similarities.shape[1]} prompts: leave images without a label out, and give one prompt per "
                "class."
            )
        return {"accuracy": float(np.mean(similarities.argmax(axis=1) == labels))}
