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
"""

import argparse
import statistics
import tempfile

from common import (
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


def main():
    args = parse_arguments()
    quieten()
    print_header(
        f"{setting(args)}, {args.turns} turns",
        *("parameters trained", "trainer", "microbatches K", "step (s)", "ratio to plain"),
    )
    for tuning in args.tuning:
        with tempfile.TemporaryDirectory() as folder:
            print_comparison(args, Workload(args.model, tuning, args.batch_size, args.bf16), folder)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_workload_arguments(parser, num_microbatches=[1])
    add_peers_argument(parser)
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each trainer (default: %(default)s)")
    args = parser.parse_args()
    check_installed(parser, args.peers)
    return args


def print_comparison(args: argparse.Namespace, workload: Workload, folder: str) -> None:
    """One row for each trainer, from one run of them all."""
    steps = {entrant: make_step(*entrant, workload, folder) for entrant in entrants(args)}
    running = {entrant: step for entrant, step in steps.items() if not isinstance(step, str)}
    seconds = dict(zip(running, take_turns(list(running.values()), args.turns)))
    plain = next(iter(seconds.values()))
    for entrant, refusal in steps.items():
        cells = "—", refusal
        if entrant in seconds:
            each = seconds[entrant]
            cells = f"{statistics.median(each):.3f}", f"{median_ratio(each, plain):.3f}"
        print_row(workload.tuning, *entrant, *cells)


if __name__ == "__main__":
    main()
