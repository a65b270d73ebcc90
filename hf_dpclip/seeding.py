"""Seeding the global generators, from which models and data pipelines draw: dropout, augmentation, NEFTune."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch start from `seed` inside, and go on afterwards as if nothing
    had been drawn.

    The draws for one microbatch then do not depend on those for the microbatches before it, which would carry the
    presence of one record into all later ones; nor do they show in the generators' state, which checkpoints hold.
    """
    with preserved_generators():
        seed_generators(seed)
        yield


@contextmanager
def preserved_generators() -> Iterator[None]:
    """The global generators go on afterwards as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_generators(seed: int) -> None:
    """The global generators of Python, numpy and torch start from `seed`."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which keeps a stack trace for each accelerator that may yet come into use.
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and (accelerator.type != "cuda" or torch.cuda.is_initialized()):
        torch.get_device_module(accelerator).manual_seed(seed)
