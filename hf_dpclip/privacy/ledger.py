"""Spend recorded per dataset across runs (`docs/privacy.md`, "The ledger").

An append-only file of JSON lines. A run writes down which steps it is about to take before it takes them: a crash
leaves too many steps in the file, never too few.
"""

import dataclasses
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .composition import RunRecord, Total, totals
from .ledger_lines import Part, apply, parse, run_records
from .plan import PrivacyPlan


# Names with a leading underscore are not uploaded to the Hub: the fingerprint is computed from the private records.
LEDGER_NAME = "_privacy_ledger.jsonl"
# Steps are recorded ahead in blocks, of a hundredth of the planned steps but at least one, so that a crash leaves at
# most one block too many in the ledger.
BLOCKS = 100


class Ledger:
    """A file that several processes may write to at once.

    Args:
        path (`str` or `Path`): the file. It is created, with its folder, when the first run begins.

    Formal guarantees:
        When [`RunRecorder.before_step`] returns, a line that covers the step is on the disk. The ledger therefore
        never has fewer steps of a run than were taken, and [`totals`] of its runs bounds ε of all of them together.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def runs(self) -> list[RunRecord]:
        """All runs, in the order in which they began.

        Raises `FileNotFoundError` if there is no ledger and `ValueError` if a line is damaged, other than a last one
        that was cut short: the steps that it was to cover were not taken.
        """
        self._check_exists()
        with open(self.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return run_records(parse(self.path, file.read()))

    def begin(
        self,
        run: str,
        plan: PrivacyPlan,
        planned: int,
        dataset: str | None = None,
        fingerprint: str | None = None,
        not_private_because: Iterable[str] = (),
        earlier: int = 0,
        budget: float | None = None,
    ) -> "RunRecorder":
        """Records that a call of `train` begins.

        Args:
            run (`str`): the run's id. If the ledger has it already, that run is continued.
            plan ([`PrivacyPlan`]): the run's plan.
            planned (`int`): steps that this call is to take.
            dataset, fingerprint (`str`, *optional*): name and fingerprint of the training records.
            not_private_because (iterable of `str`): reasons why no guarantee holds.
            earlier (`int`): steps that the run took before, which count if the ledger does not know the run.
            budget (`float`, *optional*): the ε that all runs on these records may spend together.

        Raises `ValueError`, and writes nothing, if the run could exceed the budget or the ledger is damaged, and
        `OSError` if the file cannot be written.
        """
        with self._locked(os.O_CREAT) as file:
            parts = parse(self.path, _content(file))
            part = sum(known == run for known, _ in parts)
            event: dict[str, Any] = {
                "event": "begin",
                "run": run,
                "part": part,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "dataset": dataset,
                "fingerprint": fingerprint,
                "plan": plan.to_dict(),
                "not_private_because": list(not_private_because),
                "steps": 0 if part else earlier,
                "planned": planned,
            }
            apply(parts, event)
            if budget is not None:
                self._check_budget(parts, run, budget, resumed=part > 0)
            self._append(file, event)
        return RunRecorder(self, run, part, event["steps"], max(planned // BLOCKS, 1))

    def write(self, event: dict[str, Any]) -> None:
        """Appends one line, which is on the disk when this returns. Raises `OSError` if that fails."""
        with self._locked() as file:
            self._append(file, event)

    def flag(self, run: str, not_private_because: Iterable[str]) -> bool:
        """Records reasons why no guarantee holds that came up after a run began. Returns whether the ledger has it.

        Raises `OSError` if the file cannot be written, and `ValueError` if the ledger is damaged.
        """
        with self._locked() as file:
            parts = parse(self.path, _content(file))
            own = [part for (known, _), part in parts.items() if known == run]
            new = set(not_private_because) - {why for part in own for why in part.not_private_because}
            if own and new:
                event = {"event": "flag", "run": run, "part": len(own) - 1, "not_private_because": sorted(new)}
                self._append(file, event)
        return bool(own)

    def close(self, run: str) -> None:
        """Ends a run that crashed and will not be resumed, so that its remaining steps no longer count in budgets.

        Args:
            run (`str`): the beginning of its id.

        Raises `ValueError` unless exactly one run has such an id, and `FileNotFoundError` if there is no ledger.
        """
        self._check_exists()
        with self._locked() as file:
            parts = parse(self.path, _content(file))
            ids = {known for known, _ in parts if known.startswith(run)}
            if len(ids) != 1:
                raise ValueError(f"{len(ids)} runs in {self.path} have an id that begins with {run!r}: name one.")
            for (known, number), part in parts.items():
                if known in ids and part.open:
                    self._append(file, {"event": "end", "run": known, "part": number, "steps": part.steps})

    def _check_exists(self) -> None:
        if not self.path.is_file():
            places = [self.path.parent.parent / self.path.name, *self.path.parent.glob(f"*/{self.path.name}")]
            nearby = next(filter(Path.is_file, places), None)
            found = f" (there is one in {nearby.parent})" if nearby else ""
            raise FileNotFoundError(
                f"{self.path} does not exist: name a ledger, or the output folder of a run{found}."
            )

    @contextmanager
    def _locked(self, create: int = 0) -> Iterator[int]:
        """Yields the file's descriptor, while no other process can read or write it."""
        file = self._open(create)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _open(self, create: int) -> int:
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_APPEND | create, 0o666)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path} could not be opened ({error.strerror}), so no step can be recorded: set ledger_path to "
                "a file that may be written, and do not remove it while a run lasts.",
            ) from error

    def _append(self, file: int, event: dict[str, Any]) -> None:
        """Appends after the last whole line, over one that was cut short, which covers no step that was taken."""
        end = _end_of_last_line(file)
        line = json.dumps(event).encode() + b"\n"
        try:
            os.ftruncate(file, end)
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, end)
            raise OSError(
                error.errno,
                f"{self.path} could not be written ({error.strerror}), so no further step was taken. Make room on the "
                "disk and resume with resume_from_checkpoint=True.",
            ) from error

    def _check_budget(self, parts: dict[tuple[str, int], Part], run: str, budget: float, resumed: bool) -> None:
        """Counts calls of `train` that have not ended with all the steps that are planned in them."""
        runs = run_records(parts)
        whole = [
            dataclasses.replace(
                record,
                steps=record.steps + record.reserved,
                # A run that became not private only later spent its part of the budget all the same.
                not_private_because=tuple(parts[record.run, 0].begin["not_private_because"]),
            )
            for record in runs
        ]
        (total,) = (total for total in totals(whole) if any(record.run == run for record in total.runs))
        if any(record.run == run and record.not_private_because for record in runs):
            raise ValueError(
                f"ledger_epsilon={budget:g} bounds what is spent on dataset {total.dataset}, and this run would not "
                "be private, which no ε bounds: leave ledger_epsilon unset for it."
            )
        if total.epsilon_of_private_runs > budget:
            unfinished = [record.run[:8] for record in runs if record.reserved and record.run != run]
            raise ValueError(_over_budget(total, budget, self.path, unfinished, resumed))


class RunRecorder:
    """Records the steps of one call of `train` while they are taken. Made by [`Ledger.begin`]."""

    def __init__(self, ledger: Ledger, run: str, part: int, steps: int, block: int):
        self._ledger = ledger
        self._run = run
        self._part = part
        self._taken = self._recorded = steps
        self._block = block

    def before_step(self) -> None:
        """To be called before a release is computed. Raises `OSError` if the step cannot be recorded."""
        if self._taken == self._recorded:
            self._write("steps", self._recorded + self._block)
            self._recorded += self._block
        self._taken += 1

    def end(self) -> None:
        """Takes back steps that were recorded ahead but not taken. Raises `OSError` if the file cannot be written."""
        self._write("end", self._taken)

    def _write(self, event: str, steps: int) -> None:
        self._ledger.write({"event": event, "run": self._run, "part": self._part, "steps": steps})


def _over_budget(total: Total, budget: float, path: Path, unfinished: list[str], resumed: bool) -> str:
    units = total.privacy_units
    spent = (
        f"protect different units ({', '.join(units)}), for which there is no common ε"
        if len(units) > 1
        else f"would come to ε = {total.epsilon_of_private_runs:.4g} at δ = {total.delta:.3g}"
    )
    remedy = (
        "what this run has taken so far counts, and so do steps after a checkpoint that are taken again; raise "
        "ledger_epsilon, since the plan of a run that goes on stays as it is"
        if resumed
        else "lower target_epsilon or the number of steps, or raise ledger_epsilon"
    )
    message = (
        f"the runs on dataset {total.dataset} in {path} ({len(total.runs)}, with this one) {spent}, and "
        f"ledger_epsilon={budget:g}: {remedy}."
    )
    if unfinished:
        message += (
            f" Counted in full, since they have not ended: {', '.join(unfinished)}. One that crashed and will not be "
            f"resumed is closed by `hf-dpclip ledger {path} --close RUN`."
        )
    return message


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _end_of_last_line(file: int) -> int:
    end = os.fstat(file).st_size
    while end and os.pread(file, 1, end - 1) != b"\n":
        end -= 1
    return end
