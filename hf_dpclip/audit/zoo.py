"""The honest mechanism and the broken ones, each with a game that exposes its mistake."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import mistakes
from .game import ChosenGradients, ContrastiveTemperature, Game, Mechanism


# So much larger than other gradients that the canary determines the direction of its microbatch's.
LOUD = 1000.0


def chosen(*rows: list[float]) -> list[dict[str, Tensor]]:
    """Records for [`ChosenGradients`]."""
    return [{"vector": torch.tensor(row, dtype=torch.float32)} for row in rows]


def pair(image: list[float], text: list[float]) -> dict[str, Tensor]:
    """A record for [`ContrastiveTemperature`]."""
    return {"image": torch.tensor(image), "text": torch.tensor(text)}


# ---- What the adversary looks at ----


def downwards(releases: Tensor) -> Tensor:
    """The canary pulls all coordinates down."""
    return -releases.sum(dim=1)


def each_upwards(releases: Tensor) -> Tensor:
    """Each canary pulls its own coordinate up."""
    return releases


def quietness(releases: Tensor) -> Tensor:
    """The canary makes the noise smaller."""
    return -releases.square().mean(dim=1)


def any_value(releases: Tensor) -> Tensor:
    """Only with the canary is there a release at all."""
    return (releases != 0).any(dim=1)


def not_a_number(releases: Tensor) -> Tensor:
    """Only the canary's gradient is NaN."""
    return releases.isnan().any(dim=1)


def difference_of_halves(releases: Tensor) -> Tensor:
    """The canary moves the two tensors apart; noise that they share cancels."""
    first, second = releases.chunk(2, dim=1)
    return (second - first).sum(dim=1)


def coarseness(releases: Tensor) -> Tensor:
    """Whether the values near zero are on a coarse grid.

    Where the canary adds 2^-6 to noise in bfloat16, a sum below 2^-8 has noise between 2^-7 and 2^-5, whose grid is
    2^-14 or wider. Without the canary, values below 2^-8 are noise, whose grid there is 2^-16 or finer.
    """
    off_grid = torch.remainder(releases * 2**14, 1) != 0
    return -((releases.abs() < 2**-8) & off_grid).sum(dim=1)


# ---- Games ----


def turned_around(tensors: int = 1, plays: int = 200, thresholds: tuple[float, ...] = (0.0,), **options) -> Game:
    """One microbatch, whose gradient the canary reverses in each tensor: from +C to -C if there is one tensor."""
    records = chosen([1.0] * tensors, [-LOUD] * tensors)
    return Game(partial(ChosenGradients, *[1] * tensors), records, downwards, thresholds, plays, **options)


def lone_canary(
    gradient: list[float], score: Callable, threshold: float, plays: int = 200, others: int = 0, **options
) -> Game:
    """A canary among records without a gradient, each in a microbatch of its own by default."""
    records = chosen(*[[0.0] * len(gradient)] * others, gradient)
    options = {"settings": {"microbatch_size": 1}, **options}
    return Game(partial(ChosenGradients, len(gradient)), records, score, (threshold,), plays, **options)


def every_record_a_canary(count: int, threshold: float, plays: int, **options) -> Game:
    """Each record has its own microbatch and coordinate, so that one step is `count` plays."""
    records, canaries = chosen(*(LOUD * torch.eye(count)).tolist()), tuple(range(count))
    model = partial(ChosenGradients, count)
    return Game(model, records, each_upwards, (threshold,), plays, canaries, **options)


CONTRASTIVE = Game(
    ContrastiveTemperature,
    # Two matching pairs, whose loss falls with `logit_scale`, and a canary whose image and text are opposites.
    [pair([1.0, 0.0], [1.0, 0.0]), pair([0.0, 1.0], [0.0, 1.0]), pair([9.0, 0.0], [-9.0, 0.0])],
    lambda releases: releases[:, 0],
    # Halfway between -C and C, in noise of 0.8 C; and a value that is rarely reached without the canary.
    thresholds=(0.0, 0.009),
    plays=4500,
    settings={"noise_multiplier": 0.4, "max_grad_norm": 0.01},
)

ALTERNATING = Game(
    partial(ChosenGradients, 1),
    # Growing with alternating signs: the larger of two neighbours is negative if it comes first, and positive if not.
    chosen([-1.0], *[[(-2.0) ** number] for number in range(1, 12)]),
    downwards,
    thresholds=(1.0,),  # without the canary five of six point up, with it none
    plays=200,
    canaries=(0,),
    settings={"microbatch_size": 2},
)

MECHANISMS = [
    Mechanism("honest", "the library's own code", CONTRASTIVE),
    Mechanism(
        "published-dp-clip",
        "noise σC on whole batches and each tensor clipped by itself, as in the Dp-CLIP paper's code",
        turned_around(tensors=64),
        mechanism=mistakes.PublishedRecipe,
    ),
    Mechanism(
        "noise-relative-to-c",
        "noise σC on whole batches, whose sensitivity is 2C",
        turned_around(plays=1200, thresholds=(0.0, 1.3)),
        mechanism=mistakes.NoiseRelativeToC,
    ),
    Mechanism(
        "clips-each-tensor",
        "each parameter tensor clipped to C",
        turned_around(tensors=64),
        mechanism=mistakes.ClipsEachTensor,
    ),
    Mechanism(
        "positional-microbatches",
        "microbatches cut by position in the batch",
        ALTERNATING,
        sampler=mistakes.PositionalMicrobatches,
    ),
    Mechanism(
        "shuffled-fixed-size",
        "shuffled batches of fixed size, accounted as Poisson samples",
        Game(
            partial(ChosenGradients, 1),
            chosen([LOUD], [-LOUD]),
            downwards,
            thresholds=(0.8,),
            plays=2000,
            settings={"per_device_train_batch_size": 1},
            delta=0.05,
        ),
        sampler=mistakes.ShuffledFixedSize,
    ),
    Mechanism(
        "divides-by-realised-count",
        "the mean over the microbatches that were there",
        lone_canary([0.0] * 256, quietness, -2.0, others=1),
        mechanism=mistakes.DividesByRealisedCount,
    ),
    Mechanism(
        "skips-empty-batches",
        "no noise where no record was drawn",
        lone_canary([0.0], any_value, 0.5),
        mechanism=mistakes.SkipsEmptyBatches,
    ),
    Mechanism(
        "lets-nan-pass",
        "gradients that are not finite are released",
        lone_canary([torch.nan], not_a_number, 0.5, others=1, settings={}),
        mechanism=mistakes.LetsNaNPass,
    ),
    Mechanism(
        "stops-on-nan",
        "the run ends where a gradient is not finite",
        lone_canary([torch.nan], not_a_number, 0.5, others=1, settings={}),
        mechanism=mistakes.StopsOnNaN,
    ),
    Mechanism(
        "global-generator",
        "noise from the generator that transformers seeds with 42",
        turned_around(thresholds=(1.0,), knows_noise=True),
        mechanism=mistakes.GlobalGenerator,
    ),
    Mechanism(
        "same-seed-on-every-rank",
        "every rank draws from all records with the same random numbers",
        lone_canary([-LOUD], downwards, 3.2, plays=1500, others=5),
        sampler=mistakes.SameSeedOnEveryRank,
    ),
    Mechanism(
        "reuses-generator-state",
        "each tensor's noise starts from the same state",
        Game(
            partial(ChosenGradients, 1, 1),
            chosen([1.0, -1.0], [-LOUD, LOUD]),
            difference_of_halves,
            thresholds=(0.0,),
            plays=200,
        ),
        mechanism=mistakes.ReusesGeneratorState,
    ),
    Mechanism(
        "half-precision-noise",
        "noise drawn and added in bfloat16",
        lone_canary([LOUD] * 4096, coarseness, -0.5, others=1, settings={}),
        mechanism=mistakes.HalfPrecisionNoise,
    ),
    Mechanism(
        "scaled-loss",
        "noise added before a loss scaler divides by 1024",
        turned_around(),
        mechanism=mistakes.ScaledLoss,
    ),
    Mechanism(
        "counts-micro-steps",
        "forward passes accounted as steps on batches of their own, with one draw of noise for all",
        every_record_a_canary(
            16,
            threshold=1.2,
            plays=3200,
            settings={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "microbatch_size": 1},
            delta=0.05,
        ),
        trainer=mistakes.CountsMicroSteps,
    ),
    Mechanism(
        "forgets-on-resume",
        "the count of steps starts anew when a run is resumed",
        every_record_a_canary(
            50,
            threshold=40.0,
            plays=50,
            settings={
                "microbatch_size": 1,
                "noise_multiplier": 2.0,
                "save_strategy": "steps",
                "save_steps": 79,
            },
            steps=80,
            resumed=True,
        ),
        trainer=mistakes.ForgetsOnResume,
    ),
    Mechanism(
        "silently-resolved",
        "neither ε nor σ given, and σ = 0 came of it",
        turned_around(),
        mechanism=mistakes.NoNoise,
    ),
]


def find_mechanism(name: str) -> Mechanism:
    """The mechanism of that name. Raises `ValueError` if there is none."""
    for mechanism in MECHANISMS:
        if mechanism.name == name:
            return mechanism
    raise ValueError(f"there is no mechanism {name!r}: choose one of {', '.join(each.name for each in MECHANISMS)}.")
