"""Run under a launcher: train on every process and write down what each of them saw, for the tests to judge.

python -m torch.distributed.run --nproc_per_node 2 two_processes.py FOLDER
"""

import json
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import PartialState
from torch.utils._pytree import tree_leaves


sys.path.insert(0, str(Path(__file__).parents[1]))

from checks import LOUD, flat_weights, one_update
from factories import arguments, pairs, raw_pairs, tiny_clip, tiny_processor
from plans import noiseless_plan, one_step_plan

from hf_dpclip import DPCLIPTrainer, ImageTextCollator, WeightAveraging
from hf_dpclip.privacy import GaussianMechanism, Randomness, SecureGaussianMechanism
from hf_dpclip.privacy.secure_noise import grid_width


DRAWS = 4000


@contextmanager
def collectives():
    """Names of the collective operations of the mechanism that are called inside, with the most that each moves."""
    calls = []

    def counting(name, operation):
        def counted(*args, **kwargs):
            sizes = [sum(leaf.numel() for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)) for arg in args]
            calls.append((name, max(sizes)))
            return operation(*args, **kwargs)

        return counted

    names = ("all_reduce", "all_gather", "all_to_all_single")
    with ExitStack() as patches:
        for name in names:
            counted = counting(name, getattr(torch.distributed, name))
            patches.enter_context(mock.patch.object(torch.distributed, name, counted))
        yield calls


def noisy_update(folder: Path) -> torch.Tensor:
    """Steps so loud that the released gradient is all noise; with the communication that they took."""
    with collectives() as calls:
        update, trainer = one_update(folder, noise_multiplier=LOUD, microbatch_size=4, max_steps=3)
    facts = {
        "collectives": calls,
        "trainable": len(update),
        "steps": trainer.privacy_spent().steps,
        "num_microbatches": trainer.plan.num_microbatches,
        "num_processes": trainer.args.world_size,
    }
    (folder / f"facts-{trainer.args.process_index}.json").write_text(json.dumps(facts))
    return update


def mechanism_of(kind: type[GaussianMechanism], *sizes: int) -> tuple[GaussianMechanism, list[torch.nn.Parameter]]:
    """For parameters of these sizes, zero, with K = 4."""
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    return kind(one_step_plan(), weights, Randomness().noise(), PartialState().process_index, 2), weights


def secure_release() -> torch.Tensor:
    """K times a release on a grid, of a sum of 0.3 of its widths from each process."""
    mechanism, (weight,) = mechanism_of(SecureGaussianMechanism, 20_000)
    with mechanism.microbatch():
        weight.grad = torch.full_like(weight, 0.3 * grid_width(mechanism.plan))
    mechanism.release()
    return weight.grad * 4


def spanning_noise(kind: type[GaussianMechanism]) -> torch.Tensor:
    """K times a release of one microbatch that spans the processes and is dropped, as its gradient is not finite."""
    mechanism, (weight,) = mechanism_of(kind, 20_001)
    with mechanism.spanning_microbatch():
        weight.grad = torch.full_like(weight, torch.nan)
    mechanism.release()
    return weight.grad * 4


def noise_alone(kind: type[GaussianMechanism]) -> torch.Tensor:
    """K times a release of no microbatch; of one parameter there are fewer coordinates than processes."""
    mechanism, weights = mechanism_of(kind, 4_000, 1, 15_000, 2_001)
    mechanism.release()
    return torch.cat([weight.grad for weight in weights]) * 4


def refuses_a_mixture() -> bool:
    """Whether a release is refused where only some of its microbatches span the processes."""
    mechanism, (weight,) = mechanism_of(GaussianMechanism, 5)
    for microbatch in (mechanism.microbatch, mechanism.spanning_microbatch):
        with microbatch():
            weight.grad = torch.ones_like(weight)
    try:
        mechanism.release()
    except RuntimeError:
        return True
    return False


def refuses(folder: Path, records, collator=None) -> bool:
    """Whether nothing is trained on records that are in another order on the other process."""
    args = arguments(folder, per_device_train_batch_size=4)
    try:
        DPCLIPTrainer(tiny_clip(), args, collator, records).train()
    except ValueError as error:
        return "in another order" in str(error)
    return False


def refuses_another_order(folder: Path) -> bool:
    """Where each process has shuffled the records for itself."""
    return refuses(
        folder, raw_pairs(64).shuffle(seed=PartialState().process_index), ImageTextCollator(tiny_processor())
    )


def refuses_another_order_of_a_list(folder: Path) -> bool:
    """With records in a list, as a set of files gives them."""
    return refuses(folder, [*pairs(64)][:: 1 - 2 * PartialState().process_index])


class Gathering(DPCLIPTrainer):
    """Contrasts the texts of this process with the images of all."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        images = [torch.empty(16, 8) for _ in range(2)]
        own = torch.nn.functional.pad(outputs.image_embeds.detach(), (0, 0, 0, 16 - len(outputs.image_embeds)))
        torch.distributed.all_gather(images, own)
        return (outputs.text_embeds @ torch.cat(images).T).exp().sum()


def refuses_to_gather(folder: Path) -> bool:
    """Whether a loss that learns from the other process is found out before anything of it is released."""
    # Draws with pairs for both processes: one without would not join in.
    args = arguments(folder, per_device_train_batch_size=4, max_steps=1, noise_seed=5)
    trainer = Gathering(tiny_clip(), args, train_dataset=pairs(64))
    before = flat_weights(trainer.model)
    try:
        trainer.train()
    except RuntimeError as error:
        return "gathers over processes" in str(error) and torch.equal(flat_weights(trainer.model), before)
    return False


def exact_update(folder: Path) -> torch.Tensor:
    """One step without noise whose draws are reproducible: the same as that of one process."""
    settings = {"non_private": True, "noise_seed": 5, "microbatch_size": 2, "optim": "sgd", "learning_rate": 1.0}
    batch = 16 // int(os.environ["WORLD_SIZE"])
    update, _ = one_update(folder, per_device_train_batch_size=batch, **settings)
    return update


def spanning_update(folder: Path) -> torch.Tensor:
    """The same with one microbatch, on which all processes work in chunks of 4; with the communication it took."""
    settings = {"non_private": True, "noise_seed": 5, "microbatch_size": 16, "optim": "sgd", "learning_rate": 1.0}
    passes = 4 // int(os.environ["WORLD_SIZE"])
    with collectives() as calls:
        update, trainer = one_update(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=passes, **settings
        )
    assert trainer.args.microbatch_spans_processes
    (folder / f"spanning-{trainer.args.process_index}.json").write_text(json.dumps(calls))
    return update


def spanning_sums() -> torch.Tensor:
    """K times a release of what the processes computed of three microbatches: [3, 4] in two halves; [3, 4] hundred
    times, which is clipped to norm 1; and one that is infinite on the last process, which does not count."""
    plan = noiseless_plan(expected_batch_size=15, num_microbatches=3)
    process = PartialState().process_index
    weight = torch.nn.Parameter(torch.zeros(5))
    mechanism = GaussianMechanism(plan, [weight], Randomness().noise(), process, 2)
    for scale in (0.1, 100.0, torch.inf if process else 1.0):
        with mechanism.spanning_microbatch():
            weight.grad = scale / 2 * torch.tensor([3.0, 0.0, 0.0, 0.0, 4.0])
    mechanism.release()
    return weight.grad * 3


def averaged_update(folder: Path) -> torch.Tensor:
    """Averages of four steps, of which a resumed run took the last two. The same on one process as on two."""
    settings = {"non_private": True, "noise_seed": 5, "microbatch_size": 2, "optim": "sgd", "learning_rate": 1.0}
    batch = 16 // int(os.environ.get("WORLD_SIZE", 1))
    args = arguments(
        folder, per_device_train_batch_size=batch, max_steps=4, save_strategy="steps", save_steps=2, **settings
    )
    for checkpoint in (None, str(folder / "checkpoint-2")):
        model = tiny_clip()
        trainer = DPCLIPTrainer(model, args, train_dataset=pairs(64), callbacks=[WeightAveraging()])
        trainer.train(resume_from_checkpoint=checkpoint)
    return flat_weights(model)


def draws(folder: Path) -> np.ndarray:
    """Which of 60 units this process was dealt in each of many steps, and in which of its microbatches."""
    args = arguments(folder, per_device_train_batch_size=6, microbatch_size=3, max_steps=1)
    trainer = DPCLIPTrainer(tiny_clip(), args, train_dataset=pairs(60))
    trainer.train()
    sampler = trainer.get_train_dataloader().sampler
    dealt = np.zeros((DRAWS, 60), dtype=np.int64)
    for step in range(DRAWS):
        (forward_batch,) = list(sampler)[:1]
        for label, (_, units) in enumerate(forward_batch):
            dealt[step, units] = label + 1
    return dealt


def mostly_empty(folder: Path) -> torch.Tensor:
    """Steps in which hardly anybody is drawn must not leave a process waiting for the other."""
    args = arguments(
        folder, per_device_train_batch_size=2, microbatch_size=1, max_steps=30, gradient_accumulation_steps=1
    )
    model = tiny_clip()
    dataset = [{"pixel_values": pair["pixel_values"], "input_ids": pair["input_ids"]} for pair in pairs(400)]
    trainer = DPCLIPTrainer(
        model, args, train_dataset=dataset, compute_loss_func=lambda outputs, *_, **__: outputs.loss
    )
    trainer.train()
    return flat_weights(model)


def buckets_of(size: int):
    return mock.patch("hf_dpclip.privacy.reduction.BUCKET", size)


def main():
    folder, process = Path(sys.argv[1]), os.environ["RANK"]
    results = {
        "noisy": noisy_update(folder).numpy(),
        "exact": exact_update(folder).numpy(),
        "spanning": spanning_update(folder).numpy(),
        "spanning sums": spanning_sums().numpy(),
        "spanning noise": spanning_noise(GaussianMechanism).numpy(),
        "spanning secure noise": spanning_noise(SecureGaussianMechanism).numpy(),
        "averaged": averaged_update(folder / "averaged").numpy(),
        "empty": mostly_empty(folder).numpy(),
        "secure": secure_release().numpy(),
        "refuses a mixture": refuses_a_mixture(),
        "refuses another order": refuses_another_order(folder / "orders"),
        "refuses another order of a list": refuses_another_order_of_a_list(folder / "lists"),
        "refuses to gather": refuses_to_gather(folder / "gathering"),
        "draws": draws(folder),
    }
    with buckets_of(1001):
        in_buckets = {
            "exact": exact_update(folder / "buckets").numpy(),
            "spanning": spanning_update(folder / "buckets").numpy(),
            "spanning noise": spanning_noise(GaussianMechanism).numpy(),
            "noise": noise_alone(GaussianMechanism).numpy(),
            "secure noise": noise_alone(SecureGaussianMechanism).numpy(),
        }
    with buckets_of(2):
        in_buckets["spanning sums"] = spanning_sums().numpy()
    results |= {f"{name} in buckets": result for name, result in in_buckets.items()}
    np.savez(folder / f"process-{process}.npz", **results)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
