"""The trusted core: everything the privacy guarantee rests on, and nothing else.

Read in this order: `plan` (what is promised), `sampling` (who takes part in a step), `mechanism` (clip, add up, noise
once), `reduction` (sums over several processes), `randomness` (where the random numbers come from), `secure_noise`
(noise that withstands floating-point attacks), `accounting` (what T steps cost), `statement` (what is written beside
the weights), `composition` (what several runs cost together) and `ledger` (the file that records them, whose lines are
those of `ledger_lines`). `docs/privacy.md` holds the theorem and its proof.

The core needs torch, numpy and dp_accounting only. Names are imported on first use, so that the command line can make
a plan without waiting for torch, which only sampling, the mechanism and its noise need.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # The same names for type checkers, which do not run `__getattr__`.
    from .composition import RunRecord as RunRecord
    from .composition import Total as Total
    from .composition import composed as composed
    from .composition import totals as totals
    from .ledger import LEDGER_NAME as LEDGER_NAME
    from .ledger import Ledger as Ledger
    from .ledger import RunRecorder as RunRecorder
    from .mechanism import GaussianMechanism as GaussianMechanism
    from .mechanism import clip_ as clip_
    from .plan import PrivacyPlan as PrivacyPlan
    from .plan import PrivacySpent as PrivacySpent
    from .randomness import Randomness as Randomness
    from .sampling import PoissonSampler as PoissonSampler
    from .secure_noise import SecureGaussianMechanism as SecureGaussianMechanism
    from .statement import STATEMENT_NAME as STATEMENT_NAME
    from .statement import PrivacyStatement as PrivacyStatement


_MODULE_OF = {
    "LEDGER_NAME": "ledger",
    "STATEMENT_NAME": "statement",
    "GaussianMechanism": "mechanism",
    "Ledger": "ledger",
    "PoissonSampler": "sampling",
    "PrivacyPlan": "plan",
    "PrivacySpent": "plan",
    "PrivacyStatement": "statement",
    "Randomness": "randomness",
    "RunRecord": "composition",
    "RunRecorder": "ledger",
    "SecureGaussianMechanism": "secure_noise",
    "Total": "composition",
    "clip_": "mechanism",
    "composed": "composition",
    "totals": "composition",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
