"""Time and communication of a private training step on several processes, relative to `transformers.Trainer` with DDP.

Started plainly, the script starts itself with `torch.distributed.run`. In every process the trainers take turns; the
ratio is the median over the turns of their time by the plain trainer's, on the first process. n = B, hence every step
sees the whole batch, of which each process has its share.

    python examples/benchmarks/scaling.py --processes 2 --model vit-b-32 --batch_size 16 --num_microbatches 1 2 8

Bytes are those of all tensors that go through collective operations from the first forward pass of a step to its end,
whoever calls them, on one process: once for an all-reduce, and half for each of its halves, the all-to-all of slices
and the all-gather of their sums, as in a ring. They are counted in a step of their own, since counting takes time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from common import (
    TrainerStep,
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
from peers import entrants, make_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


COLUMNS = (
    "parameters trained",
    "trainer",
    "microbatches K",
    "step (s)",
    "ratio to plain",
    "sent (MB)",
    "ratio to plain",
)


def main():
    args = parse_arguments()
    if "RANK" not in os.environ:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
        sys.exit(subprocess.call([sys.executable, "-m", *launcher, *sys.argv]))
    quieten()
    if os.environ["RANK"] == "0":
        print_header(f"{setting(args)}, {args.processes} processes, {args.turns} turns", *COLUMNS)
    for tuning in args.tuning:
        with tempfile.TemporaryDirectory() as folder:
            print_comparison(args, Workload(args.model, tuning, args.batch_size, args.bf16), folder)
    torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_workload_arguments(parser, num_microbatches=[1, 2, 8])
    parser.add_argument("--processes", type=int, default=2, help="on this machine (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each trainer (default: %(default)s)")
    parser.set_defaults(peers=[])
    return parser.parse_args()


def print_comparison(args: argparse.Namespace, workload: Workload, folder: str) -> None:
    """One row for each trainer, from one run of them all, on the first process."""
    steps = {entrant: make_step(*entrant, workload, folder) for entrant in entrants(args)}
    seconds = take_turns(list(steps.values()), args.turns)
    sent = [bytes_sent(step) for step in steps.values()]
    if os.environ["RANK"] != "0":
        return
    for entrant, each, size in zip(steps, seconds, sent):
        time = f"{statistics.median(each):.3f}", f"{median_ratio(each, seconds[0]):.3f}"
        print_row(workload.tuning, *entrant, *time, f"{size / 1e6:.2f}", f"{size / sent[0]:.3f}")


def bytes_sent(step: TrainerStep) -> float:
    """Bytes that go through this process's collective operations in one more step."""
    counter = CollectiveCounter()
    step.trainer.add_callback(counter)
    step()
    step.trainer.remove_callback(counter)
    return counter.bytes


class CollectiveCounter(TorchDispatchMode, TrainerCallback):
    """Adds up the sizes of all tensors in the collective operations of a step.

    Those of DDP's reducer, which is not written in Python, pass here like any other.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            share = 1 if "allreduce" in function.__name__ else 0.5
            self.bytes += share * max(_nbytes(arg) for arg in args)
        return function(*args, **(kwargs or {}))


def _nbytes(argument) -> int:
    """Of all tensors in it."""
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))


if __name__ == "__main__":
    main()
