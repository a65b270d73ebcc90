"""Records that show the same image, recognised by the bytes of its file, without decoding any."""

from collections import Counter
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .digests import file_digests, image_columns


logger = logging.get_logger(__name__)

# Records that are looked at when training is set up: enough to find captions that share images, and seldom more than
# a minute of reading.
LOOKED_AT = 100_000


def warn_of_shared_images(dataset: Any) -> None:
    """Warns if records share their image with other ones, as captions of one image do.

    The message counts private records: it is for the console of whoever holds them, and is not part of any log.
    """
    if not isinstance(dataset, Dataset):
        return
    looked_at = dataset.select(range(min(len(dataset), LOOKED_AT)))
    for column in image_columns(dataset):
        shared = _records_that_share(looked_at, column)
        if shared:
            logger.warning(
                f"{shared:,} of the {len(looked_at):,} records looked at share their {column!r} with another record. "
                "Each record is protected by itself, which says less about an image with all its records: set "
                "privacy_unit_column to a column that names the image, or whom it shows. (For your eyes only: this "
                "counts private records.)"
            )


def _records_that_share(dataset: Dataset, column: str) -> int:
    counts = Counter(file_digests(dataset, column))
    del counts[None]
    return sum(count for count in counts.values() if count > 1)
