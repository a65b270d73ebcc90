"""Resuming and repeating `train`: the count goes on, under the same plan, with fresh randomness."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from checks import flat_weights
from factories import SAVING, StopAfter, arguments, pairs, tiny_clip
from peft import get_peft_model
from transformers import CLIPModel, TrainerCallback

from hf_dpclip import DPCLIPTrainer, PrivacyStatement, lora_config
from hf_dpclip.checkpoints import replace_statement
from hf_dpclip.privacy import Randomness
from hf_dpclip.resuming import check_resumable, last_complete_checkpoint


@pytest.fixture
def interrupted(make_trainer, tmp_path):
    """The folder of a run of 4 planned steps that ended after the second."""
    trainer = make_trainer(trainer_options={"callbacks": [StopAfter(2)]}, max_steps=4, logging_steps=1, **SAVING)
    trainer.train()
    return tmp_path


# ---- Which checkpoint ----


def checkpoint(folder, name: str, complete: bool = True):
    path = folder / name
    path.mkdir()
    if complete:
        (path / "trainer_state.json").write_text("{}", encoding="utf-8")
    return path


def test_the_last_checkpoint_is_the_one_of_most_steps(tmp_path):
    for steps in (9, 10, 2):
        checkpoint(tmp_path, f"checkpoint-{steps}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    checkpoint(tmp_path, "checkpoint-1")
    checkpoint(tmp_path, "checkpoint-2", complete=False)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("name", ["checkpoint-3-backup", "checkpoint-", "tmp-checkpoint-3"])
def test_other_folders_are_no_checkpoints(tmp_path, name):
    checkpoint(tmp_path, "checkpoint-1")
    checkpoint(tmp_path, name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("unfinished", [0, 2])
def test_without_a_complete_checkpoint_there_is_nothing_to_resume(make_trainer, tmp_path, unfinished):
    for steps in range(unfinished):
        checkpoint(tmp_path, f"checkpoint-{steps}", complete=False)
    with pytest.raises(
        ValueError, match=rf"no complete checkpoint in .*\({unfinished} unfinished\): check output_dir"
    ):
        make_trainer().train(resume_from_checkpoint=True)


# ---- The count goes on ----


@pytest.mark.parametrize("which", [True, "True", "checkpoint-2"], ids=["the_last", "as_text", "by_name"])
def test_a_resumed_run_continues_the_count(make_trainer, interrupted, which):
    trainer = make_trainer(max_steps=4, logging_steps=1, **SAVING)
    trainer.train(resume_from_checkpoint=str(interrupted / which) if which == "checkpoint-2" else which)
    assert trainer.state.global_step == 4
    assert trainer.privacy_spent().steps == 4
    assert trainer.privacy_spent().epsilon == trainer.plan.epsilon()
    logged = {entry["step"]: entry["epsilon"] for entry in trainer.state.log_history if "epsilon" in entry}
    assert [logged[step] for step in (3, 4)] == [trainer.plan.epsilon(step) for step in (3, 4)]


def test_which_of_two_runs_is_to_go_on_is_asked(make_trainer, tmp_path):
    """The end of a run from before has the higher number, and the other is the one that was killed."""
    make_trainer(max_steps=4, save_strategy="steps", save_steps=3).train()
    make_trainer(trainer_options={"callbacks": [StopAfter(2)]}, max_steps=4, **SAVING).train()
    resumed = make_trainer(max_steps=4, **SAVING)
    with pytest.raises(ValueError, match=r"checkpoint-4 is of one run, and checkpoint-2, .* of another: name the one"):
        resumed.train(resume_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.privacy_spent().steps == 4
    make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_adapters_are_not_resumed_from_a_whole_model(make_trainer, tmp_path):
    """They would stay as they are, beside the ε of the run."""
    make_trainer(max_steps=2, **SAVING).train()
    adapters = make_trainer(get_peft_model(tiny_clip(), lora_config(tiny_clip())), max_steps=2, **SAVING)
    with pytest.raises(ValueError, match=r"checkpoint-2 does not fit the model .*\(it has no adapters\)"):
        adapters.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("max_steps", [2, 4], ids=["finished", "unfinished"])
def test_a_whole_model_is_not_resumed_from_adapters(make_trainer, tmp_path, caplog, max_steps):
    callbacks = {"callbacks": [StopAfter(2)]}
    settings = {"target_epsilon": 3.0, "max_steps": max_steps, **SAVING}
    make_trainer(get_peft_model(tiny_clip(), lora_config(tiny_clip())), trainer_options=callbacks, **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 does not fit .*\(it has adapters, and the model has none\)"):
        make_trainer(**settings).train(resume_from_checkpoint=True)
    assert "is spent" not in caplog.text


def test_a_resumed_run_saves_the_count_of_both_parts(make_trainer, interrupted):
    make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)
    assert {n: PrivacyStatement.load(interrupted / f"checkpoint-{n}").steps for n in (2, 3, 4)} == {2: 2, 3: 3, 4: 4}


def test_a_resumed_run_starts_from_the_weights_of_the_checkpoint(make_trainer, interrupted):
    trainer = make_trainer(tiny_clip(seed=5), max_steps=4, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    saved = CLIPModel.from_pretrained(interrupted / "checkpoint-2")
    # Two steps of the default learning rate move a weight by 1e-4 or so, another initialisation by far more.
    assert (flat_weights(trainer.model) - flat_weights(saved)).abs().max() < 1e-3
    assert (flat_weights(tiny_clip(seed=5)) - flat_weights(saved)).abs().max() > 1e-2


def test_a_resumed_run_draws_fresh_randomness(make_trainer, interrupted):
    trained = []
    for _ in range(2):
        trainer = make_trainer(max_steps=4)
        trainer.train(resume_from_checkpoint=str(interrupted / "checkpoint-2"))
        trained.append(flat_weights(trainer.model))
    assert not torch.equal(*trained)


def test_a_resumed_run_differs_from_the_uninterrupted_one(make_trainer, tmp_path):
    whole = make_trainer(max_steps=4, **SAVING)
    whole.train()
    resumed = make_trainer(max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not torch.equal(flat_weights(whole.model), flat_weights(resumed.model))


def test_nothing_that_was_saved_holds_the_entropy_or_the_state_of_the_noise(make_trainer, tmp_path, monkeypatch):
    roots = []

    class Remembered(Randomness):
        def __init__(self, seed=None):
            super().__init__(seed)
            roots.append(self.entropy)

    monkeypatch.setattr("hf_dpclip.trainer.Randomness", Remembered)
    trainer = make_trainer(logging_steps=1, **SAVING)
    trainer.train()
    trainer.save_model()
    entropy = roots[-1]
    secrets = {
        "entropy in decimal": str(entropy).encode(),
        "entropy in hexadecimal": f"{entropy:x}".encode(),
        "entropy, low byte first": entropy.to_bytes(16, "little"),
        "entropy, high byte first": entropy.to_bytes(16, "big"),
        "state": trainer._mechanism.generators[0].get_state().numpy().tobytes()[24:88],
    }
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"rng_state.pth", "trainer_state.json", "training_args.bin", "privacy.json"} <= {f.name for f in files}
    found = [(path.name, name) for path in files for name, secret in secrets.items() if secret in path.read_bytes()]
    assert not found


def test_an_earlier_checkpoint_does_not_undo_what_this_process_has_spent(make_trainer, interrupted):
    trainer = make_trainer(max_steps=4, **SAVING)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(interrupted / "checkpoint-2"))
    assert trainer.privacy_spent().steps == 6


def test_the_checkpoint_of_another_run_does_not_undo_what_this_trainer_has_spent(make_trainer, interrupted):
    trainer = make_trainer(trainer_options={"callbacks": [StopAfter(3)]}, max_steps=4)
    trainer.train()
    trainer.pop_callback(StopAfter)
    trainer.train(resume_from_checkpoint=str(interrupted / "checkpoint-2"))
    assert [steps for _, steps in trainer.privacy_statement().runs] == [3, 4]
    assert trainer.privacy_spent().epsilon == trainer.plan.epsilon(3 + 4)


def test_the_checkpoint_of_a_run_without_a_name_counts_beside_this_one(make_trainer, interrupted):
    checkpoint = interrupted / "checkpoint-2"
    replace_statement(checkpoint, dataclasses.replace(PrivacyStatement.load(checkpoint), run=None))
    trainer = make_trainer(trainer_options={"callbacks": [StopAfter(3)]}, max_steps=4)
    trainer.train()
    trainer.pop_callback(StopAfter)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [steps for _, steps in trainer.privacy_statement().runs] == [3, 4]


def test_the_checkpoint_of_another_run_brings_its_earlier_runs_along(make_trainer, tmp_path):
    """However many this trainer has of its own, and although it took no step since."""
    other = make_trainer(max_steps=1, noise_multiplier=0.5, **SAVING)
    other.train()
    other.args.noise_multiplier = 1.0
    other.begin_run()
    other.train()
    expensive = other.privacy_spent().epsilon
    args = arguments(tmp_path / "own", max_steps=1, accountant="rdp")
    trainer = DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(64))
    trainer.train()
    trainer.begin_run()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.privacy_spent().epsilon > expensive
    assert {plan.noise_multiplier for plan, _ in trainer.privacy_statement().earlier_runs.values()} == {1.0, 0.5}


def test_a_run_that_spent_its_target_resumes_without_a_further_step(make_trainer):
    settings = {"target_epsilon": 2.0, "max_steps": 2, **SAVING}
    make_trainer(**settings).train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.privacy_spent().steps == 2
    assert resumed.privacy_spent().epsilon <= 2.0


# ---- Under the same plan ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": 1.5}, "noise_multiplier was 1.0, is 1.5"),
        ({"per_device_train_batch_size": 16}, "expected_batch_size was 8, is 16"),
        ({"gradient_accumulation_steps": 2}, "expected_batch_size was 8, is 16; num_microbatches was 1, is 2"),
        ({"microbatch_size": 4}, "num_microbatches was 1, is 2"),
        ({"max_steps": 6}, "num_steps was 4, is 6"),
        ({"max_grad_norm": 0.5}, "max_grad_norm was 1.0, is 0.5"),
        ({"target_delta": 1e-4}, "target_delta was .*, is 0.0001"),
        ({"accountant": "pld"}, "accountant was 'rdp', is 'pld'"),
        ({"clipping": "automatic"}, "clipping was 'flat', is 'automatic'"),
        ({"target_epsilon": 3.0}, "noise_multiplier was 1.0, is .*target_epsilon was None, is 3.0"),
        ({"non_private": True}, "noise_multiplier was 1.0, is 0.0.*non_private was False, is True"),
        ({"train_dataset": pairs(65)}, "num_examples was 64, is 65"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("interrupted")
def test_another_plan_is_refused(make_trainer, changes, message):
    model = tiny_clip()
    before = flat_weights(model)
    trainer = make_trainer(model, **{"max_steps": 4, **SAVING, **changes})
    with pytest.raises(ValueError, match=f"trained under another privacy plan: .*{message}.*Restore these settings"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.privacy_spent().steps == 0
    assert torch.equal(flat_weights(model), before)


@pytest.mark.usefixtures("interrupted")
def test_another_learning_rate_is_no_other_plan(make_trainer):
    trainer = make_trainer(max_steps=4, learning_rate=0.01, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.privacy_spent().steps == 4


def adapted(**settings):
    return get_peft_model(tiny_clip(), lora_config(tiny_clip(), **{"r": 2, **settings}))


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        ({"r": 4}, {}, "loading state_dict for PeftModel: .*size mismatch"),
        ({"text_tower": False}, {}, "a parameter group that doesn't match the size"),
        ({}, {"optim": "sgd"}, "its optimizer's state has no dampening"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_is_refused(make_trainer, tmp_path, settings, changes, message):
    make_trainer(adapted(), max_steps=4, **SAVING).train()
    other = make_trainer(adapted(**settings), max_steps=4, **{**SAVING, **changes})
    with pytest.raises(ValueError, match=f"checkpoint-2 does not fit the model .*{message}.*the rank of LoRA, optim"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "rmsprop"])
def test_other_optimizers_are_resumed_too(make_trainer, tmp_path, optim):
    make_trainer(max_steps=3, optim=optim, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    resumed = make_trainer(max_steps=3, optim=optim, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == resumed.privacy_spent().steps == 3


def test_a_checkpoint_without_a_statement_is_refused(make_trainer, interrupted):
    (interrupted / "checkpoint-2" / "privacy.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"privacy.json does not exist"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_with_an_edited_statement_is_refused(make_trainer, interrupted):
    path = interrupted / "checkpoint-2" / "privacy.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "steps": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"privacy.json is damaged or was edited"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_the_statement_of_a_checkpoint_of_the_same_plan_is_returned(make_trainer, interrupted):
    plan = make_trainer(max_steps=4, **SAVING).plan
    assert check_resumable(interrupted / "checkpoint-1", plan) == PrivacyStatement(plan, 1)


def test_a_run_resumed_with_a_noise_seed_is_not_private(make_trainer, interrupted):
    trainer = make_trainer(max_steps=4, noise_seed=1, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert PrivacyStatement.load(interrupted / "checkpoint-4").not_private_because


@pytest.mark.parametrize("setting", [{"noise_seed": 1}, {"log_private_statistics": True}], ids=lambda s: next(iter(s)))
def test_a_run_that_was_not_private_stays_so_when_resumed_without_what_made_it_so(make_trainer, tmp_path, setting):
    make_trainer(trainer_options={"callbacks": [StopAfter(2)]}, max_steps=4, **setting, **SAVING).train()
    resumed = make_trainer(max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    (reason,) = PrivacyStatement.load(tmp_path / "checkpoint-4").not_private_because
    assert reason.startswith(next(iter(setting)))


@pytest.mark.usefixtures("interrupted")
def test_a_new_run_beside_an_unfinished_one_is_warned(make_trainer, caplog):
    with caplog.at_level("WARNING"):
        make_trainer(max_steps=1).train()
    assert "checkpoint-2 is of a run that took 2 of its 4 steps" in caplog.text
    assert "resume_from_checkpoint=True" in caplog.text


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{", encoding="utf-8"), lambda path: path.unlink()])
def test_a_statement_that_cannot_be_read_is_in_nobodys_way(make_trainer, interrupted, damage):
    damage(interrupted / "checkpoint-2" / "privacy.json")
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert trainer.privacy_spent().steps == 1


@pytest.mark.usefixtures("interrupted")
def test_neither_a_resumed_run_is_nor_a_new_one_beside_a_finished_one(make_trainer, caplog):
    with caplog.at_level("WARNING"):
        make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=True)
        trainer = make_trainer(max_steps=1)
        trainer.train()
        trainer.train()
    assert "is of a run that took" not in caplog.text


# ---- Several calls of train ----


def test_a_second_training_composes_with_the_first(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    trainer.train()
    assert trainer.privacy_spent().steps == 6
    assert trainer.privacy_spent().epsilon == trainer.plan.epsilon(6)


def test_a_second_training_stops_at_the_target(make_trainer, caplog):
    trainer = make_trainer(target_epsilon=2.0, max_steps=3)
    trainer.train()
    before = flat_weights(trainer.model)
    output = trainer.train()
    assert output.global_step == 3
    assert math.isnan(output.training_loss)
    assert torch.equal(flat_weights(trainer.model), before)
    assert trainer.privacy_spent().steps == 3
    assert trainer.privacy_spent().epsilon <= 2.0
    assert "target_epsilon=2.0 is spent" in caplog.text


def test_training_stops_at_the_target_although_the_loop_would_go_on(make_trainer):
    class Longer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            state.max_steps = 5

    options = {"callbacks": [Longer()]}
    trainer = make_trainer(trainer_options=options, target_epsilon=2.0, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == trainer.privacy_spent().steps == 2


def test_no_callback_can_push_training_beyond_the_plan(make_trainer):
    """Which a ledger may have allowed, and no more."""

    class Longer(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.max_steps = 5

    trainer = make_trainer(trainer_options={"callbacks": [Longer()]}, max_steps=2)
    with pytest.raises(RuntimeError, match="another step would be more than were planned"):
        trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_no_callback_can_push_training_beyond_the_target(make_trainer):
    class Unstoppable(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = False

    trainer = make_trainer(target_epsilon=2.0, max_steps=2)
    # Added last, it has the last word.
    trainer.add_callback(Unstoppable())
    with pytest.raises(RuntimeError, match=r"another step would exceed target_epsilon=2\.0"):
        trainer.train()
    assert trainer.privacy_spent().steps == 2


def test_a_copied_checkpoint_is_as_good_as_the_original(make_trainer, interrupted):
    shutil.copytree(interrupted / "checkpoint-2", interrupted / "elsewhere")
    trainer = make_trainer(max_steps=4, **SAVING)
    trainer.train(resume_from_checkpoint=str(interrupted / "elsewhere"))
    assert trainer.privacy_spent().steps == 4
