"""`hf-dpclip ledger`: what all runs on a dataset spent together."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..privacy import RunRecord, Total

SUMMARY = "Show the runs that a ledger has, and the total ε of each dataset."

COLUMNS = ("run", "began (UTC)", "steps", "q", "σ", "δ", "ε")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", type=Path, help="a ledger, or the output folder of a run")
    parser.add_argument("--delta", type=float, help="δ of the totals; by default the smallest of a dataset's runs")
    parser.add_argument("--json", action="store_true", help="print JSON; an ε that is not finite is null")
    parser.add_argument("--close", metavar="RUN", help="end a run that crashed and will not be resumed, by its id")


def run(arguments: argparse.Namespace) -> int:
    """Prints JSON if asked, tables in a terminal, and tab-separated values anywhere else. Returns 0."""
    from ..privacy import LEDGER_NAME, STATEMENT_NAME, Ledger, totals

    if arguments.path.name == STATEMENT_NAME:
        raise ValueError(
            f"{arguments.path} is the statement of one run (which hf-dpclip card checks) and no ledger: name the "
            f"output folder of a run, the file {LEDGER_NAME} in it, or that of its ledger_path."
        )
    ledger = Ledger(arguments.path / LEDGER_NAME if arguments.path.is_dir() else arguments.path)
    if arguments.close:
        ledger.close(arguments.close)
    found = totals(ledger.runs(), arguments.delta)
    if arguments.json:
        print(json.dumps([_as_dict(total) for total in found], indent=2))
    elif not found:
        print(f"No run is recorded in {ledger.path}.")
    elif sys.stdout.isatty():
        _print_tables(found)
    else:
        for total in found:
            print(_verdict(total), *map("\t".join, _rows(total)), sep="\n")
    return 0


def _print_tables(found: list["Total"]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for total in found:
        names, *rows = _rows(total)
        table = Table(title=escape(_verdict(total)), title_justify="left", title_style="bold")
        for name in names:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)


def _verdict(total: "Total") -> str:
    """The line above the runs of a dataset."""
    units = total.privacy_units
    if len(units) > 1:
        return f"{total.dataset}: no common ε, since runs protect different units ({', '.join(units)})"
    spent = f"ε = {total.epsilon_of_private_runs:.4g} at δ = {total.delta:.3g}"
    if len({run.mechanism for run in total.runs if not run.not_private_because}) > 1:
        spent += " (if no result decided on σ, q or steps)"
    if not total.not_private_runs:
        return f"{total.dataset}: {spent} for one {units[0]}"
    return f"{total.dataset}: NOT PRIVATE; without the runs that are not, {spent}"


def _rows(total: "Total") -> list[tuple[str, ...]]:
    """The names of the columns, and a row per run; remarks come last, if there are any."""
    remarks = [_remarks(record) for record in total.runs]
    if not any(remarks):
        return [COLUMNS, *map(_figures, total.runs)]
    rows = [(*_figures(record), remark) for record, remark in zip(total.runs, remarks)]
    return [(*COLUMNS, "remarks"), *rows]


def _figures(record: "RunRecord") -> tuple[str, ...]:
    q, sigma = record.mechanism
    steps = f"{record.steps} of {record.plan['num_steps']}"
    epsilon = f"{record.epsilon:.4g}" if math.isfinite(record.epsilon) else "none"
    figures = f"{q:.4g}", f"{sigma:.4g}", f"{record.plan['target_delta']:.3g}", epsilon
    # The date and, as far as minutes, the time of day.
    began = record.time[:16].replace("T", " ")
    return record.run[:8], began, steps, *figures


def _remarks(record: "RunRecord") -> str:
    remarks = ["NOT PRIVATE", *record.not_private_because] if record.not_private_because else []
    if record.reserved:
        remarks.append("not ended")
    if record.steps > record.plan["num_steps"]:
        remarks.append("more than planned, since steps that an interruption undid, and further calls of train, count")
    return "; ".join(remarks)


def _as_dict(total: "Total") -> dict[str, Any]:
    from ..privacy.plan import finite_or_none

    return {
        "dataset": total.dataset,
        "epsilon": finite_or_none(total.epsilon),
        "delta": total.delta,
        "epsilon_of_private_runs": finite_or_none(total.epsilon_of_private_runs),
        "not_private_runs": [record.run for record in total.not_private_runs],
        "runs": [
            {
                "run": record.run,
                "began": record.time,
                "steps": record.steps,
                "reserved": record.reserved,
                "epsilon": finite_or_none(record.epsilon),
                "delta": record.plan["target_delta"],
                "not_private_because": list(record.not_private_because),
                "plan": record.plan,
            }
            for record in total.runs
        ],
    }
