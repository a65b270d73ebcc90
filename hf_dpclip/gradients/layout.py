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
        num_rows (`int`): N, rows of the batch. Those beyond the last microbatch belong to none.
        device (`torch.device`): where the batch is.
    """

    def __init__(self, sizes: list[int], num_rows: int, device: torch.device):
        self.sizes = sizes
        self.num_rows = num_rows
        self.device = device

    @property
    def num_microbatches(self) -> int:
        return len(self.sizes)

    @cached_property
    def microbatch_of_row(self) -> Tensor:
        """The microbatch of each row that belongs to one."""
        numbers = torch.arange(self.num_microbatches, device=self.device)
        return numbers.repeat_interleave(torch.tensor(self.sizes, device=self.device))

    @cached_property
    def groups(self) -> list[tuple[slice, slice, int]]:
        """Of each run of equally large microbatches: which they are, their rows, and the size of one."""
        groups, first_row = [], 0
        for size in sorted(set(self.sizes)):
            first, count = self.sizes.index(size), self.sizes.count(size)
            groups.append((slice(first, first + count), slice(first_row, first_row + count * size), size))
            first_row += count * size
        return groups

    def matrices(self, rows: Tensor) -> Iterator[Tensor]:
        """`[N, T, d]` as one batch of matrices `[microbatches, size * T, d]` per group."""
        for microbatches, of_group, size in self.groups:
            count = microbatches.stop - microbatches.start
            yield rows[of_group].reshape(count, size * rows.shape[1], rows.shape[2])

    def sum_rows(self, rows: Tensor) -> Tensor:
        """`[N, ...]` to `[K, ...]`, the float32 sum over the rows of each microbatch."""
        owned = rows[: len(self.microbatch_of_row)].float()
        sums = owned.new_zeros(self.num_microbatches, *owned.shape[1:])
        return sums.index_add_(0, self.microbatch_of_row, owned)
