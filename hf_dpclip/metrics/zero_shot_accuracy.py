"""Zero-shot classification accuracy."""

import datasets
import evaluate
import numpy as np


class ZeroShotAccuracy(evaluate.Metric):
    """Share of images whose own class prompt is the most similar of all class prompts.

    `predictions` are rows of image-to-prompt similarities, of shape `(num_images, num_classes)`; `references` are
    class numbers, for which `compute` raises `ValueError` if there is no such prompt. Usable with `evaluate.combine`,
    without a network.

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
        if not all(0 <= label < len(predictions[0]) for label in references):
            raise ValueError(
                f"class numbers go up to {max(references)}, but there are {len(predictions[0])} prompts: give one "
                "prompt for each class, and no record without a class."
            )
        return {"accuracy": float(np.mean(np.argmax(predictions, axis=1) == np.asarray(references)))}
