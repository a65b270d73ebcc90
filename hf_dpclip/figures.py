"""Figures of what privacy costs: ε against steps, and accuracy against ε."""

from pathlib import Path
from typing import Any

import numpy as np

from .planning import steps_per_epoch
from .privacy import PrivacyPlan


# Each point of the curve costs an evaluation of the accountant.
CURVE_POINTS = 12


def plot_epsilon(plan: PrivacyPlan, path: str | Path) -> None:
    """Writes the figure of ε against steps.

    Raises `ModuleNotFoundError` without matplotlib, and `ValueError` for a file format that it does not know.
    """
    figure, axes = _figure()
    draw_epsilon(axes, plan)
    axes.legend(loc="lower right")
    axes.set_title(
        f"n = {plan.num_examples:,}, B = {plan.expected_batch_size:,}, K = {plan.num_microbatches:,}, "
        f"σ = {plan.noise_multiplier:.4g} ({plan.accountant} accountant)",
        fontsize="medium",
    )
    length = steps_per_epoch(plan.num_examples, plan.expected_batch_size)
    epochs = axes.secondary_xaxis("top", functions=(lambda step: step / length, lambda epoch: epoch * length))
    epochs.set_xlabel("epochs")
    figure.savefig(path)


def draw_epsilon(axes: Any, plan: PrivacyPlan) -> None:
    """Draws the curve of ε against steps, and the target, on axes of matplotlib."""
    # Points are close together at first, where the curve is steep.
    steps = np.unique(np.ceil(plan.num_steps * np.linspace(0, 1, CURVE_POINTS + 1) ** 2).astype(int)).tolist()
    axes.plot(steps, [plan.epsilon(each) for each in steps], marker="o", markersize=3, label="spent")
    if plan.target_epsilon is not None:
        axes.axhline(plan.target_epsilon, color="tab:red", linestyle="--", label=f"target ε = {plan.target_epsilon:g}")
    axes.set(xlabel="steps", ylabel=f"ε at δ = {plan.target_delta:.3g}", xlim=(0, None), ylim=(0, None))


def plot_privacy_utility(epsilons: list[float], values: list[float], metric: str, path: str | Path) -> None:
    """Writes the figure of an evaluation metric against the ε spent when it was measured.

    Raises `ModuleNotFoundError` without matplotlib.
    """
    figure, axes = _figure()
    axes.plot(epsilons, values, marker="o")
    axes.set(xlabel="ε spent", ylabel=f"{metric} on held-out records", xlim=(0, None))
    axes.set_title("Evaluations during one run", fontsize="medium")
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install hf_dpclip[plot]") from error
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes
