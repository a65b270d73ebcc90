"""The global generators: seeded for one microbatch, and afterwards as if nothing had been drawn."""

import random

import numpy as np
import pytest
import torch

from hf_dpclip.seeding import preserved_generators, seeded


def draws() -> list[float]:
    """One number from each generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def drawn_with(seed: int) -> list[float]:
    with seeded(seed):
        return draws()


def test_every_generator_starts_from_the_seed():
    first, second = drawn_with(5), drawn_with(6)
    draws()
    assert drawn_with(5) == first
    assert all(one != other for one, other in zip(first, second))


@pytest.mark.parametrize("context", [lambda: seeded(5), preserved_generators], ids=["seeded", "preserved"])
@pytest.mark.parametrize("fails", [False, True])
def test_every_generator_goes_on_as_if_nothing_had_been_drawn(context, fails):
    """Checkpoints hold the states of all of them."""
    with preserved_generators():
        expected = draws()
    try:
        with context():
            draws()
            if fails:
                raise RuntimeError("out of memory")
    except RuntimeError:
        pass
    assert draws() == expected
