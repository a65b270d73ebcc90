"""What libraries say of single records is not shown: it would tell when these are drawn."""

import logging
import warnings

import torch
from factories import arguments, pairs, tiny_clip

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.silence import without_messages


logger = logging.getLogger("a_library")


class Complaining(DPCLIPTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        warnings.warn("the loss is large", stacklevel=2)
        return super().compute_loss(model, inputs, *args, **kwargs)


def complaining_collator(records):
    warnings.warn("an image has a damaged header", stacklevel=2)
    logger.warning("a text is long")
    return torch.utils.data.default_collate(records)


def test_a_step_shows_no_warning(tmp_path, caplog, recwarn):
    trainer = Complaining(tiny_clip(), arguments(tmp_path, max_steps=2), complaining_collator, pairs(64))
    trainer.train()
    assert trainer.privacy_spent().steps == 2
    shown = [str(each.message) for each in recwarn] + caplog.messages
    assert not any("header" in message or "long" in message or "large" in message for message in shown)
    # Outside, all is as before.
    logger.warning("about no record")
    assert "about no record" in caplog.messages


def test_what_is_shown_once_is_not_shown_again_after_silence():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            with without_messages():
                warnings.warn("of a record", stacklevel=1)
            warnings.warn("once", stacklevel=1)
    assert [str(each.message) for each in shown] == ["once"]


def test_silence_that_overlaps_in_two_threads_ends():
    before = logging.root.manager.disable, [*warnings.filters]
    first, second = without_messages(), without_messages()
    for context in (first, second):
        context.__enter__()
    assert logging.root.manager.disable >= logging.WARNING
    for context in (first, second):
        context.__exit__(None, None, None)
    assert (logging.root.manager.disable, [*warnings.filters]) == before


def test_errors_are_logged(caplog):
    with without_messages():
        logger.error("no space left")
    assert "no space left" in caplog.messages
