"""Pre-train the tiny CLIP of the examples on public synthetic pictures, the public start of private fine-tuning.

Digits, letters and shapes are drawn from fonts and outlines, distorted at random and captioned from templates; no
real image is read. Matplotlib brings the first fonts, these Debian packages bring handwriting:

    apt-get install fonts-breip fonts-bwht fonts-comic-neue fonts-dancingscript fonts-dkg-handwriting \
        fonts-humor-sans fonts-kaushanscript fonts-kristi fonts-rufscript fonts-sjfonts fonts-tlwg-purisa-ttf \
        fonts-tomsontalks

    python examples/pretrain_public.py --output_dir examples/tiny-clip

The same fonts, arguments and number of threads give the same weights.
"""

import json
import math
import random
import string
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_dpclip.presets import DIGITS


IMAGE_SIZE = 28
OVERSAMPLING = 4  # drawings are this many times larger than the images
MEAN = STD = 0.5
MAX_LENGTH = 24
VOCAB_SIZE = 787

FONTS = """
    Breip BecauseWeBuild-Regular BecauseWeConnect-Regular BecauseWeCreate-Regular BecauseWeLearn-Regular
    BecauseWeMentor-Regular BecauseWeOrganize-Regular ComicNeue-Italic ComicNeue-Light ComicNeue-Regular
    DancingScript-Regular Delphine Humor-Sans KaushanScript-Regular Kristi Purisa Purisa-Oblique Rufscript010 SteveHand
    TomsonTalks cmmi10 cmr10 cmss10 cmti10 cmtt10 dkg dkgBd dkgIt DejaVuSans DejaVuSans-Oblique DejaVuSansMono
    DejaVuSerif STIXGeneral STIXGeneralItalic
"""


POLYGONS = {  # number of corners, and the radius of the inner corners of stars
    "triangle": (3, None),
    "diamond": (4, None),
    "pentagon": (5, None),
    "hexagon": (6, None),
    "star": (5, 0.4),
    "flower": (8, 0.6),
}

SHAPES = [*POLYGONS, "cross", "ring", "circle", "square"]

COLOURS = {
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "grey": (0.5, 0.5, 0.5),
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.9, 0.1),
    "orange": (1.0, 0.55, 0.0),
    "purple": (0.6, 0.1, 0.7),
}

TEMPLATES = {
    "digit": [
        'a photo of the number: "{symbol}".',
        "a photo of the number {name}.",
        "a handwritten digit {name}",
        "a handwritten digit {symbol}",
        "a photo of the digit {symbol}",
        "an image of the number {symbol}",
        "the digit {name}",
        "{name}",
        "{symbol}",
        "a {ink} digit {name} on a {paper} background",
        "the number {symbol} in {ink}",
    ],
    "letter": [
        'a photo of the letter: "{symbol}".',
        "a handwritten letter {symbol}",
        "the letter {symbol}",
        "a {ink} letter {symbol} on a {paper} background",
    ],
    "shape": [
        "a photo of a {name}.",
        "a drawing of a {name}",
        "a {ink} {name}",
        "a {ink} {name} on a {paper} background",
    ],
}
WEIGHTS = {"digit": 0.65, "letter": 0.2, "shape": 0.15}

OTHER_WORDS = """
    a bad photo of many. a blurry picture of the small object. this is an image of some clothes, a piece of clothing,
    a t-shirt, top, trouser, trousers, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot, shoe, hat,
    a photo of an airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck, person, man, woman, child,
    house, tree, flower, food, water, street. it is a type of large, written, printed, bright, dark, black and white
"""


class Concept(NamedTuple):
    """A thing to show: its names, and for each way to draw it distances to its edge and the half-width of its pen."""

    kind: str
    name: str
    symbol: str
    maps: torch.Tensor
    pens: torch.Tensor


def make_parser(description: str, output_dir: str, steps: int, batch_size: int) -> ArgumentParser:
    """The options that all models taught from drawings have, with these defaults."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output_dir", default=output_dir, help="where to save the model and its processor")
    parser.add_argument("--steps", type=int, default=steps, help="number of optimizer steps")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="number of pictures in a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak of the cosine schedule")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of torch; the weights depend on it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures and of new weights")
    return parser


def find_fonts() -> list[ImageFont.FreeTypeFont]:
    """Load those of the named fonts that are installed, in alphabetical order."""
    # A font that Matplotlib brings is taken from there, so that it is the same everywhere.
    paths = sorted(font_manager.findSystemFonts()) + sorted(font_manager.findSystemFonts([get_data_path()]))
    found = {Path(path).stem: path for path in paths}
    names = sorted(FONTS.split())
    missing = [name for name in names if name not in found]
    if missing:
        print(f"Fonts left out because they are not installed: {', '.join(missing)}")
    return [ImageFont.truetype(found[name], 32 * OVERSAMPLING) for name in names if name in found]


def draw_glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw a character in white on black, with space around it."""
    canvas = Image.new("L", (80 * OVERSAMPLING, 80 * OVERSAMPLING))
    ImageDraw.Draw(canvas).text((40 * OVERSAMPLING, 40 * OVERSAMPLING), character, 255, font, anchor="mm")
    return canvas


def draw_shape(name: str) -> Image.Image:
    """Draw a geometric shape in white on black."""
    canvas = Image.new("L", (100, 100))
    draw = ImageDraw.Draw(canvas)
    if name in POLYGONS:
        draw.polygon(polygon_corners(*POLYGONS[name]), 255)
    elif name == "cross":
        draw.rectangle((35, 5, 65, 95), 255)
        draw.rectangle((5, 35, 95, 65), 255)
    elif name == "ring":
        draw.ellipse((5, 5, 95, 95), outline=255, width=18)
    else:
        {"circle": draw.ellipse, "square": draw.rectangle}[name]((5, 5, 95, 95), 255)
    return canvas


def polygon_corners(corners: int, inner_radius: float | None) -> list[tuple[float, float]]:
    """Return the outline of a regular polygon, or of a star whose inner corners have the radius given."""
    radii = [1.0] if inner_radius is None else [1.0, inner_radius]
    count = corners * len(radii)
    angles = [2 * math.pi * index / count for index in range(count)]
    sizes = [45 * radii[index % len(radii)] for index in range(count)]
    return [(50 + size * math.sin(angle), 50 - size * math.cos(angle)) for size, angle in zip(sizes, angles)]


def distance_map(drawing: Image.Image) -> torch.Tensor:
    """Centre a drawing in a 20 x 20 box of the image and return the signed distances to its edge, in pixels."""
    box = 20 * OVERSAMPLING
    ink = drawing.crop(drawing.getbbox())
    scale = box / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BICUBIC)
    canvas = Image.new("L", (IMAGE_SIZE * OVERSAMPLING, IMAGE_SIZE * OVERSAMPLING))
    canvas.paste(ink, [(outer - inner) // 2 for outer, inner in zip(canvas.size, ink.size)])
    inside = np.asarray(canvas) > 127
    distances = distance_transform_edt(inside) - distance_transform_edt(~inside)
    return F.avg_pool2d(torch.tensor(distances, dtype=torch.float32)[None], 2) / OVERSAMPLING


def build_concepts() -> list[Concept]:
    """Draw every digit and letter in every font, and every shape."""
    fonts = find_fonts()

    def glyphs(characters: str) -> list[Image.Image]:
        """Draw each character in each font."""
        return [draw_glyph(character, font) for character in characters for font in fonts]

    digits = [build_concept("digit", name, str(value), glyphs(str(value))) for value, name in enumerate(DIGITS)]
    letters = [build_concept("letter", char, char, glyphs(char + char.upper())) for char in string.ascii_lowercase]
    shapes = [build_concept("shape", name, name, [draw_shape(name)]) for name in SHAPES]
    return digits + letters + shapes


def build_concept(kind: str, name: str, symbol: str, drawings: list[Image.Image]) -> Concept:
    """Measure the drawings of a concept."""
    maps = torch.stack([distance_map(drawing) for drawing in drawings])
    # Half the width of the pen is the distance from the middle of a stroke to its edge.
    pens = torch.stack([distances[distances > 0].quantile(0.9) for distances in maps])
    return Concept(kind, name, symbol, maps, pens)


def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
    """Draw uniform random numbers."""
    return torch.empty(shape).uniform_(low, high)


def random_grid(count: int) -> torch.Tensor:
    """Return sampling grids that rotate, slant, stretch, shift and bend pictures at random."""
    angle, slant = uniform(-0.25, 0.25, count), uniform(-0.2, 0.5, count)
    width, height = uniform(0.85, 1.5, count), uniform(0.9, 1.2, count)
    rows = [
        [width * angle.cos(), width * (slant + angle.sin()), uniform(-0.1, 0.1, count)],
        [-height * angle.sin(), height * angle.cos(), uniform(-0.1, 0.1, count)],
    ]
    theta = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = F.affine_grid(theta, [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    bends = uniform(0, 0.12, count, 1, 1, 1) * torch.randn(count, 2, 4, 4)
    bends = F.interpolate(bends, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=True)
    return grid + bends.movedim(1, -1)


def random_strokes(maps: torch.Tensor, pens: torch.Tensor) -> torch.Tensor:
    """Turn distance maps into ink between 0 and 1, with pens of random half-width."""
    change = (uniform(0.6, 1.8, len(maps)) - pens).clamp(-0.6, 1.5)
    maps = F.grid_sample(maps, random_grid(len(maps)), padding_mode="border", align_corners=False)
    ink = (maps + change[:, None, None, None] + 0.5).clamp(0, 1)
    blur = F.avg_pool2d(ink, 3, stride=1, padding=1)
    return torch.lerp(ink, blur, uniform(0, 0.7, len(maps), 1, 1, 1))


def colourise(ink: torch.Tensor, inks: list[str], papers: list[str]) -> torch.Tensor:
    """Paint the ink on the paper, each in a random shade of its colour, and add noise."""
    shades = torch.tensor([[COLOURS[name] for name in names] for names in (papers, inks)])[..., None, None]
    papers_rgb, inks_rgb = shades + uniform(-0.1, 0.1, *shades.shape) * uniform(0, 1, 1, shades.shape[1], 1, 1, 1)
    pictures = torch.lerp(papers_rgb.expand(-1, -1, *ink.shape[2:]), inks_rgb, ink)
    noise = uniform(0, 0.1, len(ink), 1, 1, 1).square() * torch.randn_like(pictures)
    return (pictures + noise).clamp(0, 1)


def random_colours(count: int) -> tuple[list[str], list[str]]:
    """Choose the colours of ink and paper; most pictures are white on black."""
    pairs = [random.sample(list(COLOURS), 2) if random.random() < 0.25 else ["white", "black"] for _ in range(count)]
    inks, papers = zip(*pairs)
    return list(inks), list(papers)


def random_batch(concepts: list[Concept], size: int) -> tuple[torch.Tensor, list[str]]:
    """Return random pictures and their captions.

    One template serves each kind of thing in a batch, so that two captions differ only if their pictures do.
    """
    kinds = random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=size)
    chosen = [random.choice([concept for concept in concepts if concept.kind == kind]) for kind in kinds]
    inks, papers = random_colours(size)
    drawings = [random.randrange(len(concept.maps)) for concept in chosen]
    maps = torch.stack([concept.maps[drawing] for concept, drawing in zip(chosen, drawings)])
    pens = torch.stack([concept.pens[drawing] for concept, drawing in zip(chosen, drawings)])
    templates = {kind: random.choice(choices) for kind, choices in TEMPLATES.items()}
    captions = [
        templates[concept.kind].format(name=concept.name, symbol=concept.symbol, ink=ink, paper=paper)
        for concept, ink, paper in zip(chosen, inks, papers)
    ]
    return colourise(random_strokes(maps, pens), inks, papers), captions


def tokenizer_corpus(concepts: list[Concept]) -> list[str]:
    """List every template filled with every concept and colour, and the other words of common prompts."""
    captions = [
        template.format(name=concept.name, symbol=concept.symbol, ink=colour, paper=colour)
        for concept in concepts
        for template in TEMPLATES[concept.kind]
        for colour in COLOURS
    ]
    return captions + [OTHER_WORDS] * 10


def train_tokenizer(corpus: list[str]) -> CLIPTokenizer:
    """Learn a small byte-level vocabulary that can write any text, in the layout of CLIP's own."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte, within and at the end of a word, is given its place beforehand: ties are then always broken alike.
    tokens = alphabet + [char + "</w>" for char in alphabet]
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - 2, special_tokens=tokens, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab, merges, model_max_length=MAX_LENGTH)


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Return the processor that prepares any picture and text for the model."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return CLIPProcessor(image_processor, tokenizer)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a CLIP of random weights with a small vision transformer and a smaller text transformer."""
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        vision_config=vision | {"image_size": IMAGE_SIZE, "patch_size": 7, "projection_dim": 64},
        text_config=text | tokens | {"projection_dim": 64},
        projection_dim=64,
    )
    model = CLIPModel(config)
    # Patches of plain paper look alike, so their places must tell them apart from the start.
    model.vision_model.embeddings.position_embedding.weight.data.mul_(10)
    return model


def contrastive_loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, captions: list[str]
) -> torch.Tensor:
    """Return the loss of CLIP, where pictures of equal captions all belong to that one caption."""
    unique = sorted(set(captions))
    labels = torch.tensor([unique.index(caption) for caption in captions])
    texts = tokenizer(unique, padding=True, return_tensors="pt")
    logits = model(**texts, pixel_values=(pictures - MEAN) / STD).logits_per_image
    targets = F.one_hot(labels, len(unique)).T.float()
    image_loss = F.cross_entropy(logits, labels)
    text_loss = F.cross_entropy(logits.T, targets / targets.sum(dim=1, keepdim=True))
    return (image_loss + text_loss) / 2


def train(model: CLIPModel, tokenizer: CLIPTokenizer, draw_batch: Callable, args: Namespace) -> None:
    """Fit the model to random pictures that are drawn anew in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    for step in range(1, args.steps + 1):
        loss = contrastive_loss(model, tokenizer, *draw_batch(args.batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def save(model: CLIPModel, processor: CLIPProcessor, folder: str) -> None:
    """Save what `from_pretrained` loads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def go_on(description: str, output_dir: str, draw_batch: Callable) -> None:
    """Train the tiny CLIP further, on other pictures, as the command line says, and save it elsewhere."""
    parser = make_parser(description, output_dir, steps=3000, batch_size=128)
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny-clip"), help="the CLIP to start from")
    args = parser.parse_args()
    make_repeatable(args)
    model, processor = CLIPModel.from_pretrained(args.model), CLIPProcessor.from_pretrained(args.model)
    train(model.train(), processor.tokenizer, draw_batch, args)
    save(model, processor, args.output_dir)


def make_repeatable(args: Namespace) -> None:
    """Let the same arguments give the same weights."""
    set_seed(args.seed)
    torch.set_num_threads(args.num_threads)


def main() -> None:
    """Draw, train and save."""
    args = make_parser(__doc__, "examples/tiny-clip", steps=6000, batch_size=64).parse_args()
    make_repeatable(args)
    concepts = build_concepts()
    tokenizer = train_tokenizer(tokenizer_corpus(concepts))
    model = build_model(tokenizer)
    train(model, tokenizer, lambda size: random_batch(concepts, size), args)
    save(model, build_processor(tokenizer), args.output_dir)


if __name__ == "__main__":
    main()
