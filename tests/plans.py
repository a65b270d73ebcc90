"""Privacy plans for tests that need no model."""

from functools import partial

from hf_dpclip import PrivacyPlan


SIZES = {"num_examples": 1000, "expected_batch_size": 100, "num_microbatches": 10, "num_steps": 20}
# q = 0.1.
plan = partial(PrivacyPlan, **SIZES, noise_multiplier=1.25, target_delta=1e-5)

# For a mechanism or a sampler by itself.
one_step_plan = partial(
    PrivacyPlan, num_examples=1000, expected_batch_size=16, num_microbatches=4, num_steps=1, noise_multiplier=1.0
)
noiseless_plan = partial(one_step_plan, noise_multiplier=0.0, non_private=True)
