"""The ledger: every step is in it before it is taken, whatever happens, and all runs on a dataset add up."""

import errno
import fcntl
import itertools
import json
import math
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

import dp_accounting
import pytest
import torch
from checks import flat_weights
from disk import room_for
from dp_accounting import pld
from factories import SAVING, pairs, tiny_clip
from plans import plan
from scripts import DISTRIBUTED
from transformers import TrainerCallback

from hf_dpclip import PrivacyPlan, PrivacyStatement
from hf_dpclip.cli import main
from hf_dpclip.privacy import LEDGER_NAME, GaussianMechanism, Ledger, totals
from hf_dpclip.spending import recorded


PLAN = plan()


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


def spend(ledger, run: str = "run", steps: int = 20, plan: PrivacyPlan = PLAN, **options) -> None:
    """A run of so many steps, from its beginning to an orderly end."""
    recording = ledger.begin(run, plan, planned=plan.num_steps, **options)
    for _ in range(steps):
        recording.before_step()
    recording.end()


def independent_epsilon(delta: float, *runs: tuple[float, float, int]) -> float:
    """Runs of (q, σ, steps), composed without the code that is tested."""
    account = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for q, sigma, steps in runs:
        step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        account.compose(step, steps)
    return account.get_epsilon(delta)


# ---- Before a step is taken ----


@pytest.mark.parametrize(("planned", "block"), [(20, 1), (100, 1), (250, 2), (1000, 10)])
def test_a_step_is_recorded_before_it_is_taken_and_at_most_a_block_ahead(ledger, planned, block):
    recording = ledger.begin("run", plan(), planned)
    for taken in range(1, 26):
        recording.before_step()
        assert taken <= ledger.runs()[0].steps < taken + block


def test_an_orderly_end_gives_back_what_was_not_taken(ledger):
    spend(ledger, steps=13, plan=plan(num_steps=1000))
    (record,) = ledger.runs()
    assert (record.steps, record.reserved) == (13, 0)


def test_a_run_that_goes_on_beyond_its_plan_is_recorded(ledger):
    spend(ledger, steps=31)
    assert ledger.runs()[0].steps == 31


def test_a_run_takes_few_lines_whatever_its_length(ledger):
    spend(ledger, steps=5000, plan=plan(num_steps=5000))
    assert len(ledger.path.read_text().splitlines()) <= 103


def test_a_release_that_fails_is_counted(make_trainer, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(GaussianMechanism, "release", fail)
    trainer = make_trainer()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.privacy_spent().steps == Ledger(tmp_path / LEDGER_NAME).runs()[0].steps == 1


# ---- Torn writes and damage ----


def test_a_last_line_that_was_cut_short_does_not_count_and_is_repaired(ledger):
    recording = ledger.begin("run", plan(), 20)
    recording.before_step()
    whole = ledger.path.read_bytes()
    recording.before_step()
    torn = ledger.path.read_bytes()
    for end in range(len(whole), len(torn)):
        ledger.path.write_bytes(torn[:end])
        assert ledger.runs()[0].steps == 1
    ledger.begin("other", plan(), 20)
    assert [record.run for record in ledger.runs()] == ["run", "other"]
    assert ledger.path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"\0\0\0",
        b"[]",
        b"null",
        b'{"event": "other"}',
        b'{"event": ["steps"], "run": "run", "part": 0, "steps": 3}',
        b'{"event": "steps", "run": "run", "part": 0}',
        b'{"event": "steps", "run": "run", "part": 1, "steps": 3}',
        b'{"event": "steps", "run": "unknown", "part": 0, "steps": 3}',
        b'{"event": "steps", "run": "run", "part": 0, "steps": -3}',
        b'{"event": "steps", "run": "run", "part": 0, "steps": "3"}',
        b'{"event": "steps", "run": "run", "part": 0, "steps": 3.5}',
        b'{"event": "begin", "run": "run", "part": 1, "steps": 3}',
    ],
)
def test_a_damaged_line_is_an_error_that_names_file_and_line(ledger, damaged):
    spend(ledger, steps=1)
    lines = ledger.path.read_bytes().split(b"\n")
    ledger.path.write_bytes(b"\n".join([lines[0], damaged, *lines[1:]]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(ledger.path))}, line 2, is damaged .*Restore the file"):
        ledger.runs()
    before = ledger.path.read_bytes()
    with pytest.raises(ValueError, match=r"line 2, is damaged"):
        ledger.begin("other", plan(), 20)
    assert ledger.path.read_bytes() == before


def test_a_plan_without_what_its_epsilon_follows_from_is_damage(ledger):
    spend(ledger, steps=1)
    ledger.path.write_text(ledger.path.read_text().replace("noise_multiplier", "noise"))
    with pytest.raises(ValueError, match=r"line 1, is damaged \('noise_multiplier'\)"):
        ledger.runs()


def test_what_is_no_ledger_is_refused(ledger):
    with pytest.raises(FileNotFoundError, match=r"ledger.jsonl does not exist: name a ledger, or the output folder"):
        ledger.runs()
    nearby = ledger.path.parent / "adapter" / ledger.path.name
    nearby.parent.mkdir()
    nearby.touch()
    with pytest.raises(FileNotFoundError, match=r"of a run \(there is one in .*adapter\)\."):
        ledger.runs()
    nearby.rename(ledger.path)
    with pytest.raises(FileNotFoundError, match=rf"of a run \(there is one in {ledger.path.parent}\)\."):
        Ledger(nearby).runs()


# ---- A full disk ----


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_is_an_error_before_the_step_and_leaves_the_ledger_whole(ledger, room):
    recording = ledger.begin("run", plan(), 20)
    before = ledger.path.read_bytes()
    with (
        room_for(len(before) + room),
        pytest.raises(OSError, match=r"ledger.jsonl could not be written \(.*Make room"),
    ):
        recording.before_step()
    assert ledger.path.read_bytes() == before
    recording.before_step()
    assert ledger.runs()[0].steps == 1


def test_what_the_disk_does_not_confirm_was_not_written(ledger, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    recording = ledger.begin("run", plan(), 20)
    before = ledger.path.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device\), so no further step was taken"):
        recording.before_step()
    assert ledger.path.read_bytes() == before


def test_a_full_disk_stops_training_before_the_step(make_trainer, monkeypatch):
    def full(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer()
    before = flat_weights(trainer.model)
    monkeypatch.setattr(Ledger, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert torch.equal(flat_weights(trainer.model), before)
    assert trainer.privacy_spent().steps == 0


def test_a_disk_that_is_full_at_the_end_only_costs_the_settlement(make_trainer, tmp_path, monkeypatch, caplog):
    write = Ledger.write

    def full_at_the_end(self, event):
        if event["event"] == "end":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, event)

    monkeypatch.setattr(Ledger, "write", full_at_the_end)
    make_trainer().train()
    assert "The ledger has a few steps more than were taken" in caplog.text
    assert Ledger(tmp_path / LEDGER_NAME).runs()[0].steps == 2


def test_a_ledger_that_cannot_be_opened_is_an_error_with_the_remedy(make_trainer, tmp_path):
    (tmp_path / "_file").touch()
    with pytest.raises(OSError, match=r"_file/ledger.jsonl could not be opened .*set ledger_path to a file"):
        make_trainer(ledger_path=str(tmp_path / "_file" / "ledger.jsonl")).train()


def test_a_ledger_that_was_removed_stops_the_run(ledger):
    recording = ledger.begin("run", plan(), 20)
    ledger.path.unlink()
    with pytest.raises(OSError, match=r"could not be opened .*do not remove it while a run lasts"):
        recording.before_step()


# ---- Several processes ----


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A ledger that two processes wrote to at once until they were killed, and what each of them said."""
    folder = tmp_path_factory.mktemp("crowded")
    script = DISTRIBUTED / "spending.py"
    processes = [
        subprocess.Popen([sys.executable, str(script), str(folder), name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    while len(list(folder.glob("*-is-ready"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (folder / "go").touch()
    said = [process.communicate(timeout=120)[0] for process in processes]
    return Ledger(folder / "ledger.jsonl"), said


def test_two_processes_lose_no_line_of_each_other(crowded):
    ledger, _ = crowded
    steps = {record.run: record.steps for record in ledger.runs() if record.datasets == ("common",)}
    assert steps == {f"{name}-{number}": 7 for name in "ab" for number in range(20)}


def test_two_processes_did_write_at_the_same_time(crowded):
    ledger, _ = crowded
    writers = [json.loads(line)["run"][0] for line in ledger.path.read_text().splitlines()]
    assert sum(first != second for first, second in itertools.pairwise(writers)) > 2


def test_a_crash_between_recording_and_stepping_counts_the_step(crowded):
    ledger, _ = crowded
    crashed = [record for record in ledger.runs() if record.datasets == ("crashed",)]
    assert [(record.steps, record.reserved) for record in crashed] == [(2, 18)] * 2


def test_a_reader_waits_for_who_is_writing(tmp_path):
    ledger = Ledger(tmp_path / LEDGER_NAME)
    ledger.begin("run", plan(), 20).before_step()
    with ThreadPoolExecutor(1) as reader, open(ledger.path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        read = reader.submit(ledger.runs)
        with pytest.raises(NotYet):
            read.result(timeout=0.3)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert len(read.result(timeout=60)) == 1


def test_of_two_runs_that_only_fit_the_budget_one_at_a_time_one_is_refused(crowded):
    ledger, said = crowded
    assert sorted("ledger_epsilon" in text for text in said) == [False, True]
    assert len([record for record in ledger.runs() if record.run.endswith("last")]) == 1


# ---- The total ----


def test_the_total_is_the_composition_of_all_steps_at_the_smallest_delta(ledger):
    plans = [
        plan(),
        plan(noise_multiplier=0.8, expected_batch_size=20, accountant="rdp", target_delta=1e-6),
        plan(num_microbatches=100, max_grad_norm=3.0),
    ]
    for number, each in enumerate(plans):
        spend(ledger, f"run-{number}", 10 * (number + 1), each)
    (total,) = totals(ledger.runs())
    runs = [(0.1, 1.25, 10), (0.02, 0.8, 20), (0.1, 1.25, 30)]
    assert total.delta == 1e-6
    assert total.epsilon == pytest.approx(independent_epsilon(1e-6, *runs), rel=2e-3)
    assert totals(ledger.runs(), 1e-5)[0].epsilon == pytest.approx(independent_epsilon(1e-5, *runs), rel=2e-3)


def test_the_total_is_less_than_the_sum_and_more_than_each(ledger):
    for number in range(4):
        spend(ledger, f"run-{number}")
    (total,) = totals(ledger.runs())
    single = [record.epsilon for record in total.runs]
    assert single == [plan().epsilon(20)] * 4
    assert max(single) < total.epsilon < sum(single)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_impossible_delta_is_refused(ledger, delta):
    spend(ledger, steps=1)
    with pytest.raises(ValueError, match=r"delta=.* is not possible: it must be between 0 and 1"):
        totals(ledger.runs(), delta)


@pytest.mark.parametrize(
    ("names", "fingerprints", "groups"),
    [
        ((None, None), (None, None), 1),
        (("scans", "scans"), ("1", "2"), 1),
        (("scans", "slides"), (None, None), 2),
        (("scans", "slides"), ("1", "2"), 2),
        (("scans", "slides"), ("1", "1"), 1),
        (("scans", None), ("1", "2"), 2),
        (("scans", None, "slides"), ("1", "2", "2"), 2),
        (("scans", "slides", None, None), ("1", "2", "1", "2"), 1),
    ],
)
def test_runs_that_share_a_name_or_a_fingerprint_add_up(ledger, names, fingerprints, groups):
    for number, (name, fingerprint) in enumerate(zip(names, fingerprints)):
        spend(ledger, f"run-{number}", steps=1, dataset=name, fingerprint=fingerprint)
    found = totals(ledger.runs())
    assert len(found) == groups
    assert sorted(record.run for total in found for record in total.runs) == [f"run-{n}" for n in range(len(names))]


def test_runs_that_protect_different_units_have_no_common_epsilon(ledger):
    spend(ledger, "records", steps=1)
    spend(ledger, "patients", steps=1, plan=plan(privacy_unit="patient"))
    (total,) = totals(ledger.runs())
    assert total.epsilon == total.epsilon_of_private_runs == math.inf
    assert total.privacy_units == ("record", "patient")


def test_a_run_that_is_not_private_leaves_no_total_but_that_of_the_others(ledger):
    spend(ledger, "private")
    spend(ledger, "comparison", plan=plan(noise_multiplier=0.0, non_private=True), not_private_because=["no noise"])
    (total,) = totals(ledger.runs())
    assert total.epsilon == math.inf
    assert total.epsilon_of_private_runs == pytest.approx(independent_epsilon(1e-5, (0.1, 1.25, 20)), rel=2e-3)
    assert [record.run for record in total.not_private_runs] == ["comparison"]
    assert total.not_private_runs[0].epsilon == math.inf


# ---- The budget ----


def test_a_run_that_would_exceed_the_budget_is_refused_before_it_begins(ledger):
    budget = 1.2 * plan().epsilon()
    spend(ledger, "first", dataset="scans", budget=budget)
    before = ledger.path.read_bytes()
    with pytest.raises(
        ValueError, match=r"the runs on dataset scans in .* \(2, with this one\) would come to ε = .*lower"
    ):
        ledger.begin("second", plan(), 20, dataset="scans", budget=budget)
    assert ledger.path.read_bytes() == before
    spend(ledger, "elsewhere", dataset="slides", budget=budget)
    spend(ledger, "shorter", steps=1, plan=plan(num_steps=1), dataset="scans", budget=budget)


def test_a_run_that_goes_on_beyond_the_budget_is_told_what_helps(ledger):
    """Its plan cannot be changed any more."""
    budget = 1.02 * plan().epsilon()
    spend(ledger, "interrupted", steps=15, budget=budget)
    with pytest.raises(
        ValueError, match=r"steps after a checkpoint that are taken again; raise ledger_epsilon"
    ) as over:
        ledger.begin("interrupted", plan(), 10, budget=budget)
    assert "lower target_epsilon" not in str(over.value)


def test_a_run_that_has_not_ended_counts_in_full_until_it_is_closed(ledger):
    budget = 1.2 * plan().epsilon()
    ledger.begin("crashed", plan(), 20).before_step()
    with pytest.raises(ValueError, match=r"since they have not ended: crashed\. .*hf-dpclip ledger .* --close RUN"):
        ledger.begin("second", plan(), 20, budget=budget)
    ledger.close("cra")
    assert ledger.runs()[0].steps == 1
    spend(ledger, "second", budget=budget)


def test_a_resumed_run_counts_what_it_has_left(ledger):
    recording = ledger.begin("run", plan(), 20)
    for _ in range(15):
        recording.before_step()
    # Resumed from step 10: five steps are taken twice.
    budget = plan().epsilon(25)
    with pytest.raises(ValueError, match="ledger_epsilon"):
        ledger.begin("run", plan(), 10, budget=0.99 * budget)
    ledger.begin("run", plan(), 10, budget=1.01 * budget)


@pytest.mark.parametrize("run", ["", "r", "x"])
def test_one_run_is_closed_at_a_time(ledger, run):
    spend(ledger, "run-1", steps=1)
    spend(ledger, "run-2", steps=1)
    with pytest.raises(ValueError, match=r"\d runs in .* have an id that begins with"):
        ledger.close(run)


def test_a_budget_has_no_room_for_a_run_that_is_not_private(make_trainer):
    with pytest.raises(
        ValueError, match=r"ledger_epsilon=3 .*this run would not be private, which no ε bounds: leave"
    ):
        make_trainer(noise_seed=1, ledger_epsilon=3.0).train()


def test_a_run_that_becomes_not_private_leaves_no_more_of_the_budget_to_others(ledger):
    budget = 1.2 * plan().epsilon()
    spend(ledger, "shown", budget=budget)
    ledger.flag("shown", ["its training records were evaluated"])
    with pytest.raises(ValueError, match=r"the runs on dataset .* \(2, with this one\) would come to"):
        ledger.begin("second", plan(), 20, budget=budget)
    with pytest.raises(ValueError, match="this run would not be private"):
        ledger.begin("shown", plan(), 1, budget=100.0)


def test_a_budget_has_no_room_for_another_unit(ledger):
    spend(ledger, "records", steps=1)
    with pytest.raises(ValueError, match=r"protect different units \(record, patient\), for which there is no common"):
        ledger.begin("patients", plan(privacy_unit="patient"), 1, budget=100.0)


def test_a_trainer_beyond_the_budget_takes_no_step(make_trainer):
    make_trainer(ledger_epsilon=2.0).train()
    trainer = make_trainer(ledger_epsilon=1.01 * make_trainer(accountant="pld").plan.epsilon())
    before = flat_weights(trainer.model)
    with pytest.raises(ValueError, match=r"the runs on dataset .unnamed. in .* \(2, with this one\)"):
        trainer.train()
    assert torch.equal(flat_weights(trainer.model), before)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf])
def test_an_impossible_budget_is_refused(make_trainer, budget):
    with pytest.raises(ValueError, match=r"ledger_epsilon=.* is not possible: it must be positive and finite.$"):
        make_trainer(ledger_epsilon=budget)


# ---- The trainer's runs ----


class Stop(TrainerCallback):
    """Ends a run after two steps."""

    def __init__(self, error: type[Exception] | None = None):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.error is not None:
            raise self.error
        control.should_training_stop = state.global_step == 2


def test_every_run_is_recorded_in_its_output_folder(make_trainer, tmp_path):
    dataset = pairs(64)
    trainer = make_trainer(train_dataset=dataset, ledger_dataset="scans")
    trainer.train()
    (record,) = Ledger(tmp_path / LEDGER_NAME).runs()
    assert record.run == trainer.privacy_statement().run
    assert (record.steps, record.reserved, record.not_private_because) == (2, 0, ())
    assert (record.datasets, record.fingerprints) == (("scans",), (dataset._fingerprint,))
    assert record.plan == trainer.plan.to_dict()
    assert record.epsilon == trainer.privacy_spent().epsilon


def test_the_ledger_has_public_constants_only(make_trainer, tmp_path):
    make_trainer(log_private_statistics=True).train()
    lines = [json.loads(line) for line in (tmp_path / LEDGER_NAME).read_text().splitlines()]
    constants = {"event", "run", "part", "steps"}
    assert [line.keys() - constants for line in lines[1:]] == [set()] * (len(lines) - 1)
    begin = {"time", "dataset", "fingerprint", "plan", "not_private_because", "planned"}
    assert lines[0].keys() - constants == begin


def test_uploads_leave_the_ledger_out():
    # Both uploads of the Trainer ignore "_*".
    assert LEDGER_NAME.startswith("_")


def test_runs_that_are_not_private_are_flagged_and_allowed(make_trainer, tmp_path, not_private):
    make_trainer().train()
    make_trainer(**not_private).train()
    (total,) = totals(Ledger(tmp_path / LEDGER_NAME).runs())
    assert total.epsilon == math.inf
    assert [len(total.runs), len(total.not_private_runs)] == [2, 1]
    assert total.epsilon_of_private_runs < math.inf


def test_a_run_is_flagged_too_if_its_training_records_are_evaluated_later(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.args.log_private_statistics = True
    trainer.evaluate(trainer.train_dataset)
    (record,) = Ledger(tmp_path / LEDGER_NAME).runs()
    assert record.not_private_because == trainer.privacy_statement().not_private_because != ()
    assert (record.steps, record.reserved) == (2, 0)
    before = (tmp_path / LEDGER_NAME).read_bytes()
    trainer.evaluate(trainer.train_dataset)
    assert (tmp_path / LEDGER_NAME).read_bytes() == before


def test_the_run_of_the_weights_is_flagged_while_the_next_one_is_only_planned(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.args.log_private_statistics = True
    trainer.begin_run()
    trainer.evaluate(trainer.train_dataset)
    (record,) = Ledger(tmp_path / LEDGER_NAME).runs()
    assert len(record.not_private_because) == 1


def test_a_finished_run_that_is_resumed_is_flagged_too(make_trainer, tmp_path):
    make_trainer(**SAVING).train()
    trainer = make_trainer(log_private_statistics=True, **SAVING)
    # Not that run yet.
    trainer.evaluate(trainer.train_dataset)
    assert not Ledger(tmp_path / LEDGER_NAME).runs()[0].not_private_because
    trainer.train(resume_from_checkpoint=True)
    trainer.evaluate(trainer.train_dataset)
    (record,) = Ledger(tmp_path / LEDGER_NAME).runs()
    assert len(record.not_private_because) == 1


def test_only_the_run_in_which_a_reason_came_up_is_flagged(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.args.log_private_statistics = True
    trainer.begin_run()
    trainer.train()
    records = Ledger(tmp_path / LEDGER_NAME).runs()
    assert [len(record.not_private_because) for record in records] == [0, 1]


def test_a_run_that_becomes_not_private_is_flagged_at_once(make_trainer, tmp_path):
    class Logs(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.log_private_statistics = True

        def on_step_end(self, args, state, control, **kwargs):
            recorded.extend(Ledger(tmp_path / LEDGER_NAME).runs())

    recorded = []
    make_trainer(trainer_options={"callbacks": [Logs()]}, max_steps=1).train()
    assert [len(record.not_private_because) for record in recorded] == [1]


def test_so_is_one_whose_model_changed_past_the_mechanism(make_trainer, tmp_path):
    def count(module, *_):
        module.seen += 1

    model = tiny_clip()
    model.visual_projection.register_buffer("seen", torch.zeros(()))
    model.visual_projection.register_forward_hook(count)
    with pytest.raises(RuntimeError, match="a buffer"):
        make_trainer(model).train()
    (total,) = totals(Ledger(tmp_path / LEDGER_NAME).runs())
    assert total.epsilon == math.inf


def test_a_flag_that_cannot_be_recorded_only_warns(make_trainer, tmp_path, caplog):
    trainer = make_trainer()
    trainer.train()
    Path(tmp_path, LEDGER_NAME).write_text("damaged\n")
    trainer.args.log_private_statistics = True
    with caplog.at_level("WARNING"):
        trainer.evaluate(trainer.train_dataset)
    assert f"does not say that run {trainer.privacy_statement().run[:8]} is not private" in caplog.text
    assert trainer.privacy_statement().not_private_because


def test_a_ledger_that_does_not_have_a_run_does_not_flag_it(ledger):
    spend(ledger, "known")
    before = ledger.path.read_bytes()
    ledger.flag("unknown", ["no noise"])
    assert ledger.path.read_bytes() == before


def test_trials_of_a_search_add_up(make_trainer, tmp_path):
    shared = tmp_path / "_shared.jsonl"
    for sigma in (0.8, 1.0, 2.0):
        make_trainer(noise_multiplier=sigma, ledger_path=str(shared)).train()
    (total,) = totals(Ledger(shared).runs())
    independent = independent_epsilon(total.delta, *((1 / 8, sigma, 2) for sigma in (0.8, 1.0, 2.0)))
    assert total.epsilon == pytest.approx(independent, rel=2e-3)


def test_a_second_training_continues_the_record(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.train()
    (record,) = Ledger(tmp_path / LEDGER_NAME).runs()
    assert record.steps == trainer.privacy_spent().steps == 4


@pytest.mark.parametrize("error", [None, KeyboardInterrupt], ids=["stopped", "interrupted"])
def test_a_resumed_run_continues_its_record(make_trainer, tmp_path, error):
    settings = {"max_steps": 5, **SAVING}
    first = make_trainer(trainer_options={"callbacks": [Stop(error)]}, **settings)
    try:
        first.train()
    except KeyboardInterrupt:
        # The second step is in no checkpoint, and was taken.
        assert error is KeyboardInterrupt
    taken = first.privacy_spent().steps
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    (record,) = Ledger(tmp_path / LEDGER_NAME).runs()
    assert PrivacyStatement.load(tmp_path / "checkpoint-5").run == record.run == first.privacy_statement().run
    assert resumed.privacy_spent().steps == 5
    assert record.steps == (5 if error is None else 6) == taken + 5 - (2 if error is None else 1)


def test_a_run_that_another_ledger_knows_brings_its_steps_along(make_trainer, tmp_path):
    settings = {"max_steps": 5, **SAVING}
    make_trainer(trainer_options={"callbacks": [Stop()]}, **settings).train()
    moved = tmp_path / "_moved.jsonl"
    make_trainer(ledger_path=str(moved), **settings).train(resume_from_checkpoint=True)
    assert Ledger(moved).runs()[0].steps == 5


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def over_budget(*args, **kwargs):
    raise ValueError("would exceed the budget")


@pytest.mark.parametrize("refuse", [full, over_budget])
def test_a_refusal_reaches_the_processes_that_do_not_write(make_trainer, monkeypatch, refuse):
    """Which would wait for the first one in their next exchange."""
    trainer, told = make_trainer(), []
    monkeypatch.setattr(Ledger, "begin", refuse)
    monkeypatch.setattr("hf_dpclip.spending.broadcast_object_list", lambda objects: told.append(objects) or objects)
    with pytest.raises((OSError, ValueError)) as raised, recorded(trainer, "run", 2):
        pytest.fail("began")
    assert told == [[raised.value]]
    monkeypatch.setattr("hf_dpclip.spending.broadcast_object_list", lambda objects: told[0])
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    with pytest.raises(type(raised.value), match=re.escape(str(raised.value))), recorded(trainer, "run", 2):
        pytest.fail("began")


def test_the_first_process_writes_for_all(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    with recorded(trainer, "run", 2) as before_step:
        before_step()
    assert not (tmp_path / LEDGER_NAME).exists()


# ---- The command ----


@pytest.fixture
def two_datasets(ledger):
    spend(ledger, "0123456789abcdef", steps=20, dataset="scans")
    spend(ledger, "comparison", steps=3, dataset="scans", not_private_because=["noise_seed is set"])
    ledger.begin("crashed", plan(), 20, dataset="slides [old]").before_step()
    return ledger.path


def test_the_command_prints_json(two_datasets, capsys):
    assert main(["ledger", str(two_datasets), "--json", "--delta", "1e-6"]) == 0
    scans, slides = json.loads(capsys.readouterr().out)
    assert (scans["dataset"], scans["epsilon"], scans["not_private_runs"]) == ("scans", None, ["comparison"])
    assert scans["epsilon_of_private_runs"] == pytest.approx(independent_epsilon(1e-6, (0.1, 1.25, 20)), rel=2e-3)
    assert [run["epsilon"] for run in scans["runs"]] == [plan().epsilon(20), None]
    assert (slides["delta"], slides["runs"][0]["steps"], slides["runs"][0]["reserved"]) == (1e-6, 1, 19)


def test_the_command_prints_plain_lines_where_nobody_watches(two_datasets, capsys):
    assert main(["ledger", str(two_datasets)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scans: NOT PRIVATE; without the runs that are not, ε = ")
    assert lines[1].split("\t")[:3] == ["run", "began (UTC)", "steps"]
    fields = lines[2].split("\t")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", fields[1])
    assert (fields[0], fields[2], fields[6]) == ("01234567", "20 of 20", f"{plan().epsilon(20):.4g}")
    assert lines[3].split("\t")[6:] == ["none", "NOT PRIVATE; noise_seed is set"]
    assert lines[4].startswith("slides [old]: ε = ")
    assert lines[6].endswith("not ended")


@pytest.mark.parametrize("sigma, is_said", [(1.25, False), (2.0, True)])
def test_the_command_says_when_the_total_of_different_runs_holds(ledger, capsys, sigma, is_said):
    spend(ledger, "first", steps=2)
    spend(ledger, "second", plan=plan(noise_multiplier=sigma), steps=2)
    assert main(["ledger", str(ledger.path)]) == 0
    assert (" (if no result decided on σ, q or steps) for one record" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("steps", [20, 23])
def test_the_command_says_why_there_may_be_more_steps_than_planned(ledger, capsys, steps):
    spend(ledger, "resumed", steps=steps)
    assert main(["ledger", str(ledger.path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed"))
    assert f"\t{steps} of 20\t" in line
    assert ("more than planned, since steps that an interruption undid" in line) == (steps == 23)


def test_the_command_draws_tables_in_a_terminal(two_datasets, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["ledger", str(two_datasets)]) == 0
    shown = capsys.readouterr().out
    assert "┃" in shown
    assert "slides [old]: ε = " in shown


def test_a_table_without_remarks_fits_in_a_narrow_terminal(ledger, capsys, monkeypatch):
    spend(ledger, "0123456789abcdef", steps=20)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["ledger", str(ledger.path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "01234567" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[2:] == ["20 of 20", "0.1", "1.25", "1e-05", f"{plan().epsilon(20):.4g}"]
    assert len(cells[1]) == len("2026-11-30 20:17")


def test_lines_without_remarks_end_with_epsilon(ledger, capsys):
    spend(ledger, "run", steps=20)
    assert main(["ledger", str(ledger.path)]) == 0
    _, names, line = capsys.readouterr().out.splitlines()
    assert names.split("\t")[-1] == "ε" and line.endswith(f"\t{plan().epsilon(20):.4g}")


def test_the_command_takes_an_output_folder_and_closes_a_run(tmp_path, capsys):
    Ledger(tmp_path / LEDGER_NAME).begin("crashed", plan(), 20).before_step()
    assert main(["ledger", str(tmp_path), "--close", "crashed"]) == 0
    assert "not ended" not in capsys.readouterr().out


def test_the_command_says_that_nothing_is_recorded(tmp_path, capsys):
    (tmp_path / LEDGER_NAME).touch()
    assert main(["ledger", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No run is recorded in {tmp_path / LEDGER_NAME}.\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["absent.jsonl"], "absent.jsonl does not exist: name a ledger"),
        (
            ["run/privacy.json"],
            "is the statement of one run (which hf-dpclip card checks) and no ledger: name the output",
        ),
        (["no/such/ledger.jsonl", "--close", "x"], "no/such/ledger.jsonl does not exist: name a ledger"),
        ([".", "--close", "x"], "0 runs in"),
    ],
)
def test_the_command_says_what_is_wrong(two_datasets, monkeypatch, capsys, options, message):
    monkeypatch.chdir(two_datasets.parent)
    two_datasets.rename(LEDGER_NAME)
    assert main(["ledger", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("no").exists()
