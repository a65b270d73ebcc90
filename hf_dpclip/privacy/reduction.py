"""Sums over several processes, one bucket at a time: copying all coordinates into one would double the memory."""

import torch
from torch import Tensor


# Coordinates in a bucket, 16 MiB: enough to make latency negligible, and few enough for glibc to keep the memory from
# one bucket to the next, which is faster than asking the system for it.
BUCKET = 2**22


def all_reduce_(tensors: list[Tensor]) -> None:
    """Replaces tensors by their sums over all processes. Every coordinate is sent once."""
    for pieces in flat_chunks(tensors, BUCKET):
        bucket = _side_by_side(pieces, 1)
        torch.distributed.all_reduce(bucket)
        _put_back(bucket, pieces)


def reduce_scatter(tensors: list[Tensor], num_processes: int) -> list[Tensor]:
    """This process's slices of the sums over all processes: one of each bucket, of the same length on all processes.
    The first half of an all-reduce."""
    slices = []
    for pieces in flat_chunks(tensors, BUCKET):
        bucket = _side_by_side(pieces, num_processes)
        # Each process receives its slice from all others and adds up: gloo's own reduce-scatter is an all-reduce.
        received = torch.empty_like(bucket)
        torch.distributed.all_to_all_single(received, bucket)
        slices.append(received.view(num_processes, -1).sum(0))
    return slices


def all_gather_(tensors: list[Tensor], slices: list[Tensor], num_processes: int) -> None:
    """Fills tensors with the slices of all processes, which `reduce_scatter` made from tensors of the same shapes. The
    second half of an all-reduce."""
    for pieces, own in zip(flat_chunks(tensors, BUCKET), slices, strict=True):
        bucket = own.new_empty(len(own) * num_processes)
        torch.distributed.all_gather(list(bucket.chunk(num_processes)), own)
        _put_back(bucket, pieces)


def flat_chunks(tensors: list[Tensor], size: int) -> list[list[Tensor]]:
    """Flat views of all tensors, in lists of at most `size` coordinates together, so that small tensors share one."""
    chunks: list[list[Tensor]] = []
    room = 0
    for piece in (piece for tensor in tensors for piece in tensor.view(-1).split(size)):
        if not chunks or len(piece) > room:
            chunks.append([])
            room = size
        chunks[-1].append(piece)
        room -= len(piece)
    return chunks


def _side_by_side(pieces: list[Tensor], factor: int) -> Tensor:
    """In one tensor, padded with zeros to a multiple of `factor`. One piece that needs no padding is not copied."""
    missing = -sum(map(len, pieces)) % factor
    if len(pieces) == 1 and missing == 0:
        return pieces[0]
    return torch.cat([*pieces, pieces[0].new_zeros(missing)])


def _put_back(bucket: Tensor, pieces: list[Tensor]) -> None:
    if bucket is not pieces[0]:
        sizes = [len(piece) for piece in pieces]
        torch._foreach_copy_(pieces, bucket[: sum(sizes)].split(sizes))
