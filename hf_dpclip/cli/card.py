"""`hf-dpclip card`: what a published model claims, recomputed.

```bash
hf-dpclip card outputs/private-clip
hf-dpclip card me/private-clip --revision v1.0
```
"""

import argparse
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import print_table


if TYPE_CHECKING:
    from ..privacy import PrivacyStatement


SUMMARY = "What a model claims of its privacy, recomputed from its plan."


@dataclass(frozen=True)
class Findings:
    """The statement (`None` if it is damaged), where it does not hold, and whether the card agrees."""

    statement: "PrivacyStatement | None"
    problems: list[str]
    card: str = "there is no card beside it"

    @property
    def claims_nothing(self) -> bool:
        """Whether the model says of itself that it is not private, and nothing beside it says otherwise."""
        return self.statement is not None and len(self.problems) == len(self.statement.not_private_because) > 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="FOLDER_OR_REPO", help="saved model, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Checks the claim. Returns 0 if it holds and 1 if it does not."""
    findings = check(_folder_of(arguments.model, arguments.revision))
    if arguments.json:
        print(json.dumps(_as_dict(findings), indent=2))
    else:
        _show(arguments.model, findings)
    return 1 if findings.problems else 0


def check(folder: Path) -> Findings:
    """Recomputes what `privacy.json` in a folder claims, and compares the card beside it, if there is one.

    Raises `FileNotFoundError` if there is no `privacy.json`.
    """
    from ..privacy import PrivacyStatement
    from ..privacy_section import CARD_NAME, HEADING, contradictions

    card = Path(folder, CARD_NAME)
    try:
        statement = PrivacyStatement.load(folder)
    except ValueError as error:
        return Findings(None, [str(error)])
    problems = [f"NOT PRIVATE: {reason}" for reason in statement.not_private_because]
    if not problems and not math.isfinite(statement.spent.epsilon):
        problems = ["ε is infinite"]
    if not card.is_file():
        return Findings(statement, problems)
    text = card.read_text(encoding="utf-8")
    found = contradictions(text, statement)
    problems += [f"{CARD_NAME} was edited or belongs to other weights: {problem}" for problem in found]
    if HEADING in text.splitlines():
        return Findings(statement, problems, "the card agrees")
    return Findings(
        statement,
        problems,
        f"{CARD_NAME} beside it says nothing of it (trainer.create_model_card() writes one that does)",
    )


def _folder_of(model: str, revision: str | None) -> Path:
    """The folder of that name, or one with `privacy.json` and the card from the Hub."""
    if Path(model).is_file():
        raise ValueError(f"{model} is a file: name the folder that it is in, {Path(model).resolve().parent}")
    if not Path(model).is_dir():
        return _download(model, revision)
    if revision is not None:
        raise ValueError(f"--revision is for models on the Hub, but {model} is a folder here: leave it out.")
    return Path(model)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    from ..privacy import STATEMENT_NAME
    from ..privacy_section import CARD_NAME

    try:
        statement = hf_hub_download(repo_id, STATEMENT_NAME, revision=revision)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{repo_id} does not exist, and no model on the Hub can have such a name: name the folder of a saved "
            "model."
        ) from error
    # The second one where there is no connection.
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a folder here nor a model that the Hub shows you ({error}): check the spelling and "
            "the connection, or log in with `hf auth login` if it is private."
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no {STATEMENT_NAME}, so it claims no privacy ({error}).") from error
    # A model without a card can be checked too.
    with suppress(EntryNotFoundError):
        hf_hub_download(repo_id, CARD_NAME, revision=revision)
    return Path(statement).parent


def _as_dict(findings: Findings) -> dict:
    values = {"holds": not findings.problems, "problems": findings.problems}
    if findings.statement is None:
        return values
    from ..privacy.plan import finite_or_none

    spent = findings.statement.spent
    recomputed = {"epsilon": finite_or_none(spent.epsilon), "delta": spent.delta, "steps": spent.steps}
    return {**values, **recomputed, "plan": findings.statement.plan.to_dict()}


def _show(model: str, findings: Findings) -> None:
    from ..privacy_section import statement_rows

    if findings.statement is not None:
        print_table(f"Privacy of {model}", statement_rows(findings.statement))
    if not findings.problems:
        print(f"The claim holds: ε follows from the plan and the steps taken, and {findings.card}.")
        return
    if findings.claims_nothing:
        print("No privacy is claimed:")
    else:
        print("The claim does NOT hold:")
    for problem in findings.problems:
        print(f"  - {problem}")
