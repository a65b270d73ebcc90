"""What is said of weights stays true when arguments change, folders are used again, and settings are put back."""

import copy
import json
import logging
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from factories import pairs, raw_pairs, tiny_clip, tiny_dual_encoder, tiny_processor
from plans import plan
from transformers import TrainerCallback

from hf_dpclip import DPCLIPTrainer, ImageTextCollator, PrivacyPlan, PrivacyStatement
from hf_dpclip.forward_pass import OneByOne
from hf_dpclip.held_out import check_evaluation_data
from hf_dpclip.privacy import STATEMENT_NAME
from hf_dpclip.reporting import search_summary


REASONS = ("noise_seed is set",)


def test_weights_of_which_nothing_is_known_do_not_inherit_a_claim(make_trainer, tmp_path):
    trained = make_trainer()
    trained.train()
    trained.save_model(tmp_path / "saved")
    evaluating = DPCLIPTrainer(tiny_clip(1), trained.args, eval_dataset=pairs(8))
    evaluating.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / STATEMENT_NAME).exists()


def test_raw_statistics_that_were_logged_once_stay_logged(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert trainer.privacy_statement().not_private_because == ()
    trainer.args.log_private_statistics = True
    trainer.evaluate(trainer.train_dataset)
    trainer.args.log_private_statistics = False
    assert "raw statistics" in trainer.privacy_statement().not_private_because[0]


def edited(path, edit) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["plan"].pop("accountant_version"),
        lambda values: values.pop("run"),
        lambda values: values.update(steps=True),
        lambda values: values["plan"].update(privacy_unit=5),
        lambda values: values["plan"].update(privacy_unit="record) |\n| x"),
        lambda values: values["plan"].update(non_private=True),
        lambda values: values["plan"].update(num_microbatches=True),
    ],
)
def test_an_impossible_statement_is_no_statement(tmp_path, edit):
    PrivacyStatement(plan(), 1).save(tmp_path)
    edited(tmp_path / STATEMENT_NAME, edit)
    with pytest.raises(ValueError, match="is damaged or was edited"):
        PrivacyStatement.load(tmp_path)


def test_epsilon_is_not_shown_without_what_takes_it_back():
    assert "NOT PRIVATE: noise_seed is set" in search_summary(PrivacyStatement(plan(), 3, REASONS))
    assert "NOT PRIVATE" not in search_summary(PrivacyStatement(plan(), 3))


def test_nor_is_it_in_notebooks(make_trainer):
    notebook = pytest.importorskip("hf_dpclip.notebook")
    trainer, callback, lines = make_trainer(), notebook.PrivacyNotebookProgressCallback(), []
    callback.training_tracker = SimpleNamespace(write_line=lines.append)
    for logs in ({"epsilon": 1.0}, {"epsilon": 1.0, "NOT PRIVATE": 1.0}):
        callback.on_log(trainer.args, trainer.state, None, logs=logs)
    assert [line["Epsilon"] for line in lines] == [1.0, "NOT PRIVATE"]


@pytest.mark.parametrize("ids", [["1", "9"], [2, 9]], ids=str)
def test_a_unit_is_the_same_as_a_number_and_as_a_text(ids):
    private = pairs(3).add_column("patient", [1, 2, 3])
    held_out = pairs(2, seed=1).add_column("patient", ids)
    with pytest.raises(ValueError, match="1 records of eval_dataset have the 'patient'"):
        check_evaluation_data(private, held_out, "patient")


def round_by_the_new_name():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "let_round",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        pytest.param(
            round_by_the_new_name,
            marks=pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has no such name"),
        ),
    ],
    ids=["old name", "new name"],
)
def test_products_are_not_rounded(make_trainer, caplog, let_round):
    let_round()
    try:
        with caplog.at_level(logging.WARNING):
            make_trainer().train()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "it is set back to 'highest'" in caplog.text


def test_a_refused_run_changes_nothing(make_trainer):
    dataset = pairs(64).add_column("patient", [number // 2 for number in range(64)])
    trainer = make_trainer(train_dataset=dataset, privacy_unit_column="patient")
    trainer.train()
    trainer.args.privacy_unit_column = None
    with pytest.raises(ValueError, match="there is no ε for both together"):
        trainer.begin_run()
    with pytest.raises(ValueError, match="privacy_unit_column was 'patient' when the privacy plan was made"):
        trainer.train()
    assert len(trainer._units) == trainer.plan.num_examples == 32


def test_what_evaluation_reads_of_the_private_records_it_reads_once(make_trainer, monkeypatch):
    looked_at = []
    monkeypatch.setattr("hf_dpclip.evaluating.check_evaluation_data", lambda *args: looked_at.append(args[1]))
    held_out = {"near": pairs(4, seed=1), "far": pairs(4, seed=2)}
    trainer = make_trainer(trainer_options={"eval_dataset": held_out})
    for _ in range(2):
        trainer.evaluate()
        trainer.evaluate("near")
    other = pairs(4, seed=3)
    trainer.evaluate(other)
    assert [*map(id, looked_at)] == [*map(id, (*held_out.values(), other))]


def test_raw_statistics_of_a_prediction_stay_known_too(make_trainer):
    trainer = make_trainer(log_private_statistics=True)
    trainer.predict(trainer.train_dataset)
    trainer.args.log_private_statistics = False
    assert "raw statistics" in trainer.privacy_statement().not_private_because[0]


def test_whatever_is_logged_by_others_is_left_as_it_is(make_trainer):
    class Popping(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs.pop("epsilon", None)

    trainer = make_trainer(trainer_options={"callbacks": [Popping()]}, logging_steps=1)
    trainer.train()
    mine = {"loss": 1.0, "epsilon": 2.0}
    trainer.log(mine)
    trainer.log(MappingProxyType(mine))
    assert mine == {"loss": 1.0, "epsilon": 2.0, "epoch": trainer.state.epoch}


def test_calibration_finds_the_noise_of_very_long_runs():
    long = PrivacyPlan.calibrate(
        target_epsilon=3.0, num_examples=1000, expected_batch_size=64, num_microbatches=8, num_steps=100_000
    )
    assert 0.99 * 3 < long.epsilon() <= 3


def test_the_files_of_a_tokenizer_do_not_tell_whether_anybody_was_drawn(make_trainer, tmp_path):
    """It remembers how it was called, for the first time by the first microbatch that has records."""
    collator = ImageTextCollator(tiny_processor())
    options = {"data_collator": collator, "processing_class": collator.processor}
    # Of this one, no image is collated to compare its size.
    trainer = make_trainer(tiny_dual_encoder(), raw_pairs(8), options, per_device_train_batch_size=2)
    trainer.save_model(tmp_path / "before")
    collator([raw_pairs(2)[0]])
    trainer.save_model(tmp_path / "after")
    before, after = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("before", "after"))
    assert before == after


def test_microbatches_can_be_kept_apart(make_trainer):
    """Then what one adds to the sum does not depend on what else there is, to the last bit."""
    trainer = make_trainer(microbatch_size=2, vectorized=False, max_steps=1)
    trainer.train()
    assert isinstance(trainer._forward_pass, OneByOne)
    dataset = trainer._microbatch_dataset()
    first, second = (dataset[[(seed, rows)]] for seed, rows in ((1, rows_of(0, 1)), (2, rows_of(2, 3, 4))))

    def summed(forward_batch):
        mechanism = trainer._mechanism
        mechanism._sum = [None] * len(mechanism.parameters)
        trainer._forward_pass(copy.deepcopy(forward_batch))
        return mechanism._sum

    both = summed([*first, *second])
    apart = [one + other for one, other in zip(summed(first), summed(second))]
    assert all(torch.equal(total, parts) for total, parts in zip(both, apart))


def rows_of(*numbers):
    return torch.tensor(numbers).numpy()
