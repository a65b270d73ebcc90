"""How the gradient of one microbatch is computed. Knows models, knows nothing of privacy."""

from .plain import accumulate_gradient


__all__ = ["accumulate_gradient"]
