"""`hf-dpclip card` on folders: an honest claim is confirmed, an edited one exposed. The Hub: `test_publishing.py`."""

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from plans import plan
from scripts import modules_after

from hf_dpclip import PrivacyStatement
from hf_dpclip.cli import main
from hf_dpclip.privacy_section import privacy_section


PLAN = plan(accountant="rdp")
EPSILON = f"{PLAN.epsilon(12):.4g}"


@pytest.fixture
def publish(tmp_path):
    """A folder with a statement and its card."""

    def write(*reasons: str):
        statement = PrivacyStatement(PLAN, 12, reasons)
        statement.save(tmp_path)
        (tmp_path / "README.md").write_text(f"# A model\n\n{privacy_section(statement)}", encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture
def answer(capsys):
    """The exit code for a folder, and what was printed."""

    def ask(folder, *options: str) -> tuple[int, str]:
        code = main(["card", str(folder), *options])
        return code, capsys.readouterr().out

    return ask


def edit(folder, name: str, old: str, new: str) -> None:
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_an_honest_claim_is_confirmed(publish, answer):
    code, text = answer(publish())
    assert code == 0
    assert "The claim holds" in text
    assert "the card agrees" in text
    assert EPSILON in text


def test_a_claim_without_a_card_is_confirmed(publish, answer):
    folder = publish()
    (folder / "README.md").unlink()
    code, text = answer(folder)
    assert code == 0
    assert "there is no card" in text


def test_a_card_that_says_nothing_of_privacy_does_not_agree(publish, answer):
    folder = publish()
    (folder / "README.md").write_text("# A model\n", encoding="utf-8")
    code, text = answer(folder)
    assert code == 0
    assert "README.md beside it says nothing of it (trainer.create_model_card() writes one that does)" in text
    assert "agrees" not in text


def test_an_edited_epsilon_is_exposed(publish, answer):
    folder = publish()
    edit(folder, "privacy.json", f'"epsilon": {PLAN.epsilon(12)}', '"epsilon": 0.1')
    code, text = answer(folder)
    assert code == 1
    assert "The claim does NOT hold" in text
    assert f"epsilon is 0.1 but the plan and 12 steps give {PLAN.epsilon(12)}" in text


def test_an_edited_plan_is_exposed(publish, answer):
    folder = publish()
    edit(folder, "privacy.json", '"noise_multiplier": 1.25', '"noise_multiplier": 2.5')
    code, text = answer(folder)
    assert code == 1
    assert "noise_std" in text


def test_an_edited_card_is_exposed(publish, answer):
    folder = publish()
    edit(folder, "README.md", f"({EPSILON}, ", "(0.1, ")
    code, text = answer(folder)
    assert code == 1
    assert "README.md was edited" in text
    assert "(0.1, 1e-05)-differentially private" in text


def test_a_run_without_a_guarantee_does_not_pass(publish, answer):
    code, text = answer(publish("noise_seed is set"))
    assert code == 1
    assert "No privacy is claimed" in text and "NOT PRIVATE: noise_seed is set" in text


def test_a_card_that_claims_more_than_the_weights_is_exposed(publish, answer):
    folder = publish("noise_seed is set")
    edit(folder, "README.md", "NOT PRIVATE", "private")
    code, text = answer(folder)
    assert code == 1
    assert "The claim does NOT hold" in text


def test_json_holds_the_recomputed_claim(publish, answer):
    code, text = answer(publish(), "--json")
    assert code == 0
    assert json.loads(text) == {
        "holds": True,
        "problems": [],
        "epsilon": PLAN.epsilon(12),
        "delta": 1e-5,
        "steps": 12,
        "plan": PLAN.to_dict(),
    }


def test_json_holds_the_problems(publish, answer):
    folder = publish()
    edit(folder, "privacy.json", '"steps": 12', '"steps": 6')
    code, text = answer(folder, "--json")
    values = json.loads(text)
    assert (code, values["holds"], len(values["problems"])) == (1, False, 1)


def test_a_folder_without_a_statement_is_unusable_input(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "privacy.json does not exist" in error and "start a new run" not in error


def test_a_file_is_unusable_input(publish, capsys):
    folder = publish()
    assert main(["card", str(folder / "privacy.json")]) == 2
    assert f"name the folder that it is in, {folder}" in capsys.readouterr().err


def test_a_revision_of_a_folder_is_unusable_input(publish, capsys):
    assert main(["card", str(publish()), "--revision", "main"]) == 2
    assert "--revision is for models on the Hub" in capsys.readouterr().err


def test_a_name_that_is_nowhere_is_unusable_input(tmp_path, capsys):
    folder = tmp_path / "misspelt" / "folder"
    assert main(["card", str(folder)]) == 2
    assert f"{folder} does not exist, and no model on the Hub can have such a name" in capsys.readouterr().err


def test_without_a_connection_nothing_is_said_of_the_model(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot be reached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    assert main(["card", "someone/private-clip"]) == 2
    error = capsys.readouterr().err
    assert "a model that the Hub shows you (cannot be reached): check the spelling and the connection" in error


def test_the_command_waits_for_no_training_library(publish):
    loaded = modules_after(f"from hf_dpclip.cli import main; main(['card', {str(publish())!r}])")
    assert "dp_accounting" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "huggingface_hub"}
