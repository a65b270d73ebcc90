"""Attacks on the mechanism: empirical lower bounds on ε, to be held against what is claimed.

`bounds` turns guesses into lower bounds on ε, `game` plays the distinguishing game through the real trainer,
`mistakes` holds what published code gets wrong, `zoo` names each mistake with the game that convicts it, `one_run`
audits a whole run by canaries, and `fine_tune` is such a run, for which `small_clip` needs no files.
`docs/auditing.md` says what a result means.
"""

from .game import StepAudit, audit_step
from .zoo import MECHANISMS, find_mechanism


__all__ = ["MECHANISMS", "StepAudit", "audit_step", "find_mechanism"]
