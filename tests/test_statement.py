"""`privacy.json`: written whole, read back equal, and refused once damaged or edited."""

import json
import math
import re
from functools import partial
from pathlib import Path

import plans
import pytest

from hf_dpclip import PrivacyPlan, PrivacyStatement


plan = partial(plans.plan, max_grad_norm=0.5, accountant="rdp")


STATEMENTS = {
    "private": PrivacyStatement(plan(), 12),
    "before_training": PrivacyStatement(plan(), 0),
    "default_delta": PrivacyStatement(plan(target_delta=None), 20),
    "grouped": PrivacyStatement(plan(privacy_unit="user_id", clipping="automatic"), 3),
    "beyond_the_plan": PrivacyStatement(plan(), 40),
    "not_private": PrivacyStatement(plan(), 12, ("noise_seed is set", "raw statistics were logged")),
    "without_noise": PrivacyStatement(plan(noise_multiplier=0.0, non_private=True), 12, ("no noise",)),
    "calibrated": PrivacyStatement(PrivacyPlan.calibrate(target_epsilon=3.0, **plans.SIZES, accountant="rdp"), 20),
}


@pytest.fixture
def saved(tmp_path):
    """Writes a statement and returns its values; `rewrite` in their place puts others."""
    STATEMENTS["private"].save(tmp_path)
    path = tmp_path / "privacy.json"

    def rewrite(values) -> None:
        path.write_text(json.dumps(values), encoding="utf-8")

    return json.loads(path.read_text(encoding="utf-8")), rewrite


# ---- Round trip ----


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_is_read_back_equal(tmp_path, statement):
    statement.save(tmp_path)
    assert PrivacyStatement.load(tmp_path) == statement


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_is_standard_json(tmp_path, statement):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    statement.save(tmp_path)
    json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_statement_claims_epsilon_of_the_steps_taken(saved):
    values, _ = saved
    assert values["epsilon"] == plan().epsilon(12)
    assert (values["delta"], values["steps"], values["private"]) == (1e-5, 12, True)
    assert values["plan"] == plan().to_dict()


def test_a_statement_names_the_libraries_that_it_rests_on(saved):
    values, _ = saved
    assert values["versions"].keys() == {"torch", "numpy", "dp-accounting"}
    assert values["plan"]["accountant_version"].startswith("dp-accounting ")


def test_the_documented_schema_lists_every_entry(saved):
    values, _ = saved
    text = (Path(__file__).parents[1] / "docs" / "publishing.md").read_text(encoding="utf-8")
    schema = text[text.index("## `privacy.json`") : text.index("## Afterwards")]
    entries = re.findall(r"^\| `(\w+)` \|", schema, re.MULTILINE)
    assert entries == [*values, "earlier_runs", *values["plan"]]


def test_a_run_without_noise_claims_no_finite_epsilon(tmp_path):
    STATEMENTS["without_noise"].save(tmp_path)
    values = json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"))
    assert (values["epsilon"], values["private"]) == (None, False)
    assert PrivacyStatement.load(tmp_path).spent.epsilon == math.inf


def test_saving_replaces_the_former_statement_and_leaves_nothing_else_behind(tmp_path):
    STATEMENTS["before_training"].save(tmp_path)
    STATEMENTS["private"].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["privacy.json"]
    assert PrivacyStatement.load(tmp_path).steps == 12


def test_a_write_that_is_cut_short_leaves_the_former_statement(tmp_path, monkeypatch):
    STATEMENTS["private"].save(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        PrivacyStatement(plan(), 19).save(tmp_path)
    assert PrivacyStatement.load(tmp_path).steps == 12


# ---- Refusals ----


def test_a_folder_without_a_statement_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"privacy.json does not exist.*or a checkpoint that DPCLIPTrainer saved\.$"
    ):
        PrivacyStatement.load(tmp_path)


def test_a_statement_in_a_folder_below_is_pointed_out(tmp_path):
    (tmp_path / "private-clip").mkdir()
    STATEMENTS["private"].save(tmp_path / "private-clip")
    with pytest.raises(FileNotFoundError, match=r"saved \(there is one in .*private-clip\)\.$"):
        PrivacyStatement.load(tmp_path)


def test_the_file_in_place_of_its_folder_is_refused(tmp_path):
    STATEMENTS["private"].save(tmp_path)
    with pytest.raises(ValueError, match=rf"is a file: name the folder that it is in, {re.escape(str(tmp_path))}\.$"):
        PrivacyStatement.load(tmp_path / "privacy.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"private"', '{"private": true}', "{'private': True}"])
def test_a_file_that_is_no_statement_is_refused(tmp_path, text):
    (tmp_path / "privacy.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"privacy.json is damaged or was edited"):
        PrivacyStatement.load(tmp_path)


@pytest.mark.parametrize("names", [("here", "a"), ("a", "a"), (None, "a")], ids=str)
def test_earlier_runs_that_are_not_told_apart_are_refused(tmp_path, names):
    PrivacyStatement(plan(), 1, run="here", earlier_runs={"a": (plan(), 2), "b": (plan(), 3)}).save(tmp_path)
    assert [steps for _, steps in PrivacyStatement.load(tmp_path).runs] == [2, 3, 1]
    path = tmp_path / "privacy.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for run, name in zip(values["earlier_runs"], names):
        run["run"] = name
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="earlier_runs does not name each run, once, by its id"):
        PrivacyStatement.load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    STATEMENTS["private"].save(tmp_path)
    path = tmp_path / "privacy.json"
    path.write_text(path.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    with pytest.raises(ValueError, match=r"privacy.json is damaged or was edited"):
        PrivacyStatement.load(tmp_path)


@pytest.mark.parametrize("name", ["private", "not_private_because", "epsilon", "delta", "steps", "plan", "versions"])
def test_a_missing_entry_is_refused(tmp_path, saved, name):
    values, rewrite = saved
    rewrite({key: value for key, value in values.items() if key != name})
    with pytest.raises(ValueError, match=rf"privacy.json is damaged or was edited \('{name}'\)"):
        PrivacyStatement.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("private", False),
        ("private", None),
        ("epsilon", 0.1),
        ("epsilon", None),
        ("epsilon", 0),
        ("epsilon", "small"),
        ("delta", 1e-9),
        ("delta", None),
        ("steps", 11),
        ("steps", 0),
        ("steps", -1),
        ("steps", "12"),
        ("steps", None),
        ("not_private_because", ["noise_seed is set"]),
        ("not_private_because", None),
        ("not_private_because", [3]),
        ("versions", None),
        ("versions", {}),
        ("versions", {"torch": "2.13", "numpy": "2.0", "dp-accounting": 0.6}),
        ("invented", 1),
        ("plan", None),
        ("plan", {}),
    ],
)
def test_an_edited_claim_is_refused(tmp_path, saved, name, value):
    values, rewrite = saved
    rewrite({**values, name: value})
    with pytest.raises(ValueError, match=r"privacy.json is damaged or was edited .*Restore it from a backup"):
        PrivacyStatement.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "contradicted"),
    [
        ("num_examples", 2000, "sampling_probability"),
        ("num_examples", None, "num_examples"),
        ("num_examples", 1000.0, "num_examples"),
        ("expected_batch_size", 50, "sampling_probability"),
        ("expected_batch_size", 2000, "expected_batch_size"),
        ("num_microbatches", 100, "microbatch_size"),
        ("num_microbatches", 0, "num_microbatches"),
        ("num_steps", 0, "num_steps"),
        ("num_steps", "20", "num_steps"),
        ("noise_multiplier", 2.5, "noise_std"),
        ("noise_multiplier", 0.0, "noise_multiplier"),
        ("noise_multiplier", -1.25, "noise_multiplier"),
        ("max_grad_norm", 1.0, "sensitivity"),
        ("max_grad_norm", None, "max_grad_norm"),
        ("target_delta", 1e-4, "delta"),
        ("target_delta", 1e-2, "target_delta"),
        ("accountant", "pld", "epsilon"),
        ("accountant", "prv", "accountant"),
        ("clipping", "none", "clipping"),
        ("target_epsilon", -1.0, "target_epsilon"),
        ("sampling_probability", 0.01, "sampling_probability"),
        ("microbatch_size", 1.0, "microbatch_size"),
        ("sensitivity", 0.5, "sensitivity"),
        ("noise_std", 2.5, "noise_std"),
        ("adjacency", "replace_one", "adjacency"),
        ("sampler", "shuffle", "sampler"),
        ("invented", 1, "invented"),
    ],
)
def test_an_edited_plan_is_refused(tmp_path, saved, name, value, contradicted):
    values, rewrite = saved
    rewrite({**values, "plan": {**values["plan"], name: value}})
    with pytest.raises(ValueError, match=rf"privacy.json is damaged or was edited \(.*\b{contradicted}\b"):
        PrivacyStatement.load(tmp_path)


@pytest.mark.parametrize("name", [name for name in plan().to_dict() if name != "accountant_version"])
def test_a_plan_with_a_missing_entry_is_refused(tmp_path, saved, name):
    values, rewrite = saved
    rewrite({**values, "plan": {key: value for key, value in values["plan"].items() if key != name}})
    with pytest.raises(ValueError, match=rf"privacy.json is damaged or was edited \(.*{name}"):
        PrivacyStatement.load(tmp_path)


def test_an_epsilon_that_differs_as_little_as_another_release_of_the_accountant_is_accepted(tmp_path, saved):
    values, rewrite = saved
    rewrite({**values, "epsilon": values["epsilon"] * 1.0005})
    assert PrivacyStatement.load(tmp_path).spent.epsilon == plan().epsilon(12)
