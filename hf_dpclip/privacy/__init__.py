"""The trusted core: everything the privacy guarantee rests on, and nothing else.

Read in this order: `plan` (what is promised), `sampling` (who takes part in a step), `mechanism` (clip, add up, noise
once), `randomness` (where the random numbers come from), `secure_noise` (noise that withstands more), `accounting`
(what T steps cost), `statement` (what is written beside the weights). `docs/privacy.md` holds the theorem and its
proof. The core needs torch, numpy and dp_accounting only.
"""

from .mechanism import GaussianMechanism, clip_
from .plan import PrivacyPlan, PrivacySpent, Runs, composed
from .randomness import Randomness
from .sampling import PoissonSampler
from .secure_noise import SecureGaussianMechanism
from .statement import STATEMENT_NAME, PrivacyStatement


__all__ = [
    "STATEMENT_NAME",
    "GaussianMechanism",
    "PoissonSampler",
    "PrivacyPlan",
    "PrivacySpent",
    "PrivacyStatement",
    "Randomness",
    "Runs",
    "SecureGaussianMechanism",
    "clip_",
    "composed",
]
