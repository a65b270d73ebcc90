"""`hf-dpclip check`: every record read and encoded once, before a run that would stop at one that cannot be.

```bash
hf-dpclip check scans.csv --model openai/clip-vit-base-patch32 --image-column scan --text-column report
```
"""

import argparse
import json


SUMMARY = "Read every record of a dataset once, and name those at which training would stop."

# So many are shown; `--json` has all.
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("dataset", metavar="FILE_OR_FOLDER_OR_REPO", help="image-text pairs, here or on the Hub")
    parser.add_argument(
        "--model", required=True, metavar="FOLDER_OR_REPO", help="the model to be trained, for its processor"
    )
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--image-column", default="image", metavar="COLUMN", help="default: %(default)s")
    parser.add_argument("--text-column", default="text", metavar="COLUMN", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Reads all records. Returns 0 if every one can be trained on, and 1 if not."""
    from ..collators import ImageTextCollator
    from ..data import load_pairs, unusable_records

    splits = load_pairs(arguments.dataset, arguments.image_column)
    if arguments.split not in splits:
        raise ValueError(f"{arguments.dataset} has no split {arguments.split!r}, only {[*splits]}: name one of these.")
    dataset = splits[arguments.split]
    processor = _load_processor(arguments.model)
    collator = ImageTextCollator(processor, arguments.image_column, arguments.text_column)
    collator.check_columns(dataset.column_names)
    unusable = unusable_records(dataset, collator)
    if arguments.json:
        print(json.dumps({"records": len(dataset), "unusable": unusable}, indent=2))
    else:
        _show(len(dataset), unusable)
    return 1 if unusable else 0


def _load_processor(model: str):
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model} has no processor ({error}): name the model that is to be trained, a folder here or a "
            "name on the Hub."
        ) from error


def _show(count: int, unusable: dict[int, str]) -> None:
    if not unusable:
        print(f"All {count:,} records can be trained on.")
        return
    print(f"{len(unusable):,} of {count:,} records cannot be trained on:")
    for number in list(unusable)[:SHOWN]:
        print(f"  record {number}: {unusable[number]}")
    if len(unusable) > SHOWN:
        print(f"  and {len(unusable) - SHOWN:,} more, which --json lists")
    print(
        "Repair them, or leave them out, which the guarantee allows:\n"
        "  unusable = hf_dpclip.data.unusable_records(dataset, collator)\n"
        "  dataset = dataset.select(row for row in range(len(dataset)) if row not in unusable)"
    )
