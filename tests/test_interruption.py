"""kill -9 in the middle of a run: the resumed run owes what an uninterrupted one owes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checks import flat_weights
from transformers.trainer import TRAINER_STATE_NAME

from hf_dpclip import PrivacyStatement
from hf_dpclip.resuming import last_complete_checkpoint


sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from interrupted import trainer


def kill_after_steps(folder: Path, steps: int):
    """Starts the run and kills it as soon as a checkpoint of at least `steps` steps is complete."""
    script = Path(__file__).parent / "distributed" / "interrupted.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        complete = folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
        if any(int(state.parent.name.removeprefix("checkpoint-")) >= steps for state in complete):
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, "the run ended before it was killed"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    kill_after_steps(folder, 5)
    return folder


def test_the_last_complete_checkpoint_says_what_was_spent(killed):
    checkpoint = Path(last_complete_checkpoint(killed))
    statement = PrivacyStatement.load(checkpoint)
    assert statement.steps == int(checkpoint.name.removeprefix("checkpoint-"))
    assert 5 <= statement.steps < 40


def test_a_resumed_run_ends_at_the_planned_epsilon_with_fresh_noise(killed):
    runs = [trainer(killed, save_strategy="no") for _ in range(2)]
    for resumed in runs:
        resumed.train(resume_from_checkpoint=True)
        assert resumed.privacy_spent().steps == resumed.state.global_step == 40
        assert resumed.privacy_spent().epsilon == resumed.plan.epsilon()
    assert not torch.equal(*(flat_weights(resumed.model) for resumed in runs))
