"""Steps of other libraries on the same model, batch and optimizer, beside which `DPCLIPTrainer` is measured.

Opacus clips what hooks on each layer take for the gradient of one example. In a contrastive loss every example is in
the gradient of all others, so the result is NOT private; only what it costs is of interest. opake clips whatever its
loss function computes from one slice of the batch: given slices of B/K pairs, it clips the joint gradient of each, as
`DPCLIPTrainer` does, if all slices have the same size.
"""

import argparse
import importlib.util
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Step, TrainerStep, Workload, timed
from torch import nn


MAX_GRAD_NORM = NOISE_MULTIPLIER = 1.0
REASON_LENGTH = 120


class PeerStep:
    """One optimizer step of another library. Subclasses say how the noisy gradient gets into `Parameter.grad`.

    Model, batch and optimizer are those of a plain trainer.
    """

    def __init__(self, workload: Workload, folder: str):
        trainer = workload.plain_trainer(folder)
        self.args = trainer.args
        self.steps = workload.steps
        self.model = trainer.model.train()
        self.optimizer = trainer.create_optimizer()
        self.loader = trainer.get_train_dataloader()
        self.batch = next(iter(self.loader))
        del self.batch["return_loss"]

    def __call__(self) -> float:
        return [timed(self.step) for _ in range(self.steps)][-1]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)


class OpacusStep(PeerStep):
    """`PrivacyEngine.make_private` with `grad_sample_mode` `"hooks"` or `"ghost"`.

    Ghost clipping takes one loss per example, which it weighs for a second backward pass: a row of the contrastive
    loss passes for that.
    """

    def __init__(self, workload: Workload, folder: str, mode: str):
        from opacus import PrivacyEngine

        super().__init__(workload, folder)
        self.model, self.optimizer, *criterion, _ = PrivacyEngine(accountant="rdp").make_private(
            module=self.model,
            optimizer=self.optimizer,
            criterion=ContrastiveLoss(),
            data_loader=self.loader,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,  # the batch is given
            grad_sample_mode=mode,
        )
        # Only ghost clipping replaces the criterion.
        self.criterion = criterion[0] if criterion else ContrastiveLoss()

    def backward(self) -> None:
        with self.autocast():
            loss = self.criterion(self.model(**self.batch).logits_per_text)
        loss.backward()


class ContrastiveLoss(nn.Module):
    """CLIP's loss; with `reduction="none"`, which Opacus sets, one term per pair."""

    reduction = "mean"

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        pairs = torch.arange(len(logits), device=logits.device)
        towers = [nn.functional.cross_entropy(each, pairs, reduction=self.reduction) for each in (logits, logits.T)]
        return sum(towers) / 2


class OpakeStep(PeerStep):
    """`clipped_grad` over K equal slices of the batch, then `gaussian_noise`."""

    def __init__(self, workload: Workload, folder: str, num_microbatches: int):
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.random import key

        super().__init__(workload, folder)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.slices = [self.batch[name].unflatten(0, (num_microbatches, -1)) for name in ("pixel_values", "input_ids")]
        self.clipped_grad, self.clip_state = clipped_grad(
            self.loss, clipping_norm=MAX_GRAD_NORM, normalize_by=num_microbatches, batch_argnums=(1, 2)
        )
        self.noise, self.noise_state = gaussian_noise(noise_multiplier=NOISE_MULTIPLIER, key=key(0))

    def loss(
        self, parameters: dict[str, torch.Tensor], pixel_values: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "return_loss": True}
        return torch.func.functional_call(self.model, parameters, (), inputs).loss

    def backward(self) -> None:
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        with self.autocast():
            clipped, self.clip_state = self.clipped_grad(values, *self.slices, state=self.clip_state)
        noisy, self.noise_state = self.noise(clipped, self.noise_state)
        for name, parameter in self.parameters.items():
            parameter.grad = noisy.pytree[name]


@dataclass(frozen=True)
class Peer:
    """How to make the step of another library.

    Args:
        package (`str`): what has to be installed.
        make (callable): from workload, folder and K to the step.
        per_example (`bool`): whether it knows no microbatches, so that K = B whatever is asked for.
    """

    package: str
    make: Callable[[Workload, str, int], Step]
    per_example: bool

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


PEERS = {
    "opacus-hooks": Peer("opacus", lambda workload, folder, _: OpacusStep(workload, folder, "hooks"), True),
    "opacus-ghost": Peer("opacus", lambda workload, folder, _: OpacusStep(workload, folder, "ghost"), True),
    "opake": Peer("opake", OpakeStep, False),
}


def add_peers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="other libraries to measure beside ours")


def check_installed(parser: argparse.ArgumentParser, names: list[str]) -> None:
    for name in names:
        if not PEERS[name].installed:
            parser.error(f"--peers {name} needs {PEERS[name].package}: pip install {PEERS[name].package}")


def entrants(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(name, K) of every trainer that was asked for, the plain one first."""
    ours = [("private", k) for k in args.num_microbatches]
    peers = [(name, k) for name in args.peers for k in microbatches_of(name, args)]
    return [("plain", 1), *ours, *peers]


def microbatches_of(peer: str, args: argparse.Namespace) -> list[int]:
    return [args.batch_size] if PEERS[peer].per_example else args.num_microbatches


def make_step(name: str, num_microbatches: int, workload: Workload, folder: str) -> Step | str:
    """The step of a trainer, or in short why a peer does not run."""
    if name == "plain":
        return TrainerStep(workload.plain_trainer(folder))
    if name == "private":
        return TrainerStep(workload.private_trainer(folder, workload.batch_size // num_microbatches))
    try:
        step = PEERS[name].make(workload, folder, num_microbatches)
        step()
    except Exception as error:  # whatever it is, it is the answer
        return in_short(error)
    return step


def in_short(error: Exception) -> str:
    if error.args and isinstance(error.args[0], list):  # as Opacus raises them
        error = error.args[0][0]
    return textwrap.shorten(f"{type(error).__name__}: {error}", REASON_LENGTH)
