"""Time and memory of drawing the microbatches of one step, for any size of the dataset.

    python examples/benchmarks/sampler.py --num_examples 1000000 100000000 --batch_size 4096 --num_microbatches 64 4096

K = B draws single records; every other K draws microbatches. Sizes of the dataset take turns; the ratio, a median over
the steps, is to the first size, and stays near 1 where a step costs what its batch costs, however large the dataset.
Memory is the peak of everything that Python and numpy allocate in one step, measured apart, as counting takes time.
"""

import argparse
import statistics
import tracemalloc
from functools import partial

from common import make_parser, median_ratio, print_header, print_row, take_turns, timed

from hf_dpclip.privacy import PoissonSampler, PrivacyPlan, Randomness


def main():
    args = parse_arguments()
    print_header(
        f"B = {args.batch_size}, {args.steps} steps",
        *("examples n", "microbatches K", "step (ms)", "ratio", "peak memory (MiB)"),
    )
    for num_microbatches in args.num_microbatches:
        samplers = [make_sampler(n, args.batch_size, num_microbatches) for n in args.num_examples]
        seconds = take_turns([partial(timed, partial(draw, sampler)) for sampler in samplers], args.steps)
        for sampler, each in zip(samplers, seconds):
            time = f"{1000 * statistics.median(each):.3f}", f"{median_ratio(each, seconds[0]):.2f}"
            memory = f"{peak_memory(sampler) / 2**20:.2f}"
            print_row(f"{sampler.plan.num_examples:.0e}", num_microbatches, *time, memory)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--num_examples", type=int, nargs="+", default=[10**6, 10**8], metavar="n", help="dataset sizes"
    )
    parser.add_argument("--batch_size", type=int, default=4096, metavar="B", help="expected (default: %(default)s)")
    parser.add_argument(
        "--num_microbatches", type=int, nargs="+", default=[64, 4096], metavar="K", help="microbatches"
    )
    parser.add_argument("--steps", type=int, default=200, help="measured steps (default: %(default)s)")
    return parser.parse_args()


def make_sampler(num_examples: int, batch_size: int, num_microbatches: int) -> PoissonSampler:
    plan = PrivacyPlan(num_examples, batch_size, num_microbatches, num_steps=1, noise_multiplier=1.0)
    return PoissonSampler(plan, Randomness().sampling())


def draw(sampler: PoissonSampler) -> None:
    """What the data loader asks for at each step."""
    sampler.draw_seeds(len(sampler.draw()))


def peak_memory(sampler: PoissonSampler) -> int:
    """Bytes."""
    tracemalloc.start()
    draw(sampler)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
