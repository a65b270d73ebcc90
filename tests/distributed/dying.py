"""One of two processes, of which the second dies in the middle of the third step.

python dying.py FOLDER, with RANK, WORLD_SIZE and what else torch.distributed reads from the environment.
"""

import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from factories import SAVING, arguments, pairs, tiny_clip
from transformers import TrainerCallback

from hf_dpclip import DPCLIPTrainer


class Death(TrainerCallback):
    """Of a process, without a word."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    args = arguments(sys.argv[1], max_steps=5, **SAVING)
    DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64), callbacks=[Death()]).train()


if __name__ == "__main__":
    main()
