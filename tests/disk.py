"""A disk that fills up."""

import resource
from contextlib import contextmanager


@contextmanager
def room_for(size: int):
    """No file can grow beyond `size` bytes inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
