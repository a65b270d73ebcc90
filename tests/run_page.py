"""Runs a page of the documentation from top to bottom, like a notebook, with stand-ins for what its reader has.

python run_page.py PAGE, in the folder where the page is to run and with the Hub at HF_ENDPOINT
"""

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from factories import IMAGE_SIZE, arguments, clap_processor, tiny_blip, tiny_clap, tiny_clip, tiny_processor
from migrating import write_inputs, write_private_script
from pages import PAGES, Block, blocks
from PIL import Image
from scripts import ROOT

import hf_dpclip
from hf_dpclip import DPTrainingArguments, ImageTextCollator
from hf_dpclip.cli import main as command_line


COMMAND_LINE = "hf-dpclip"


# ---- Stand-ins for what a reader has ----


def records(n: int, seed: int = 0) -> Dataset:
    """Images of noise with whatever columns the pages speak of."""
    pixels = torch.randint(0, 255, (n, IMAGE_SIZE, IMAGE_SIZE, 3), generator=torch.Generator().manual_seed(seed))
    images = [Image.fromarray(image) for image in pixels.to(torch.uint8).numpy()]
    texts = [f"report {'abcdefghijklmnopqrs'[number % 19]}" for number in range(n)]
    answers = [["yes", "no"][number % 2] for number in range(n)]
    ids = {"patient": [number // 2 for number in range(n)], "image_id": list(range(n))}
    return Dataset.from_dict(
        {"image": images, "scan": images, "text": texts, "report": texts, **ids}
        | {"question": texts, "answer": answers, "finding": answers}
    )


def names(folder: Path) -> dict:
    """The variables that pages may take for granted."""
    processor = tiny_processor()
    return {
        "__name__": "__main__",
        "model": tiny_clip(),
        "clip": tiny_clip(),
        "processor": processor,
        "args": arguments(folder / "args", microbatch_size=4),
        "collator": ImageTextCollator(processor),
        "train_dataset": records(640),
        "held_out": records(64, seed=1),
        # As long as the tiny model takes, whose extractor can neither cut nor pad.
        "waveforms": list(np.random.default_rng(0).normal(size=(64, 9_000)).astype(np.float32)),
        "captions": [f"sound {'abcdefgh'[number % 8]}" for number in range(64)],
    }


def furnish(folder: Path) -> None:
    """What pages name: the repository's files, the script they change, models in the Hub's layout, tables of pairs."""
    furnish_with_scripts(folder)
    save_models(folder)
    data = folder / "path" / "to"
    data.mkdir(parents=True)
    write_inputs(data)
    table = ["scan,report,asked,finding"]
    for number, record in enumerate(records(90)):
        record["scan"].save(data / f"{number}.png")
        table.append(f"{number}.png,{record['report']},{record['question']},{record['finding']}")
    (data / "pairs.csv").write_text("\n".join(table))


def furnish_with_scripts(folder: Path) -> None:
    for name in ("examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    write_private_script(folder)


def save_models(folder: Path) -> None:
    clip, blip = folder / "openai" / "clip-vit-base-patch32", folder / "Salesforce" / "blip-vqa-base"
    tiny_clip().save_pretrained(clip)
    tiny_processor().save_pretrained(clip)
    tiny_blip().save_pretrained(blip)
    tiny_processor().save_pretrained(blip)
    clap = folder / "laion" / "clap-htsat-unfused"
    tiny_clap().save_pretrained(clap)
    clap_processor(sampling_rate=48_000).save_pretrained(clap)


# ---- Running ----


def run_page(page: str, namespace: dict) -> None:
    """Runs the Python blocks and the commands of `hf-dpclip`; trainings are cut short.

    Raises `AssertionError` if something prints another output than the page shows, or if a command fails.
    """
    with mock.patch.object(hf_dpclip, "DPTrainingArguments", two_steps):
        printed = ""
        for block in blocks(page):
            if block.language == "output":
                assert printed.rstrip() == block.text.rstrip(), f"{page}:{block.line} shows another output"
            elif block.language == "python":
                printed = run_python(block, namespace)
            elif block.language == "bash":
                run_command_line(block)


def two_steps(*args, **kwargs) -> DPTrainingArguments:
    """What a page asks for, cut short."""
    return DPTrainingArguments(*args, **{**kwargs, "max_steps": 2})


def run_python(block: Block, namespace: dict) -> str:
    """Returns what the block prints. Line numbers of a traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.text, str(PAGES[block.page]), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def run_command_line(block: Block) -> None:
    for command in block.commands():
        if command.words[0] == COMMAND_LINE:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                code = command_line(command.words[1:])
            assert code == 0, f"{block.page}: {command} ends with {code}: {printed.getvalue()}"
            assert printed.getvalue(), f"{block.page}: {command} prints nothing"


def main():
    folder = Path.cwd()
    furnish(folder)
    run_page(sys.argv[1], names(folder))


if __name__ == "__main__":
    main()
