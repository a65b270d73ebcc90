"""Checkpoints are complete or do not count, and one that was damaged is refused by the name of the file."""

import json
import shutil

import pytest
import torch
from checks import flat_weights
from factories import SAVING, arguments, pairs, tiny_clip
from transformers import CLIPModel

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.checkpoints import SEAL_NAME, check_undamaged, seal, set_aside, why_incomplete
from hf_dpclip.resuming import last_complete_checkpoint


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "config.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with four checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    args = arguments(folder, accountant="rdp", max_steps=4, **SAVING)
    DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64)).train()
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """The last one, in a copy of the folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoint-4"


def flip(path):
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_checkpoint_is_complete(checkpoint):
    assert why_incomplete(checkpoint) is None
    check_undamaged(checkpoint)


def test_the_seal_covers_every_file_but_itself_and_the_last(checkpoint):
    sealed = json.loads((checkpoint / SEAL_NAME).read_text())["sha256"]
    assert sealed.keys() == {path.name for path in checkpoint.iterdir()} - {SEAL_NAME, "trainer_state.json"}
    assert {*FILES, "privacy.json"} <= sealed.keys()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate], ids=["edited", "truncated"])
def test_a_damaged_file_is_refused_by_name(make_trainer, checkpoint, name, damage):
    damage(checkpoint / name)
    message = (
        rf"checkpoint-4 is not a complete checkpoint: {name} is not what was saved. "
        "Restore it .* or remove this folder"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", [flip, truncate], ids=["edited", "truncated"])
def test_a_damaged_statement_is_refused_by_name(make_trainer, checkpoint, damage):
    damage(checkpoint / "privacy.json")
    with pytest.raises(ValueError, match=r"privacy.json is (damaged or was edited|not what was saved)"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_a_statement_that_was_edited_without_contradiction_is_refused(make_trainer, checkpoint):
    shutil.copy(checkpoint.parent / "checkpoint-1" / "privacy.json", checkpoint)
    with pytest.raises(ValueError, match=r"privacy.json is not what was saved"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_an_edited_state_of_training_is_refused(make_trainer, checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": 1}))
    with pytest.raises(ValueError, match=r"trainer_state.json has step 1, and 4 was saved"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["trainer_state.json", SEAL_NAME])
def test_a_checkpoint_that_was_cut_short_is_passed_over_or_refused_by_name(make_trainer, checkpoint, name, caplog):
    truncate(checkpoint / name)
    with pytest.raises(ValueError, match=r"checkpoint-4 is not a complete checkpoint: .*trainer_state.json"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    resumed = make_trainer(max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.privacy_spent().steps == 4
    assert "checkpoint-4 beside" in caplog.text
    check_undamaged(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_whose_deletion_was_begun_does_not_count(checkpoint, name):
    (checkpoint / name).unlink()
    assert why_incomplete(checkpoint) == f"{name} is missing"
    assert last_complete_checkpoint(checkpoint.parent).endswith("checkpoint-3")


def test_a_finished_run_resumes_without_a_step_and_with_its_weights(make_trainer, checkpoint):
    resumed = make_trainer(tiny_clip(seed=5), max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.privacy_spent().steps, resumed.state.global_step) == (4, 4)
    assert torch.equal(flat_weights(resumed.model), flat_weights(CLIPModel.from_pretrained(checkpoint)))


# ---- A checkpoint in the place of another ----


def test_a_complete_checkpoint_stays_until_the_one_that_replaces_it_is_complete(checkpoint):
    set_aside(checkpoint)
    aside = checkpoint.with_name("_replaced-checkpoint-4")
    check_undamaged(aside)
    assert not checkpoint.exists()
    # The new one was cut short, and is written once more.
    checkpoint.mkdir()
    set_aside(checkpoint)
    check_undamaged(aside)
    assert not checkpoint.exists()


def test_nothing_of_the_replaced_checkpoint_is_left_in_the_end(make_trainer, checkpoint):
    (checkpoint.parent / "checkpoint-1" / "old.bin").touch()
    make_trainer(max_steps=4, **SAVING).train()
    assert not list(checkpoint.parent.glob("**/old.bin"))
    assert not list(checkpoint.parent.glob("_replaced*"))
    for step in range(1, 5):
        check_undamaged(checkpoint.parent / f"checkpoint-{step}")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_was_cut_short_unnoticed_is_not_sealed(checkpoint, name):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{name} is cut short"):
        seal(checkpoint, step=4)
