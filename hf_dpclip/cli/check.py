"""`hf-dpclip check`: reads and encodes every record once, so that no run has to stop at one that it cannot use.

```bash
hf-dpclip check scans.csv --model openai/clip-vit-base-patch32 --image-column scan --text-column report
```
"""

import argparse
import json
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin


SUMMARY = "Read every record of a dataset once, and name those that cannot be trained on."

# The number of reasons that are shown; `--json` has all.
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("dataset", metavar="FILE_OR_FOLDER_OR_REPO", help="image-text pairs, here or on the Hub")
    parser.add_argument(
        "--model", required=True, metavar="FOLDER_OR_REPO", help="the model to be trained, for its processor"
    )
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--image-column", default="image", metavar="COLUMN", help="default: %(default)s")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text-column", default="text", metavar="COLUMN", help="default: %(default)s")
    texts.add_argument("--label-column", metavar="COLUMN", help="class labels, if texts are to be made of them")
    unit = "ids of the privacy units, if you are going to set it: whether every record has one"
    parser.add_argument("--privacy-unit-column", metavar="COLUMN", help=unit)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Reads all records, and warns of what a trainer would. Returns 0 if every one can be trained on, and 1 if not."""
    from ..caveats import warn_of_records
    from ..collators import ImageTextCollator
    from ..data import load_pairs, unusable_records

    # Texts that are made of labels need no reading.
    text_column = arguments.text_column if arguments.label_column is None else None
    collator = ImageTextCollator(_load_processor(arguments.model), arguments.image_column, text_column)
    collator.check_processor()
    splits = load_pairs(arguments.dataset, arguments.image_column)
    if arguments.split not in splits:
        raise ValueError(f"{arguments.dataset} has no split {arguments.split!r}, only {[*splits]}: name one of these.")
    dataset = splits[arguments.split]
    if text_column is not None and text_column not in dataset.column_names:
        raise ValueError(
            f"{arguments.dataset} has no column {text_column!r}, only {dataset.column_names}: name that of the texts "
            "with --text-column, or one of class labels with --label-column."
        )
    incomplete = _without_label_or_unit(dataset, arguments.label_column, arguments.privacy_unit_column)
    unreadable = unusable_records(dataset, collator)
    unusable = _merged(unreadable, *incomplete)
    if arguments.json:
        print(json.dumps({"records": len(dataset), "unusable": unusable}, indent=2))
    else:
        _show(dataset, unusable, len(unreadable))
    warn_of_records(dataset, collator, arguments.privacy_unit_column)
    return 1 if unusable else 0


def _without_label_or_unit(
    dataset: "Dataset", label_column: str | None, unit_column: str | None
) -> tuple[dict[int, str], dict[int, str]]:
    """The records that lack a label, and those that lack an id, each with the reason."""
    from ..data import unlabelled
    from ..privacy_units import records_without_unit

    labels = [] if label_column is None else unlabelled(dataset, label_column)
    why = f"column {label_column!r} holds no label: leave the record out, or choose a split that has labels"
    units = {} if unit_column is None else records_without_unit(dataset, unit_column)
    return dict.fromkeys(labels, why), units


def _merged(*found: dict[int, str]) -> dict[int, str]:
    """All reasons of each record, in the order of the records."""
    numbers = sorted({number for each in found for number in each})
    return {number: "; ".join(each[number].rstrip(".") for each in found if number in each) for number in numbers}


def _load_processor(model: str) -> "ProcessorMixin":
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model} has no processor ({error}): name the model that is to be trained, a folder here or a "
            "name on the Hub; of adapters, the model that they belong to."
        ) from error


def _show(dataset: "Dataset", unusable: dict[int, str], num_unreadable: int) -> None:
    count = len(dataset)
    if not unusable:
        print(f"All {count:,} records can be read and encoded.")
        return
    print(f"{len(unusable):,} of {count:,} records cannot be trained on (for your eyes only, like the records):")
    by_reason: dict[str, list[int]] = {}
    for number, reason in unusable.items():
        by_reason.setdefault(reason, []).append(number)
    for reason, numbers in [*by_reason.items()][:SHOWN]:
        print(f"  {_named(dataset, numbers)}: {reason}")
    if len(by_reason) > SHOWN:
        print(f"  and {len(by_reason) - SHOWN:,} reasons more, which --json lists")
    if 0 < num_unreadable < count:
        print(
            "Repair what cannot be read or encoded, or leave it out, which the guarantee allows:\n"
            "  unusable = hf_dpclip.data.unusable_records(dataset, collator)\n"
            "  dataset = dataset.select([row for row in range(len(dataset)) if row not in unusable])"
        )


def _named(dataset: "Dataset", numbers: list[int]) -> str:
    """The records of these numbers, and of the first one the files of its images."""
    from ..records import listed, whereabouts

    first = f"record {numbers[0]}{whereabouts(dataset, numbers[0])}"
    return first if len(numbers) == 1 else f"{len(numbers):,} records ({listed(numbers)}), the first of them {first}"
