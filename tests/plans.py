"""A privacy plan for tests that need no model."""

from hf_dpclip import PrivacyPlan


def plan(**changes) -> PrivacyPlan:
    """20 steps of q = 0.1 and σ = 1.25 at δ = 1e-5."""
    fields = {
        "num_examples": 1000,
        "expected_batch_size": 100,
        "num_microbatches": 10,
        "num_steps": 20,
        "noise_multiplier": 1.25,
        "target_delta": 1e-5,
    }
    return PrivacyPlan(**{**fields, **changes})
