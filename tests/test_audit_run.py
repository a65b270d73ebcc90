"""The audit of a whole run: who was in it can be told from a run without noise, and not from a private one."""

import json
import math
import re

import numpy as np
import pytest
import torch
from checks import Given, flat_weights, vectors
from datasets import disable_progress_bars
from factories import arguments, tiny_clip, tiny_processor
from peft import get_peft_model
from scripts import ROOT, load_script, run_main
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import AutoModel, AutoProcessor

from hf_dpclip import DPCLIPTrainer, cli, lora_config
from hf_dpclip.audit.fine_tune import FineTune, FineTuneAudit, Membership, drawn
from hf_dpclip.audit.one_run import (
    Canaries,
    RunAudit,
    WhiteBox,
    audit_run,
    best_bound,
    correct_guesses,
    number_of_guesses,
)
from hf_dpclip.audit.small_clip import small_clip, small_processor


CANARIES = 64


class OwnCoordinates:
    """Canaries of which each has a coordinate for its gradient, and the trainer of all of them."""

    records = vectors(*torch.eye(CANARIES).tolist())

    def losses(self, model):
        return torch.stack([record["vector"] for record in self.records]) @ model.weight

    def trainer(self, folder, **overrides):
        settings = {"per_device_train_batch_size": CANARIES, "microbatch_size": 1, "accountant": "rdp"}
        # One run's theorem multiplies δ by the number of canaries.
        settings |= {"target_delta": 1e-9, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
        return DPCLIPTrainer(Given(CANARIES), arguments(folder, **settings, **overrides), train_dataset=self.records)

    def audit(self, folder, included=None, **overrides):
        canaries = Canaries.toss(np.arange(CANARIES))
        if included is not None:
            canaries = Canaries(canaries.units, np.full(CANARIES, included))
        trainer = self.trainer(folder, **overrides)
        return audit_run(trainer, canaries, self.losses), trainer


@pytest.fixture
def own_coordinates():
    return OwnCoordinates()


def test_every_canary_is_found_without_noise(own_coordinates, tmp_path):
    audit, _ = own_coordinates.audit(tmp_path, non_private=True)
    # The coins are rarely balanced, and half of the guesses are "in".
    assert audit.white_box_accuracy == audit.black_box_accuracy > 0.6
    assert min(audit.white_box, audit.black_box) > 0
    assert audit.claimed_epsilon == math.inf and not audit.refuted


def test_bounds_of_a_private_run_stay_below_its_claim(own_coordinates, tmp_path):
    audit, _ = own_coordinates.audit(tmp_path, noise_multiplier=1.0)
    assert max(audit.white_box, audit.black_box) < audit.claimed_epsilon
    assert not audit.refuted


@pytest.mark.parametrize("included", [False, True])
def test_canaries_are_in_the_run_exactly_if_their_coin_says_so(own_coordinates, tmp_path, included):
    _, trainer = own_coordinates.audit(tmp_path, included, non_private=True)
    assert (trainer.model.weight != 0).all() == included
    assert (trainer.model.weight == 0).all() != included


def test_the_white_box_adversary_sees_the_inner_products_and_leaves_no_trace(own_coordinates):
    model, white_box = Given(CANARIES), WhiteBox(own_coordinates.losses)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(1, 2, CANARIES))
    before = model.weight.detach().clone()
    model.weight.grad = torch.linspace(-1, 1, CANARIES)
    state = type("State", (), {"global_step": 0})
    for _ in range(2):
        white_box.on_pre_optimizer_step(None, state, None, model=model)
    torch.testing.assert_close(white_box.scores, 2 * model.weight.grad, atol=1e-3, rtol=1e-2)
    assert torch.equal(model.weight, before)


def test_records_grouped_into_units_cannot_be_canaries(own_coordinates, tmp_path):
    trainer = own_coordinates.trainer(tmp_path)
    trainer.args.privacy_unit_column = "patient"
    with pytest.raises(ValueError, match="canaries are single records"):
        audit_run(trainer, Canaries.toss(np.arange(3)), own_coordinates.losses)


def test_guesses_are_the_highest_and_the_lowest_scores():
    scores = np.array([0.1, 0.9, 0.5, 0.7, 0.2])
    included = np.array([True, True, False, False, False])
    assert [correct_guesses(scores, included, count) for count in (2, 4)] == [1, 2]


@pytest.mark.parametrize("canaries", [2, 3, 303, 400])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_nobody_is_guessed_to_be_both_in_and_out(canaries, share):
    guesses = number_of_guesses(canaries, share)
    assert guesses % 2 == 0 and 2 <= guesses <= canaries
    # Which would make one of them right, whatever was included.
    nobody = np.zeros(canaries, dtype=bool)
    assert correct_guesses(np.arange(canaries), nobody, guesses) == guesses / 2
    assert guesses == max(2, 2 * int(share * canaries / 2))


def test_one_canary_is_too_few(own_coordinates, tmp_path):
    with pytest.raises(ValueError, match="1 canaries are too few"):
        audit_run(
            own_coordinates.trainer(tmp_path, noise_multiplier=1.0),
            Canaries.toss(np.arange(1)),
            own_coordinates.losses,
        )


def test_the_best_number_of_guesses_is_used():
    # Only the extremes tell anything.
    included = np.tile([True, False], 200)
    scores = np.where(np.arange(400) < 100, np.where(included, 1.0, -1.0), 0.0)
    assert best_bound(scores, included, 1e-5, 0.999) > best_bound(scores[100:], included[100:], 1e-5, 0.999) == 0


# ---- Membership inference ----


def test_membership_rates_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.5, 1, 200), generator.normal(0, 1, 300)
    truth, scores = np.repeat([1, 0], [200, 300]), np.concatenate([members, others])
    membership = Membership(members, others)
    assert membership.auc == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(membership.curve(), (false[1:], true[1:]))
    assert membership.true_positive_rate(0.01) == true[false <= 0.01].max()


# ---- The fine-tune ----


@pytest.fixture
def fine_tune():
    disable_progress_bars()
    return FineTune(ROOT / "examples" / "tiny-clip", num_members=30, num_canaries=20)


def test_canaries_have_a_wrong_label_and_nobody_is_in_two_parts(fine_tune):
    canaries, members, others, prompts = fine_tune.records()
    truth = drawn(fine_tune.dataset_name).select(range(20))["label"]
    assert all(label != true for label, true in zip(canaries["label"], truth))
    assert [prompts[label] for label in canaries["label"]] == list(canaries["caption"])
    images = [image.tobytes() for part in (canaries, members, others) for image in part["image"]]
    assert len(images) == len(set(images)) == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num_canaries", "3000"], "are more than the 4000 of mnist-5k: ask for fewer of them"),
        (["--num-canaries", "0"], "0 canaries and 600 other records show nothing: give at least 1"),
        (["--max_steps", "0"], "--max-steps 0 is not possible: expected a whole number of at least 1"),
        (["--num-members=0"], "300 canaries and 0 other records show nothing"),
        (
            ["--num-canaries=20", "--num-members=40"],
            "20 canaries and 40 other records are fewer than the 256 of an expected batch: ask for more of them",
        ),
        (["--dataset_name", "cifar"], "--dataset-name 'cifar' is not known: choose one of mnist-5k"),
    ],
)
def test_the_command_says_what_is_wrong(changes, message, capsys):
    assert cli.main(["audit", "run", *changes]) == 2
    assert message in capsys.readouterr().err


def test_the_command_audits_a_private_run_and_needs_no_model(tmp_path, capsys, monkeypatch):
    for loader in (AutoModel, AutoProcessor):
        monkeypatch.setattr(loader, "from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    few = ["--num_canaries", "130", "--num_members", "140", "--max_steps", "1"]
    assert cli.main(["audit", "run", *few, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["white_box"] < values["claimed_epsilon"] <= 8
    assert values["canaries"] == 130 and 0 <= values["auc"] <= 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("white_box, refuted", [(0.5, 0), (9.0, 1)])
def test_the_command_shows_a_table_and_a_verdict(monkeypatch, capsys, white_box, refuted):
    def audit(self, target, max_steps):
        members = Membership(np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.5]))
        run = RunAudit(7.96123456789, 1e-6, white_box, 0.0, 0.5633333333, 0.5, 0.999, 300)
        return FineTuneAudit(run, members, members, 0.905, members, 0.85)

    monkeypatch.setattr(FineTune, "audit", audit)
    assert cli.main(["audit", "run"]) == refuted
    lines = capsys.readouterr().out.splitlines()
    rows = dict(re.split(" {2,}", line.strip(), maxsplit=1) for line in lines[1:-1])
    assert (rows["claimed ε"], rows["coins guessed, white-box"]) == ("7.961", "56.3%")
    assert rows["membership: AUC"] == "0.6667 (before training: 0.6667)"
    verdict = "REFUTED: a lower bound exceeds the" if refuted else "No lower bound exceeds the"
    assert lines[-1] == f"{verdict} claimed ε = 7.961."


def test_nothing_is_refuted_where_nothing_is_claimed(monkeypatch, capsys):
    def audit(self, target, max_steps):
        members = Membership(np.array([1.0, 2.0]), np.array([0.5, 1.5]))
        return FineTuneAudit(RunAudit(math.inf, 1e-6, 2, 2, 1, 1, 0.999, 300), members, members, 0.9, members, 0.8)

    monkeypatch.setattr(FineTune, "audit", audit)
    assert cli.main(["audit", "run", "--non-private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Trained without privacy: no ε is claimed")


def test_only_a_model_with_all_weights_is_audited(tmp_path, capsys):
    tiny_clip().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora_config(base)).save_pretrained(tmp_path / "adapters")
    tiny_processor().save_pretrained(tmp_path / "adapters")
    assert cli.main(["audit", "run", "--model-name-or-path", str(tmp_path / "adapters")]) == 2
    error = capsys.readouterr().err
    assert "adapters' holds adapters, and all weights" in error and "name the model that they were merged in" in error
    assert cli.main(["audit", "run", "--model-name-or-path", str(tmp_path / "nope")]) == 2
    error = capsys.readouterr().err
    assert "--model-name-or-path '" in error and "name a CLIPModel with its processor, or leave it out" in error


def test_the_small_model_is_the_same_each_time_and_reads_every_text():
    first, second = flat_weights(small_clip()), flat_weights(small_clip())
    assert torch.equal(first, second) and len(first) == 668_737
    tokenizer = small_processor().tokenizer
    encoded = tokenizer("sieben, 七")["input_ids"]
    assert tokenizer.decode(encoded, skip_special_tokens=True).strip() == "sieben , 七"


def test_the_command_audits_another_model(capsys):
    few = ["--num_canaries", "130", "--num_members", "140", "--max_steps", "1"]
    model = str(ROOT / "examples" / "tiny-clip")
    assert cli.main(["audit", "run", "--model_name_or_path", model, *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.3


def test_the_example_draws_and_prints_both_runs(tmp_path, monkeypatch, capsys):
    script = load_script(ROOT / "examples" / "audit.py")
    few = ["--num_canaries", "130", "--num_members", "140", "--max_steps", "1"]
    run_main(monkeypatch, script, *few, "--output", tmp_path / "audit.png")
    output = capsys.readouterr().out
    assert "| before training | - |" in output
    assert "| without privacy | inf |" in output and "| ε = 8 |" in output
    assert (tmp_path / "audit.png").stat().st_size > 10_000
