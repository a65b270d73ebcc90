"""Attack a fine-tune with privacy and one without, and see what each lets out.

The tiny CLIP beside this script learns handwritten digits twice. Among the records are canaries, digits with a wrong
label, each in the run or not by a coin of its own, which the adversary then guesses; and ordinary records are to be
told from others of the same draw that were held out. `docs/auditing.md` says what the numbers mean.

    python examples/audit.py
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import disable_progress_bars

from hf_dpclip.audit.fine_tune import FineTune, FineTuneAudit, Membership
from hf_dpclip.markdown import table_head, table_row


TINY_CLIP = Path(__file__).parent / "tiny-clip"
WITHOUT = "without privacy"
COLORS = {WITHOUT: "tab:red"}
# Below this, a curve of a thousand records has a handful of them.
LOWEST_RATE = 2e-3


def main():
    args = parse_arguments()
    disable_progress_bars()
    fine_tune = FineTune(
        TINY_CLIP, num_members=args.num_members, num_canaries=args.num_canaries, lora_rank=args.lora_rank
    )
    runs = {WITHOUT: None, **{f"ε = {epsilon:g}": epsilon for epsilon in args.target_epsilon}}
    audits = {name: fine_tune.audit(epsilon, args.max_steps) for name, epsilon in runs.items()}
    print_table(audits)
    draw(audits, args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_epsilon", type=float, nargs="+", default=[8.0], help="of the private runs")
    parser.add_argument("--lora_rank", type=int, default=0, help="0 trains all parameters (default: %(default)s)")
    parser.add_argument("--num_members", type=int, default=600, help="ordinary records (default: %(default)s)")
    parser.add_argument("--num_canaries", type=int, default=300, help="canaries (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, help="steps of each run, to see quickly that everything works")
    output = Path("outputs", "audit.png")
    parser.add_argument("--output", type=Path, default=output, help="the figure (default: %(default)s)")
    return parser.parse_args()


def print_table(audits: dict[str, FineTuneAudit]) -> None:
    columns = ("run", "claimed ε", "ε ≥, white-box", "ε ≥, black-box", "coins guessed, white-box", "black-box")
    print(table_head(*columns, "AUC", "TPR at 1 % FPR", "accuracy"))
    first = next(iter(audits.values()))
    print(table_row("before training", *["-"] * 5, *rates(first.start), f"{first.accuracy_at_start:.1%}"))
    for name, audit in audits.items():
        run = audit.run
        bounds = f"{run.claimed_epsilon:.2f}", f"{run.white_box:.2f}", f"{run.black_box:.2f}"
        guessed = f"{run.white_box_accuracy:.1%}", f"{run.black_box_accuracy:.1%}"
        print(table_row(name, *bounds, *guessed, *rates(audit.membership), f"{audit.accuracy:.1%}"))


def rates(membership: Membership) -> tuple[str, str]:
    return f"{membership.auc:.3f}", f"{membership.true_positive_rate():.1%}"


def draw(audits: dict[str, FineTuneAudit], path: Path) -> None:
    """ROC curves of membership inference, of canaries on the left and of ordinary records on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    titles = {"canaries (wrong labels)": "canaries", "ordinary records": "membership"}
    for panel, (title, attack) in zip(panels, titles.items()):
        for name, audit in audits.items():
            membership = getattr(audit, attack)
            label = f"{name}: AUC {membership.auc:.3f}"
            panel.step(*membership.curve(), where="post", color=COLORS.get(name), label=label)
        panel.plot([LOWEST_RATE, 1], [LOWEST_RATE, 1], ":", color="grey", label="guessing")
        panel.set(title=title, xscale="log", yscale="log", xlim=(LOWEST_RATE, 1), ylim=(LOWEST_RATE, 1.05))
        panel.set(xlabel="false positive rate", ylabel="true positive rate")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()
