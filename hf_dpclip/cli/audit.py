"""`hf-dpclip audit`: attacks on one step of the mechanism, and on a whole run."""

import argparse
import gc
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from .tables import print_table


if TYPE_CHECKING:
    from ..audit import StepAudit
    from ..audit.fine_tune import FineTuneAudit
    from ..audit.one_run import RunAudit

SUMMARY = "Attack the mechanism, and compare the resulting lower bound on ε with the claim."
STEP_SUMMARY = "One step: the honest mechanism passes, published mistakes are convicted."
RUN_SUMMARY = "A whole fine-tune, with canaries and membership inference."
WORKERS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of the command."""
    commands = parser.add_subparsers(dest="audit", required=True, metavar="step | run")
    step = commands.add_parser("step", help=STEP_SUMMARY, description=STEP_SUMMARY)
    step.add_argument("--mechanism", metavar="NAME", help="only this one; the exit code is 1 if it is convicted")
    step.add_argument("--list", action="store_true", help="print the names of all mechanisms")
    step.add_argument("--json", action="store_true", help="print an object, or a list of objects for all mechanisms")
    step.set_defaults(audit_command=run_step)
    whole = commands.add_parser("run", help=RUN_SUMMARY, description=RUN_SUMMARY)
    model = "a CLIPModel (default: a small one with random weights)"
    whole.add_argument("--model-name-or-path", metavar="MODEL", help=model)
    whole.add_argument("--dataset-name", default="mnist-5k", help="a preset (default: %(default)s)")
    privacy = whole.add_mutually_exclusive_group()
    privacy.add_argument("--target-epsilon", type=float, default=8.0, help="ε of the run (default: %(default)s)")
    privacy.add_argument("--non-private", action="store_true", help="train without privacy instead, to compare")
    whole.add_argument("--num-canaries", type=int, default=300, help="canaries (default: %(default)s)")
    whole.add_argument("--num-members", type=int, default=600, help="other records (default: %(default)s)")
    whole.add_argument("--max-steps", type=int, help="steps (default: those of docs/auditing.md)")
    whole.add_argument("--json", action="store_true", help="print an object")
    whole.set_defaults(audit_command=run_whole)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if the claim stands, 1 if it is refuted."""
    return arguments.audit_command(arguments)


def run_step(arguments: argparse.Namespace) -> int:
    """Exit code 0 if the mechanism passes; without `--mechanism`, if the honest one does and no other."""
    from ..audit import MECHANISMS

    if arguments.list:
        print("\n".join(mechanism.name for mechanism in MECHANISMS))
        return 0
    if arguments.mechanism is not None:
        audit = _audit_step(arguments.mechanism)
        _show(audit.to_dict(), [audit], arguments.json)
        return int(audit.refuted)
    audits = list(_audit_all([mechanism.name for mechanism in MECHANISMS]))
    _show([audit.to_dict() for audit in audits], audits, arguments.json)
    return int(any(audit.refuted == mechanism.honest for audit, mechanism in zip(audits, MECHANISMS)))


def run_whole(arguments: argparse.Namespace) -> int:
    """Exit code 0 if no lower bound exceeds the claim."""
    from ..audit.fine_tune import FineTune
    from ..audit.game import quiet

    fine_tune = FineTune(
        arguments.model_name_or_path, arguments.dataset_name, arguments.num_members, arguments.num_canaries
    )
    target = None if arguments.non_private else arguments.target_epsilon
    with quiet():
        audit = fine_tune.audit(target, arguments.max_steps)
    if arguments.json:
        print(json.dumps(audit.to_dict()))
    else:
        print_table("Audit of a whole run", _run_rows(audit))
        print(_run_verdict(audit.run))
    return int(audit.run.refuted)


def _run_rows(audit: "FineTuneAudit") -> dict[str, str]:
    run, members = audit.run, audit.membership
    return {
        "claimed ε": f"{run.claimed_epsilon:.4g}",
        "δ": f"{run.delta:.4g}",
        "ε ≥, white-box": f"{run.white_box:.4g}",
        "ε ≥, black-box": f"{run.black_box:.4g}",
        "confidence of each bound": f"{run.confidence:.4g}",
        "canaries": f"{run.canaries}",
        "coins guessed, white-box": f"{run.white_box_accuracy:.1%}",
        "coins guessed, black-box": f"{run.black_box_accuracy:.1%}",
        "membership: AUC": f"{members.auc:.4g} (before training: {audit.start.auc:.4g})",
        "membership: TPR at 1 % FPR": f"{members.true_positive_rate():.1%}",
        "accuracy": f"{audit.accuracy:.1%} (before training: {audit.accuracy_at_start:.1%})",
    }


def _run_verdict(run: "RunAudit") -> str:
    if not math.isfinite(run.claimed_epsilon):
        return "Trained without privacy: no ε is claimed that a lower bound could exceed."
    if run.refuted:
        return f"REFUTED: a lower bound exceeds the claimed ε = {run.claimed_epsilon:.4g}."
    return f"No lower bound exceeds the claimed ε = {run.claimed_epsilon:.4g}."


def _audit_all(names: list[str]) -> Iterator["StepAudit"]:
    """In two processes, since each game is a long sequence of small trainings."""
    workers = min(WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_audit_step, names)


def _audit_step(name: str) -> "StepAudit":
    import torch

    from ..audit import audit_step, find_mechanism

    torch.set_num_threads(1)
    # Every training begins with a garbage collection, which would go through all imported objects each time.
    gc.freeze()
    return audit_step(find_mechanism(name))


def _show(values: dict | list, audits: Iterable["StepAudit"], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=2))
        return
    row = "{:28}{:>10}{:>17}{:>13}{:>7}{:>12}  {}"
    print(row.format("", "claimed ε", "ε ≥ (any)", "(Gaussian)", "δ", "confidence", ""))
    for audit in audits:
        gaussian = f"{audit.gaussian_dp:.2f}" if audit.gaussian else "-"
        bounds = f"{audit.claimed_epsilon:.2f}", f"{audit.clopper_pearson:.2f}", gaussian
        verdict = "CONVICTED" if audit.refuted else "passes"
        print(row.format(audit.mechanism, *bounds, f"{audit.delta:g}", f"{audit.confidence:.1%}", verdict))
