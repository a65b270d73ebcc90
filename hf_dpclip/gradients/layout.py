"""Which rows of a concatenated batch belong to which microbatch."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor


class Layout:
    """Microbatches one after another in one batch.

    Args:
        sizes (`list[int]`): rows of each of the K microbatches, at least one each and in ascending order, so that
            microbatches of one size are neighbours and can be multiplied as one batch of matrices without a copy.
        num_rows (`int`): N, rows of the batch. Rows after the last microbatch belong to none.
        device (`torch.device`): where the batch is.

    Attributes:
        num_owned (`int`): rows that belong to a microbatch; they come first.
    """

    def __init__(self, sizes: list[int], num_rows: int, device: torch.device):
        self.sizes = sizes
        self.num_microbatches = len(sizes)
        self.num_owned = sum(sizes)
        self.num_rows = num_rows
        self.device = device

    @property
    def batches_products(self) -> bool:
        """Whether products are batched as far as possible: those of microbatches of similar sizes, padded with zeros,
        and those of layers of one shape. On an accelerator many small products take longer than a few large ones."""
        return self.device.type != "cpu"

    @cached_property
    def microbatch_of_row(self) -> Tensor:
        """The microbatch of each row that belongs to one."""
        # Made on the CPU: on an accelerator, its length would take a wait for the device.
        numbers = torch.arange(self.num_microbatches).repeat_interleave(torch.tensor(self.sizes))
        return numbers.to(self.device)

    @cached_property
    def groups(self) -> list["Group"]:
        """Consecutive microbatches that are multiplied as one batch of matrices."""
        by_class: dict[int, list[int]] = {}
        for size in self.sizes:
            by_class.setdefault(_size_class(size) if self.batches_products else size, []).append(size)
        groups, first, first_row = [], 0, 0
        for sizes in by_class.values():
            groups.append(Group(sizes, first, first_row, self.device))
            first += len(sizes)
            first_row += sum(sizes)
        return groups

    def matrices(self, rows: Tensor) -> Iterator[Tensor]:
        """`[N, T, d]` as one batch of matrices `[microbatches, size * T, d]` per group."""
        return (group.matrices(rows) for group in self.groups)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """`[N, ...]` to `[K, ...]`, the float32 sum over the rows of each microbatch."""
        owned = rows.float() if self.num_owned == self.num_rows else rows[: self.num_owned].float()
        sums = owned.new_zeros(self.num_microbatches, *owned.shape[1:])
        return sums.index_add_(0, self.microbatch_of_row, owned)


class Group:
    """Consecutive microbatches, the smaller of which are padded with rows of zeros to the size of the largest.

    Args:
        sizes (`list[int]`): rows of each, in ascending order.
        first, first_row (`int`): the first of these microbatches and the first of their rows.
        device (`torch.device`): where the rows are.

    Attributes:
        microbatches (`slice`): their numbers.
    """

    def __init__(self, sizes: list[int], first: int, first_row: int, device: torch.device):
        self.sizes = sizes
        self.microbatches = slice(first, first + len(sizes))
        self.rows = slice(first_row, first_row + sum(sizes))
        self.device = device

    def matrices(self, rows: Tensor) -> Tensor:
        """`[N, T, d]` to `[microbatches, size * T, d]`."""
        own, count, size = rows[self.rows], len(self.sizes), self.sizes[-1]
        if self.sizes[0] < size:
            own = own.new_zeros(count * size, *own.shape[1:]).index_copy_(0, self._places, own)
        return own.reshape(count, size * rows.shape[1], rows.shape[2])

    @cached_property
    def _places(self) -> Tensor:
        """The position of each row in the padded matrices."""
        taken = torch.arange(self.sizes[-1]) < torch.tensor(self.sizes)[:, None]
        return taken.flatten().nonzero().squeeze(1).to(self.device)


def _size_class(size: int) -> int:
    """Equal for sizes between two powers of two, so that padding at most doubles them."""
    return (size - 1).bit_length()
