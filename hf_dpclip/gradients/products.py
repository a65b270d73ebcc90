"""Products of the factors of weight gradients, and their norms: in float32 or better, whatever the factors are in."""

from collections.abc import Iterator

import torch
from torch import Tensor


# Columns (rank r of LoRA) below which CPUs multiply up to three times as fast if they are on the left, which pays for
# turning the product round.
THIN = 32
# Rows of a Gram matrix that are computed at a time, up to the diagonal.
GRAM_BLOCK = 128
ACCELERATOR_GRAM_BLOCK = 1024
# Elements of one weight matrix's gradients that an accelerator holds at a time to measure them: 256 MiB.
PRODUCT_ELEMENTS = 2**26
# Elements of such gradients up to which it makes and measures all of them, for which it writes and reads a GiB, sooner
# than Python starts some thirty operations on Gram matrices.
SOONER_MULTIPLIED_OUT = 2**27
# Whether torch can give products of bfloat16 in float32: since 2.8, on Nvidia's GPUs.
NARROW_TO_FLOAT32 = torch.version.hip is None and "dtype" in torch.ops.aten.bmm.overloads()


def product(a: Tensor, b: Tensor) -> Tensor:
    """bᵀa of each pair of matrices `[K, rows, d]` and `[K, rows, p]`, float32."""
    if _is_thin(a):
        return _matmul(a.transpose(1, 2), b).transpose(1, 2)
    return _matmul(b.transpose(1, 2), a)


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """What `product` gives, in memory that is there already."""
    if _is_thin(a) or _in_tensor_cores(a, b):
        out.copy_(product(a, b))
    else:
        torch.bmm(b.float().transpose(1, 2), a.float(), out=out)


def weighted_product(a: Tensor, b: Tensor, factors: Tensor, total: Tensor | None) -> Tensor:
    """bᵀ diag(factors) a of matrices `[rows, d]` and `[rows, p]`, float32, [`added`] to the total."""
    # The factors go to the one with fewer columns.
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
    """Whether that takes fewer multiplications than Gram matrices, or an accelerator less time to start."""
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
    # Where large terms cancel, what rounding may have taken away is added, and what is too small for float32 where the
    # factors are of very different sizes: a norm that is too small would leave a gradient longer than C.
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
    """What `product` gives, a few at a time."""
    size = _at_once(a, b)
    if size == 1:
        return ((y.float().T @ x.float())[None] for x, y in zip(a, b))
    return (product(x, y) for x, y in zip(a.split(size), b.split(size)))


def _at_once(a: Tensor, b: Tensor) -> int:
    """How many products are made at a time: all together could be larger than everything else."""
    return 1 if a.device.type == "cpu" else max(1, PRODUCT_ELEMENTS // (a.shape[2] * b.shape[2]))


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """Of each pair of matrices, float32 as if the factors were, which a product of two narrow numbers fits into."""
    return torch.bmm(x, y, out_dtype=torch.float32) if _in_tensor_cores(x, y) else torch.bmm(x.float(), y.float())


def _in_tensor_cores(x: Tensor, y: Tensor) -> bool:
    """Whether a GPU can multiply the two as they are and add up in float32, ten times as fast as float32."""
    return x.dtype == y.dtype == torch.bfloat16 and x.device.type == "cuda" and NARROW_TO_FLOAT32
