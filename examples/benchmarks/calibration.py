"""Seconds that it takes to find the noise for a target ε, and the share of the target that is used.

    python examples/benchmarks/calibration.py --epochs 3 30 --target_epsilon 0.5 1 3 8

One row for each dataset and batch size, over all numbers of epochs and targets. Nothing is remembered between two
calibrations. A share above 1 would break the promise; what it lacks to 1 is noise that nobody asked for.
"""

import argparse
import itertools
import math
import statistics

from common import make_parser, now, print_header, print_row

from hf_dpclip.privacy import PrivacyPlan, accounting


# (n, B): a small archive, Fashion-MNIST, a hospital's archive, a crawl of the web.
SIZES = [(4_000, 256), (4_000, 512), (60_000, 512), (60_000, 2048), (10**6, 1024), (10**6, 8192), (3 * 10**7, 8192)]


def main():
    args = parse_arguments()
    calibrate(*SIZES[0], epochs=1, target_epsilon=1.0, accountant="pld")  # what is imported at the first call
    print_header(
        f"epochs {args.epochs}, ε {args.target_epsilon}",
        *("accountant", "examples n", "batch B", "median (s)", "slowest (s)", "share of ε, lowest", "highest"),
    )
    for accountant, (num_examples, batch_size) in itertools.product(args.accountant, SIZES):
        settings = itertools.product(args.epochs, args.target_epsilon)
        results = [calibrate(num_examples, batch_size, *setting, accountant) for setting in settings]
        seconds, shares = zip(*results)
        times = f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"
        print_row(accountant, num_examples, batch_size, *times, f"{min(shares):.4f}", f"{max(shares):.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 10, 30], help="(default: %(default)s)")
    parser.add_argument(
        "--target_epsilon", type=float, nargs="+", default=[0.5, 1.0, 3.0, 8.0], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--accountant",
        nargs="+",
        choices=accounting.ACCOUNTANTS,
        default=accounting.ACCOUNTANTS,
        help="(default: both)",
    )
    return parser.parse_args()


def calibrate(
    num_examples: int, batch_size: int, epochs: int, target_epsilon: float, accountant: str
) -> tuple[float, float]:
    """Seconds, and ε of the plan as a share of the target."""
    accounting.epsilon.cache_clear()
    start = now()
    plan = PrivacyPlan.calibrate(
        target_epsilon=target_epsilon,
        num_examples=num_examples,
        expected_batch_size=batch_size,
        num_microbatches=batch_size // 8,
        num_steps=epochs * math.ceil(num_examples / batch_size),
        accountant=accountant,
    )
    return now() - start, plan.epsilon() / target_epsilon


if __name__ == "__main__":
    main()
