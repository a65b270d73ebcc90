"""Train with a checkpoint after every step, for a test to kill.

python interrupted.py FOLDER
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from factories import arguments, pairs, tiny_clip

from hf_dpclip import DPCLIPTrainer


def trainer(folder: Path, **overrides) -> DPCLIPTrainer:
    """The run that is killed, and the one that resumes it."""
    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, **overrides}
    return DPCLIPTrainer(tiny_clip(), arguments(folder, **settings), train_dataset=pairs(64))


if __name__ == "__main__":
    trainer(Path(sys.argv[1])).train()
