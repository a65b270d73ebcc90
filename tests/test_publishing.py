"""Pushing to a Hub, with the real client: what arrives is what was trained, with the guarantee that it has."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from hub_server import client_of, running_hub
from hub_state import metadata_errors
from safetensors.torch import load_file
from scripts import DISTRIBUTED, TORCHRUN, output_of
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from hf_dpclip import PrivacyStatement
from hf_dpclip.privacy_section import contradictions


LAUNCHERS = {"1": [], "2": TORCHRUN}
TRAINED = ["full-1", "lora-1", "vqa", *(strategy.value for strategy in HubStrategy), "adapters", "secret"]


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """Runs the script on so many processes, once. Returns the folder that they wrote into."""
    folders = {}

    def publish(processes: str) -> Path:
        if processes not in folders:
            folders[processes] = folder = tmp_path_factory.mktemp(f"processes-{processes}")
            output_of(*LAUNCHERS[processes], DISTRIBUTED / "publish.py", folder, env=client_of(hub, folder / "home"))
        return folders[processes]

    return publish


@pytest.fixture(scope="module")
def facts(published):
    return json.loads((published("1") / "facts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def answers(facts):
    """Exit code and output of `hf-dpclip card me/NAME`."""
    return facts["answers"]


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_trained_is_on_the_disk_if_the_upload_fails(make_trainer, monkeypatch, tmp_path, trained):
    """And nothing else takes the place of what is there."""

    def fail(*args, **kwargs):
        raise ConnectionError("no Hub")

    monkeypatch.setattr(Trainer, "push_to_hub", fail)
    trainer = make_trainer(save_strategy="no")
    if trained:
        trainer.train()
    with pytest.raises(ConnectionError, match="no Hub"):
        trainer.push_to_hub()
    assert (tmp_path / "model.safetensors").is_file() == trained
    if trained:
        assert PrivacyStatement.load(tmp_path).spent == trainer.privacy_spent()


# ---- Weights ----


@pytest.mark.parametrize(("processes", "name"), [(p, n) for p in LAUNCHERS for n in ("full", "lora")] + [("1", "vqa")])
def test_the_hub_gives_back_the_weights_that_were_trained(published, processes, name):
    folder = published(processes)
    pushed, loaded = (load_file(folder / f"{name}-{kind}.safetensors") for kind in ("pushed", "loaded"))
    assert pushed.keys() == loaded.keys()
    assert len(pushed) > 40
    assert all(torch.equal(pushed[key], loaded[key]) for key in pushed)


def test_a_revision_has_the_weights_and_the_main_branch_has_not(published, hub):
    folder = published("1")
    pushed, loaded = (load_file(folder / f"revised-{kind}.safetensors") for kind in ("pushed", "loaded"))
    assert all(torch.equal(pushed[key], loaded[key]) for key in pushed)
    assert hub.model("me/revised").keys() == {".gitattributes"}
    assert {"model.safetensors", "privacy.json", "README.md"} <= hub.model("me/revised", "v2").keys()


@pytest.mark.parametrize("processes", LAUNCHERS)
def test_the_processor_and_the_statement_go_with_the_weights(published, hub, processes):
    published(processes)
    beside = {"README.md", "privacy.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert beside | {"config.json", "model.safetensors"} <= hub.model(f"me/full-{processes}").keys()
    adapters = hub.model(f"me/lora-{processes}").keys()
    assert beside | {"adapter_config.json", "adapter_model.safetensors"} <= adapters
    assert "model.safetensors" not in adapters


# ---- Strategies ----


def summaries(hub, name: str) -> list[str]:
    return [commit.message for commit in hub.repositories["model", f"me/{name}"].branches["main"]][1:]


def test_each_strategy_pushes_what_it_says(published, hub):
    published("1")
    saves = ["Training in progress, step 1", "Training in progress, step 2"]
    with_checkpoints = [message for save in saves for message in (save, f"{save}, checkpoint")]
    last = "End of training"
    assert summaries(hub, "end") == [last]
    assert summaries(hub, "every_save") == [*saves, last]
    assert summaries(hub, "checkpoint") == [*with_checkpoints, last]
    assert summaries(hub, "all_checkpoints") == summaries(hub, "adapters") == [*with_checkpoints, last]


def test_checkpoints_go_with_their_statements(published, hub):
    published("1")
    for name, checkpoints in {
        "checkpoint": ["last-checkpoint"],
        "all_checkpoints": ["checkpoint-1", "checkpoint-2"],
        "adapters": ["checkpoint-1", "checkpoint-2"],
    }.items():
        files = hub.model(f"me/{name}")
        steps = [json.loads(files[f"{checkpoint}/privacy.json"])["steps"] for checkpoint in checkpoints]
        assert steps == [1, 2][-len(checkpoints) :]


@pytest.mark.parametrize("name", ["every_save", "checkpoint", "all_checkpoints", "adapters"])
def test_at_every_commit_weights_statement_and_card_belong_together(published, hub, tmp_path, name):
    folder = published("1") / name
    weights = "adapter_model.safetensors" if name == "adapters" else "model.safetensors"
    for commit in hub.repositories["model", f"me/{name}"].branches["main"][1:]:
        step = int((re.search(r"step (\d)", commit.message) or ["", "2"])[1])
        assert commit.files[weights].data == (folder / f"checkpoint-{step}" / weights).read_bytes()
        (tmp_path / "privacy.json").write_bytes(commit.files["privacy.json"].data)
        statement = PrivacyStatement.load(tmp_path)
        assert statement.steps == step
        assert contradictions(commit.files["README.md"].data.decode(), statement) == []


class Upload:
    """A push that is still going on, until somebody waits for it."""

    def __init__(self):
        self.done = False

    def is_done(self) -> bool:
        return self.done

    def wait_until_done(self) -> None:
        self.done = True


@pytest.fixture
def uploading(make_trainer, monkeypatch, tmp_path):
    """A trainer whose upload is under way, and what the `Trainer`'s own methods found when they were called."""

    def make(**settings):
        trainer = make_trainer(**settings)
        trainer.hub_model_id, trainer.push_in_progress = "me/clip", Upload()
        found = []

        def record(*args, **kwargs):
            found.append((trainer.push_in_progress.is_done(), (tmp_path / "privacy.json").is_file()))

        monkeypatch.setattr(Trainer, "push_to_hub", record)
        monkeypatch.setattr(Trainer, "_push_from_checkpoint", record)
        return trainer, found

    return make


def test_a_save_during_an_upload_leaves_its_files_alone(uploading):
    trainer, found = uploading()
    trainer._push_from_checkpoint("checkpoint-1")
    assert found == [(False, False)]


def test_a_save_that_is_always_pushed_waits_for_the_upload(uploading):
    trainer, found = uploading(hub_always_push=True)
    trainer._push_from_checkpoint("checkpoint-1")
    assert found == [(True, True)]


def test_the_last_push_waits_for_the_upload_before_it_saves(uploading):
    trainer, found = uploading()
    trainer.push_to_hub()
    assert found == [(True, False)]


def test_the_strategy_end_writes_nothing_while_training(uploading):
    trainer, found = uploading(hub_strategy="end")
    trainer.push_in_progress.done = True
    trainer._push_from_checkpoint("checkpoint-1")
    assert found == [(True, False)]


# ---- Privacy of repositories ----


def test_a_private_repository_is_shown_to_its_owner_only(published, hub, answers):
    published("1")
    private = {repo_id for (_, repo_id), repository in hub.repositories.items() if repository.private}
    assert private == {"me/secret"}
    assert answers["secret"][0] == 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{hub.url}/me/secret/resolve/main/privacy.json")


# ---- The card ----


@pytest.mark.parametrize("name", TRAINED)
def test_the_claim_of_what_was_pushed_is_confirmed(answers, name):
    code, text = answers[name]
    assert code == 0, text
    assert "the card agrees" in text


def test_the_claim_of_a_revision_is_confirmed(answers):
    assert answers["revision"][0] == 0


def test_an_edited_card_is_exposed(answers):
    code, text = answers["edited-card"]
    assert code == 1
    assert "README.md was edited" in text
    assert "it claims (0.1, " in text


def test_an_edited_statement_is_exposed(answers):
    code, text = answers["edited-statement"]
    assert code == 1
    assert "epsilon is 0.1 but the plan and 2 steps give" in text


def test_a_model_without_a_card_can_be_checked(answers):
    code, text = answers["no-card"]
    assert code == 0
    assert "there is no card" in text


@pytest.mark.parametrize("name", ["no-statement", "revised"])
def test_a_model_without_a_statement_is_unusable_input(answers, name):
    code, text = answers[name]
    assert code == 2
    assert "has no privacy.json, so it claims no privacy" in text


def test_a_model_that_is_not_there_is_unusable_input(answers):
    code, text = answers["nowhere"]
    assert code == 2
    assert "check the spelling" in text


def test_the_client_had_the_metadata_of_every_card_validated(published, hub):
    published("1")
    cards = [
        commit.files["README.md"].data.decode()
        for name in TRAINED
        for commit in hub.repositories["model", f"me/{name}"].branches["main"][1:]
    ]
    assert len(cards) > 20
    assert set(cards) <= set(hub.validated)


@pytest.mark.parametrize(
    "metadata",
    [
        "tags: [1]",
        "base_model: /tmp/a folder",
        "license: MIT Licence",
        "model-index: [{name: a, results: [{}]}]",
        "a: [",
    ],
)
def test_the_validation_refuses_what_the_hub_would(metadata):
    assert metadata_errors(f"---\n{metadata}\n---\n# A model\n")


def test_the_adapters_name_the_base_model_on_the_hub(published, hub):
    published("1")
    card = hub.model("me/lora-1")["README.md"].decode()
    assert "base_model: me/base-1\n" in card
    assert 'CLIPModel.from_pretrained("me/base-1")' in card
    assert 'PeftModel.from_pretrained(base, "me/lora-1")' in card


def test_the_card_names_the_dataset_that_the_caller_named_and_its_results(published, hub):
    published("1")
    files = hub.model("me/full-1")
    card = files["README.md"].decode()
    assert "datasets:\n- me/scans\n" in card
    assert "name: Scans\n      type: me/scans\n" in card
    assert "![Metric against ε spent](privacy_utility.png)" in card
    assert files["privacy_utility.png"].startswith(b"\x89PNG")


# ---- Datasets ----


def test_pairs_are_loaded_from_the_hub(facts):
    assert facts["pairs"] == ["black 0", "brown 128", "red 255"]
