"""`hf-dpclip audit`: attacks on one step of the mechanism, and on a whole run."""

import argparse
import gc
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..audit import StepAudit

SUMMARY = "attack the mechanism, and hold the lower bound on ε that comes of it against the claim"
STEP_SUMMARY = "one step: the honest mechanism passes, published mistakes are convicted"
WORKERS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own commands."""
    commands = parser.add_subparsers(dest="audit", required=True, metavar="step | run")
    step = commands.add_parser("step", help=STEP_SUMMARY, description=STEP_SUMMARY)
    step.add_argument("--mechanism", metavar="NAME", help="only this one; exit code 1 if it is convicted")
    step.add_argument("--list", action="store_true", help="the names of all mechanisms")
    step.add_argument("--json", action="store_true", help="machine-readable: one object, or a list of all")
    step.set_defaults(audit_command=run_step)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if the claim stands, 1 if it is refuted."""
    return arguments.audit_command(arguments)


def run_step(arguments: argparse.Namespace) -> int:
    """Exit code 0 if the mechanism passes; without `--mechanism`, if the honest one passes and no other does."""
    from ..audit import MECHANISMS, find_mechanism

    if arguments.list:
        print("\n".join(mechanism.name for mechanism in MECHANISMS))
        return 0
    if arguments.mechanism is not None:
        audit = _audit_step(find_mechanism(arguments.mechanism).name)
        print(json.dumps(audit.to_dict())) if arguments.json else _print_table([audit])
        return int(audit.convicted)
    audits = _audit_all([mechanism.name for mechanism in MECHANISMS])
    if arguments.json:
        print(json.dumps([audit.to_dict() for audit in audits], indent=2))
    else:
        audits = list(_print_table(audits))
    as_expected = [audit.convicted != mechanism.honest for audit, mechanism in zip(audits, MECHANISMS)]
    return int(not all(as_expected))
