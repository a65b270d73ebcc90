"""Teach the tiny CLIP what clothes look like, from drawings alone: the public start of private shop photographs.

The tiny CLIP beside this script (`pretrain_public.py`) knows the words, and has seen digits, letters and shapes. It
goes on here with clothes, shoes and bags that are drawn from outlines of random measures, in random shades and
patterns, as a shop shows them, on black; it sees no real image.

    python examples/pretrain_public_clothes.py --output_dir examples/tiny-clip-clothes

The same arguments and number of threads give the same weights.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from pretrain_public import IMAGE_SIZE, OVERSAMPLING, go_on


TEMPLATES = ["a photo of a {}", "a picture of a {}.", "a {} in a shop", "the {} is on sale", "{}"]
CANVAS = IMAGE_SIZE * OVERSAMPLING
Y, X = np.mgrid[0 : 1 : IMAGE_SIZE * 1j, 0 : 1 : IMAGE_SIZE * 1j].astype(np.float32)

Point = tuple[float, float]


class Drawing:
    """A picture in shades of grey, in coordinates from 0 to 1, x to the right and y down."""

    def __init__(self):
        self.canvas = Image.new("L", (CANVAS, CANVAS))
        self.shade = random.randint(70, 255)

    def area(self, *points: Point, change: float = 0) -> None:
        """Fills an outline with the shade of the piece, made darker or brighter by `change`."""
        ImageDraw.Draw(self.canvas).polygon([(x * CANVAS, y * CANVAS) for x, y in points], self._shade(change))

    def line(self, *points: Point, width: float = 0.02, change: float = -60) -> None:
        """Draws a line of a width."""
        pixels = max(1, round(width * CANVAS))
        path = [(x * CANVAS, y * CANVAS) for x, y in points]
        ImageDraw.Draw(self.canvas).line(path, self._shade(change), pixels, joint="curve")

    def arch(self, left: float, top: float, right: float, bottom: float, width: float) -> None:
        """Draws the upper half of an ellipse."""
        box = [value * CANVAS for value in (left, top, right, bottom)]
        ImageDraw.Draw(self.canvas).arc(box, 180, 360, self._shade(-20), max(1, round(width * CANVAS)))

    def mirrored(self, *points: Point, change: float = 0) -> None:
        """Fills an outline and its mirror image."""
        self.area(*points, change=change)
        self.area(*((1 - x, y) for x, y in points), change=change)

    def _shade(self, change: float) -> int:
        # 0 is the background.
        return int(min(255, max(20, self.shade + change)))


def draw_top(drawing: Drawing, sleeve: float, length: float, half_width: float, slant: float) -> None:
    """Draws a torso with sleeves of a length and a slant, 0 for arms that hang straight down."""
    shoulder, top = half_width * random.uniform(0.85, 1.0), random.uniform(0.02, 0.08)
    neck, depth = random.uniform(0.08, 0.14), random.uniform(0.02, 0.12)
    waist, hem = half_width * random.uniform(0.8, 1.0), half_width * random.uniform(0.85, 1.1)
    left = [(0.5 - neck, top), (0.5 - shoulder, top + 0.06), (0.5 - waist, 0.55), (0.5 - hem, length)]
    drawing.area((0.5, top + depth), *left, *((1 - x, y) for x, y in reversed(left)))
    thickness = random.uniform(0.1, 0.16)
    hand = 0.5 - shoulder - slant * sleeve, top + 0.06 + sleeve
    arm = [(0.5 - shoulder + 0.05, top + 0.03), (0.5 - shoulder - 0.04, top + 0.1)]
    cuff = [(hand[0] - thickness / 2, hand[1]), (hand[0] + thickness / 2, hand[1] + 0.02)]
    armpit = (0.5 - shoulder + 0.04, top + 0.06 + thickness * 1.5)
    drawing.mirrored(*arm, *cuff, armpit, change=random.uniform(-25, 5))


def draw_collar(drawing: Drawing) -> None:
    """Draws a collar and the line of buttons below it."""
    drop = random.uniform(0.08, 0.3)
    drawing.mirrored((0.5, drop), (0.4, 0.04), (0.44, 0.02), change=random.choice([-40, 30]))
    drawing.line((0.5, drop), (0.5, random.uniform(0.8, 0.98)), width=random.uniform(0.01, 0.025))


def draw_t_shirt(drawing: Drawing) -> None:
    half_width = random.uniform(0.24, 0.34)
    draw_top(drawing, random.uniform(0.12, 0.32), random.uniform(0.9, 0.98), half_width, random.uniform(0.3, 0.8))


def draw_pullover(drawing: Drawing) -> None:
    sleeve = random.uniform(0.65, 0.85)
    draw_top(drawing, sleeve, random.uniform(0.85, 0.97), random.uniform(0.22, 0.32), random.uniform(0.05, 0.25))
    drawing.line((0.4, 0.06), (0.5, 0.1), (0.6, 0.06), width=0.03, change=random.choice([-40, 30]))


def draw_coat(drawing: Drawing) -> None:
    sleeve = random.uniform(0.6, 0.8)
    draw_top(drawing, sleeve, random.uniform(0.95, 1.0), random.uniform(0.22, 0.3), random.uniform(0.03, 0.15))
    draw_collar(drawing)
    drawing.line((0.5, 0.2), (0.5, 0.98), width=random.uniform(0.02, 0.04), change=-90)


def draw_shirt(drawing: Drawing) -> None:
    sleeve = random.choice([random.uniform(0.2, 0.45), random.uniform(0.6, 0.8)])
    draw_top(drawing, sleeve, random.uniform(0.88, 0.98), random.uniform(0.2, 0.3), random.uniform(0.1, 0.5))
    if random.random() < 0.6:
        draw_collar(drawing)


def draw_dress(drawing: Drawing) -> None:
    shoulder, waist = random.uniform(0.09, 0.17), random.uniform(0.08, 0.13)
    hem, waistline = random.uniform(0.14, 0.3), random.uniform(0.3, 0.5)
    left = [(0.5 - shoulder * 0.6, 0.02), (0.5 - shoulder, 0.1), (0.5 - waist, waistline), (0.5 - hem, 0.98)]
    drawing.area((0.5, random.uniform(0.04, 0.16)), *left, *((1 - x, y) for x, y in reversed(left)))
    if random.random() < 0.4:
        reach = random.uniform(0.12, 0.55)
        out = 0.5 - shoulder - random.uniform(0.02, 0.08)
        drawing.mirrored((0.5 - shoulder, 0.04), (out - 0.04, 0.06 + reach), (out + 0.05, 0.06 + reach), (0.42, 0.2))
    if random.random() < 0.5:
        drawing.line((0.5 - waist, waistline), (0.5 + waist, waistline), width=0.03)


def draw_trouser(drawing: Drawing) -> None:
    waist, leg = random.uniform(0.1, 0.18), random.uniform(0.07, 0.13)
    spread, crotch = random.uniform(0.0, 0.06), random.uniform(0.22, 0.38)
    foot = 0.5 - spread - leg
    drawing.mirrored((0.5, 0.02), (0.5 - waist, 0.02), (foot - 0.04, crotch), (foot - 0.02, 0.98), (foot + leg, 0.98))
    drawing.mirrored((0.5, 0.02), (0.5 - waist, 0.02), (foot, crotch), (0.5, crotch))
    drawing.line((0.5, crotch), (0.5, 0.98), width=random.uniform(0.01, 0.05), change=-255)


def draw_bag(drawing: Drawing) -> None:
    top, side, base = random.uniform(0.3, 0.5), random.uniform(0.02, 0.15), random.uniform(0.0, 0.12)
    bottom = random.uniform(0.8, 0.97)
    inner = random.uniform(0.15, 0.35)
    drawing.arch(inner, random.uniform(0.02, 0.15), 1 - inner, 2 * top - 0.1, random.uniform(0.03, 0.07))
    drawing.area((side, top), (1 - side, top), (1 - base, bottom), (base, bottom))
    if random.random() < 0.6:
        flap = top + random.uniform(0.08, 0.3)
        drawing.area((side, top), (1 - side, top), (0.9, flap), (0.1, flap), change=random.choice([-50, 40]))
    if random.random() < 0.4:
        drawing.area((0.45, top), (0.55, top), (0.55, top + 0.2), (0.45, top + 0.2), change=-70)


def draw_low_shoe(drawing: Drawing, top: float, ground: float, heel: float) -> None:
    """Draws a shoe that points to the left, open at height `top`."""
    toe, instep = ground - random.uniform(0.12, 0.2), random.uniform(0.45, 0.65)
    outline = [
        (0.02, ground - 0.04),
        (0.06, toe),
        (0.25, toe - 0.05),
        (instep, top),
        (0.95, top + 0.02),
        (0.97, ground),
    ]
    drawing.area(*outline, (0.04, ground))
    sole = ground - random.uniform(0.04, 0.08)
    drawing.area((0.02, sole), (0.97, sole), (0.98, ground), (0.03, ground), change=random.choice([-80, 60, 90]))
    if heel > 0:
        drawing.area((0.72, ground), (0.96, ground), (0.95, ground + heel), (0.78, ground + heel), change=-40)


def draw_sneaker(drawing: Drawing) -> None:
    ground = random.uniform(0.66, 0.74)
    draw_low_shoe(drawing, ground - random.uniform(0.26, 0.4), ground, heel=0)
    for lace in range(random.randint(0, 4)):
        x, y = 0.32 + 0.07 * lace, ground - 0.22 - 0.04 * lace
        drawing.line((x, y), (x + 0.07, y + 0.06), width=0.02, change=random.choice([-80, 70]))
    if random.random() < 0.5:
        drawing.line((0.4, ground - 0.08), (0.7, ground - 0.2), width=0.04, change=random.choice([-90, 70]))


def draw_sandal(drawing: Drawing) -> None:
    ground, rise = random.uniform(0.68, 0.8), random.choice([0.0, random.uniform(0.05, 0.35)])
    sole = [(0.03, ground), (0.35, ground), (0.65, ground - rise * 0.6), (0.95, ground - rise)]
    drawing.line(*sole, width=random.uniform(0.04, 0.09), change=random.uniform(-60, 20))
    if rise > 0.04:
        drawing.area((0.82, ground - rise), (0.96, ground - rise), (0.94, ground + 0.04), (0.88, ground + 0.04))
    for _ in range(random.randint(2, 5)):
        start = random.choice([0.1, 0.25, 0.4, 0.6, 0.75, 0.9])
        end = min(0.95, max(0.08, start + random.uniform(-0.3, 0.3)))
        height = ground - rise * start - random.uniform(0.1, 0.35)
        foot = ground - rise * max(0.0, start - 0.3)
        drawing.line(
            (start, foot), ((start + end) / 2, height), (end, foot), width=random.uniform(0.02, 0.06), change=0
        )


def draw_ankle_boot(drawing: Drawing) -> None:
    heel = random.choice([0.0, 0.0, random.uniform(0.05, 0.2)])
    ground, top = 0.95 - heel, random.uniform(0.02, 0.2)
    toe, ankle = ground - random.uniform(0.18, 0.26), random.uniform(0.45, 0.62)
    front = [(0.03, ground - 0.04), (0.08, toe), (0.28, toe - 0.08), (ankle, toe - 0.2), (ankle - 0.02, top)]
    drawing.area(*front, (0.95, top + random.uniform(-0.02, 0.06)), (0.95, ground), (0.05, ground))
    drawing.area((0.03, ground - 0.05), (0.97, ground - 0.05), (0.97, ground), (0.05, ground), change=-60)
    if heel > 0:
        drawing.area((0.7, ground), (0.96, ground), (0.95, ground + heel), (0.78, ground + heel), change=-40)
    if random.random() < 0.5:
        drawing.line((0.7, top), (0.72, ground - 0.1), width=0.03, change=random.choice([-70, 50]))


DRAW: dict[str, Callable[[Drawing], None]] = {
    "t-shirt": draw_t_shirt,
    "trouser": draw_trouser,
    "pullover": draw_pullover,
    "dress": draw_dress,
    "coat": draw_coat,
    "sandal": draw_sandal,
    "shirt": draw_shirt,
    "sneaker": draw_sneaker,
    "bag": draw_bag,
    "ankle boot": draw_ankle_boot,
}


def patterned(piece: np.ndarray) -> np.ndarray:
    """Puts stripes, folds and print on a picture `[28, 28]` between 0 and 1; what is black stays so."""
    angle = random.choice([0, 0, np.pi / 2, random.uniform(0, np.pi)])
    waves = np.sin((X * np.cos(angle) + Y * np.sin(angle)) * random.uniform(8, 80) + random.uniform(0, 6))
    coarse = Image.fromarray(np.random.rand(7, 7).astype(np.float32))
    folds = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) - 0.5
    stripes = 1 + random.choice([0, 0, 0.15, 0.5]) * waves
    light = 1 + random.uniform(-0.3, 0.3) * (X - 0.5) + random.uniform(-0.3, 0.3) * (Y - 0.5)
    return (piece * stripes * light * (1 + random.choice([0.1, 0.3, 0.7]) * folds)).clip(0, 1)


def picture(name: str) -> np.ndarray:
    """A drawing in shades of grey between 0 and 1, `[28, 28]`."""
    drawing = Drawing()
    DRAW[name](drawing)
    image = ImageOps.mirror(drawing.canvas) if random.random() < 0.1 else drawing.canvas
    # Turned by an angle and seen from nearer or farther.
    angle, distance = math.radians(random.uniform(-4, 4)), random.uniform(0.95, 1.1)
    cos, sin, middle = distance * math.cos(angle), distance * math.sin(angle), CANVAS / 2
    matrix = (cos, sin, middle - middle * (cos + sin), -sin, cos, middle - middle * (cos - sin))
    image = image.transform(image.size, Image.Transform.AFFINE, matrix).reduce(OVERSAMPLING)
    return patterned(np.asarray(image, dtype=np.float32) / 255)


def random_batch(size: int) -> tuple[torch.Tensor, list[str]]:
    """Return random pictures `[size, 3, 28, 28]` and their captions, all from one template."""
    names, template = random.choices(list(DRAW), k=size), random.choice(TEMPLATES)
    greys = torch.tensor(np.stack([picture(name) for name in names]), dtype=torch.float32)
    noise = 0.04 * torch.rand(size, 1, 1) * torch.randn_like(greys)
    pictures = (greys + noise * (greys > 0)).clamp(0, 1)
    return pictures[:, None].expand(-1, 3, -1, -1), [template.format(name) for name in names]


if __name__ == "__main__":
    go_on(__doc__, "examples/tiny-clip-clothes", random_batch)
