"""What must hold of an honest mechanism, as checks that tests apply to the real code and to broken doubles of it.

Every statistical check has a false-alarm rate below 1e-6.
"""

import logging
import math

import numpy as np
import torch
from factories import arguments, pairs, tiny_clip
from scipy import stats
from torch import nn

from hf_dpclip import DPCLIPTrainer
from hf_dpclip.audit.game import ChosenGradients
from hf_dpclip.audit.zoo import chosen


FALSE_ALARM_RATE = 1e-7
# Two-sided normal quantile of the false-alarm rate.
SIGMAS = 5.4
# A noise multiplier at which the gradient below the noise does not show in the law.
LOUD = 30.0
# From rows to a dataset for [`Given`].
vectors = chosen


class Given(ChosenGradients):
    """A model whose gradient on a microbatch is the sum of the records' own vectors, in one tensor."""

    def __init__(self, size: int = 4):
        super().__init__(size)

    @property
    def weight(self) -> nn.Parameter:
        return self.tensors[0]


def one_update(tmp_path, model=None, dataset=None, trainer_class=DPCLIPTrainer, **overrides):
    """What one SGD step of learning rate 1 subtracts from the weights (the released gradient), and the trainer."""
    model = tiny_clip() if model is None else model
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    args = arguments(tmp_path, **{**settings, **overrides})
    trainer = trainer_class(model, args, train_dataset=pairs(64) if dataset is None else dataset)
    before = flat_weights(model)
    trainer.train()
    return before - flat_weights(model), trainer


def sum_of_clipped(tmp_path, monkeypatch, model, dataset, microbatches, **overrides) -> torch.Tensor:
    """The sum that one step without noise releases, where it is known who is drawn and with which label."""
    drawn = [np.array(microbatch, dtype=np.int64) for microbatch in microbatches]
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw", lambda self: drawn)
    monkeypatch.setattr("hf_dpclip.trainer.PoissonSampler.draw_seeds", lambda self, count: list(range(count)))
    update, trainer = one_update(tmp_path, model, dataset, non_private=True, **overrides)
    return update * trainer.plan.num_microbatches


def logged_values(trainer, name: str) -> list[float]:
    """All values of that name in the log history."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def flat_weights(model) -> torch.Tensor:
    """A copy of all trainable parameters, as one vector."""
    return torch.cat([p.detach().cpu().double().flatten() for p in model.parameters() if p.requires_grad])


def check_noise_law(values: torch.Tensor, std: float) -> None:
    """The values are draws from N(0, std²): that law passes, 2/3 and 3/2 of its scale do not."""
    values = values.detach().double().numpy().ravel()
    assert fits(values, std), f"not N(0, {std:g}²): standard deviation {values.std():.4g}"
    for wrong in (2 / 3, 3 / 2):
        assert not fits(values, wrong * std), f"{len(values)} values cannot tell {wrong * std:g} from {std:g}"


def fits(values: np.ndarray, std: float) -> bool:
    return stats.kstest(values, "norm", args=(0, std)).pvalue > FALSE_ALARM_RATE


def check_resolution(values: torch.Tensor) -> None:
    """Float32 noise hardly repeats a value; half-precision noise has few to choose from."""
    distinct = len(values.float().unique()) / values.numel()
    assert distinct > 0.9, f"only {distinct:.0%} of the values are distinct"


def check_uncorrelated(first: torch.Tensor, second: torch.Tensor) -> None:
    """Two stretches of noise have nothing in common."""
    correlation = np.corrcoef(first.numpy().ravel(), second.numpy().ravel())[0, 1]
    assert abs(correlation) < SIGMAS / math.sqrt(first.numel()), f"correlation {correlation:.3f}"


def check_bounded(contribution: torch.Tensor, bound: float) -> None:
    """The norm over all tensors together is at most `bound`, up to float32 rounding."""
    norm = float(contribution.double().norm())
    assert norm <= bound * (1 + 1e-5), f"norm {norm:.4g} > {bound:g}"


def check_binomial(counts: list[int], trials: int, probability: float) -> None:
    """Mean and variance of the counts are those of Binomial(trials, probability)."""
    counts = np.asarray(counts, dtype=float)
    variance = trials * probability * (1 - probability)
    z = (counts.mean() - trials * probability) / math.sqrt(variance / len(counts))
    assert abs(z) < SIGMAS, f"mean {counts.mean():.3f}, expected {trials * probability:.3f}"
    # The sample variance of a binomial has relative deviation sqrt((2 + excess kurtosis) / N).
    deviation = math.sqrt((2 + 1 / variance) / len(counts))
    ratio = counts.var(ddof=1) / variance
    assert abs(ratio - 1) < 1.2 * SIGMAS * deviation, f"variance {ratio:.3f} times that of the binomial"


def check_poisson_batches(draws: list[list[np.ndarray]], num_units: int, probability: float) -> None:
    """Each unit joins each batch independently with the given probability."""
    check_binomial([sum(map(len, draw)) for draw in draws], num_units, probability)
    members = [set(np.concatenate(draw).tolist()) if draw else set() for draw in draws]
    for pair in ({0, 1}, {0, num_units - 1}):
        check_binomial([pair <= batch for batch in members], 1, probability**2)


def check_independent_labels(draws: list[list[np.ndarray]], num_units: int, probability: float) -> None:
    """Each drawn unit has a uniform microbatch label of its own, whoever else was drawn."""
    num_microbatches = len(draws[0])
    for label in (0, num_microbatches - 1):
        check_binomial([len(draw[label]) for draw in draws], num_units, probability / num_microbatches)
    together = [any(0 in microbatch and 1 in microbatch for microbatch in draw) for draw in draws]
    check_binomial(together, 1, probability**2 / num_microbatches)


def warnings_of(caplog, warn, *args) -> str:
    """What a function warns of, and nothing that was said before."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn(*args)
    return caplog.text
