"""Checkpoints that are complete or do not count.

The `Trainer` writes a checkpoint file by file into its final folder, the state of training last. Just before that, we
write a seal, with the digests of all other files. A checkpoint that was cut short therefore has no readable state of
training, and one that was damaged later does not match its seal.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from .privacy import PrivacyStatement
from .privacy.statement import STATEMENT_NAME, write_atomically


SEAL_NAME = "checkpoint_seal.json"
_READ_AT_ONCE = 2**20


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """A checkpoint is written inside. Raises `OSError` if that fails, usually because the disk is full."""
    try:
        yield
    # What safetensors, torch and Python raise when they cannot write.
    except (SafetensorError, RuntimeError, OSError) as error:
        if why_incomplete(checkpoint) is None:
            # The checkpoint is complete; uploading it failed.
            raise
        raise OSError(
            f"{checkpoint} could not be saved ({error}) and does not count as a checkpoint; earlier ones, if any, are "
            "as they were. If the disk is full, make room (save_total_limit=2 keeps two checkpoints), then go on from "
            "the last complete one with resume_from_checkpoint=True."
        ) from error


def set_aside(checkpoint: Path) -> None:
    """Clears the folder in which a checkpoint is to be written. If it holds a complete one, from another run, that one
    is moved aside, and kept until the new one is complete."""
    if checkpoint.is_dir() and why_incomplete(checkpoint) is None:
        shutil.rmtree(_replaced(checkpoint), ignore_errors=True)
        os.replace(checkpoint, _replaced(checkpoint))
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_replaced(checkpoint: Path) -> None:
    """Deletes the checkpoint that was set aside, once the new one is complete."""
    shutil.rmtree(_replaced(checkpoint), ignore_errors=True)


def seal(checkpoint: Path, step: int) -> None:
    """Writes the digests of a checkpoint's files, when all but the state of training are there.

    Raises `OSError` for a file of torch that was cut short.
    """
    # Early releases of torch do not notice a full disk when they close a small file. Their files are zip archives.
    for path in [*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")]:
        if not (path.is_file() and zipfile.is_zipfile(path)):
            raise OSError(f"{path.name} is cut short")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    digests = {path.relative_to(checkpoint).as_posix(): _digest(path) for path in files}
    write_atomically(Path(checkpoint, SEAL_NAME), {"step": step, "sha256": digests})


def replace_statement(checkpoint: Path, statement: PrivacyStatement) -> None:
    """Replaces the privacy statement of a checkpoint, and its digest in the seal if there is one."""
    statement.save(checkpoint)
    sealed = _sealed(checkpoint)
    if sealed["sha256"]:
        sealed["sha256"][STATEMENT_NAME] = _digest(Path(checkpoint, STATEMENT_NAME))
        write_atomically(Path(checkpoint, SEAL_NAME), sealed)


def why_incomplete(checkpoint: Path) -> str | None:
    """Why the checkpoint is not complete, or `None` if it is: it was not written to its end, or partly deleted.

    A missing `privacy.json` is not looked at here: that nobody knows what the weights cost is an error of its own.
    """
    state = Path(checkpoint, TRAINER_STATE_NAME)
    if not state.is_file():
        return f"{state.name} is missing"
    try:
        json.loads(state.read_text(encoding="utf-8"))
        needed = _sealed(checkpoint)["sha256"].keys() - {STATEMENT_NAME}
        missing = [name for name in needed if not Path(checkpoint, name).is_file()]
    except (ValueError, KeyError, TypeError):
        return f"{state.name} or {SEAL_NAME} is cut short or damaged"
    return f"{min(missing)} is missing" if missing else None


def check_undamaged(checkpoint: Path) -> None:
    """Raises `ValueError` for a file that is missing, truncated or not what was saved."""
    why = why_incomplete(checkpoint) or _difference(checkpoint)
    if why is not None:
        raise ValueError(
            f"{checkpoint} is not a complete checkpoint: {why}. Restore it from a backup, or remove this folder and "
            "go on from the one before with resume_from_checkpoint=True."
        )


def _difference(checkpoint: Path) -> str | None:
    """How the checkpoint differs from its seal, if at all. Those of weights only have none."""
    sealed = _sealed(checkpoint)
    step = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("global_step")
    if sealed.get("step", step) != step:
        return f"{TRAINER_STATE_NAME} has step {step}, and {sealed['step']} was saved"
    changed = [name for name, digest in sealed["sha256"].items() if _digest(Path(checkpoint, name)) != digest]
    return f"{changed[0]} is not what was saved" if changed else None


def _sealed(checkpoint: Path) -> dict:
    path = Path(checkpoint, SEAL_NAME)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sha256": {}}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _replaced(checkpoint: Path) -> Path:
    """Where a checkpoint is set aside: a name that the `Trainer` neither takes for a checkpoint nor uploads."""
    return checkpoint.with_name(f"_replaced-{checkpoint.name}")
