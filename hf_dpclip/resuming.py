"""Finding and checking the checkpoint that a run continues from."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .checkpoints import check_undamaged, why_incomplete
from .models.lora import holds_adapters
from .privacy import STATEMENT_NAME, PrivacyPlan, PrivacyStatement


logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest complete checkpoint in `output_dir`. One that was cut short is passed over.

    Raises `ValueError` if there is none, or if a later run also left one, of an earlier step.
    """
    complete = complete_checkpoints_in(output_dir)
    if not complete:
        raise ValueError(
            f"no complete checkpoint in {output_dir} ({len(_checkpoints_in(output_dir))} unfinished): check "
            "output_dir, or start anew with resume_from_checkpoint=None."
        )
    newest = complete[-1]
    later = [path for path in complete if _written(path) > _written(newest) and _run_of(path) != _run_of(newest)]
    if later:
        raise ValueError(
            f"{newest} is of one run, and {later[-1].name}, which was written after it, of another: name the one that "
            f"is to go on, as in resume_from_checkpoint={str(later[-1])!r}."
        )
    return str(newest)


def complete_checkpoints_in(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, in the order of their steps."""
    return [path for path in _checkpoints_in(folder) if why_incomplete(path) is None]


def check_resumable(checkpoint: str | Path, plan: PrivacyPlan) -> PrivacyStatement:
    """The statement of a checkpoint that was trained under `plan`.

    Raises `FileNotFoundError` or `ValueError` if the checkpoint has none, or one of another plan: ε would then follow
    from neither. Raises `ValueError` too if the checkpoint is not complete. Warns if the run had gone on beyond it.
    """
    if not isinstance(checkpoint, str | Path):
        raise ValueError(f"resume_from_checkpoint={checkpoint!r} is no folder: name one, or pass True for the last.")
    if not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(checkpoint)!r} is not a folder: name one of the checkpoint-... folders, or "
            "pass True for the last."
        )
    if not Path(checkpoint, STATEMENT_NAME).is_file():
        raise FileNotFoundError(
            f"{Path(checkpoint, STATEMENT_NAME)} does not exist, so what the weights beside it cost is not known. "
            "Choose a folder checkpoint-... that DPCLIPTrainer saved, or start a new run."
        )
    statement = PrivacyStatement.load(checkpoint)
    if not Path(checkpoint, TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"{checkpoint} has no {TRAINER_STATE_NAME}, so it is a saved model or was cut short: resume from one of "
            "the checkpoint-... folders, or start a new run from these weights and account for both."
        )
    check_undamaged(Path(checkpoint))
    changed = differences(statement.plan, plan)
    if changed:
        raise ValueError(
            f"{checkpoint} was trained under another privacy plan: {'; '.join(changed)}. Restore these settings, or "
            "start a new run with resume_from_checkpoint=None and account for both."
        )
    _warn_of_lost_steps(Path(checkpoint))
    return statement


def warn_of_unfinished_run(output_dir: str | Path, run: str) -> None:
    """Warns a new run if the newest complete checkpoint is from another run that could still go on."""
    checkpoint = next(reversed(complete_checkpoints_in(output_dir)), None)
    statement = checkpoint and readable_statement(checkpoint)
    if statement and statement.run != run and statement.steps < statement.plan.num_steps:
        logger.warning(
            f"{checkpoint} is of a run that took {statement.steps} of its {statement.plan.num_steps} steps, or was "
            "stopped there. This is a new run, which spends anew and may delete it. To go on with the other instead, "
            "stop now and pass resume_from_checkpoint=True."
        )


def readable_statement(checkpoint: Path) -> PrivacyStatement | None:
    """The statement of a checkpoint, or `None` if it has none that can be read."""
    try:
        return PrivacyStatement.load(checkpoint)
    except (OSError, ValueError):
        return None


@contextmanager
def loading(checkpoint: str | Path | None) -> Iterator[None]:
    """A checkpoint is loaded inside. Raises `ValueError` if it is one of another model or optimizer."""
    try:
        yield
    # torch raises these for other shapes and other parameter groups.
    except (RuntimeError, ValueError) as error:
        # torch lists all parameters; the first is enough.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(
            f"{checkpoint} does not fit the model or the optimizer ({reason}): make both as they were in the run that "
            "is resumed (what is trained, the rank of LoRA, optim), or start a new one."
        ) from error


def check_adapters(checkpoint: str | Path, model: nn.Module) -> None:
    """Raises `ValueError` if a model has adapters and the checkpoint has none, which peft would not notice, or the
    other way round."""
    saved = any(Path(checkpoint).rglob("adapter_config.json"))
    if isinstance(model, PeftModel) and not saved:
        raise ValueError("it has no adapters")
    if saved and not holds_adapters(model):
        raise ValueError("it has adapters, and the model has none")


def check_settings(optimizer: Optimizer, expected: list[set[str]]) -> None:
    """Raises `ValueError` if an optimizer loaded the state of another kind, which lacks some of its own settings."""
    missing = [name for group, names in zip(optimizer.param_groups, expected) for name in names - group.keys()]
    if missing:
        raise ValueError(f"its optimizer's state has no {min(missing)}")


def differences(first: PrivacyPlan, second: PrivacyPlan) -> list[str]:
    """The differences between two plans, in words."""
    if _same_calibration(second, first):
        second = dataclasses.replace(second, noise_multiplier=first.noise_multiplier)
    fields, others = dataclasses.asdict(first), dataclasses.asdict(second)
    return [f"{name} was {fields[name]!r}, is {others[name]!r}" for name in fields if fields[name] != others[name]]


def _same_calibration(plan: PrivacyPlan, saved: PrivacyPlan) -> bool:
    """Whether σ was calibrated to a target both times and differs by no more than another machine's rounding."""
    return plan.target_epsilon is not None and math.isclose(
        plan.noise_multiplier, saved.noise_multiplier, rel_tol=1e-6
    )


def _warn_of_lost_steps(checkpoint: Path) -> None:
    # The name need not say the step, such as that of the copy in a Hub repository.
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    later = [path.name for path in _checkpoints_in(checkpoint.parent) if _step(path) > state.global_step]
    if later:
        logger.warning(
            f"{', '.join(later)} beside {checkpoint} came from steps that ε of the resumed run will not contain: if "
            "anybody saw them, the total in the ledger counts, which does."
        )


def _checkpoints_in(folder: str | Path) -> list[Path]:
    """All checkpoint folders, complete or not, in the order of their steps."""
    return sorted((path for path in Path(folder).glob("checkpoint-*") if _step(path) >= 0), key=_step)


def _written(checkpoint: Path) -> int:
    return Path(checkpoint, TRAINER_STATE_NAME).stat().st_mtime_ns


def _run_of(checkpoint: Path) -> str | None:
    """The id of its run, read without checking the statement, which takes the accountant a while."""
    try:
        return json.loads(Path(checkpoint, STATEMENT_NAME).read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError):
        return None


def _step(checkpoint: Path) -> int:
    """The step in the folder's name, -1 if there is none."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1
