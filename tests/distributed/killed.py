"""Kills training runs at random moments, resumes them, and writes down what each left behind.

python killed.py FOLDER KILLS SEED

One process imports everything and forks for every attempt, so that an attempt takes a fraction of a second. An attempt
resumes from the last complete checkpoint of its run, if there is one. Independently of the library, it appends a byte
to a file before every release, and the step to another file after every checkpoint that is saved.
"""

import dataclasses
import gc
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from factories import arguments, pairs, tiny_clip
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from hf_dpclip import DPCLIPTrainer, PrivacyStatement
from hf_dpclip.privacy import GaussianMechanism, Ledger
from hf_dpclip.resuming import check_resumable, last_complete_checkpoint


STEPS = 12
DATASET = pairs(64)
# What an attempt is doing, which it writes down for whoever kills it.
RESUMING, TRAINING, SAVING = PHASES = "resuming", "training", "saving"
# How many steps or checkpoints an attempt may get through before it is killed in a later one.
PATIENCE = 4


@dataclass
class Run:
    """One run, through all its attempts."""

    folder: Path
    kills: int = 0

    @property
    def released(self) -> int:
        """Releases, counted independently."""
        return len(self._read("released"))

    @property
    def saved(self) -> int:
        """The last step whose checkpoint was saved, as far as the run was told."""
        return max(map(int, self._read("saved").split()), default=0)

    @property
    def phases(self) -> list[tuple[str, float]]:
        """What the present attempt has been doing, and since when in seconds."""
        lines = [line.split() for line in self._read("phases").splitlines()]
        begun = max(number for number, (phase, _) in enumerate(lines) if phase == RESUMING) if lines else 0
        return [(phase, float(since)) for phase, since in lines[begun:]]

    @property
    def final(self) -> dict:
        """What the run said at its end."""
        return json.loads(self._read("final"))

    def append(self, name: str, text: str) -> None:
        with open(self.folder / name, "a") as file:
            file.write(text)

    def says(self, phase: str) -> None:
        self.append("phases", f"{phase} {time.monotonic()}\n")

    def recorded(self) -> int:
        """Steps in the ledger that all runs share."""
        ledger = Ledger(self.folder.parent / "ledger.jsonl")
        runs = ledger.runs() if ledger.path.exists() else []
        return sum(record.steps for record in runs if record.datasets == (self.folder.name,))

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


class Watched(DPCLIPTrainer):
    """Says what it is doing."""

    run: Run

    def _save_checkpoint(self, model, trial):
        self.run.says(SAVING)
        super()._save_checkpoint(model, trial)
        self.run.append("saved", f"{self.state.global_step}\n")
        self.run.says(TRAINING)


class Begun(TrainerCallback):
    def __init__(self, run: Run):
        self.run = run

    def on_step_begin(self, args, state, control, **kwargs):
        self.run.says(TRAINING)


def make_trainer(run: Run) -> Watched:
    settings = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "accountant": "rdp",
        "ledger_path": str(run.folder.parent / "ledger.jsonl"),
        "ledger_dataset": run.folder.name,
    }
    trainer = Watched(tiny_clip(), arguments(run.folder, **settings), train_dataset=DATASET, callbacks=[Begun(run)])
    trainer.run = run
    return trainer


def attempt(run: Run) -> None:
    """A child's whole life, if it is not killed."""
    release = GaussianMechanism.release

    def counted(mechanism):
        run.append("released", ".")
        release(mechanism)

    GaussianMechanism.release = counted
    trainer = make_trainer(run)
    try:
        checkpoint = last_complete_checkpoint(run.folder)
    except ValueError:
        checkpoint = None
    trainer.train(resume_from_checkpoint=checkpoint)
    spent = dataclasses.asdict(trainer.privacy_spent())
    Path(run.folder, "final").write_text(json.dumps({**spent, "planned": trainer.plan.epsilon()}))


def lock_progress_bars() -> None:
    """Gives the progress bars of this process a lock of their own.

    The one they come with is shared with forked processes, and one that is killed holding it would stop all others.
    """
    tqdm.set_lock(threading.RLock())


def start(run: Run) -> int:
    """The number of the attempt's process."""
    run.says(RESUMING)
    process = os.fork()
    if process:
        return process
    lock_progress_bars()
    log = os.open(run.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        attempt(run)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


@dataclass
class Facts:
    """What all attempts left behind, for a test to judge."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    finals: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lost_steps: int = 0
    seconds: float = 0.0


def problems(run: Run, plan) -> list[str]:
    """What is wrong with what the last attempt left behind."""
    found = []
    released, recorded = run.released, run.recorded()
    if not released <= recorded <= released + run.kills:
        found.append(f"{released} releases, {recorded} steps in the ledger, {run.kills} kills")
    try:
        checkpoint = Path(last_complete_checkpoint(run.folder))
    except ValueError:
        return [*found, f"step {run.saved} was saved and is lost"] if run.saved else found
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    if step < run.saved:
        found.append(f"step {run.saved} was saved, and the last complete checkpoint is {step}")
    try:
        statement = check_resumable(checkpoint, plan)
        read(checkpoint)
    except Exception as error:
        return [*found, f"{checkpoint.name} counts as good and is unreadable: {error!r}"]
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if not statement.steps == state.global_step == step or PrivacyStatement.load(checkpoint).spent.steps != step:
        found.append(f"checkpoint-{step} claims {statement.steps} steps at global step {state.global_step}")
    return found


def read(checkpoint: Path) -> None:
    """Everything that resuming reads."""
    tiny_clip().load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(checkpoint / name, weights_only=False)


def new_run(folder: Path) -> Run:
    run = Run(folder / f"run-{len(list(folder.glob('run-*')))}")
    run.folder.mkdir()
    return run


def finish(run: Run, facts: Facts, plan) -> None:
    """Lets the run go on to its end."""
    _, status = os.waitpid(start(run), 0)
    conclude(run, facts, plan, status)


def conclude(run: Run, facts: Facts, plan, status: int) -> None:
    if status:
        facts.problems.append(f"{run.folder.name} failed: {(run.folder / 'log').read_text()[-2000:]}")
        return
    facts.finals.append(run.final)
    facts.problems += problems(run, plan)
    facts.lost_steps += run.released - STEPS


def kill(run: Run, process: int, phase: str, durations: dict[str, float], chance: random.Random) -> int:
    """Kills the attempt at a random moment of a phase. Returns how it ended, which may have been before."""
    patience = 1 if phase == RESUMING else chance.randint(1, PATIENCE)
    while [name for name, _ in run.phases].count(phase) < patience:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    time.sleep(chance.uniform(0, durations[phase]))
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def durations_of(run: Run) -> dict[str, float]:
    """How long each phase of an undisturbed attempt takes, in seconds."""
    spent = {phase: [] for phase in PHASES}
    for (phase, since), (_, until) in itertools.pairwise(run.phases):
        spent[phase].append(until - since)
    return {phase: sum(times) / len(times) for phase, times in spent.items()}


def main():
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    # Before the first bar: every class of bars keeps the lock that it finds then.
    lock_progress_bars()
    run, facts = new_run(folder), Facts()
    plan = make_trainer(run).plan
    gc.freeze()
    began = time.monotonic()
    for _ in range(2):
        # The first is slower than all others.
        finish(run, facts, plan)
        durations = durations_of(run)
        run = new_run(folder)
    while sum(facts.kills.values()) < kills and not facts.problems:
        phase = chance.choice(PHASES)
        status = kill(run, start(run), phase, durations, chance)
        if os.WIFEXITED(status):
            conclude(run, facts, plan, status)
            run = new_run(folder)
            continue
        run.kills += 1
        facts.kills[run.phases[-1][0]] += 1
        facts.problems += problems(run, plan)
    finish(run, facts, plan)
    facts.seconds = time.monotonic() - began
    print(json.dumps(dataclasses.asdict(facts)))


if __name__ == "__main__":
    main()
