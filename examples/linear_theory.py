"""Private contrastive learning with linear encoders: the rates that theory promises, and those that are measured.

Pairs come from a spiked covariance model, two linear encoders learn its subspaces by clipped and noised gradient
descent, and the slopes of the error against n, ε, T and d are fitted. `docs/theory.md` derives those to expect.

    python examples/linear_theory.py

Sampling, clipping and noise are `hf_dpclip.privacy`'s own. Seeds make the noise reproducible, which only simulated
data allows.
"""

import argparse
import math
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from theory.simulation import BATCH, MICROBATCHES, PAIRS, PAPER, Arm, Setting, predict, random_error, simulate

from hf_dpclip.markdown import table_head, table_row


# Privacy noise dominates where the error is this many times larger than without noise, and as many times smaller than
# that of random encoders.
DOMINANCE = 3.0
NON_PRIVATE = "no privacy"
CAPTION = (
    "filled: fitted; open: privacy noise does not dominate; bars: standard deviation over seeds\n"
    "dashed: predicted term of the error, nothing fitted; dotted: the same arm without noise"
)
ERRORBARS = {"capsize": 2, "fmt": "o", "markersize": 5}
AXES = {
    "num_examples": "pairs n",
    "epsilon": "ε",
    "num_steps": "steps T",
    "dimension": "dimension d",
}

# Errors of one setting, one per seed.
Errors = dict[Setting, np.ndarray]


class Sweep(NamedTuple):
    """One arm at several values of one field of `Setting`."""

    arm: Arm
    axis: str
    settings: list[Setting]

    @classmethod
    def over(cls, arm: Arm, axis: str, values: Iterable, **fixed) -> "Sweep":
        return cls(arm, axis, [Setting(arm, **fixed, **{axis: value}) for value in values])

    @property
    def values(self) -> np.ndarray:
        return np.array([getattr(setting, self.axis) for setting in self.settings])

    @property
    def private(self) -> bool:
        return self.settings[0].private

    @property
    def name(self) -> str:
        """The arm, and the ε that is asked of it where that is the same for all points."""
        if not self.private:
            return NON_PRIVATE
        fixed = "" if self.axis == "epsilon" else f", ε = {self.settings[0].epsilon:g}"
        return self.arm.name + fixed

    def predicted(self, setting: Setting) -> float:
        """The term of the error that the sweep is about."""
        prediction = predict(setting)
        return prediction.privacy if self.private else prediction.statistics

    @property
    def without_noise(self) -> "Sweep":
        return self._replace(settings=[setting.without_noise for setting in self.settings])


class Fit(NamedTuple):
    """The slope of a sweep in log-log scale, fitted where its regime holds.

    Args:
        inside (`np.ndarray` of `bool`): the points that are fitted.
        predicted (`float`): the slope of the prediction over the same points.
        slopes (`np.ndarray`): the measured slope, one per seed.
    """

    inside: np.ndarray
    predicted: float
    slopes: np.ndarray


def main():
    args = parse_arguments()
    sweeps, side_by_side = quick_plan() if args.quick else full_plan()
    settings = [*(setting for sweep in sweeps for setting in sweep.settings), *side_by_side]
    errors = simulate_all(settings, args.seeds, args.workers)
    fits = [fit(sweep, errors) for sweep in sweeps]
    print_slopes(sweeps, fits)
    print_side_by_side(side_by_side, errors)
    draw(sweeps, fits, errors, args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every setting (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see that everything works")
    output = Path("outputs", "linear_theory.png")
    parser.add_argument("--output", type=Path, default=output, help="the figure (default: %(default)s)")
    args = parser.parse_args()
    if args.seeds < 2 or args.workers < 1:
        parser.error("--seeds must be at least 2, for a deviation, and --workers at least 1")
    return args


def full_plan() -> tuple[list[Sweep], list[Setting]]:
    """Every arm where its own privacy noise dominates, and all of them at one n and one ε."""
    sizes = [3200 * 2**power for power in range(7)]
    sweeps = [
        Sweep.over(PAPER, "num_examples", sizes[:5], epsilon=0.02),
        Sweep.over(BATCH, "num_examples", sizes[3:], epsilon=4.0),
        Sweep.over(MICROBATCHES, "num_examples", sizes[1:6], epsilon=1.0),
        Sweep.over(PAIRS, "num_examples", sizes[:5], epsilon=0.1),
        Sweep.over(PAPER, "epsilon", [0.0025, 0.005, 0.01, 0.02, 0.04]),
        Sweep.over(BATCH, "epsilon", [1.0, 2.0, 4.0, 8.0, 16.0]),
        Sweep.over(MICROBATCHES, "epsilon", [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]),
        Sweep.over(PAIRS, "epsilon", [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]),
        Sweep.over(MICROBATCHES, "num_steps", [250 * 2**power for power in range(5)], epsilon=1.0),
        Sweep.over(MICROBATCHES, "dimension", [5, 10, 20, 40], epsilon=1.0),
        Sweep.over(BATCH, "num_examples", sizes),
    ]
    arms = [PAPER, BATCH, MICROBATCHES, PAIRS]
    return sweeps, [*(Setting(arm, 102_400, epsilon=1.0) for arm in arms), Setting(BATCH, 102_400)]


def quick_plan() -> tuple[list[Sweep], list[Setting]]:
    short = {"num_steps": 1000}
    sweeps = [
        Sweep.over(MICROBATCHES, "num_examples", [6400, 25_600], epsilon=1.0, **short),
        Sweep.over(PAIRS, "epsilon", [0.025, 0.1], **short),
    ]
    return sweeps, [sweep.settings[-1] for sweep in sweeps]


def simulate_all(settings: list[Setting], seeds: int, workers: int) -> Errors:
    """Errors of all settings, each with and without noise."""
    distinct = list(dict.fromkeys(each for setting in settings for each in (setting, setting.without_noise)))
    # Plans are calibrated here, where those of equal noise share the work, and travel with their settings.
    plans = {setting.plan for setting in distinct}
    print(f"{len(distinct)} settings with {len(plans)} privacy plans, {seeds} seeds each ...\n", flush=True)
    # Every run has a seed of its own: data and noise of no two points are the same.
    jobs = [setting for setting in distinct for _ in range(seeds)]
    # One thread each: matrices this small are slower on several.
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        errors = list(pool.map(simulate, jobs, range(len(jobs))))
    return dict(zip(distinct, np.reshape(errors, (len(distinct), seeds))))


def mean_errors(sweep: Sweep, errors: Errors) -> np.ndarray:
    return np.array([errors[setting].mean() for setting in sweep.settings])


def regime(sweep: Sweep, errors: Errors) -> np.ndarray:
    """Which points are to be fitted: where the term of the error that the sweep is about dominates.

    Privacy noise does where the error is far above what the same arm reaches without noise, and far below that of
    encoders that know nothing; without privacy, sampling does where the error is far above what descent has left.
    """
    error = mean_errors(sweep, errors)
    if not sweep.private:
        return error >= DOMINANCE * np.array([predict(setting).optimisation for setting in sweep.settings])
    floor = mean_errors(sweep.without_noise, errors)
    ceiling = np.array([random_error(setting) for setting in sweep.settings])
    return (error >= DOMINANCE * floor) & (error <= ceiling / DOMINANCE)


def fit(sweep: Sweep, errors: Errors) -> Fit:
    """Least squares of log error on the logarithm of the axis, and of the predicted term likewise."""
    inside = regime(sweep, errors)
    settings = [setting for setting, fitted in zip(sweep.settings, inside) if fitted]
    if len(settings) < 2:
        return Fit(inside, math.nan, np.array([math.nan]))
    x = np.log(sweep.values[inside])
    predicted = np.log([sweep.predicted(setting) for setting in settings])
    measured = np.log([errors[setting] for setting in settings])
    return Fit(inside, np.polyfit(x, predicted, 1)[0], np.polyfit(x, measured, 1)[0])


def decimals(slope: float) -> str:
    """Two of them, and no sign before a zero."""
    return f"{round(slope, 2) + 0.0:.2f}"


def print_slopes(sweeps: list[Sweep], fits: list[Fit]) -> None:
    print(table_head("arm", "against", "predicted slope", "fitted slope", "points fitted", "range fitted"))
    for sweep, fitted in zip(sweeps, fits):
        slope = f"{decimals(fitted.slopes.mean())} ± {fitted.slopes.std():.2f}"
        values = sweep.values[fitted.inside]
        span = f"{values[0]:g} to {values[-1]:g}" if len(values) else "none"
        points = f"{len(values)} of {len(sweep.values)}"
        print(table_row(sweep.name, AXES[sweep.axis], decimals(fitted.predicted), slope, points, span))


def print_side_by_side(settings: list[Setting], errors: Errors) -> None:
    """What noise each arm adds to the mean gradient, what ε the accountant finds for it, and what error follows."""
    first = settings[0]
    print(f"\nSide by side: n = {first.num_examples}, T = {first.num_steps}, d = {first.dimension}\n")
    print(table_head("arm", "ε asked for", "ε of the accountant", "K", "noise", "predicted error", "error"))
    for setting in settings:
        plan, error = setting.plan, errors[setting]
        noise = f"{plan.noise_std / plan.num_microbatches:.4f}"
        measured = f"{error.mean():.4f} ± {error.std():.4f}"
        accounted = f"{plan.epsilon():.3g}"
        predicted = f"{predict(setting).total:.4f}"
        name = setting.arm.name if setting.private else NON_PRIVATE
        print(table_row(name, f"{setting.epsilon:g}", accounted, plan.num_microbatches, noise, predicted, measured))


def draw(sweeps: list[Sweep], fits: list[Fit], errors: Errors, path: Path) -> None:
    """One panel for each axis."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 11), layout="constrained")
    figure.suptitle(CAPTION, fontsize=10)
    for panel, (axis, label) in zip(panels.flat, AXES.items()):
        for sweep, fitted in zip(sweeps, fits):
            if sweep.axis == axis:
                draw_sweep(panel, sweep, fitted, errors)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="error (rms sine of angles to the truth)")
        for scale in (panel.xaxis, panel.yaxis):
            scale.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
            scale.set_major_formatter("{x:g}")
        # Four decades of ε take small labels.
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(alpha=0.3)
        panel.legend(*panel.get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\nFigure: {path}")


def draw_sweep(panel: Axes, sweep: Sweep, fitted: Fit, errors: Errors) -> None:
    x, color = sweep.values, sweep.arm.color if sweep.private else "black"
    mean, deviation = mean_errors(sweep, errors), np.array([errors[setting].std() for setting in sweep.settings])
    for points, filling in ((fitted.inside, color), (~fitted.inside, "white")):
        panel.errorbar(x[points], mean[points], deviation[points], color=color, markerfacecolor=filling, **ERRORBARS)
    label = f"{sweep.name}: slope {decimals(fitted.slopes.mean())}, predicted {decimals(fitted.predicted)}"
    panel.plot(x, [sweep.predicted(setting) for setting in sweep.settings], "--", color=color, label=label)
    if sweep.private:
        panel.plot(x, mean_errors(sweep.without_noise, errors), ":", color=color, linewidth=1)


if __name__ == "__main__":
    main()
