"""Clip the gradient of each microbatch, add up, noise once: the Gaussian mechanism of one optimizer step."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from .plan import PrivacyPlan
from .randomness import CPU_STREAMS
from .reduction import all_gather_, all_reduce_, flat_chunks, reduce_scatter


# γ of automatic clipping: small gradients are scaled up to almost C, those far below γ stay small.
AUTOMATIC_CLIPPING_GAMMA = 0.01

# torch's float32 normals never exceed 5.77 standard deviations; the sum of two reaches 8.16, beyond which a Gaussian
# goes once in 10^15 draws.
DRAWS_PER_COORDINATE = 2
# Coordinates that are noised at a time on a CPU: few enough to fit into its cache, and for torch not to start threads
# within each of ours, which would slow down everything after.
NOISE_CHUNK = 2**14
# The same on an accelerator, where each chunk costs a kernel launch, and memory.
ACCELERATOR_NOISE_CHUNK = 2**24
# Coordinates whose squares a CPU adds up in float32, before these sums are added up in float64.
NORM_ROW = 2**12


def clip_(gradients: list[Tensor], plan: PrivacyPlan) -> bool:
    """Scale the gradient of one microbatch, in place, so that its norm over all tensors together is at most C.

    Returns `False` for a gradient that is not finite, or too large to be scaled down in float32. Such a gradient
    counts as zero: the caller drops it.

    Formal guarantees:
        The contribution of a microbatch has L2 norm at most C = `plan.max_grad_norm` (up to float32 rounding),
        whatever the data, the loss and the model.
    """
    return _scale_(gradients, clip_factors(_norm(gradients), plan))


def clip_factors(norms: Tensor, plan: PrivacyPlan) -> Tensor:
    """The factors by which gradients of these norms are multiplied: 0 for a norm that is not finite, or so large that
    the factor is subnormal in float32, whose fewer digits could round the product up beyond C; positive for others.

    Formal guarantees:
        factor · norm ≤ C = `plan.max_grad_norm`.
    """
    if plan.clipping == "automatic":
        factors = plan.max_grad_norm / (norms + AUTOMATIC_CLIPPING_GAMMA)
    else:
        factors = plan.max_grad_norm / norms.clamp(min=plan.max_grad_norm)
    return factors.where(torch.isfinite(norms) & (factors >= torch.finfo(torch.float32).tiny), 0)


class GaussianMechanism:
    """The noisy sum of clipped microbatch gradients.

    ```python
    for microbatch in microbatches:
        with mechanism.microbatch():
            loss(microbatch).backward()
    mechanism.release()
    optimizer.step()
    ```

    Gradients leave `Parameter.grad` at the end of each `microbatch` and come back, noised, at `release`. An optimizer
    step that is not preceded by a release therefore finds no gradient: forgetting the noise cannot leak anything.

    Args:
        plan ([`PrivacyPlan`]): gives C, K and the standard deviation σΔ.
        parameters (iterable of `Parameter`): all trainable parameters.
        generators (`list[torch.Generator]`): this process's noise streams.
        process, num_processes (`int`): rank and world size. The sums of all processes are added up, once per release.

    Formal guarantees:
        `release` is a Gaussian mechanism of noise multiplier σ: the sum over all processes has sensitivity Δ =
        `plan.sensitivity`, since one unit is in one microbatch, and every coordinate receives exactly one draw from
        N(0, (σΔ)²), from one process, in float32. Dividing by the public constant K is post-processing.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        parameters: Iterable[Parameter],
        generators: list[torch.Generator],
        process: int = 0,
        num_processes: int = 1,
    ):
        self.plan = plan
        self.parameters = list(parameters)
        self.generators = generators
        self.process = process
        self.num_processes = num_processes
        self._sum: list[Tensor | None] = [None] * len(self.parameters)
        # The sum of microbatches that span the processes, of which each process keeps its own slices; and memory for
        # the slices of all, which is reused, since touching new memory takes longer than filling it.
        self._slices_of_sum: list[Tensor] | None = None
        self._gathered: list[Tensor] = []
        self._noise_threads = ThreadPoolExecutor(CPU_STREAMS)

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Clips the gradient that is computed inside and adds it to the sum. An exception inside adds nothing."""
        self._take_gradients()
        yield
        gradients = self._take_gradients()
        present = [gradient for gradient in gradients if gradient is not None]
        if present and clip_(present, self.plan):
            self._sum = [_add(total, gradient) for total, gradient in zip(self._sum, gradients)]

    def add(
        self, norms: Tensor, weighted_sum: Callable[[Tensor, list[Tensor | None]], Iterable[Tensor | None]]
    ) -> None:
        """Clips the gradients g_1 .. g_k of several microbatches and adds them to the sum, given only:

        Args:
            norms (`Tensor` of shape `[k]`): the norm of each g_j over all parameters together.
            weighted_sum (`Callable`): from k factors f and a total for each parameter to the totals plus
                Σ_j f_j · g_j, in place or not, float32. A total is `None` as long as nothing was added to it. A factor
                of 0 leaves its microbatch out even if g_j is not finite.

        Formal guarantees:
            The contribution of each microbatch has L2 norm at most C, provided that `norms` and `weighted_sum` are
            what they are said to be and that g_j depends on the records of microbatch j only.
        """
        totals = weighted_sum(clip_factors(norms, self.plan), self._sum)
        self._sum = [total for _, total in zip(self.parameters, totals, strict=True)]

    @contextmanager
    def spanning_microbatch(self) -> Iterator[None]:
        """As `microbatch`, but every process computes a part of the same microbatch's gradient inside: the parts are
        added up over the processes, and their sum is clipped. Between two releases, either all microbatches span the
        processes or none does."""
        self._take_gradients()
        self._gathered = []
        yield
        gradients = [_zeros(p) if g is None else g for p, g in zip(self.parameters, self._take_gradients())]
        own = reduce_scatter(gradients, self.num_processes)
        self._gathered = gradients
        square = _norm(own).square()
        torch.distributed.all_reduce(square)
        if not _scale_(own, clip_factors(square.sqrt(), self.plan)):
            torch._foreach_zero_(own)
        if self._slices_of_sum is None:
            self._slices_of_sum = own
        else:
            torch._foreach_add_(self._slices_of_sum, own)

    def release(self) -> None:
        """Sets every `Parameter.grad` to (sum of clipped gradients over all processes + noise) / K.

        Called once per optimizer step, even if no unit was drawn: the release is then pure noise, which must look like
        any other.

        Raises `RuntimeError` if some microbatches spanned the processes and others did not.
        """
        sums = self._noised_sums()
        torch._foreach_div_(sums, self.plan.num_microbatches)
        for parameter, total in zip(self.parameters, sums):
            parameter.grad = total.to(parameter.dtype)

    def _noised_sums(self) -> list[Tensor]:
        own, self._slices_of_sum = self._slices_of_sum, None
        memory, self._gathered = self._gathered, []
        if own is not None:
            if any(total is not None for total in self._sum):
                raise RuntimeError("a release cannot hold both microbatches that span the processes and others")
            return self._noised_and_gathered(own, memory)
        sums = [_zeros(p) if total is None else total for p, total in zip(self.parameters, self._sum)]
        self._sum = [None] * len(self.parameters)
        if self.num_processes > 1:
            return self._noised_and_reduced(sums)
        self._add_noise_(sums)
        return sums

    def _noised_and_reduced(self, sums: list[Tensor]) -> list[Tensor]:
        """The sums over all processes. Each process first adds the noise of its own slice of each tensor."""
        self._add_noise_([total.view(-1).tensor_split(self.num_processes)[self.process] for total in sums])
        all_reduce_(sums)
        return sums

    def _noised_and_gathered(self, own: list[Tensor], memory: list[Tensor]) -> list[Tensor]:
        """The slices of all processes, gathered in `memory`. Each process first adds noise to its own."""
        self._add_noise_(own)
        all_gather_(memory, own, self.num_processes)
        return memory

    def _add_noise_(self, tensors: list[Tensor]) -> None:
        """Adds an independent draw from N(0, (σΔ)²) to every coordinate. Each stream serves a share of them."""
        chunks = flat_chunks(tensors, NOISE_CHUNK if tensors[0].device.type == "cpu" else ACCELERATOR_NOISE_CHUNK)
        if len(self.generators) == 1 or len(chunks) <= len(self.generators):
            # Threads would take longer, and on a GPU they would leave the CUDA stream of the rest of the step.
            return self._add_share_of_noise_(chunks, self.generators[0])
        shares = [chunks[stream :: len(self.generators)] for stream in range(len(self.generators))]
        list(self._noise_threads.map(self._add_share_of_noise_, shares, self.generators))

    def _add_share_of_noise_(self, chunks: list[list[Tensor]], generator: torch.Generator) -> None:
        std = self.plan.noise_std / math.sqrt(DRAWS_PER_COORDINATE)
        for pieces in chunks:
            sizes = [len(piece) for piece in pieces]
            draws = torch.empty(sum(sizes), dtype=torch.float32, device=generator.device)
            for _ in range(DRAWS_PER_COORDINATE):
                torch._foreach_add_(pieces, draws.normal_(0, std, generator=generator).split(sizes))

    def _take_gradients(self) -> list[Tensor | None]:
        """Detaches the gradients from their parameters, in float32 whatever the parameters' dtype."""
        gradients = [None if p.grad is None else p.grad.float().contiguous() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


def _scale_(gradients: list[Tensor], factor: Tensor) -> bool:
    """Multiplies in place. Returns `False`, and does nothing, for the factor 0 of a gradient that is not finite."""
    # Waits for the device, hence asked once.
    number = factor.item()
    if number == 0:
        return False
    if number != 1:
        torch._foreach_mul_(gradients, number)
    return True


def _norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over all tensors together, to 1e-5 or better.

    Float32 sums of millions of squares are too small: clipped by such a norm, a gradient could exceed C by percents.
    """
    if gradients[0].device.type != "cpu":
        # Accelerators add up in trees, in which errors stay small.
        return get_total_norm(gradients).double()
    norms = []
    for gradient in gradients:
        flat = gradient.flatten()
        rows = flat[: flat.numel() // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
        rest = flat[rows.numel() :].view(1, -1)
        norms += [torch.linalg.vector_norm(part, dim=1) for part in (rows, rest)]
    return torch.cat(norms).double().norm()


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The first gradient becomes the sum itself, so that one microbatch per step needs no second copy."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)


def _zeros(parameter: Parameter) -> Tensor:
    # Contiguous, whatever the layout of the parameter.
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
