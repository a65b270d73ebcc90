"""What a tokenizer remembers of how it was called last, and writes into its files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerFast

from .collators import tokenizer_of


# How tokenizers pad and cut: as a first trainer was given them.
_as_given: "WeakKeyDictionary[PreTrainedTokenizerFast, tuple[dict | None, dict | None]]" = WeakKeyDictionary()


class TokenizerState:
    """How the tokenizer of a processor padded and cut texts when the first trainer of this process was given it.

    Where the longest text of a batch decides how it is called, its files would tell how long private texts are.

    Args:
        processor: a processor, a tokenizer, or anything else, of which nothing is remembered.
    """

    def __init__(self, processor: Any):
        tokenizer = tokenizer_of(processor)
        # Others than fast tokenizers remember nothing.
        self._backend = tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None
        self._settings = self._current()
        if self._backend is not None:
            self._settings = _as_given.setdefault(tokenizer, self._settings)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the tokenizer is as it was."""
        now = self._current()
        self._set(self._settings)
        try:
            yield
        finally:
            self._set(now)

    def _current(self) -> tuple[dict | None, dict | None]:
        return (None, None) if self._backend is None else (self._backend.truncation, self._backend.padding)

    def _set(self, settings: tuple[dict | None, dict | None]) -> None:
        if self._backend is None:
            return
        truncation, padding = settings
        self._backend.no_truncation()
        self._backend.no_padding()
        if truncation is not None:
            self._backend.enable_truncation(**truncation)
        if padding is not None:
            self._backend.enable_padding(**padding)
