"""Tables and figures of what `paper_table.py` measured.

    python examples/results_report.py

reads `docs/results/paper_table.json`, writes the tables into `docs/results.md` and the figures into `docs/figures`.
Tables of other rows (`--rows outputs/vit.json`) are printed, and their figures drawn beside the rows.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation
from paper_table import ARMS, PRIVATE_ARMS, ROWS, load_rows

from hf_dpclip import markdown


DOCUMENT = ROWS.parents[1] / "results.md"
FIGURES = ROWS.parents[1] / "figures"
ARM_NAMES = {
    "zero_shot": "zero-shot",
    "non_private": "no privacy",
    "per_batch": "per batch",
    "microbatch": "microbatches",
    "public_negatives": "public negatives",
}
TUNING_NAMES = {"full": "all parameters", "lora": "LoRA"}
COLORS = {"per_batch": "tab:red", "microbatch": "tab:blue", "public_negatives": "tab:green"}
# The arms in each figure; those by K differ in nothing else.
ARMS_OF = {"privacy_utility": list(PRIVATE_ARMS), "accuracy_by_microbatches": ["per_batch", "microbatch"]}
ERRORBARS = {"capsize": 3, "marker": "o", "markersize": 5}
CAPTION = (
    "bars and grey bands: standard deviation over seeds, where there are several; lines guide the eye\n"
    "each series is drawn a little to the right of the one before, so that none hides another"
)
# Points of 1/72 inch between series.
BESIDE = 7


@dataclass(frozen=True, order=True)
class Cell:
    """What was measured with several seeds.

    Args:
        dataset, arm, tuning (`str`): as in the rows.
        num_microbatches (`int`): K, 0 for arms without.
        epsilon (`float`): infinite for arms without privacy.
    """

    dataset: str
    arm: str
    tuning: str
    num_microbatches: int
    epsilon: float


class Results:
    """The accuracies of all seeds, by cell.

    Args:
        rows (`list[dict]`): as `paper_table.py` writes them.
    """

    def __init__(self, rows: list[dict]):
        self.accuracies: dict[Cell, list[float]] = defaultdict(list)
        self.deltas: dict[str, set[float]] = defaultdict(set)
        for row in rows:
            # The start is the same however it would be tuned.
            tuning = "" if row["arm"] == "zero_shot" else row["tuning"]
            epsilon = math.inf if row["epsilon"] is None else row["epsilon"]
            cell = Cell(row["dataset"], row["arm"], tuning, row["num_microbatches"] or 0, epsilon)
            self.accuracies[cell].append(row["accuracy"])
            self.deltas[row["dataset"]] |= {row["delta"]} - {None}

    @property
    def datasets(self) -> list[str]:
        return sorted({cell.dataset for cell in self.accuracies})

    def cells(self, **fields) -> list[Cell]:
        """Those with the given fields, arms in the order of the paper."""
        chosen = [cell for cell in self.accuracies if all(getattr(cell, name) == fields[name] for name in fields)]
        return sorted(chosen, key=lambda cell: (ARMS.index(cell.arm), cell))

    def mean(self, cell: Cell) -> float:
        return float(np.mean(self.accuracies[cell]))

    def deviation(self, cell: Cell) -> float:
        """Of single seeds, not of their mean; not a number for one seed."""
        values = self.accuracies[cell]
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def ratio(self, cell: Cell) -> float | None:
        """To the mean without privacy, of the same tuning, where that was measured."""
        references = self.cells(dataset=cell.dataset, arm="non_private", tuning=cell.tuning)
        return self.mean(cell) / self.mean(references[0]) if references else None


# ---- Tables ----


def measured(results: Results) -> str:
    """The part of the documentation that is made from rows: nothing until there are some."""
    if not results.accuracies:
        return ""
    figures = [f"![{' '.join(name.split('_'))}]({FIGURES.name}/{name}.png)" for name in drawable(results)]
    return "\n\n".join([*figures, tables(results)])


def tables(results: Results) -> str:
    """Markdown: one table for each dataset."""
    return "\n\n".join(table(results, dataset) for dataset in results.datasets)


def table(results: Results, dataset: str) -> str:
    cells = results.cells(dataset=dataset)
    epsilons = sorted({cell.epsilon for cell in cells})
    titles = ["no noise" if math.isinf(epsilon) else f"ε = {epsilon:g}" for epsilon in epsilons]
    rows = []
    for arm, tuning, count in dict.fromkeys((cell.arm, cell.tuning, cell.num_microbatches) for cell in cells):
        line = results.cells(dataset=dataset, arm=arm, tuning=tuning, num_microbatches=count)
        entries = {cell.epsilon: entry(results, cell) for cell in line}
        names = [ARM_NAMES[arm], TUNING_NAMES.get(tuning, ""), str(count or "")]
        rows.append([*names, *(entries.get(epsilon, "") for epsilon in epsilons)])
    delta = " or ".join(f"{delta:.3g}" for delta in sorted(results.deltas[dataset])) or "none"
    return f"### {dataset} (δ = {delta})\n\n" + markdown.table(["arm", "trained", "K", *titles], rows)


def entry(results: Results, cell: Cell) -> str:
    """Mean ± standard deviation over seeds (their number), and the ratio to the mean without privacy."""
    seeds = len(results.accuracies[cell])
    spread = f" ± {100 * results.deviation(cell):.1f}" if seeds > 1 else ""
    text = f"{100 * results.mean(cell):.1f}{spread} % ({seeds})"
    ratio = results.ratio(cell) if cell.arm in PRIVATE_ARMS else None
    return text if ratio is None else f"{text}, {ratio:.3f}"


def write_between(document: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises `ValueError` if the document has no such markers.
    """
    content = document.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{document} has no lines <!-- begin {name} --> and <!-- end {name} -->: add them.")
    document.write_text(pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", content), encoding="utf-8")


# ---- Figures ----


def draw_privacy_utility(results: Results, path: Path) -> None:
    """Accuracy against ε, a line for each private arm."""
    panels = Panels(results, ARMS_OF["privacy_utility"], "epsilon", "ε")
    for panel, cells in panels:
        for arm in PRIVATE_ARMS:
            by_count = swept([cell for cell in cells if cell.arm == arm], "num_microbatches")
            for number, (count, line) in enumerate(by_count.items(), start=1):
                panels.draw(panel, line, f"{ARM_NAMES[arm]}, K = {count}", (COLORS[arm], number / len(by_count)))
    panels.save(path)


def draw_accuracy_by_microbatches(results: Results, path: Path) -> None:
    """Accuracy against K, a line for each ε. K = 1 is the arm `per_batch`."""
    panels = Panels(results, ARMS_OF["accuracy_by_microbatches"], "num_microbatches", "microbatches per step K")
    for panel, cells in panels:
        by_epsilon = swept(cells, "epsilon")
        for number, (epsilon, line) in enumerate(by_epsilon.items()):
            panels.draw(panel, line, f"ε = {epsilon:g}", plt.colormaps["viridis"](0.85 * number / len(by_epsilon)))
    panels.save(path)


def swept(cells: list[Cell], fixed: str) -> dict[float, list[Cell]]:
    """The cells by the field that stays the same along a line. Where there are lines, single points are left out."""
    values = sorted({getattr(cell, fixed) for cell in cells})
    by_value = {value: [cell for cell in cells if getattr(cell, fixed) == value] for value in values}
    return {value: line for value, line in by_value.items() if len(line) > 1} or by_value


class Panels:
    """A panel for each dataset and tuning, with the levels of no privacy and of no training.

    Args:
        results ([`Results`]): what to draw.
        arms (`list[str]`): those that are drawn, of which some have been measured.
        axis (`str`): the field of the cells on the horizontal axis, which is logarithmic.
        xlabel (`str`): its label.
    """

    def __init__(self, results: Results, arms: list[str], axis: str, xlabel: str):
        self.results, self.arms, self.axis = results, arms, axis
        keys = sorted({(cell.dataset, cell.tuning) for cell in results.cells() if cell.arm in arms})
        columns = min(len(keys), 2)
        shape = math.ceil(len(keys) / columns), columns
        size = 6 * shape[1], 4.5 * shape[0] + 0.3
        self.figure, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
        self.figure.suptitle(CAPTION, fontsize=9)
        for unused in panels.flat[len(keys) :]:
            unused.remove()
        self.panels = dict(zip(keys, panels.flat))
        for (dataset, tuning), panel in self.panels.items():
            panel.set(xscale="log", ylim=(0, 1), xlabel=xlabel, ylabel="test accuracy")
            panel.set_title(f"{dataset}, {TUNING_NAMES[tuning]}", fontsize=10)
            self._draw_levels(panel, dataset, tuning)

    def __iter__(self) -> Iterator[tuple[Axes, list[Cell]]]:
        """Each panel with the cells of its arms."""
        for (dataset, tuning), panel in self.panels.items():
            cells = self.results.cells(dataset=dataset, tuning=tuning)
            yield panel, [cell for cell in cells if cell.arm in self.arms]

    def draw(self, panel: Axes, cells: list[Cell], label: str, color: Any) -> None:
        """Means over seeds along the axis, with deviations."""
        cells = sorted(cells, key=lambda cell: getattr(cell, self.axis))
        x, means = [getattr(cell, self.axis) for cell in cells], [self.results.mean(cell) for cell in cells]
        deviations = np.nan_to_num([self.results.deviation(cell) for cell in cells])
        shift = ScaledTranslation(BESIDE * len(panel.containers) / 72, 0, self.figure.dpi_scale_trans)
        settings = {"label": label, "color": color, "transform": panel.transData + shift, **ERRORBARS}
        panel.errorbar(x, means, deviations, **settings)

    def _draw_levels(self, panel: Axes, dataset: str, tuning: str) -> None:
        for arm, of, style in (("non_private", tuning, "-"), ("zero_shot", "", ":")):
            for cell in self.results.cells(dataset=dataset, arm=arm, tuning=of):
                mean, deviation = self.results.mean(cell), np.nan_to_num(self.results.deviation(cell))
                panel.axhline(mean, color="black", linestyle=style, linewidth=1, label=ARM_NAMES[arm])
                panel.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.15, linewidth=0)

    def save(self, path: Path) -> None:
        for panel in self.panels.values():
            ticks = sorted({x for bars in panel.containers for x in bars.lines[0].get_xdata()})
            # Of a single value, a logarithmic axis would find no limits.
            panel.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(PercentFormatter(1))
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8, loc="best")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=110)
        plt.close(self.figure)
        print(f"Figure: {path}")


FIGURE_OF = {"privacy_utility": draw_privacy_utility, "accuracy_by_microbatches": draw_accuracy_by_microbatches}


def drawable(results: Results) -> dict[str, Callable[[Results, Path], None]]:
    """The figures of whose arms some have been measured."""
    measured_arms = {cell.arm for cell in results.cells()}
    return {name: draw for name, draw in FIGURE_OF.items() if measured_arms & set(ARMS_OF[name])}


def main():
    args = parse_arguments()
    results = Results(load_rows(args.rows))
    if not results.accuracies:
        sys.exit(f"results_report.py: {args.rows} has no rows: measure some with examples/paper_table.py.")
    folder = FIGURES if args.rows == ROWS else args.rows.parent
    for name, draw in drawable(results).items():
        draw(results, folder / f"{name}.png")
    if args.rows == ROWS:
        write_between(DOCUMENT, "measured", measured(results))
    else:
        print(tables(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON file with the rows (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
