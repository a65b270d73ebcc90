"""One of several processes that write to the same ledger at once, and at last die between recording and stepping.

python spending.py FOLDER NAME
"""

import os
import signal
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from plans import plan

from hf_dpclip.privacy import Ledger


RUNS, STEPS = 20, 7


def main():
    folder, name = Path(sys.argv[1]), sys.argv[2]
    ledger = Ledger(folder / "ledger.jsonl")
    Path(folder, f"{name}-is-ready").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.001)
    for number in range(RUNS):
        recording = ledger.begin(f"{name}-{number}", plan(), planned=300, dataset="common")
        for _ in range(STEPS):
            recording.before_step()
        recording.end()
    try:
        # Together with what is there, one of these is within the budget, and two are not.
        ledger.begin(f"{name}-last", plan(), planned=20, dataset="budgeted", budget=1.2 * plan().epsilon())
    except ValueError as error:
        print(error, flush=True)
    recording = ledger.begin(f"{name}-crashed", plan(), planned=20, dataset="crashed")
    recording.before_step()
    recording.before_step()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
