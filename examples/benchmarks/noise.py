"""Time of secure noise (`secure_noise=True`) beside the default: of a release alone, and of a whole training step.

    python examples/benchmarks/noise.py --num_parameters 300000 4500000 --model small --batch_size 64

Both kinds take turns in one process; ratios are medians over the turns.
"""

import argparse
import statistics
import tempfile
from functools import partial

import torch
from common import (
    Step,
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
    timed,
)

from hf_dpclip.privacy import GaussianMechanism, PrivacyPlan, Randomness, SecureGaussianMechanism


def main():
    args = parse_arguments()
    quieten()
    columns = ("default (s)", "secure (s)", "secure / default")
    print_header(f"Release, {torch.get_num_threads()} CPU threads, torch {torch.__version__}", "parameters", *columns)
    for size in args.num_parameters:
        kinds = (GaussianMechanism, SecureGaussianMechanism)
        print_times(f"{size:,}", [partial(timed, make_mechanism(kind, size).release) for kind in kinds], args.turns)
    print_header(f"\nStep, {setting(args)}", "trained", "K", *columns)
    with tempfile.TemporaryDirectory() as folder:
        for tuning in args.tuning:
            workload = Workload(args.model, tuning, args.batch_size, args.bf16)
            for num_microbatches in args.num_microbatches:
                size = args.batch_size // num_microbatches
                trainers = [workload.private_trainer(folder, size, secure_noise=secure) for secure in (False, True)]
                label = f"{tuning} | {num_microbatches}"
                print_times(label, [TrainerStep(trainer) for trainer in trainers], args.turns)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_workload_arguments(parser, num_microbatches=[1, 8])
    parser.add_argument(
        "--num_parameters", type=int, nargs="+", default=[300_000, 4_500_000], metavar="d", help="trained parameters"
    )
    parser.add_argument("--turns", type=int, default=15, help="measured turns (default: %(default)s)")
    return parser.parse_args()


def make_mechanism(kind: type[GaussianMechanism], size: int) -> GaussianMechanism:
    plan = PrivacyPlan(1000, 64, 8, num_steps=1, noise_multiplier=1.0)
    return kind(plan, [torch.nn.Parameter(torch.zeros(size))], Randomness().noise())


def print_times(label: str, steps: list[Step], turns: int) -> None:
    default, secure = take_turns(steps, turns)
    medians = [f"{statistics.median(seconds):.4f}" for seconds in (default, secure)]
    print_row(label, *medians, f"{median_ratio(secure, default):.3f}")


if __name__ == "__main__":
    main()
