"""`privacy.json`: the machine-readable privacy statement beside every set of weights."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from .composition import NamedRuns, Runs, composed
from .plan import PrivacyPlan, PrivacySpent, finite_or_none, is_whole


STATEMENT_NAME = "privacy.json"
_LIBRARIES = ("torch", "numpy", "dp-accounting")


def _versions() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES}


@dataclass(frozen=True)
class PrivacyStatement:
    """What may be claimed of the weights in a folder.

    Args:
        plan ([`PrivacyPlan`]): the run's plan.
        steps (`int`): noisy releases so far.
        not_private_because (`tuple[str]`): reasons why no guarantee holds; empty for a private run.
        versions (`dict[str, str]`, *optional*, defaults to those in use): versions of the libraries that matter.
        run (`str`, *optional*): the id under which a [`~privacy.ledger.Ledger`] has the run.
        earlier_runs (`dict`, *optional*): by run id, plan and steps of each earlier run on the same records that these
            weights depend on, such as the trials of a hyperparameter search.
    """

    plan: PrivacyPlan
    steps: int
    not_private_because: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=_versions, compare=False)
    run: str | None = field(default=None, compare=False)
    earlier_runs: NamedRuns = field(default_factory=dict)

    @property
    def runs(self) -> Runs:
        """The earlier runs and this one."""
        return (*self.earlier_runs.values(), (self.plan, self.steps))

    @property
    def spent(self) -> PrivacySpent:
        """ε and δ of the steps taken in all runs."""
        return composed(self.runs)

    def save(self, folder: str | Path) -> None:
        """Writes `privacy.json`, atomically."""
        write_atomically(Path(folder, STATEMENT_NAME), self._to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> "PrivacyStatement":
        """Reads `privacy.json`. Raises `FileNotFoundError` or, for one that is damaged or edited, `ValueError`."""
        path = Path(folder, STATEMENT_NAME)
        if Path(folder).is_file():
            raise ValueError(f"{folder} is a file: name the folder that it is in, {Path(folder).resolve().parent}.")
        if not path.is_file():
            nearby = next(iter(sorted(path.parent.glob(f"*/{STATEMENT_NAME}"))), None)
            found = f" (there is one in {nearby.parent})" if nearby else ""
            raise FileNotFoundError(
                f"{path} does not exist, so what the weights beside it cost is not known: name the folder of a model "
                f"or a checkpoint that DPCLIPTrainer saved{found}."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            plan = PrivacyPlan.from_dict(values["plan"])
            reasons = tuple(values["not_private_because"])
            earlier = values.get("earlier_runs", [])
            runs = {run["run"]: (PrivacyPlan.from_dict(run["plan"]), run["steps"]) for run in earlier}
            statement = cls(plan, values["steps"], reasons, values["versions"], values["run"], runs)
            statement._check(values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or was edited ({error}). Restore it from a backup.") from error
        return statement

    def _to_dict(self) -> dict:
        spent = self.spent
        statement = {
            "private": not self.not_private_because,
            "not_private_because": list(self.not_private_because),
            "epsilon": finite_or_none(spent.epsilon),
            "delta": spent.delta,
            "steps": self.steps,
            "run": self.run,
            "plan": self.plan.to_dict(),
            "versions": self.versions,
        }
        if self.earlier_runs:
            statement["earlier_runs"] = [
                {"run": run, "plan": plan.to_dict(), "steps": steps}
                for run, (plan, steps) in self.earlier_runs.items()
            ]
        return statement

    def _check(self, values: dict) -> None:
        """Raises `ValueError` unless the claims follow from the plan. ε may differ in the fourth digit, as between
        releases of the accountant."""
        if not isinstance(values["not_private_because"], list) or not _all_text(self.not_private_because):
            raise ValueError("not_private_because is not a list of reasons")
        if not isinstance(self.versions, dict) or not _all_text(self.versions.values()):
            raise ValueError("versions does not name libraries and their versions")
        if not self.versions.keys() >= set(_LIBRARIES):
            raise ValueError(f"versions does not name all of {', '.join(_LIBRARIES)}")
        if not isinstance(self.run, str | None):
            raise ValueError(f"run is {self.run!r}, not the id of a run")
        names = [self.run, *(run["run"] for run in values.get("earlier_runs", []))]
        if not _all_text(names[1:]) or len(set(names)) < len(names):
            raise ValueError("earlier_runs does not name each run, once, by its id")
        if self.plan.non_private and not self.not_private_because:
            raise ValueError("the plan has no noise, and not_private_because gives no reason")
        for _, steps in self.runs:
            if not is_whole(steps) or steps < 0:
                raise ValueError(f"steps is {steps!r}, not a number of steps")
        expected = self._to_dict()
        for name in ("private", "delta"):
            if values[name] != expected[name]:
                raise ValueError(f"{name} is {values[name]!r} but the plan gives {expected[name]!r}")
        claimed, actual = (math.inf if each["epsilon"] is None else each["epsilon"] for each in (values, expected))
        if not math.isclose(claimed, actual, rel_tol=1e-3):
            raise ValueError(f"epsilon is {claimed!r} but the plan and {self.steps} steps give {actual!r}")
        unknown = values.keys() - expected.keys()
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} is no entry of a statement")


def _all_text(values: Iterable) -> bool:
    return all(isinstance(value, str) for value in values)


def write_atomically(path: Path, values: dict) -> None:
    """Writes a JSON file atomically: if the disk is full or the process dies, the old file stays."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
