"""Which checkpoint a run may continue from."""

import dataclasses
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .privacy import PrivacyPlan, PrivacyStatement


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint in `output_dir` that was written to its end.

    The trainer's state is the last file of a checkpoint, so one without it was cut short and is passed over. Raises
    `ValueError` if there is none.
    """
    checkpoints = [
        path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    complete = [path for path in checkpoints if Path(path, TRAINER_STATE_NAME).is_file()]
    if not complete:
        raise ValueError(
            f"no complete checkpoint in {output_dir} ({len(checkpoints)} unfinished): check output_dir, or start anew "
            "with resume_from_checkpoint=None."
        )
    return str(max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-"))))


def check_resumable(checkpoint: str | Path, plan: PrivacyPlan) -> PrivacyStatement:
    """The statement of a checkpoint that was trained under `plan`.

    Raises `FileNotFoundError` or `ValueError` if the checkpoint has none, or that of another plan: its ε would then be
    neither plan's.
    """
    statement = PrivacyStatement.load(checkpoint)
    saved, current = dataclasses.asdict(statement.plan), dataclasses.asdict(plan)
    differences = [
        f"{name} was {saved[name]!r}, is {current[name]!r}" for name in saved if saved[name] != current[name]
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} was trained under another privacy plan: {'; '.join(differences)}. Restore these settings, "
            "or start a new run with resume_from_checkpoint=None and account for both."
        )
    return statement
