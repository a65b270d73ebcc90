"""The privacy section of a model card: written from the privacy statement, and compared with it."""

import math
import re

from .markdown import table
from .privacy import STATEMENT_NAME, PrivacyPlan, PrivacyStatement


CARD_NAME = "README.md"
HEADING = "## Privacy"
NOT_PRIVATE = "NOT PRIVATE"

_CLAIM = re.compile(r"\(\s*([^(),]+),\s*([^(),]+)\)[^\w\n]{0,3}(?:differentially\s+private|DP\b)", re.IGNORECASE)
# Lines in which ε is looked for: optimizers and layers have an epsilon too.
_EPSILON_LINE = re.compile(r"[\s*_>|]*(?:ε|epsilon\b)|.*(?:differential|privacy|\bDP\b)", re.IGNORECASE)
_EPSILON = re.compile(
    r"(?<!target )(?:ε|\bepsilon\b)[\s*]*([=:≈≤<])[\s*]*([0-9][0-9.]*(?:e[+-]?[0-9]+)?)", re.IGNORECASE
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_NUMBER = re.compile(r"[0-9][0-9.]*(?:,[0-9]{3})*(?:e[+-]?[0-9]+)?|inf\b")
_SPEAKS_OF_PRIVACY = re.compile(r"differential(ly)?[\s-]priva|\bepsilon\b|ε", re.IGNORECASE)

# Cards round to four digits, and another release of the accountant may differ in the fourth.
_TOLERANCE = 2e-3

NOT_COVERED = f"""\
- The data that the starting weights were trained on.
- Other models trained on the same records: each spends its own ε, and they add up.
- Choices made by looking at the records: settings tuned on them, classes or captions collected from them.
- Whatever was declared public: lists of classes or answers, and captions or images to contrast with.
- Metrics computed on the training records, if anybody publishes such.
- Several records of one person, unless the privacy unit above is that person.
- Whoever watches the training machine: the time of a step, or the error of a record that cannot be read.

The theorem, its proof and its limits are in `docs/privacy.md` of `hf_dpclip`. `{STATEMENT_NAME}` beside this card
holds the figures in machine-readable form."""


def plan_rows(plan: PrivacyPlan) -> dict[str, str]:
    """Everything that the guarantee depends on, under the names of the documentation, for a table."""
    return {
        "privacy units n": f"{plan.num_examples:,} (one unit = one {plan.privacy_unit})",
        "adjacency": "one privacy unit added or removed",
        "sampler": f"Poisson, probability q = {plan.sampling_probability:.4g}, fresh in every step",
        "expected batch size B": f"{plan.expected_batch_size:,}",
        "microbatches per step K": f"{plan.num_microbatches:,} of about {_count(plan.microbatch_size)} units each",
        "clipping norm C": f"{plan.max_grad_norm:g} ({plan.clipping})",
        "sensitivity Δ": f"{plan.sensitivity:g}",
        "noise multiplier σ": f"{plan.noise_multiplier:.4g}",
        "noise standard deviation σΔ": f"{plan.noise_std:.4g}",
        "δ": f"{plan.target_delta:.3g}",
    }


def _count(number: float) -> str:
    """Four digits, and all of those before the decimal point, as whole numbers are shown."""
    return f"{number:.4g}" if number < 1000 else f"{number:,.0f}"


def statement_rows(statement: PrivacyStatement) -> dict[str, str]:
    """[`plan_rows`], and the steps taken and ε spent."""
    plan = statement.plan
    earlier = {"earlier runs, counted in ε": f"{len(statement.earlier_runs)}"} if statement.earlier_runs else {}
    return {
        "ε": "no guarantee" if statement.not_private_because else f"{statement.spent.epsilon:.4g}",
        **plan_rows(plan),
        "δ": f"{statement.spent.delta:.3g}",
        "steps taken": f"{statement.steps:,} (planned: {plan.num_steps:,})",
        **earlier,
        "accountant": f"{plan.accountant} (dp-accounting {statement.versions['dp-accounting']})",
    }


def privacy_section(statement: PrivacyStatement) -> str:
    """Markdown that says what is guaranteed, by which mechanism, and what is not."""
    return f"""\
{HEADING}

{_claim(statement)}

{table(["", ""], statement_rows(statement).items())}

### Not covered

{NOT_COVERED}
"""


def contradictions(card: str, statement: PrivacyStatement) -> list[str]:
    """Where the text of a card disagrees with the statement, one sentence each; none where it says nothing of privacy.

    Compares every claim, wherever it stands, every row of the table and every line of the section. Comments are
    ignored.
    """
    card = _COMMENT.sub("", card)
    claims = _CLAIM.findall(card)
    if HEADING not in card.splitlines() and not claims:
        spoken = _SPEAKS_OF_PRIVACY.search(card)
        return [f"it speaks of privacy ({spoken[0]!r}) but has no section {HEADING!r}"] if spoken else []
    found = [problem for claim in claims for problem in _check_claim(claim, statement)]
    if statement.not_private_because and NOT_PRIVATE not in card:
        found.append(f"it does not say {NOT_PRIVATE}")
    if not statement.not_private_because and not claims:
        found.append("it does not state the guarantee")
    rows = statement_rows(statement)
    found += [problem for name, value in rows.items() for problem in _check_row(card, name, value)]
    found += _check_epsilons(card, statement)
    # A line with a wrong number was already found.
    return found or _check_lines(card, statement)


def _claim(statement: PrivacyStatement) -> str:
    if statement.not_private_because:
        return f"**{NOT_PRIVATE}**: " + "; ".join(statement.not_private_because) + "."
    spent = statement.spent
    return (
        f"This model is **({spent.epsilon:.4g}, {spent.delta:.3g})-differentially private** with respect to adding or "
        f"removing one {statement.plan.privacy_unit} of its training data: whether it took part changes the "
        "probability of anything that the weights can tell by a factor of at most e^ε, plus δ."
    )


def _check_claim(claim: tuple[str, str], statement: PrivacyStatement) -> list[str]:
    text = f"({claim[0]}, {claim[1]})-differentially private"
    if statement.not_private_because:
        return [f"it claims {text}, but the run is {NOT_PRIVATE}"]
    expected = f"{statement.spent.epsilon:.4g}", f"{statement.spent.delta:.3g}"
    if all(map(_agree, claim, expected)):
        return []
    return [f"it claims {text}, but {STATEMENT_NAME} gives ({', '.join(expected)})"]


def _check_row(card: str, name: str, expected: str) -> list[str]:
    values = re.findall(rf"^\| *{re.escape(name)} *\| *(.*?) *\|\s*$", card, re.MULTILINE)
    if not values:
        return [f"it has no row {name!r}, which would be {expected!r}"]
    return [
        f"its row {name!r} is {value!r}, but {STATEMENT_NAME} gives {expected!r}"
        for value in values
        if not _agree(value, expected)
    ]


def _check_epsilons(card: str, statement: PrivacyStatement) -> list[str]:
    """Compares every ε outside the section."""
    lines = [line for line in _lines(card)[1] if _EPSILON_LINE.match(line)]
    return [
        f"it gives {found[0]!r} outside the section, but {STATEMENT_NAME} gives {statement.spent.epsilon:.4g}"
        for found in _EPSILON.finditer("\n".join(lines))
        if statement.not_private_because or not _is_true(found[1], found[2].rstrip("."), statement.spent.epsilon)
    ]


def _is_true(relation: str, number: str, epsilon: float) -> bool:
    if relation in "≤<":
        return float(number) >= epsilon * (1 - _TOLERANCE)
    return math.isclose(float(number), epsilon, rel_tol=0.05 if relation == "≈" else _TOLERANCE)


def _check_lines(card: str, statement: PrivacyStatement) -> list[str]:
    """Compares the lines of the section, but for numbers, which are compared in claims and rows."""
    written, expected = (
        {_without_numbers(line): line for line in _lines(text)[0]} for text in (card, privacy_section(statement))
    )
    return [
        *(f"its section lacks {line!r}" for key, line in expected.items() if key not in written),
        *(f"its section has a line of its own, {line!r}" for key, line in written.items() if key not in expected),
    ]


def _lines(card: str) -> tuple[list[str], list[str]]:
    """The lines of the section, up to the next heading of its level, and all other lines."""
    inside: list[str] = []
    outside: list[str] = []
    is_inside = False
    for line in map(str.strip, card.splitlines()):
        if line.startswith(("# ", "## ")):
            is_inside = line == HEADING
        if line:
            (inside if is_inside else outside).append(line)
    return inside, outside


def _without_numbers(line: str) -> str:
    return _NUMBER.sub("#", "".join(line.split()))


def _agree(text: str, expected: str) -> bool:
    """Whether both are the same, or numbers that differ by no more than rounding."""
    try:
        return math.isclose(float(text), float(expected), rel_tol=_TOLERANCE)
    except ValueError:
        return text == expected
