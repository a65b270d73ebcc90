"""What dies beside the training itself: a full disk, a process that loads data, a record, another process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from disk import room_for
from factories import IMAGE_SIZE, SAVING, arguments, pairs, tiny_clip, tiny_processor
from PIL import Image as PILImage
from scripts import DISTRIBUTED
from transformers import TrainerCallback

from hf_dpclip import DPCLIPTrainer, PrivacyStatement
from hf_dpclip.checkpoints import why_incomplete
from hf_dpclip.privacy import LEDGER_NAME, Ledger
from hf_dpclip.resuming import last_complete_checkpoint


def recorded_steps(folder: Path) -> int:
    return sum(record.steps for record in Ledger(folder / LEDGER_NAME).runs())


# ---- The disk ----


class Full(TrainerCallback):
    """From the second step on, no file has room for what is written to the checkpoint's file of this name."""

    def __init__(self, monkeypatch, name: str):
        self.monkeypatch = monkeypatch
        self.name = name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            # Writing to this device always fails so.
            path = Path(args.output_dir, "checkpoint-2", self.name)
            path.parent.mkdir()
            path.symlink_to("/dev/full")
            self.monkeypatch.setattr("hf_dpclip.checkpoints.set_aside", lambda checkpoint: None)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_disk_that_is_full_while_saving_costs_that_checkpoint_only(make_trainer, tmp_path, monkeypatch, name):
    trainer = make_trainer(trainer_options={"callbacks": [Full(monkeypatch, name)]}, max_steps=4, **SAVING)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be saved .*\) and does not count .*save_total_limit=2"):
        trainer.train()
    monkeypatch.undo()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert recorded_steps(tmp_path) == trainer.privacy_spent().steps == 2
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = make_trainer(max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.privacy_spent().epsilon == resumed.plan.epsilon()
    assert recorded_steps(tmp_path) == 5


def test_weights_that_do_not_fit_on_the_disk_are_an_error_with_the_remedy(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, **SAVING)
    with room_for(20_000), pytest.raises(OSError, match=r"checkpoint-1 could not be saved .*save_total_limit=2"):
        trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir()
    with pytest.raises(ValueError, match=r"no complete checkpoint in .* \(1 unfinished\)"):
        trainer.train(resume_from_checkpoint=True)


def test_weights_are_never_beside_the_claim_of_others(make_trainer, tmp_path, monkeypatch):
    make_trainer(noise_multiplier=9.0).save_model()
    trainer = make_trainer(noise_multiplier=0.1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match=r"what the weights beside it cost is not known"):
        PrivacyStatement.load(tmp_path)


def test_weights_of_unknown_cost_are_not_beside_the_claim_of_others_either(make_trainer, tmp_path, caplog):
    make_trainer().save_model()
    DPCLIPTrainer(tiny_clip(), arguments(tmp_path)).save_model()
    assert "privacy.json in" in caplog.text and "is removed" in caplog.text
    assert not (tmp_path / "privacy.json").exists()


# ---- Loading data ----


class Deadly(torch.utils.data.Dataset):
    """Kills the process that reads its records, unless that is the one that made it."""

    def __init__(self):
        self.pairs = pairs(64)
        self.made_by = os.getpid()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, record):
        if os.getpid() != self.made_by:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.pairs[record]


def test_a_data_loading_process_that_dies_ends_the_run_with_the_remedy(make_trainer, tmp_path):
    trainer = make_trainer(train_dataset=Deadly(), dataloader_num_workers=1)
    remedy = (
        r"DataLoader worker .* A process that loads data died.*dataloader_num_workers.*resume_from_checkpoint=True"
    )
    with pytest.raises(RuntimeError, match=remedy):
        trainer.train()
    assert recorded_steps(tmp_path) == trainer.privacy_spent().steps == 0


@pytest.fixture
def images(tmp_path):
    """64 image files with captions, and the path of the one that is going to spoil."""
    paths = [tmp_path / f"{number}.png" for number in range(64)]
    for number, path in enumerate(paths):
        PILImage.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (number, 0, 0)).save(path)
    columns = {"image": [str(path) for path in paths], "text": ["a b"] * 64}
    return Dataset.from_dict(columns).cast_column("image", Image()), paths[7]


class Spoil(TrainerCallback):
    """An image file is cut short when the second epoch begins."""

    def __init__(self, path: Path):
        self.path = path

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self.path.write_bytes(self.path.read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_in_the_second_epoch_is_named(make_trainer, tmp_path, images, workers):
    dataset, path = images
    whole = path.read_bytes()
    settings = {"per_device_train_batch_size": 48, "max_steps": 14, "save_strategy": "epoch"}
    options = {"processing_class": tiny_processor(), "callbacks": [Spoil(path)]}
    trainer = make_trainer(train_dataset=dataset, trainer_options=options, dataloader_num_workers=workers, **settings)
    # It is drawn in one of the last 12 steps, but once in 10^7 runs.
    with pytest.raises(ValueError, match=r"record 7 of the dataset .*7.png. cannot be read .*goes on, with"):
        trainer.train()
    taken = trainer.privacy_spent().steps
    assert recorded_steps(tmp_path) == taken >= 2
    saved = PrivacyStatement.load(last_complete_checkpoint(tmp_path)).steps
    path.write_bytes(whole)
    resumed = make_trainer(train_dataset=dataset, trainer_options={"processing_class": tiny_processor()}, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.privacy_spent().epsilon == resumed.plan.epsilon()
    assert recorded_steps(tmp_path) == taken + 14 - saved


# ---- Another process ----

# Seconds in which the death of one process has ended the others. It takes gloo less than one.
NO_HANG = 60


@pytest.fixture(scope="module")
def bereaved(tmp_path_factory):
    """The folder, the exit code and the last words of a process whose companion died, and how long it outlived it."""
    folder = tmp_path_factory.mktemp("bereaved")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = DISTRIBUTED / "dying.py"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    processes[1].communicate(timeout=300)
    began = time.monotonic()
    _, said = processes[0].communicate(timeout=300)
    return folder, processes[0].returncode, said, time.monotonic() - began


def test_when_one_of_two_processes_dies_the_other_ends_with_the_remedy(bereaved):
    _, code, said, seconds = bereaved
    assert code == 1
    assert "Another process of this run died" in said.splitlines()[-1]
    assert seconds < NO_HANG


def test_the_step_in_which_a_process_died_is_counted_and_the_last_checkpoint_is_complete(bereaved):
    folder = bereaved[0]
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert why_incomplete(folder / "checkpoint-2") is None
    (record,) = Ledger(folder / LEDGER_NAME).runs()
    assert record.steps == 3
