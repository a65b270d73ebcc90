"""Teach the tiny CLIP small shapes anywhere in the picture, the public start of private visual question answering.

The tiny CLIP beside this script (`pretrain_public.py`) has seen shapes in the middle of its pictures only, and few. It
goes on here with shapes of any size and place on plain paper, with captions from templates; it sees no real image, no
question and no answer.

    python examples/pretrain_public_shapes.py --output_dir examples/tiny-clip-shapes

The same arguments and number of threads give the same weights.
"""

import random

import torch
import torch.nn.functional as F
from pretrain_public import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    Concept,
    build_concept,
    colourise,
    draw_shape,
    go_on,
    uniform,
)


TEMPLATES = ["a {ink} {name}", "a picture of a small {ink} {name}.", "a photo of a {name}.", "{ink}"]
# Half the side of a drawing, where half the side of the picture is 1.
EXTENT = 20 / IMAGE_SIZE


def place(maps: torch.Tensor) -> torch.Tensor:
    """Turn distance maps into ink between 0 and 1, each shrunk, stretched, turned and moved, but not out of sight."""
    count = len(maps)
    shrinking, stretch, angle = uniform(1.2, 5, count), uniform(0.75, 1.33, count), uniform(-0.15, 0.15, count)
    width, height = shrinking * stretch, shrinking / stretch
    cos, sin = angle.cos(), angle.sin()
    x, y = (uniform(-1, 1, count) * (1 - EXTENT / side).clamp(min=0) for side in (width, height))
    rows = [
        [width * cos, width * sin, -width * (cos * x + sin * y)],
        [-height * sin, height * cos, height * (sin * x - cos * y)],
    ]
    theta = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = F.affine_grid(theta, [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    distances = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return (distances / shrinking[:, None, None, None] + 0.5).clamp(0, 1)


def random_batch(concepts: list[Concept], size: int) -> tuple[torch.Tensor, list[str]]:
    """Return random pictures and their captions, all from one template."""
    chosen = random.choices(concepts, k=size)
    inks = random.choices(list(COLOURS), k=size)
    # Mostly white paper; never that of the ink.
    others = [[paper for paper in ["white"] * 12 + list(COLOURS) if paper != ink] for ink in inks]
    papers = [random.choice(choices) for choices in others]
    template = random.choice(TEMPLATES)
    captions = [template.format(name=concept.name, ink=ink) for concept, ink in zip(chosen, inks)]
    return colourise(place(torch.stack([concept.maps[0] for concept in chosen])), inks, papers), captions


def main() -> None:
    """Draw, train and save."""
    concepts = [build_concept("shape", name, name, [draw_shape(name)]) for name in SHAPES]
    go_on(__doc__, "examples/tiny-clip-shapes", lambda size: random_batch(concepts, size))


if __name__ == "__main__":
    main()
