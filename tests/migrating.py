"""The script that `docs/migrating.md` makes private, and what it is started with."""

import json
from pathlib import Path

import numpy as np
from factories import IMAGE_SIZE, tiny_dual_encoder, tiny_processor
from PIL import Image
from scripts import ROOT


SCRIPT = ROOT / "tests" / "contrastive_image_text.py"


def documented_diff() -> tuple[str, str]:
    """What is taken away, and what stands in its place, with what is around it."""
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    lines = text.split("```diff\n")[1].split("```")[0].splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] != "+")
    new = "\n".join(line[1:] for line in lines if line[0] != "-")
    return old, new


def write_private_script(folder: Path) -> Path:
    """The script with the documented difference, and no other."""
    old, new = documented_diff()
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = folder / SCRIPT.name
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def write_inputs(folder: Path) -> list[str]:
    """A dual encoder with its processors, and files of 40 and 8 pairs. Returns them as arguments of the script."""
    model, images = folder / "dual-encoder", folder / "images"
    tiny_dual_encoder().save_pretrained(model)
    tiny_processor().tokenizer.save_pretrained(model)
    tiny_processor().image_processor.save_pretrained(model)
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    rows = []
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{number}.png")
        rows.append(json.dumps({"image_path": str(images / f"{number}.png"), "caption": "abcdefgh"[number % 8]}))
    train, validation = folder / "train.json", folder / "validation.json"
    train.write_text("\n".join(rows[:40]))
    validation.write_text("\n".join(rows[40:]))
    options = {"--model_name_or_path": model, "--train_file": train, "--validation_file": validation}
    return [word for option, path in options.items() for word in (option, str(path))]
