"""Metrics as `evaluate.Metric` classes, which load without a network."""

from .retrieval_recall import RetrievalRecall
from .vqa_accuracy import VQAAccuracy
from .zero_shot_accuracy import ZeroShotAccuracy


__all__ = ["RetrievalRecall", "VQAAccuracy", "ZeroShotAccuracy"]
