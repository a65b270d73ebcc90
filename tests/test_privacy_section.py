"""The section on privacy, read back: whatever was edited shows."""

import pytest
from plans import plan

from hf_dpclip import PrivacyStatement
from hf_dpclip.privacy_section import contradictions, privacy_section, statement_rows


PLAN = plan(max_grad_norm=0.5, accountant="rdp")
PRIVATE = PrivacyStatement(PLAN, 12)
NOT_PRIVATE = PrivacyStatement(PLAN, 12, ("noise_seed is set",))
BOTH = pytest.mark.parametrize("statement", [PRIVATE, NOT_PRIVATE], ids=["private", "not_private"])


def card(statement: PrivacyStatement = PRIVATE) -> str:
    return f"# A model\n\n{privacy_section(statement)}\n## Usage\n\nLoad it.\n"


@BOTH
def test_an_unedited_card_agrees(statement):
    assert contradictions(card(statement), statement) == []


def test_a_card_that_says_nothing_of_privacy_contradicts_nothing():
    assert contradictions("# A model\n\nIt sees.\n", PRIVATE) == []


@pytest.mark.parametrize("sentence", ["Trained at ε = 0.1.", "Its epsilon is 0.1.", "It is differentially private."])
def test_a_card_that_speaks_of_privacy_without_the_section_is_exposed(sentence):
    (problem,) = contradictions(f"# A model\n\n{sentence}\n", PRIVATE)
    assert "has no section '## Privacy'" in problem


@pytest.mark.parametrize("claim", ["(0.1, 1e-05)", f"({PLAN.epsilon(12):.4g}, 1e-09)", "(0.1,1e-05)", "(none, 1e-05)"])
def test_an_edited_claim_is_exposed(claim):
    true = f"({PLAN.epsilon(12):.4g}, 1e-05)"
    (problem,) = contradictions(card().replace(true, claim), PRIVATE)
    assert "it claims" in problem
    assert true in problem


@pytest.mark.parametrize(
    "claim",
    [
        "(0.1, 1e-12) differentially private",
        "(0.1, 1e-12)\u2011differentially private",
        "(0.1, 1e-12)-DP",
        "ε = 0.1",
        "epsilon: 0.1",
        "**ε** ≤ 0.1",
    ],
)
def test_another_claim_however_it_is_written_is_exposed(claim):
    assert contradictions(f"---\nlanguage: en\n---\n{claim}\n\n{card()}", PRIVATE)


@pytest.mark.parametrize("end", ["\n-->\n", ""], ids=["closed", "open"])
def test_a_guarantee_in_a_comment_is_none(end):
    hidden = f"It cannot tell anything of anybody: differential privacy.\n\n<!--\n\n{card()}{end}"
    assert "has no section" in contradictions(hidden, PRIVATE)[0]


@pytest.mark.parametrize(
    "sentence",
    [
        f"Trained with differential privacy, ε = {PLAN.epsilon(12):.4g}.",
        f"ε ≤ {PLAN.epsilon(12) + 0.1:.3g}",
        f"ε ≈ {PLAN.epsilon(12):.2g}",
        "Its target ε = 3 was not exhausted, so its privacy is better.",
        "label smoothing with ε = 0.1",
        "The layer norm has epsilon = 1e-5.",
        "- optimizer: AdamW with betas=(0.9,0.999) and epsilon=1e-08",
        "# clip-epsilon=3",
        "images of shape (B, T)\n\nDP is nice",
    ],
)
def test_other_sentences_are_no_claims(sentence):
    assert contradictions(f"{card()}\n{sentence}\n", PRIVATE) == []


@pytest.mark.parametrize(
    ("line", "edited"),
    [
        ("| adjacency |", "| **ε** | 0.1 |\n| adjacency |"),
        ("removing one record", "removing one patient with all their records"),
        ("- Several records of one person, unless the privacy unit above is that person.\n", ""),
        ("- Whatever was declared public", "- Nothing is left out, and whatever was declared public"),
        ("### Not covered", "It cannot leak anything.\n\n### Not covered"),
    ],
)
def test_an_edited_line_is_exposed(line, edited):
    assert line in card()
    problems = contradictions(card().replace(line, edited), PRIVATE)
    assert any("its section" in problem for problem in problems)


def test_a_second_claim_elsewhere_is_exposed():
    (problem,) = contradictions(card() + "\nThis is a (0.5, 1e-5)-Differentially Private model.\n", PRIVATE)
    assert "it claims (0.5, 1e-5)-differentially private" in problem


def test_a_deleted_claim_is_exposed():
    problems = contradictions(card().replace("-differentially private", ""), PRIVATE)
    assert problems == ["it does not state the guarantee"]


@pytest.mark.parametrize("name", statement_rows(PRIVATE))
def test_each_edited_row_is_exposed(name):
    row = f"| {name} | {statement_rows(PRIVATE)[name]} |"
    assert row in card()
    (problem,) = contradictions(card().replace(row, f"| {name} | 0.001 |"), PRIVATE)
    assert repr(name) in problem
    assert "'0.001'" in problem


@pytest.mark.parametrize("name", statement_rows(PRIVATE))
def test_each_deleted_row_is_exposed(name):
    row = f"| {name} | {statement_rows(PRIVATE)[name]} |\n"
    (problem,) = contradictions(card().replace(row, ""), PRIVATE)
    assert f"no row {name!r}" in problem


def test_a_second_table_is_exposed():
    (problem,) = contradictions(card() + "\n| ε | 0.1 |\n", PRIVATE)
    assert "its row 'ε' is '0.1'" in problem


def test_the_card_of_other_weights_is_exposed():
    problems = contradictions(card(), PrivacyStatement(PLAN, 20))
    assert any("it claims" in problem for problem in problems)
    assert any("'steps taken'" in problem for problem in problems)


def test_a_guarantee_claimed_for_a_run_without_one_is_exposed():
    problems = contradictions(card(PRIVATE), NOT_PRIVATE)
    assert any("but the run is NOT PRIVATE" in problem for problem in problems)
    assert "it does not say NOT PRIVATE" in problems


def test_layout_is_not_an_edit():
    reformatted = card().replace("| ε |", "|  ε   |").replace("1e-05)-diff", "0.00001)-diff")
    assert contradictions(reformatted, PRIVATE) == []


def test_an_epsilon_that_differs_as_little_as_another_release_of_the_accountant_is_no_edit():
    true = f"{PLAN.epsilon(12):.4g}"
    assert contradictions(card().replace(true, f"{PLAN.epsilon(12) * 1.001:.4g}"), PRIVATE) == []


def test_the_accountant_is_the_one_that_the_statement_was_written_with():
    written = PrivacyStatement(PLAN, 12, (), {"torch": "2.6", "numpy": "2.0", "dp-accounting": "0.5.9"})
    assert "| accountant | rdp (dp-accounting 0.5.9) |" in privacy_section(written)
