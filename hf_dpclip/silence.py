"""Warnings that libraries give for single records, which would tell when these are drawn, are not shown."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


IGNORED = ("ignore", None, Warning, None, 0)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Python warnings are not shown inside."""
    # Not by `catch_warnings`, after which those that are shown once would be shown again.
    filters: Any = warnings.filters
    filters.insert(0, IGNORED)
    try:
        yield
    finally:
        filters.remove(IGNORED)


class _Logging:
    """Counts who wants silence, since threads may leave it in another order than they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._count == 0:
                self._before = logging.root.manager.disable
                logging.disable(max(self._before, logging.WARNING))
            self._count += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                logging.disable(self._before)


_logging = _Logging()


@contextmanager
def without_messages() -> Iterator[None]:
    """Neither are those that are logged. Errors are raised as ever."""
    with _logging, without_warnings():
        yield
