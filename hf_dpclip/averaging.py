"""Exponential moving average of the weights, to be evaluated and saved instead of the last weights."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback


AVERAGES_NAME = "weight_averages.safetensors"


class WeightAveraging(TrainerCallback):
    """
    Averages the trainable parameters over the steps; the averages are what is evaluated and saved.

    The noise of single steps averages out. That costs no privacy: averages of private weights are post-processing.

    Between two steps the model holds the averages, so that whatever happens there (evaluation, checkpoints, callbacks
    listed after this one, and everything after the last step) sees them. During a step it holds the weights that the
    optimizer moves. After step t, counted from 0, averages become d · averages + (1 − d) · weights, where d is
    min(decay, (1 + t) / (10 + t)), so that a short run soon forgets its start. They are float32 whatever the dtype of
    the parameters.

    A checkpoint holds the averages where the model is kept, and in `weight_averages.safetensors` these in float32 and
    the weights of the last step, from which a run resumed by [`DPCLIPTrainer`] goes on.

    Args:
        decay (`float`, *optional*, defaults to 0.9999): the largest d, at least 0 and below 1.

    Raises `ValueError` for another decay, and for a run resumed without the averages of its checkpoint.

    Example:
        ```python
        trainer = DPCLIPTrainer(model, args, collator, train_dataset, callbacks=[WeightAveraging()])
        ```

    Reference: De et al., Unlocking High-Accuracy Differentially Private Image Classification through Scale (2022).
    """

    def __init__(self, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} is not possible: it must be at least 0 and below 1, e.g. 0.9999.")
        self.decay = decay
        self._parameters: dict[str, nn.Parameter] = {}
        self._weights: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self._begin(model)
        elif not self._averages:
            raise ValueError(
                "a plain Trainer resumes without the averages of its checkpoint: use DPCLIPTrainer "
                "(non_private=True trains without noise), or remove WeightAveraging."
            )

    @torch.no_grad()
    def on_step_begin(self, args, state, control, **kwargs):
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[name])

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        t = state.global_step - 1
        decay = min(self.decay, (1 + t) / (10 + t))
        for name, parameter in self._parameters.items():
            self._weights[name].copy_(parameter)
            parameter.copy_(self._averages[name].lerp_(parameter.float(), 1 - decay))

    def on_train_end(self, args, state, control, **kwargs):
        self._parameters, self._weights, self._averages = {}, {}, {}

    def save(self, folder: str | Path) -> None:
        """Writes weights and averages into a checkpoint, atomically."""
        path = Path(folder, AVERAGES_NAME)
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, temporary)
        os.replace(temporary, path)

    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Continues with the weights and averages of a checkpoint.

        Raises `FileNotFoundError` if it has none and `ValueError` if they are those of other parameters.
        """
        path = Path(folder, AVERAGES_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: the checkpoint was saved without WeightAveraging, or with "
                "save_only_model=True. Choose another checkpoint, or resume without WeightAveraging."
            )
        self._begin(model)
        saved, own = load_file(path), self._tensors()
        if _shapes(saved) != _shapes(own):
            raise ValueError(
                f"{path} holds averages of other parameters than those that are trained now: restore the model and "
                "what of it is trainable, or start a new run."
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def _begin(self, model: nn.Module) -> None:
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._weights = {name: each.detach().clone() for name, each in self._parameters.items()}
        self._averages = {name: each.detach().float().clone() for name, each in self._parameters.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names under which they are saved."""
        kinds = {"weights": self._weights, "averages": self._averages}
        return {f"{kind}.{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}


def save_averages(callbacks: Iterable[TrainerCallback], checkpoint: str | Path) -> None:
    """To be called while a checkpoint is written, if there may be a [`WeightAveraging`] among the callbacks."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            callback.save(checkpoint)


def load_averages(callbacks: Iterable[TrainerCallback], checkpoint: str | Path, model: nn.Module) -> None:
    """To be called when a checkpoint is resumed.

    Raises `FileNotFoundError` or `ValueError` unless either both the checkpoint and the run have averages, or neither:
    averages are not the weights that the optimizer would go on from.
    """
    averaging = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    if not averaging and Path(checkpoint, AVERAGES_NAME).is_file():
        raise ValueError(
            f"the weights in {checkpoint} are averages, and the run has no WeightAveraging to go on with: pass "
            "callbacks=[WeightAveraging()] to the trainer."
        )
    for callback in averaging:
        callback.load(checkpoint, model)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
