"""Recording the steps of a run in the ledger."""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from .privacy import LEDGER_NAME, Ledger, RunRecorder


if TYPE_CHECKING:
    from .trainer import DPCLIPTrainer

logger = logging.get_logger(__name__)


def new_run_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex


def ledger_of(trainer: "DPCLIPTrainer") -> Ledger:
    """Where the trainer's runs are recorded."""
    return Ledger(trainer.args.ledger_path or Path(trainer.output_dir, LEDGER_NAME))


@contextmanager
def recorded(trainer: "DPCLIPTrainer", run: str, planned: int) -> Iterator[Callable[[], None]]:
    """Records the steps that are taken inside. Yields a function to be called before each of them.

    Process 0 writes. A release needs all processes, so none of them has a result before process 0 has written.

    Args:
        trainer ([`DPCLIPTrainer`]): takes the steps.
        run (`str`): the id of their run.
        planned (`int`): how many steps are to be taken inside.

    Raises, on all processes, `ValueError` if they could exceed `ledger_epsilon`, or if the ledger is damaged, and
    `OSError` if it cannot be written.
    """
    recorder = _begin(trainer, run, planned)
    try:
        yield recorder.before_step if recorder else lambda: None
    finally:
        if recorder:
            _end(recorder)


def flag(trainer: "DPCLIPTrainer", runs: Sequence[str], reasons: Iterable[str]) -> None:
    """Records reasons why no guarantee holds that came up after a run began, for the last of these runs that the
    ledger has: a run that was made and not begun is in none, and the weights are still those of the one before.

    Only warns where that fails: the statement beside the weights has the reasons in any case.
    """
    if not trainer.is_world_process_zero():
        return
    ledger = ledger_of(trainer)
    try:
        if not ledger.path.is_file():
            # None was recorded.
            return
        for run in reversed(runs):
            if ledger.flag(run, reasons):
                return
    except (OSError, ValueError) as error:
        logger.warning(f"{error} The ledger does not say that run {runs[-1][:8]} is not private.")


def _begin(trainer: "DPCLIPTrainer", run: str, planned: int) -> RunRecorder | None:
    recorder: RunRecorder | None = None
    error: Exception | None = None
    if trainer.is_world_process_zero():
        try:
            recorder = _begin_here(trainer, run, planned)
        except (OSError, ValueError) as refusal:
            error = refusal
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise error
    return recorder


def _begin_here(trainer: "DPCLIPTrainer", run: str, planned: int) -> RunRecorder:
    args, dataset, statement = trainer.args, trainer.train_dataset, trainer.privacy_statement()
    return ledger_of(trainer).begin(
        run,
        statement.plan,
        planned,
        dataset=args.ledger_dataset,
        # Other datasets have no fingerprint; only names tell their runs apart.
        fingerprint=dataset._fingerprint if isinstance(dataset, datasets.Dataset) else None,
        not_private_because=statement.not_private_because,
        earlier=statement.steps,
        budget=args.ledger_epsilon,
    )


def _end(recorder: RunRecorder) -> None:
    """Only warns where that fails: a few steps too many in the ledger are no reason to lose the trained weights."""
    try:
        recorder.end()
    except OSError as error:
        logger.warning(f"{error} The ledger has a few steps more than were taken.")
