"""The lines of a ledger: how they are checked, and the runs that they add up to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .composition import RunRecord


# The kinds of lines, and the entries that each must have.
_EVENTS: dict[str, dict[str, Any]] = {
    "begin": {
        "run": str,
        "part": int,
        "time": str,
        "dataset": str | None,
        "fingerprint": str | None,
        "plan": dict,
        "not_private_because": list,
        "steps": int,
        "planned": int,
    },
    "steps": {"run": str, "part": int, "steps": int},
    "end": {"run": str, "part": int, "steps": int},
    "flag": {"run": str, "part": int, "not_private_because": list},
}
_PLAN = {
    "sampling_probability": int | float,
    "noise_multiplier": int | float,
    "num_steps": int,
    "target_delta": float,
    "accountant": str,
    "privacy_unit": str,
}


@dataclass
class Part:
    """One call of `train`. The steps of a run's first part include those taken before the ledger had the run."""

    begin: dict[str, Any]
    steps: int
    # Those known when it began, and those found later.
    not_private_because: list[str]
    open: bool = True

    @property
    def reserved(self) -> int:
        """Steps that are planned but not yet recorded, if the call has not ended."""
        return max(self.begin["steps"] + self.begin["planned"] - self.steps, 0) if self.open else 0


def parse(path: Path, content: bytes) -> dict[tuple[str, int], Part]:
    """All calls of `train`, by run and number. Raises `ValueError` for a damaged line; a last one cut short is left
    out."""
    parts: dict[tuple[str, int], Part] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            event = json.loads(line)
            _check(event)
            apply(parts, event)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is damaged ({error}), so what was spent is not known. Restore the file from "
                "a backup; without one, move it away and add ε of its runs, which their privacy.json has, by hand."
            ) from error
    return parts


def _check(event: dict[str, Any]) -> None:
    _check_kinds(event, _EVENTS[event["event"]])
    if event["event"] == "begin":
        _check_kinds(event["plan"], _PLAN)
    if event.get("steps", 0) < 0:
        raise ValueError(f"steps is {event['steps']}")


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r}")


def apply(parts: dict[tuple[str, int], Part], event: dict[str, Any]) -> None:
    """Adds what a line says to the parts, in place."""
    run, number = event["run"], event["part"]
    if event["event"] == "begin":
        for earlier in range(number):
            # A run that is resumed had stopped.
            parts[run, earlier].open = False
        parts[run, number] = Part(event, event["steps"], [*event["not_private_because"]])
        return
    part = parts[run, number]
    if event["event"] == "flag":
        part.not_private_because += event["not_private_because"]
        return
    part.steps = event["steps"]
    part.open = part.open and event["event"] != "end"


def run_records(parts: dict[tuple[str, int], Part]) -> list[RunRecord]:
    """The runs, in the order in which they began."""
    ids = dict.fromkeys(run for run, _ in parts)
    return [_run([part for (known, _), part in parts.items() if known == run]) for run in ids]


def _run(parts: list[Part]) -> RunRecord:
    first = parts[0].begin
    fingerprints = dict.fromkeys(part.begin["fingerprint"] for part in parts)
    return RunRecord(
        run=first["run"],
        time=first["time"],
        datasets=tuple(dict.fromkeys(part.begin["dataset"] for part in parts)),
        fingerprints=tuple(fingerprint for fingerprint in fingerprints if fingerprint is not None),
        plan=first["plan"],
        not_private_because=tuple(dict.fromkeys(why for part in parts for why in part.not_private_because)),
        steps=sum(part.steps for part in parts),
        reserved=sum(part.reserved for part in parts),
    )
