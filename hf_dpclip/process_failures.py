"""What to do when another process that a run needs has died."""

from collections.abc import Iterator
from contextlib import contextmanager


GO_ON = (
    "Then go on from the last complete checkpoint with resume_from_checkpoint=True; the ledger has counted the steps."
)

OTHER_PROCESS_DIED = "Another process of this run died: what it said above, or its machine's log, says why."

# By a part of the message that torch gives.
REMEDIES = {
    "DataLoader worker": (
        "A process that loads data died, most often for want of memory: lower dataloader_num_workers, or find the "
        "record that kills it with dataloader_num_workers=0."
    ),
    "closed by peer": OTHER_PROCESS_DIED,
    "Connection reset": OTHER_PROCESS_DIED,
}


@contextmanager
def explaining_process_failures() -> Iterator[None]:
    """Adds what to do to an error of torch about a process that died."""
    try:
        yield
    except RuntimeError as error:
        for sign, remedy in REMEDIES.items():
            if sign in str(error):
                raise RuntimeError(f"{error} {remedy} {GO_ON}") from error
        raise
