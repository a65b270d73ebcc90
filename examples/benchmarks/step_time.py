"""Time of a private training step relative to `transformers.Trainer` on the same model and batch.

All trainers live in one process and take turns, so that whatever else the machine does hits all of them; the ratio is
the median over the turns of their time by the plain trainer's. n = B, hence every step sees the whole batch, as the
plain trainer's does.

    python examples/benchmarks/step_time.py --model vit-b-32 --batch_size 16 --num_microbatches 1 4

With `--peers`, steps of other libraries take turns with ours: zero gradients, forward and backward pass, clipping,
noise, AdamW. What Opacus computes is NOT private for this loss: every term of it contains all pairs of the batch, and
the hooks take the gradient apart as if each belonged to one pair. Only its cost is of interest. opake can be given the
microbatches as its examples, if all are equally large. A peer that refuses the model has its reason in the table.

    python examples/benchmarks/step_time.py --peers opacus-hooks opacus-ghost opake

On a GPU its memory is measured too. `--forward_batch_size` is what fits into it: the `Trainer` accumulates gradients
over forward batches, each contrasted in itself, while a private microbatch is contrasted whole, however large.

    python examples/benchmarks/step_time.py --bf16 --batch_size 4096 --forward_batch_size 1024 --num_microbatches 1 64
"""

import argparse
import gc
import math
import statistics
import tempfile

import torch
from common import (
    MIB,
    WARM_UP_STEPS,
    Step,
    Workload,
    add_workload_arguments,
    make_parser,
    median_ratio,
    print_header,
    print_row,
    quieten,
    setting,
    take_turns,
    warm_up,
)
from peers import add_peers_argument, check_installed, entrants, make_step


def main():
    args = parse_arguments()
    quieten()
    columns = ["parameters trained", "trainer", "microbatches K", "step (s)", "ratio to plain"]
    if torch.cuda.is_available():
        columns += ["peak (MiB)", "ratio to plain"]
    parts = f"forward batches of {args.forward_batch_size}, " if args.forward_batch_size else ""
    print_header(f"{setting(args)}, {parts}step {args.steps} of a run, {args.turns} turns", *columns)
    for tuning in args.tuning:
        with tempfile.TemporaryDirectory() as folder:
            workload = Workload(args.model, tuning, args.batch_size, args.bf16, args.forward_batch_size, args.steps)
            print_comparison(args, workload, folder)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_workload_arguments(parser, num_microbatches=[1])
    add_peers_argument(parser)
    parser.add_argument("--forward_batch_size", type=int, help="pairs in one forward pass (default: the batch)")
    parser.add_argument("--steps", type=int, default=1, help="in each run, of which the last is measured; 3 on a GPU")
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each trainer (default: %(default)s)")
    args = parser.parse_args()
    check_installed(parser, args.peers)
    if args.forward_batch_size and args.peers:
        parser.error("--forward_batch_size: the steps of --peers are one forward pass; leave one of the two out")
    if args.forward_batch_size and args.batch_size % args.forward_batch_size:
        parser.error(f"--forward_batch_size {args.forward_batch_size} does not divide --batch_size {args.batch_size}")
    return args


def print_comparison(args: argparse.Namespace, workload: Workload, folder: str) -> None:
    """One row for each trainer, from one run of them all."""
    steps = {entrant: warm_step(*entrant, workload, folder) for entrant in entrants(args)}
    running = {entrant: step for entrant, step in steps.items() if not isinstance(step, str)}
    seconds = dict(zip(running, take_turns(list(running.values()), args.turns, warm=True)))
    plain = next(iter(running))
    for entrant, step in steps.items():
        if isinstance(step, str):
            print_row(workload.tuning, *entrant, "—", step)
            continue
        each = seconds[entrant]
        cells = [f"{statistics.median(each):.3f}", f"{median_ratio(each, seconds[plain]):.3f}"]
        if isinstance(step, MeteredStep):
            cells += [f"{step.peak / MIB:.0f}", f"{step.peak / running[plain].peak:.3f}"]
        print_row(workload.tuning, *entrant, *cells)


def warm_step(name: str, num_microbatches: int, workload: Workload, folder: str) -> Step | str:
    """As `make_step`; on a GPU the step knows its memory."""
    before = memory_in_use()
    step = make_step(name, num_microbatches, workload, folder)
    if isinstance(step, str):
        return step
    warm_up(step, math.ceil(WARM_UP_STEPS / workload.steps))
    return MeteredStep(step, memory_in_use() - before) if torch.cuda.is_available() else step


def memory_in_use() -> int:
    """Bytes of GPU memory, without what only waits to be collected."""
    gc.collect()
    return torch.cuda.memory_allocated()


class MeteredStep:
    """A step that keeps the most GPU memory which it and its trainer took up, in bytes, whatever other trainers hold.

    Args:
        step (callable): takes one optimizer step.
        held (`int`): bytes that its trainer holds between steps.
    """

    def __init__(self, step: Step, held: int):
        self.step = step
        self.held = held
        self.peak = 0

    def __call__(self) -> float:
        others = memory_in_use() - self.held
        torch.cuda.reset_peak_memory_stats()
        seconds = self.step()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        return seconds


if __name__ == "__main__":
    main()
