"""Metrics as `evaluate.Metric` classes, which load without a network."""

from .zero_shot_accuracy import ZeroShotAccuracy


__all__ = ["ZeroShotAccuracy"]
