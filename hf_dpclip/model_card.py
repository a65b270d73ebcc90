"""The section on privacy that every model card carries."""

from .privacy import STATEMENT_NAME, PrivacyStatement


def privacy_section(statement: PrivacyStatement) -> str:
    """Markdown that says what is guaranteed, by which mechanism, and what is not."""
    plan, spent = statement.plan, statement.spent
    claim = (
        f"This model is **({spent.epsilon:.4g}, {spent.delta:.3g})-differentially private** with respect to adding or "
        f"removing one {plan.privacy_unit} of its training data."
        if not statement.not_private_because
        else "**NOT PRIVATE**: " + "; ".join(statement.not_private_because) + "."
    )
    rows = {
        "privacy units n": f"{plan.num_examples:,}",
        "sampler": f"Poisson, probability q = {plan.sampling_probability:.4g}, fresh in every step",
        "expected batch size B": f"{plan.expected_batch_size:,}",
        "microbatches per step K": f"{plan.num_microbatches:,}",
        "clipping norm C": f"{plan.max_grad_norm:g} ({plan.clipping})",
        "sensitivity Δ": f"{plan.sensitivity:g}",
        "noise multiplier σ": f"{plan.noise_multiplier:.4g}",
        "steps taken": f"{spent.steps:,} (planned: {plan.num_steps:,})",
        "accountant": f"{plan.accountant} ({plan.to_dict()['accountant_version']})",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"\n## Privacy\n\n{claim}\n\n| | |\n|---|---|\n{table}\n\n"
        f"`{STATEMENT_NAME}` holds the same in machine-readable form. Not covered: the data the starting weights were "
        "trained on, other models trained on the same data, choices made by looking at it, and metrics on it.\n"
    )
