"""Warnings that libraries give for single records, which would tell when these are drawn, are not shown."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_warnings() -> Iterator[None]:
    """Python warnings are not shown inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def without_messages() -> Iterator[None]:
    """Neither are those that are logged. Errors are raised as ever."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with without_warnings():
            yield
    finally:
        logging.disable(before)
