"""Noise that neither floating-point arithmetic nor a statistical generator gives away (`secure_noise=True`).

What is published are floating-point numbers, and which of them a sum can reach with its noise depends on the sum: an
adversary who knows two candidates for it may find that only one of them can have led to the observed value. (Mironov,
On significance of the least significant bits for differential privacy, 2012; Jin, McMurtry, Rubinstein and Ohrimenko,
Are we there yet? Timing and floating-point attacks on differential privacy systems, 2022.) The remedy here is a grid:
only multiples of a public number are released, and every sum can reach each of them.
"""

import math
import os

import torch
from torch import Tensor

from .mechanism import NOISE_CHUNK, GaussianMechanism
from .plan import PrivacyPlan
from .reduction import reduce_scatter


# Grid points in one standard deviation of the noise, at least. Rounding to them adds at most 10^-7 of its variance.
POINTS_PER_DEVIATION = 2**10
# Binary digits of a float64, and of the uniform numbers behind each normal.
DIGITS = 53


class SecureGaussianMechanism(GaussianMechanism):
    """[`GaussianMechanism`] with noise from the operating system's cryptographic generator, on a public grid.

    Args:
        plan, parameters, generators, process, num_processes: as in [`GaussianMechanism`]. The generators are not used.

    Formal guarantees:
        Every coordinate of the noisy sum is a multiple of `grid_width(plan)`, a function of the plan: the possible
        releases are the same whatever the records. Given real numbers, sum and noise, rounding to the nearest multiple
        is post-processing, so sensitivity, σ and ε are those of [`GaussianMechanism`]. Float64 only approximates real
        numbers: the probability of a grid point near the centre is off by a relative error of the order of 2^-40.
    """

    def _noised_and_reduced(self, sums: list[Tensor]) -> list[Tensor]:
        """Adds noise after the sums are added up: sums rounded to the grid before would leave it when those of other
        processes are added."""
        return self._noised_and_gathered(reduce_scatter(sums, self.num_processes), sums)

    def _add_noise_(self, tensors: list[Tensor]) -> None:
        """Adds an independent draw from N(0, (σΔ)²) to every coordinate and rounds to the grid."""
        pieces = [piece for tensor in tensors for piece in tensor.view(-1).split(NOISE_CHUNK)]
        list(self._noise_threads.map(self._add_noise_to_piece_, pieces))

    def _add_noise_to_piece_(self, piece: Tensor) -> None:
        # On the CPU: not every accelerator has float64.
        noisy = piece.cpu().double().add_(standard_normals(len(piece)), alpha=self.plan.noise_std)
        width = grid_width(self.plan)
        piece.copy_(noisy.div_(width).round_().mul_(width))


def grid_width(plan: PrivacyPlan) -> float:
    """The largest power of two, by which division is exact, that fits `POINTS_PER_DEVIATION` times into the standard
    deviation of the noise."""
    return 2.0 ** math.floor(math.log2(plan.noise_std / POINTS_PER_DEVIATION))


def standard_normals(count: int) -> Tensor:
    """`[count]` independent draws from N(0, 1) in float64, from bits of the operating system.

    By the transform of Box and Muller (1958): a radius of up to 8.57 and an angle, from 53 random bits each, make two
    draws.
    """
    pairs = (count + 1) // 2
    bits = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64)
    uniform = bits.bitwise_and_(2**DIGITS - 1).double().mul_(2.0**-DIGITS)
    # The logarithm of 1 - u, since u may be 0 but not 1.
    radius = uniform[:pairs].neg().log1p_().mul_(-2).sqrt_()
    angle = uniform[pairs:].mul_(2 * math.pi)
    return torch.cat([angle.cos() * radius, angle.sin() * radius])[:count]
