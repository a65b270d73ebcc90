"""Peak memory of a few training steps of `transformers.Trainer`, `DPCLIPTrainer` and other libraries.

Every configuration has a process of its own: the peak is that of `torch.cuda.max_memory_allocated` on a GPU and the
largest resident set, libraries included, on the CPU. n = B, hence every step sees the whole batch.

    python examples/benchmarks/memory.py --model vit-b-32 --batch_size 32 --num_microbatches 1 8

With `--chunked`, microbatches larger than what one forward pass holds: B pairs in one microbatch, and in microbatches
of one forward batch, beside steps of one forward batch only. Time is taken in a run of its own, in which the three
take turns. In a step the `Trainer` loads the records of all its forward passes before the first one.

    python examples/benchmarks/memory.py --chunked --tuning lora --batch_size 2048 --forward_batch_size 64
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from common import (
    MIB,
    Workload,
    add_workload_arguments,
    make_parser,
    median_ratio,
    print_header,
    print_row,
    quieten,
    setting,
    take_turns,
)
from peers import add_peers_argument, check_installed, entrants, make_step


# From the third step on nothing new is allocated.
STEPS = 3
# By default glibc moves these limits as blocks are freed, and peaks with them, from one run to the next.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Bytes in the unit of `ru_maxrss`.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main():
    args = parse_arguments()
    quieten()
    if args.chunked:
        print_chunked(args)
    else:
        print_trainers(args)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_workload_arguments(parser, num_microbatches=[1, 8, 32])
    add_peers_argument(parser)
    parser.add_argument("--chunked", action="store_true", help="microbatches larger than a forward batch")
    parser.add_argument("--forward_batch_size", type=int, default=64, help="with --chunked (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="timed steps, with --chunked (default: %(default)s)")
    args = parser.parse_args()
    check_installed(parser, args.peers)
    return args


def print_trainers(args: argparse.Namespace) -> None:
    """One row for each trainer."""
    print_header(setting(args), "parameters trained", "trainer", "microbatches K", "peak (MiB)", "ratio to plain")
    for tuning in args.tuning:
        workload = Workload(args.model, tuning, args.batch_size, args.bf16)
        plain = None
        for name, k in entrants(args):
            peak = in_own_process(peak_memory, workload, name, k, **MALLOC)
            plain = plain or peak
            refused = isinstance(peak, str)
            print_row(tuning, name, k, *(("—", peak) if refused else (f"{peak / MIB:.0f}", f"{peak / plain:.3f}")))


def print_chunked(args: argparse.Namespace) -> None:
    """One row for each size of batch and microbatch, the step of one forward batch first."""
    columns = "parameters trained", "batch B", "microbatch", "peak (MiB)", "ratio", "time per pair (ms)", "ratio"
    print_header(f"{setting(args)}, forward batches of {args.forward_batch_size}", *columns)
    for tuning in args.tuning:
        rows = chunked_rows(args, tuning)
        peaks = [in_own_process(peak_memory, workload, "private", k, **MALLOC) for workload, k in rows]
        times = in_own_process(times_per_pair, rows, args.turns)
        for (workload, k), peak, each in zip(rows, peaks, times):
            memory = f"{peak / MIB:.0f}", f"{peak / peaks[0]:.3f}"
            time = f"{1000 * statistics.median(each):.3f}", f"{median_ratio(each, times[0]):.3f}"
            print_row(tuning, workload.batch_size, workload.batch_size // k, *memory, *time)


def chunked_rows(args: argparse.Namespace, tuning: str) -> list[tuple[Workload, int]]:
    """Workload and K: one forward batch; many of them, each a microbatch; as many in one microbatch."""
    size = args.forward_batch_size
    one = Workload(args.model, tuning, size, args.bf16)
    many = Workload(args.model, tuning, args.batch_size, args.bf16, size)
    return [(one, 1), (many, args.batch_size // size), (many, 1)]


def in_own_process(function: Callable, *args, **environment: str):
    """What `function` returns in a fresh process that has these environment variables."""
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *args).result()
    for name in environment:
        del os.environ[name]
    return result


def peak_memory(workload: Workload, name: str, num_microbatches: int) -> int | str:
    """Bytes at the peak of this process, or why the trainer does not run."""
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(name, num_microbatches, workload, folder)
        if isinstance(step, str):
            return step
        for _ in range(STEPS):
            step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # A process starts with the peak of the one that started it, which has imported the same libraries and no more.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def times_per_pair(rows: list[tuple[Workload, int]], turns: int) -> list[list[float]]:
    """Seconds of each turn of each row, by the pairs in its step."""
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        steps = [make_step("private", k, workload, folder) for workload, k in rows]
        seconds = take_turns(steps, turns)
    return [[each / workload.batch_size for each in row] for row, (workload, _) in zip(seconds, rows)]


if __name__ == "__main__":
    main()
