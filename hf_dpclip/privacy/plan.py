"""The contract of a run, fixed before its first step: sampler, noise and accounting are all derived from it."""

import dataclasses
import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from . import accounting


CLIPPINGS = ("flat", "automatic")
LARGEST_TARGET = 100
# A noise multiplier at which ε can be computed for every plan.
PLENTY_OF_NOISE = 1e6
# ε is then some hundred million; for much smaller noise multipliers, 1/σ² overflows.
SMALLEST_NOISE_MULTIPLIER = 1e-3


@dataclass(frozen=True)
class PrivacySpent:
    """What the steps taken so far cost: (ε, δ) under add-or-remove-one adjacency of one privacy unit."""

    epsilon: float
    delta: float
    steps: int


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything the guarantee depends on, frozen.

    Args:
        num_examples (`int`): n, the number of privacy units (records, unless records are grouped into units).
        expected_batch_size (`int`): B, the expected number of units in one step; a public constant.
        num_microbatches (`int`): K, the number of microbatches in one step; a public constant. K = B means one unit
            per microbatch by construction.
        num_steps (`int`): T, the number of optimizer steps.
        noise_multiplier (`float`): σ = noise standard deviation / `sensitivity`.
        max_grad_norm (`float`, *optional*, defaults to 1.0): C, the L2 bound on the gradient of one microbatch over
            all trainable parameters together.
        target_delta (`float`, *optional*, defaults to `n ** -1.1`): δ.
        accountant (`str`, *optional*, defaults to `"pld"`): `"pld"` or `"rdp"`.
        clipping (`str`, *optional*, defaults to `"flat"`): `"flat"`, g · min(1, C / ||g||), or `"automatic"`,
            g · C / (||g|| + γ).
        target_epsilon (`float`, *optional*): the ε that training must not exceed, if one was promised.
        privacy_unit (`str`, *optional*, defaults to `"record"`): `"record"`, or the column whose values are the units.
        non_private (`bool`, *optional*, defaults to `False`): must be set for a plan without noise.

    Raises `ValueError` for values that promise nothing: a batch larger than the dataset, δ >= 1/n, σ, C or ε that are
    not positive and finite.

    Formal guarantees:
        T steps of a mechanism that follows the plan are (ε, δ)-differentially private with ε = `epsilon(T)` for the
        addition or removal of one privacy unit: each is a Poisson-subsampled Gaussian of noise multiplier σ
        (`docs/privacy.md`, "The theorem").
    """

    num_examples: int
    expected_batch_size: int
    num_microbatches: int
    num_steps: int
    noise_multiplier: float
    max_grad_norm: float = 1.0
    # None becomes n ** -1.1 in `__post_init__`.
    target_delta: float = None  # type: ignore[assignment]
    accountant: str = "pld"
    clipping: str = "flat"
    target_epsilon: float | None = None
    privacy_unit: str = "record"
    non_private: bool = False

    def __post_init__(self):
        if self.target_delta is None and isinstance(self.num_examples, int):
            object.__setattr__(self, "target_delta", default_delta(self.num_examples))
        for name, possible, expected in self._requirements():
            _require(possible, name, getattr(self, name), expected)

    @classmethod
    def calibrate(cls, *, target_epsilon: float, **fields: Any) -> "PrivacyPlan":
        """The plan whose noise puts ε of all `num_steps` steps within [0.992, 1.0] of `target_epsilon`.

        Takes the same fields, less `noise_multiplier`. Raises `ValueError` as the plan itself does, and for a target
        that no noise multiplier reaches.
        """
        plan = cls(noise_multiplier=PLENTY_OF_NOISE, **fields)
        target = is_positive(target_epsilon) and target_epsilon <= LARGEST_TARGET
        expected = f"a positive number of at most {LARGEST_TARGET}, e.g. 3.0; beyond, no record is protected"
        _require(target, "target_epsilon", target_epsilon, expected)
        noise_multiplier = accounting.calibrate_noise_multiplier(
            target_epsilon, plan.target_delta, plan.sampling_probability, plan.num_steps, plan.accountant
        )
        return dataclasses.replace(plan, noise_multiplier=noise_multiplier, target_epsilon=target_epsilon)

    @property
    def sampling_probability(self) -> float:
        """q = B / n."""
        return self.expected_batch_size / self.num_examples

    @property
    def microbatch_size(self) -> float:
        """B / K."""
        return self.expected_batch_size / self.num_microbatches

    @property
    def one_unit_per_microbatch(self) -> bool:
        """Whether every sampled unit is a microbatch of its own (K = B)."""
        return self.num_microbatches == self.expected_batch_size

    @property
    def sensitivity(self) -> float:
        """Δ, the L2 change of the summed clipped gradients when one unit is added or removed.

        A unit changes the gradient of its whole microbatch, from one vector of norm C to another: 2C. Alone in its
        microbatch, it adds one vector of norm C to the sum: C.
        """
        return self.max_grad_norm if self.one_unit_per_microbatch else 2 * self.max_grad_norm

    @property
    def noise_std(self) -> float:
        """σΔ, the standard deviation of each coordinate of the noise on the summed clipped gradients."""
        return self.noise_multiplier * self.sensitivity

    def epsilon(self, steps: int | None = None) -> float:
        """ε at `target_delta` after `steps` steps (*optional*, defaults to all `num_steps`)."""
        steps = self.num_steps if steps is None else steps
        _require(is_whole(steps) and steps >= 0, "steps", steps, "0 or more")
        return accounting.epsilon(
            self.sampling_probability, self.noise_multiplier, steps, self.target_delta, self.accountant
        )

    def dp_event(self, steps: int | None = None):
        """The same as a `dp_accounting.DpEvent`, for an auditor's own accountant."""
        steps = self.num_steps if steps is None else steps
        return accounting.dp_event(self.sampling_probability, self.noise_multiplier, steps)

    def signal_to_noise(self, num_parameters: int) -> float:
        """Ceiling of one step's signal-to-noise ratio: the norm K·C of K aligned clipped gradients over the expected
        norm σΔ√d of the noise on d = `num_parameters` trainable parameters."""
        noise = self.noise_std * math.sqrt(num_parameters)
        return self.num_microbatches * self.max_grad_norm / noise if noise > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the values derived from them; JSON-serialisable."""
        return {**dataclasses.asdict(self), **self._derived(), "accountant_version": accountant_version()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PrivacyPlan":
        """Inverse of `to_dict`. Raises `ValueError` for missing or unknown entries and for derived ones that do not
        follow from the fields."""
        _require(isinstance(values, dict), "plan", values, "the dictionary that to_dict returns")
        names = {field.name for field in dataclasses.fields(cls)}
        missing = {*names, "accountant_version"} - values.keys()
        _require(not missing, "missing", sorted(missing), "a complete plan")
        plan = cls(**{name: values[name] for name in names})
        unknown = values.keys() - plan.to_dict().keys()
        _require(not unknown, "unknown", sorted(unknown), "only the entries that to_dict returns")
        for name, value in plan._derived().items():
            _require(values.get(name) == value, name, values.get(name), f"{value!r}, which follows from the fields")
        return plan

    def _derived(self) -> dict[str, Any]:
        return {
            "sampling_probability": self.sampling_probability,
            "microbatch_size": self.microbatch_size,
            "sensitivity": self.sensitivity,
            "noise_std": self.noise_std,
            "adjacency": "add_or_remove_one",
            "sampler": "poisson",
        }

    def _computable(self) -> bool:
        """Whether the plan's accountant can compute ε."""
        if self.noise_multiplier == 0:
            return True
        if self.accountant != "pld":
            return self.noise_multiplier >= SMALLEST_NOISE_MULTIPLIER
        loss = accounting.typical_loss(self.sampling_probability, self.noise_multiplier, self.num_steps)
        return loss <= accounting.LARGEST_LOSS

    def _requirements(self):
        """Yields (field, whether its value is possible, what was expected). Each check may rely on those before it."""
        for name in ("num_examples", "expected_batch_size", "num_microbatches", "num_steps"):
            value = getattr(self, name)
            yield name, is_whole(value) and value >= 1, "a whole number of at least 1"
        n, batch = self.num_examples, self.expected_batch_size
        yield "expected_batch_size", batch <= n, f"at most the {n} privacy units of the dataset; lower the batch size"
        yield "num_microbatches", self.num_microbatches <= batch, f"at most expected_batch_size={batch}, one unit each"
        delta = is_positive(self.target_delta) and self.target_delta < 1 / n
        left_out = (
            "left out, it is n**-1.1" if n > 1 else "train on at least 2 privacy units, since δ of one alone is 1"
        )
        yield "target_delta", delta, f"positive and below 1/n = {1 / n:.3g}; {left_out}"
        # Below 1e-6, float32 squares of coordinates that matter would vanish from the norm. Beyond 1e30, the sum of
        # gradients that automatic clipping scales up to C could leave float32, which no noise would hide.
        bound = is_positive(self.max_grad_norm) and 1e-6 <= self.max_grad_norm <= 1e30
        yield "max_grad_norm", bound, "a finite number of at least 1e-6 and at most 1e30, e.g. 1.0"
        noise = is_positive(self.noise_multiplier) or (self.noise_multiplier == 0 and self.non_private)
        yield "noise_multiplier", noise, "a positive, finite number (0 only with non_private=True)"
        target = self.target_epsilon is None or is_positive(self.target_epsilon)
        yield "target_epsilon", target, "a positive, finite number, e.g. 3.0"
        yield "accountant", self.accountant in accounting.ACCOUNTANTS, " or ".join(accounting.ACCOUNTANTS)
        smallest = accounting.smallest_pld_delta(self.num_steps)
        expected = (
            f"rdp for a target_delta below {smallest:g} with {self.num_steps} steps, where rounding falsifies pld"
        )
        yield "accountant", self.accountant != "pld" or self.target_delta >= smallest, expected
        expected = "more, e.g. 1.0: so little noise protects no record (non_private=True trains without any)"
        yield "noise_multiplier", self._computable(), expected
        yield "clipping", self.clipping in CLIPPINGS, " or ".join(CLIPPINGS)
        named = isinstance(self.privacy_unit, str) and self.privacy_unit.isprintable() and "|" not in self.privacy_unit
        yield "privacy_unit", named, "a name that a table can show, without line breaks and vertical bars"


def finite_or_none(epsilon: float) -> float | None:
    """`None` for an infinite ε, which JSON cannot hold."""
    return epsilon if math.isfinite(epsilon) else None


def default_delta(num_examples: int) -> float:
    """δ = n^-1.1, below 1/n, at which publishing one random record in full would count as private."""
    return max(num_examples, 1) ** -1.1


def accountant_version() -> str:
    """Name and version of the library that computes ε."""
    return f"dp-accounting {version('dp-accounting')}"


def is_whole(number: Any) -> bool:
    """Whether it is a whole number, which `True` is not, although it is an `int`."""
    return isinstance(number, int) and not isinstance(number, bool)


def is_positive(number: Any) -> bool:
    """Whether it is a positive, finite number, which `True` is not."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf


def _require(condition: bool, name: str, value: Any, expected: str):
    if not condition:
        raise ValueError(f"{name}={value!r} is not possible: expected {expected}.")
