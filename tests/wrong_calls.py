"""How wrong calls are made, and what is expected of the answer."""

from collections.abc import Callable
from pathlib import Path

import pytest
from factories import arguments, tiny_clip, tiny_processor
from scripts import ROOT

import hf_dpclip
from hf_dpclip import DPCLIPTrainer


# What a wrong call may raise, and where.
EXPLAINED = (ValueError, OSError, ImportError, RuntimeError)
OURS = (Path(hf_dpclip.__file__).parent, ROOT / "examples")


def check_explained(call: Callable, wrong: str, remedy: str) -> None:
    """The call is refused by this library or an example of it, with both fragments in the message."""
    with pytest.raises(EXPLAINED) as caught:
        call()
    message = str(caught.value)
    assert wrong in message
    assert remedy in message
    raised_in = Path(caught.traceback[-1].path)
    assert any(folder in raised_in.parents for folder in OURS), f"{raised_in} raised it, which knows nothing of us"


def trainer(folder, dataset, model=None, collator=None, processor=None, train=False, options=None, **overrides):
    """A trainer, which has trained if asked to; `options` are the trainer's, `overrides` its arguments'."""
    args = arguments(folder, accountant="rdp", **{"per_device_train_batch_size": 4, **overrides})
    model = tiny_clip() if model is None else model
    made = DPCLIPTrainer(model, args, collator, dataset, processing_class=processor, **(options or {}))
    if train:
        made.train()
    return made


def processed(folder, dataset, **options):
    """A trainer with a processor of images and texts."""
    return trainer(folder, dataset, processor=tiny_processor(), **options)


def table(folder, name: str, content: str | bytes) -> str:
    """The path of a file of that content."""
    path = Path(folder, name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)
