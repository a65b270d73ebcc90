"""Recall@k of image-text retrieval, in both directions."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


# Queries that are compared with all candidates at a time.
BLOCK = 1024


class RetrievalRecall(evaluate.Metric):
    """Share of images that find a caption of theirs among the k most similar ones, and of captions their image.

    `predictions` are image embeddings, one row for each image. `references` are the embeddings of the captions: for
    each image one row, or a list of one or more rows. Rows are normalised here, so similarity is the cosine. Being
    embeddings, not similarities, they can come in batches and from several processes: the candidates are always those
    of all batches. A tie with a wrong candidate counts as a miss, so that equal embeddings for everything score 0.

    Args:
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): the values of k.
        args, kwargs: as in [`evaluate.Metric`], e.g. `num_process` and `process_id`.

    Returns `image_to_text_recall@k` and `text_to_image_recall@k` for each k. `compute` raises `ValueError` if a k
    exceeds the number of images, or if an image has no caption.

    Reference: Karpathy and Fei-Fei, Deep Visual-Semantic Alignments for Generating Image Descriptions (2015), table 1.

    Example:
        ```python
        metric = RetrievalRecall(ks=(1, 5))
        for batch in batches:
            metric.add_batch(predictions=image_embeds, references=text_embeds)
        metric.compute()  # {"image_to_text_recall@1": 0.41, ...}
        ```
    """

    def __init__(self, *args, ks: Sequence[int] = (1, 5, 10), **kwargs):
        if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
            raise ValueError(f"ks={ks!r} is not possible: give whole numbers of at least 1, e.g. ks=(1, 5, 10).")
        self.ks = ks
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="embeddings of images; of each image's caption, or a list of those of its captions",
            features=[
                datasets.Features({"predictions": row, "references": row}),
                datasets.Features({"predictions": row, "references": datasets.Sequence(row)}),
            ],
        )

    def _compute(self, predictions: list[list[float]], references: list) -> dict[str, float]:
        captions = [row if isinstance(row[0], list) else [row] for row in references if len(row)]
        self._check_sizes(len(predictions), len(captions))
        owners = np.repeat(np.arange(len(captions)), [len(rows) for rows in captions])
        images, texts = _normalised(predictions), _normalised([row for rows in captions for row in rows])
        if images.shape[1] != texts.shape[1]:
            raise ValueError(
                f"image embeddings have {images.shape[1]} coordinates and text embeddings {texts.shape[1]}: take both "
                "after the projection into the shared space (image_embeds, text_embeds)."
            )
        ranks = {
            "image_to_text": _ranks(images, texts, np.arange(len(images)), owners),
            "text_to_image": _ranks(texts, images, owners, np.arange(len(images))),
        }
        return {f"{way}_recall@{k}": float(np.mean(ranks[way] < k)) for way in ranks for k in self.ks}

    def _check_sizes(self, num_images: int, num_captioned: int):
        if num_captioned < num_images:
            raise ValueError(f"{num_images - num_captioned} of {num_images} images have no caption: leave them out.")
        if max(self.ks) > num_images:
            raise ValueError(
                f"recall@{max(self.ks)} needs at least {max(self.ks)} candidates, and there are {num_images} images: "
                f"choose smaller ones, e.g. RetrievalRecall(ks=(1,))."
            )


def _normalised(rows: list[list[float]]) -> np.ndarray:
    embeddings = np.asarray(rows, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _ranks(
    queries: np.ndarray, candidates: np.ndarray, owners: np.ndarray, candidate_owners: np.ndarray
) -> np.ndarray:
    """For each query, how many wrong candidates are at least as similar as the most similar right one."""
    ranks = []
    for start in range(0, len(queries), BLOCK):
        similarities = queries[start : start + BLOCK] @ candidates.T
        own = owners[start : start + BLOCK, None] == candidate_owners
        best = np.where(own, similarities, -np.inf).max(axis=1, keepdims=True)
        # Not `>=`: NaN must not count as found.
        ranks.append((~(similarities < best) & ~own).sum(axis=1))
    return np.concatenate(ranks)
