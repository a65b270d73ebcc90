"""Sums over three processes, of which no number of coordinates here is a multiple."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from hf_dpclip.privacy import reduction


NUM_PROCESSES = 3
SHAPES = [(7, 5), (1,), (2, 2, 11), (128,), (3,)]
# Smaller than one tensor, in the middle of one, and larger than all.
BUCKETS = [1, 16, 50, 10_000]


def gradients(process: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(process)
    # Whole numbers, whose float32 sums are the same in any order.
    return [torch.randint(-1000, 1000, shape, generator=generator).float() for shape in SHAPES]


def reduce_both_ways(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=process, world_size=NUM_PROCESSES)
    results = {}
    for bucket in BUCKETS:
        reduction.BUCKET = bucket
        at_once, in_halves = gradients(process), gradients(process)
        reduction.all_reduce_(at_once)
        slices = reduction.reduce_scatter(in_halves, NUM_PROCESSES)
        reduction.all_gather_(in_halves, slices, NUM_PROCESSES)
        results[bucket] = {"at once": at_once, "in halves": in_halves, "slices": slices}
    torch.save(results, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process ended with."""
    folder = tmp_path_factory.mktemp("reduction")
    spawn(reduce_both_ways, (str(folder),), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"{process}.pt") for process in range(NUM_PROCESSES)]


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("way", ["at once", "in halves"])
def test_all_processes_end_with_the_sums(results, bucket, way):
    expected = [torch.stack(each).sum(dim=0) for each in zip(*map(gradients, range(NUM_PROCESSES)))]
    for result in results:
        assert all(map(torch.equal, result[bucket][way], expected))


@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_coordinate_is_in_the_slices_of_one_process(results, bucket):
    """Which is what one draw of noise for each depends on: beside it, slices hold the zeros that pad buckets."""
    slices = torch.cat([each for result in results for each in result[bucket]["slices"]])
    sums = torch.cat([each.flatten() for each in results[0][bucket]["at once"]])
    assert torch.equal(slices[slices != 0].sort().values, sums[sums != 0].sort().values)
