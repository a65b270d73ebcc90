"""All microbatches of a forward batch in one forward and one backward pass."""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32, is_compiled_module
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules import module as torch_modules
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedConfig

from ..seeding import seeded
from .factored import Dense, Joined, Outer, Sparse, multiplied_out
from .grouping import Microbatch
from .inputs import concatenated, num_rows, text_length, without_return_loss
from .layout import Layout
from .products import added
from .recording import Recording
from .replaced import replaced_function, takes_part
from .vectorizable import CAUSAL_TEXTS, FIRST_POSITION_TEXTS, VectorizableModel


# Modules that treat every row of a batch, that is dimension 0, by itself: some by class, others by the module that
# defines them.
ROW_WISE = (nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.Dropout, nn.Identity)
# Attention implementations, by the names in the configuration; users may register others.
ROW_WISE_ATTENTION = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn4",
    "kernels-community/vllm-flash-attn3",
)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
ROW_WISE_FILES = (
    *CAUSAL_TEXTS,
    *FIRST_POSITION_TEXTS,
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.siglip2.modeling_siglip2",
    "transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder",
    "transformers.models.vit.modeling_vit",
    "transformers.activations",
    "peft.peft_model",
    "peft.tuners.lora.model",
    "peft.tuners.lora.layer",
    "peft.utils.other",
    "hf_dpclip.models.clip_vqa",
)
# Hooks on all modules at once, where torch keeps them.
GLOBAL_HOOKS = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)


class NotVectorizable(Exception):
    """Why microbatches have to be computed one after another, which gives the same result and takes longer."""


class MicrobatchGradients:
    """The gradients of K microbatches, known by their norms and their weighted sums.

    Args:
        parameters (`list[nn.Parameter]`): all trainable parameters.
        recording ([`Recording`]): of a forward and backward pass.

    Attributes:
        norms (`Tensor` of shape `[K]`): L2 norm of each gradient over all parameters together, float64.
    """

    def __init__(self, parameters: list[nn.Parameter], recording: Recording):
        self.parameters = parameters
        # By `id` of the parameter, as in the recording.
        gradients = {number: _merged(uses) for number, uses in recording.gradients.items()}
        outer = {n: each for n, each in gradients.items() if isinstance(each, Outer) and each.is_better_batched}
        gradients.update(multiplied_out(outer))
        small = {number: each for number, each in gradients.items() if isinstance(each, Dense) and each.is_small}
        self._gradients = {number: each for number, each in gradients.items() if number not in small}
        self._joined = Joined(small) if small else None
        joined = [self._joined] if self._joined else []
        squares = [each.squared_norms() for each in (*self._gradients.values(), *joined)]
        self.norms = torch.stack(squares).sum(dim=0).sqrt()

    def weighted_sum(self, factors: Tensor, totals: Iterable[Tensor | None] = repeat(None)) -> Iterator[Tensor | None]:
        """Σ_k factors[k] · gradient k of each parameter in turn, float32, added to its total, in place, if it has one.
        Where no gradient arrived, the total is returned as it is.

        A factor of 0 drops a microbatch even if its gradient is not finite. Can be called once: gradients are freed as
        soon as their sum is made.
        """
        factors = factors.float()
        some_are_zero = bool((factors == 0).any())
        small = self._joined.weighted_sums(factors, some_are_zero) if self._joined else {}
        self._joined = None
        for parameter, total in zip(self.parameters, totals):
            if id(parameter) in small:
                total = added(total, small[id(parameter)].view_as(parameter))
            elif id(parameter) in self._gradients:
                total = self._gradients.pop(id(parameter)).weighted_sum(factors, some_are_zero, total)
                total = total.view_as(parameter)
            yield total


def microbatch_gradients(
    model: VectorizableModel, microbatches: list[Microbatch], backward: Callable[[Tensor], None]
) -> tuple[Tensor, MicrobatchGradients]:
    """One forward and one backward pass over all microbatches together.

    Args:
        model ([`VectorizableModel`]): the model in training, without a [`vectorization_obstacle`].
        microbatches (`list`): the seed of the randomness and the collated inputs of each; one of the groups that
            [`group_microbatches`] makes.
        backward (`Callable`): runs the backward pass, e.g. `Accelerator.backward`.

    Returns the losses, detached, and their gradients, in ascending order of size. `Parameter.grad` is `None`
    afterwards.

    Raises [`NotVectorizable`] if a gradient arrived, or a random number was drawn, that cannot be told apart by
    microbatch.
    """
    sized = sorted(((num_rows(inputs), seed, inputs) for seed, inputs in microbatches), key=itemgetter(0))
    sizes = [size for size, _, _ in sized]
    batches = [without_return_loss(inputs) for _, _, inputs in sized]
    unpadded = concatenated(batches, max(map(text_length, batches)), model.pad_token_id)
    inputs = model.prepared(unpadded)
    parameters = model.trainable
    for parameter in parameters:
        parameter.grad = None
    device = parameters[0].device
    seeds = [seed for _, seed, _ in sized] if model.has_dropout else []
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    recording = Recording(parameters, Layout(sizes, num_rows(inputs), device), generators)
    scalars = [_one_for_each(each, len(sizes)) for each in model.scalars]
    outputs = _forward(model.model, inputs, recording)
    losses = model.microbatch_losses(outputs, unpadded, scalars, sizes)
    backward(losses.sum())
    for parameter, of_each in zip(model.scalars, scalars):
        if of_each.grad is not None:
            recording.record(parameter, Dense(of_each.grad))
    _check_no_gradient_arrived(model.base, parameters)
    return losses.detach(), MicrobatchGradients(parameters, recording)


def vectorization_obstacle(model: nn.Module) -> str | None:
    """Why the microbatches of a model cannot be vectorized, or `None` if they can."""
    if any(is_compiled_module(module) or module._compiled_call_impl for module in model.modules()):
        return "torch_compile hides the model's layers"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "activation checkpointing runs the forward pass again, out of sight"
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config._attn_implementation not in ROW_WISE_ATTENTION:
            unknown = config._attn_implementation
            return f"its attention is {unknown!r}, which is not known to treat every row of a batch by itself"
        if not _is_row_wise(module):
            return f"{name} is a {type(module).__name__}, which is not known to treat every row of a batch by itself"
        if _has_hooks(module) or _is_patched(module):
            return f"{name or 'the model'} has a hook, or a method of its own, which may mix the rows of a batch"
    if any(GLOBAL_HOOKS):
        return "torch has a hook on all modules, which may mix the rows of a batch"
    replaced = replaced_function(model, ROW_WISE_FILES)
    return replaced and f"{replaced} was replaced by another function, which may mix the rows of a batch"


def _is_row_wise(module: nn.Module) -> bool:
    kind = type(module)
    if kind is nn.MultiheadAttention:
        return module.batch_first
    # A softmax over dimension 0, or over one that is not known, would mix the rows.
    is_activation = kind.__module__ == activation.__name__ and vars(module).get("dim", -1) in (-1, 1, 2)
    return kind in ROW_WISE or kind in CONTAINERS or is_activation or kind.__module__ in ROW_WISE_FILES


def _is_patched(module: nn.Module) -> bool:
    """Whether this one module has another method in the place of its class's that may take part in a forward pass.
    Accelerate does that to `forward` of the outermost module, for autocast, which does not count."""
    for name, value in vars(module).items():
        of_class = getattr(type(module), name, None)
        function = getattr(value, "__func__", value)
        if (
            callable(of_class)
            and takes_part(name)
            and function is not of_class
            and not _is_accelerates(module, function)
        ):
            return True
    return False


def _is_accelerates(module: nn.Module, function: Any) -> bool:
    kept = getattr(vars(module).get("_original_forward"), "__func__", None)
    return kept is type(module).forward and getattr(function, "__module__", None) == convert_outputs_to_fp32.__module__


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _one_for_each(parameter: nn.Parameter, count: int) -> Tensor:
    """A scalar repeated, so that its gradient arrives for each microbatch."""
    return parameter.detach().float().repeat(count).requires_grad_(parameter.requires_grad)


def _forward(model: nn.Module, inputs: dict[str, Any], recording: Recording) -> Any:
    """Raises [`NotVectorizable`] if the model draws from the global generators, whatever their seed: its draws would
    belong to no microbatch."""
    device = recording.layout.device
    with seeded(0):
        before = _generator_states(device)
        with recording:
            outputs = model(**inputs)
        if before != _generator_states(device):
            raise NotVectorizable("it draws random numbers outside of dropout layers (attention_dropout, noise)")
    return outputs


def _generator_states(device: torch.device) -> list[bytes]:
    of_torch = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    others = [pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())]
    return [*(state.numpy().tobytes() for state in of_torch), *others]


def _check_no_gradient_arrived(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Raises `NotVectorizable` if a parameter was used in a way that is not known."""
    arrived = {parameter for parameter in parameters if parameter.grad is not None}
    for parameter in arrived:
        parameter.grad = None
    if arrived:
        name = next(name for name, parameter in model.named_parameters() if parameter in arrived)
        raise NotVectorizable(f"it uses {name} in a way that is not known")


def _merged(uses: list[Dense | Outer | Sparse]) -> Dense | Outer | Sparse:
    """A parameter that is used several times has one gradient, the sum."""
    return uses[0] if len(uses) == 1 else Dense(sum(use.dense() for use in uses))
