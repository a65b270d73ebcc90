"""Products of the factors of weight gradients, and their norms: float32 or wider, whatever the factors' dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor


# Columns (such as the rank r of LoRA) below which CPUs multiply up to three times as fast with this factor on the
# left, which is worth transposing the product.
THIN = 32
# Rows of a Gram matrix that are computed at a time, each only up to the diagonal.
GRAM_BLOCK = 128
ACCELERATOR_GRAM_BLOCK = 1024
# Elements of one weight matrix's gradients that an accelerator holds at a time to measure them: 256 MiB.
PRODUCT_ELEMENTS = 2**26
# Elements of all such gradients up to which multiplying them out, which writes and reads up to a GiB, takes less time
# than launching some thirty operations on Gram matrices.
SOONER_MULTIPLIED_OUT = 2**27
# Whether torch can multiply bfloat16 matrices into float32: since 2.8, on Nvidia GPUs.
NARROW_TO_FLOAT32 = torch.version.hip is None and "dtype" in torch.ops.aten.bmm.overloads()


def product(a: Tensor, b: Tensor) -> Tensor:
    """bᵀa of each pair of matrices `[K, rows, d]` and `[K, rows, p]`, float32."""
    if _is_thin(a):
        return _matmul(a.transpose(1, 2), b).transpose(1, 2)
    return _matmul(b.transpose(1, 2), a)


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """The result of `product`, written into existing memory."""
    if _is_thin(a) or _in_tensor_cores(a, b):
        out.copy_(product(a, b))
    else:
        torch.bmm(b.float().transpose(1, 2), a.float(), out=out)


def weighted_product(a: Tensor, b: Tensor, factors: Tensor, total: Tensor | None) -> Tensor:
    """bᵀ diag(factors) a of matrices `[rows, d]` and `[rows, p]`, float32, [`added`] to the total."""
    # Scale the matrix with fewer columns.
    to_b = b.shape[1] <= a.shape[1]
    scaled = (b if to_b else a).float() * factors[:, None]
    if not _in_tensor_cores(a, b):
        left, right = (scaled, a.float()) if to_b else (b.float(), scaled)
        return left.T @ right if total is None else total.addmm_(left.T, right)
    pairs = ((part, a) if to_b else (b, part) for part in _narrow_parts(scaled))
    return added(total, sum(_matmul(left.T[None], right[None])[0] for left, right in pairs))


def added(total: Tensor | None, tensor: Tensor) -> Tensor:
    """Their sum, in the memory of `total` if there is one, and else of `tensor`."""
    return tensor if total is None else total.add_(tensor)


def squared_norms_of_matrices(matrices: Tensor) -> Tensor:
    """`[K, rows, d]` to `[K]`, in float64."""
    of_rows = torch.linalg.vector_norm(matrices, dim=-1)
    return torch.linalg.vector_norm(of_rows, dim=-1, dtype=torch.float64).square()


def squared_norms_of_products(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """‖bᵀa‖² of each pair of matrices `[K, rows, d]` and `[K, rows, p]`, in float64: of all pairs, a few at a time."""
    if _are_better_multiplied_out(a, b):
        return map(squared_norms_of_matrices, _products(a, b))
    return iter([_squared_norms_from_gram_matrices(a, b)])


def _are_better_multiplied_out(a: Tensor, b: Tensor) -> bool:
    """Whether that takes fewer multiplications than Gram matrices, or less time to launch on an accelerator."""
    (count, rows, d), p = a.shape, b.shape[2]
    limit = 0 if a.device.type == "cpu" else SOONER_MULTIPLIED_OUT
    return rows * (d + p) >= d * p or count * d * p <= limit


def _squared_norms_from_gram_matrices(a: Tensor, b: Tensor) -> Tensor:
    rows, d, p = a.shape[1], a.shape[2], b.shape[2]
    # ‖bᵀa‖² = Σ over pairs of rows of (aaᵀ)(bbᵀ), symmetric: pairs with rows before a block's count twice.
    squares = magnitudes = vanished = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    block = GRAM_BLOCK if a.device.type == "cpu" else ACCELERATOR_GRAM_BLOCK
    for start in range(0, rows, block):
        end = start + block
        of_a, of_b = (_matmul(each[:, start:end], each[:, :end].transpose(1, 2)) for each in (a, b))
        for number, products in ((p, of_a), (d, of_b)):
            vanished = vanished + number * rows * products.diagonal(start, 1, 2).sum(dim=1).double()
        pairs = of_a.mul_(of_b)
        pairs[:, :, :start] *= 2
        squares = squares + pairs.sum(dim=2).double().sum(dim=1)
        magnitudes = magnitudes + pairs.abs_().sum(dim=2).double().sum(dim=1)
    # A norm that is too small would leave a gradient longer than C. So what may be missing is added: about as much as
    # rounding takes away where large terms cancel, and what float32 cannot hold where factors differ much in size.
    float32 = torch.finfo(torch.float32)
    return squares.clamp(min=0) + 2 * float32.eps * magnitudes + float32.tiny * (vanished + rows**2)


def _narrow_parts(x: Tensor) -> Iterator[Tensor]:
    """Three bfloat16 tensors, of 8 binary digits each, that add up to a float32 one of 24, exactly."""
    for _ in range(3):
        part = x.bfloat16()
        yield part
        x = x - part


def _is_thin(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.shape[2] < THIN


def _products(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The results of `product`, a few at a time."""
    size = _at_once(a, b)
    if size == 1:
        return ((y.float().T @ x.float())[None] for x, y in zip(a, b))
    return (product(x, y) for x, y in zip(a.split(size), b.split(size)))


def _at_once(a: Tensor, b: Tensor) -> int:
    """How many products are made at a time: all together could be larger than everything else."""
    return 1 if a.device.type == "cpu" else max(1, PRODUCT_ELEMENTS // (a.shape[2] * b.shape[2]))


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """The product of each pair, as exact as in float32, which holds any product of two bfloat16 numbers exactly."""
    return torch.bmm(x, y, out_dtype=torch.float32) if _in_tensor_cores(x, y) else torch.bmm(x.float(), y.float())


def _in_tensor_cores(x: Tensor, y: Tensor) -> bool:
    """Whether a GPU can multiply the two in bfloat16 and add up in float32, ten times as fast as in float32."""
    return x.dtype == y.dtype == torch.bfloat16 and x.device.type == "cuda" and NARROW_TO_FLOAT32
