"""The gradients of many microbatches with respect to one parameter, in forms that give norms and weighted sums.

`weighted_sum(factors, some_are_zero, total)` returns total + Σ_k factors[k] · gradient k, computed in the memory of
`total` if there is one: touching new memory would take longer than adding. A factor of zero leaves a microbatch out
even if its gradient is not finite. `some_are_zero` is passed in, since finding out takes a wait for the device, which
once for all parameters is enough.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout
from .products import multiply_into, product, squared_norms_of_matrices, squared_norms_of_products, weighted_product


# Gradients of one parameter with up to so many elements share a tensor with others: copying them costs less than
# operations of their own, which take longer to launch on an accelerator.
SMALL = 2**16
ACCELERATOR_SMALL = 2**22
# Products whose factors have up to so many elements are batched on an accelerator, where copying the factors takes
# less time than launching each product; and elements that are copied at a time, half a GiB in bfloat16.
WAITING = 2**25
SIDE_BY_SIDE = 2**28
# Elements of small gradients whose squares are added up in float32.
JOINED_ROW = 2**12


@dataclass(eq=False, repr=False)
class Dense:
    """Each gradient by itself.

    Args:
        gradients (`Tensor` of shape `[K, *parameter]`): float32.
    """

    gradients: Tensor

    @property
    def is_small(self) -> bool:
        """Whether it is faster to join them with others, in [`Joined`]."""
        limit = SMALL if self.gradients.device.type == "cpu" else ACCELERATOR_SMALL
        return self.gradients.numel() <= limit

    def squared_norms(self) -> Tensor:
        """`[K]`, float64. In float32 only single rows are added up: sums of millions of squares would be too small."""
        row = self.gradients.shape[-1] if self.gradients.dim() > 1 else 1
        return squared_norms_of_matrices(self.gradients.reshape(len(self.gradients), -1, row))

    def weighted_sum(self, factors: Tensor, some_are_zero: bool, total: Tensor | None = None) -> Tensor:
        """In the shape of the parameter."""
        gradients = self.gradients
        if some_are_zero:
            gradients, factors = gradients[factors != 0], factors[factors != 0]
        if total is None:
            return torch.tensordot(factors, gradients, dims=1)
        total.view(-1).addmv_(gradients.reshape(len(gradients), total.numel()).T, factors)
        return total

    def dense(self) -> Tensor:
        """`[K, *parameter]`."""
        return self.gradients


class Joined:
    """Small gradients of many parameters side by side in one tensor, so that one operation handles all of them.

    Args:
        gradients (`dict[int, Dense]`): at least one, by any keys.
    """

    def __init__(self, gradients: dict[int, Dense]):
        rows = [each.gradients.reshape(len(each.gradients), -1) for each in gradients.values()]
        self._sizes = dict(zip(gradients, [each.shape[1] for each in rows]))
        padding = rows[0].new_zeros(len(rows[0]), -sum(self._sizes.values()) % JOINED_ROW)
        self._rows = Dense(torch.cat([*rows, padding], dim=1).unflatten(1, (-1, JOINED_ROW)))

    def squared_norms(self) -> Tensor:
        """`[K]`, float64, over all these parameters together."""
        return self._rows.squared_norms()

    def weighted_sums(self, factors: Tensor, some_are_zero: bool) -> dict[int, Tensor]:
        """The weighted sum of each parameter, flat, by the same keys."""
        sizes = list(self._sizes.values())
        total = self._rows.weighted_sum(factors, some_are_zero).flatten()
        return dict(zip(self._sizes, total[: sum(sizes)].split(sizes)))


class Outer:
    """The gradients of a weight matrix, kept as factors of outer products: gradient k = Σ over its rows of b aᵀ.

    Args:
        activations (`Tensor` of shape `[N, T, d]`): a, the inputs of the layer.
        output_gradients (`Tensor` of shape `[N, T, p]`): b, the gradient of the loss with respect to its outputs.
        layout ([`Layout`]): which rows belong to which microbatch.

    References: Goodfellow, Efficient Per-Example Gradient Computations (2015) and Li et al., Large Language Models Can
    Be Strong Differentially Private Learners (2022) for norms from Gram matrices; Bu et al., Differentially Private
    Optimization on Large Model at Small Cost (2023) for weighted sums from the same tensors.
    """

    def __init__(self, activations: Tensor, output_gradients: Tensor, layout: Layout):
        self.activations = activations.detach()
        self.output_gradients = output_gradients
        self.layout = layout

    def squared_norms(self) -> Tensor:
        """`[K]`, float64, computed for each group of microbatches in the faster way."""
        groups = zip(self.layout.matrices(self.activations), self.layout.matrices(self.output_gradients))
        return torch.cat([squares for a, b in groups for squares in squared_norms_of_products(a, b)])

    def weighted_sum(self, factors: Tensor, some_are_zero: bool, total: Tensor | None = None) -> Tensor:
        """`[p, d]`, or in the shape of the total: one product over all rows."""
        of_row = factors[self.layout.microbatch_of_row]
        a, b = self.activations[: self.layout.num_owned], self.output_gradients[: self.layout.num_owned]
        if some_are_zero:
            a, b, of_row = a[of_row != 0], b[of_row != 0], of_row[of_row != 0]
        matrix = None if total is None else total.view(b.shape[-1], a.shape[-1])
        return weighted_product(a.flatten(0, 1), b.flatten(0, 1), of_row.repeat_interleave(a.shape[1]), matrix)

    @property
    def num_factors(self) -> int:
        """Elements of both factors."""
        return self.activations.numel() + self.output_gradients.numel()

    @property
    def small_by_row(self) -> bool:
        """Whether the products of single rows take no more memory than their factors: then one batched multiplication
        makes them all, and a sum over rows the gradients."""
        num_rows, _, d = self.activations.shape
        return num_rows * d * self.output_gradients.shape[2] <= self.num_factors

    @property
    def is_better_batched(self) -> bool:
        """Whether it is faster to multiply them out later, with others of their shape, in [`multiplied_out`]."""
        return self.layout.batches_products and self.small_by_row and self.num_factors <= WAITING

    def dense(self) -> Tensor:
        """`[K, p, d]`."""
        a, b = self.activations, self.output_gradients
        if self.small_by_row:
            return self.layout.sum_rows(product(a, b))
        gradients = a.new_empty(self.layout.num_microbatches, b.shape[-1], a.shape[-1], dtype=torch.float32)
        pairs = zip(self.layout.groups, self.layout.matrices(a), self.layout.matrices(b))
        for group, group_a, group_b in pairs:
            multiply_into(gradients[group.microbatches], group_a, group_b)
        return gradients


def multiplied_out(products: dict[int, Outer]) -> dict[int, Dense]:
    """The same gradients as tensors, with one multiplication for all of one shape.

    Args:
        products (`dict[int, Outer]`): all `small_by_row` and of one batch, by any keys.
    """
    by_shape: dict[tuple[torch.Size, torch.Size], list[int]] = defaultdict(list)
    for number, each in products.items():
        by_shape[each.activations.shape, each.output_gradients.shape].append(number)
    dense: dict[int, Dense] = {}
    for numbers in by_shape.values():
        at_once = max(1, SIDE_BY_SIDE // products[numbers[0]].num_factors)
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            dense.update(zip(some, _side_by_side([products[number] for number in some])))
    return dense


def _side_by_side(products: list[Outer]) -> Iterator[Dense]:
    a = torch.stack([each.activations for each in products], dim=1)
    b = torch.stack([each.output_gradients for each in products], dim=1)
    of_rows = product(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    return map(Dense, products[0].layout.sum_rows(of_rows).unbind(dim=1))


@dataclass(eq=False, repr=False)
class SpareMemory:
    """Memory to spend on keeping gradients of weight matrices multiplied out instead of as factors.

    Multiplied out, they need no second multiplication for their weighted sum, but often more memory than the factors.

    Args:
        num_elements (`int`): by how many elements all of them together may exceed their factors.
    """

    num_elements: int

    def cheaper_form(self, products: Outer) -> Dense | Outer:
        """The same gradients in the form that takes less time. Multiplying out does not if the result is more than
        twice as large as the factors."""
        if products.is_better_batched:
            return products
        a, b, factors = products.activations, products.output_gradients, products.num_factors
        excess = max(0, products.layout.num_microbatches * a.shape[-1] * b.shape[-1] - factors)
        if excess > min(factors, self.num_elements):
            return products
        self.num_elements -= excess
        return Dense(products.dense())


class Sparse:
    """The gradients of an embedding table, of which a microbatch touches few rows.

    Args:
        indices (`Tensor` of shape `[N, T]`): numbers of the rows that were looked up.
        output_gradients (`Tensor` of shape `[N, T, d]`): gradient of the loss with respect to these rows.
        num_embeddings (`int`): rows of the table.
        layout ([`Layout`]): which rows belong to which microbatch.
    """

    def __init__(self, indices: Tensor, output_gradients: Tensor, num_embeddings: int, layout: Layout):
        self.num_embeddings = num_embeddings
        self.layout = layout
        microbatch_of_row, indices = layout.microbatch_of_row[:, None], indices[: layout.num_owned]
        keys, inverse = (microbatch_of_row * num_embeddings + indices).unique(return_inverse=True)
        rows = output_gradients[: layout.num_owned].flatten(0, 1).float()
        self.gradients = rows.new_zeros(len(keys), rows.shape[-1]).index_add_(0, inverse.flatten(), rows)
        self.microbatch, self.index = keys // num_embeddings, keys % num_embeddings

    def squared_norms(self) -> Tensor:
        """`[K]`, float64."""
        squares = squared_norms_of_matrices(self.gradients[:, None])
        return squares.new_zeros(self.layout.num_microbatches).index_add_(0, self.microbatch, squares)

    def weighted_sum(self, factors: Tensor, some_are_zero: bool, total: Tensor | None = None) -> Tensor:
        """In the shape of the table."""
        of_row, rows, index = factors[self.microbatch], self.gradients, self.index
        if some_are_zero:
            rows, index, of_row = rows[of_row != 0], index[of_row != 0], of_row[of_row != 0]
        table = rows.new_zeros(self.num_embeddings, rows.shape[-1]) if total is None else total
        return table.index_add_(0, index, rows * of_row[:, None])

    def dense(self) -> Tensor:
        """`[K, *table]`."""
        gradients = self.gradients.new_zeros(
            self.layout.num_microbatches, self.num_embeddings, self.gradients.shape[-1]
        )
        gradients[self.microbatch, self.index] = self.gradients
        return gradients
