"""Attacks on the mechanism: empirical lower bounds on ε, to be compared with the claim.

`bounds` turns guesses into lower bounds on ε, `game` plays the distinguishing game with the real trainer, `mistakes`
has what published code gets wrong, `zoo` pairs each mistake with the game that exposes it, `one_run` audits a whole
run with canaries, `fine_tune` is such a run, and `small_clip` a model for it that needs no files.
`docs/auditing.md` says what a result means.
"""

from .game import StepAudit, audit_step
from .zoo import MECHANISMS, find_mechanism


__all__ = ["MECHANISMS", "StepAudit", "audit_step", "find_mechanism"]
