"""The model card: the guarantee, the training data, the evaluation, and how to load the model.

Written anew from the trainer each time. It holds public constants, noised quantities and metrics of held-out records,
never a statistic of the private ones.
"""

from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin
from transformers.modelcard import TrainingSummary
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from . import __version__
from .arguments import STATISTICS_WERE_LOGGED
from .collators import text_settings
from .figures import plot_privacy_utility
from .markdown import table
from .models import CLIPForVisualQuestionAnswering, base_model
from .privacy_section import CARD_NAME, NOT_PRIVATE, privacy_section


if TYPE_CHECKING:
    from .publishing import BestWeights, PublishingTrainer

FIGURE_NAME = "privacy_utility.png"

ZERO_SHOT, VQA = "zero-shot-image-classification", "visual-question-answering"
TASKS = {
    **dict.fromkeys(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(), ZERO_SHOT),
    **dict.fromkeys(MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES.values(), VQA),
    CLIPForVisualQuestionAnswering.__name__: VQA,
}

# The endings of what an evaluation logs beside its metrics.
_TIMES = ("_runtime", "_per_second", "_time")

# By default datasets have no name: what the `Trainer` would take is the name of a builder, such as `imagefolder`.
_UNNAMED: dict[str, list[str]] = {"dataset_tags": [], "dataset_args": [], "dataset_metadata": []}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of held-out records, and the ε that was spent by then (`None` where no guarantee holds)."""

    step: int
    epsilon: float | None
    metrics: dict[str, float]


def write_model_card(trainer: "PublishingTrainer", **names: Any) -> None:
    """Writes `README.md` into the trainer's output folder, and the figure of accuracy against ε if there is one.

    Args:
        trainer ([`DPCLIPTrainer`]): with a plan.
        names: as in [`~transformers.Trainer.create_model_card`]: `language`, `license`, `tags`, `model_name`,
            `finetuned_from`, `dataset_tags` (identifiers on the Hub), `dataset` (their names).
    """
    facts = TrainingSummary.from_trainer(trainer, **{**_UNNAMED, **names})
    evaluations = evaluations_of(trainer)
    folder = Path(trainer.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    has_figure = _draw(evaluations, trainer.args.metric_for_best_model, folder / FIGURE_NAME)
    sections = [
        f"---\n{metadata(trainer, facts, evaluations).to_yaml()}\n---",
        _introduction(trainer, facts),
        privacy_section(trainer.privacy_statement()),
        _training_data(trainer, facts),
        _evaluation(evaluations, has_figure, trainer.best_weights),
        f"## Usage\n\n```python\n{usage(trainer)}```",
        _procedure(trainer, facts),
    ]
    Path(folder, CARD_NAME).write_text("\n\n".join(map(str.strip, sections)) + "\n", encoding="utf-8")


def evaluations_of(trainer: "PublishingTrainer") -> list[Evaluation]:
    """All logged evaluations in order, those on several datasets at one step as one and repetitions left out; none if
    private records may have been used. Those of the best weights, after these were loaded, have their step."""
    if STATISTICS_WERE_LOGGED in trainer.privacy_statement().not_private_because:
        return []
    best = trainer.best_weights
    evaluations: list[Evaluation] = []
    for number, logs in enumerate(trainer.state.log_history):
        metrics = {name.removeprefix("eval_"): logs[name] for name in logs if name.startswith("eval_")}
        metrics = {name: value for name, value in metrics.items() if not f"_{name}".endswith(_TIMES)}
        step = best.step if best and number >= best.logs_before else int(logs["step"])
        repeated = any(each.step == step and metrics.items() <= each.metrics.items() for each in evaluations)
        if metrics and not repeated:
            epsilon = None if NOT_PRIVATE in logs else logs.get("epsilon", 0.0)
            evaluation = Evaluation(step, epsilon, metrics)
            if evaluations and _complete_one_another(evaluations[-1], evaluation):
                evaluation = replace(evaluation, metrics={**evaluations.pop().metrics, **metrics})
            evaluations.append(evaluation)
    return evaluations


def _complete_one_another(first: Evaluation, second: Evaluation) -> bool:
    """Whether they are evaluations of the same weights on different datasets."""
    same_weights = (first.step, first.epsilon) == (second.step, second.epsilon)
    return same_weights and first.metrics.keys().isdisjoint(second.metrics)


def _metrics_of_weights(trainer: "PublishingTrainer", evaluations: list[Evaluation]) -> dict[str, float]:
    """Of the last evaluation, or of all of the best weights."""
    if trainer.best_weights is None:
        return evaluations[-1].metrics
    of_best = [each.metrics for each in evaluations if each.step == trainer.best_weights.step]
    return {name: value for metrics in of_best for name, value in metrics.items()} or evaluations[-1].metrics


def metadata(trainer: "PublishingTrainer", facts: TrainingSummary, evaluations: list[Evaluation]) -> ModelCardData:
    """Metadata by which the Hub filters and lists models."""
    results = _results(trainer, facts, _metrics_of_weights(trainer, evaluations)) if evaluations else None
    base = _hub_id(facts.finetuned_from)
    adapter = isinstance(trainer.model, PeftModel)
    return ModelCardData(
        base_model=base,
        base_model_relation=base and ("adapter" if adapter else "finetune"),
        datasets=_listed(facts.dataset_tags) or None,
        eval_results=results,
        language=facts.language,
        library_name="peft" if adapter else "transformers",
        license=next(iter(_listed(facts.license)), None),
        metrics=[result.metric_type for result in results if result.metric_type != "loss"] if results else None,
        model_name=facts.model_name if results else None,
        pipeline_tag=_task(trainer.model),
        tags=[*_tags(trainer), *_listed(facts.tags)],
    )


def usage(trainer: "PublishingTrainer") -> str:
    """Code that loads the model from where it is published, and uses it."""
    where = trainer.hub_model_id or trainer.output_dir
    model = base_model(trainer.model)
    processor = trainer.processing_class if isinstance(trainer.processing_class, ProcessorMixin) else None
    example = _example(model, processor) if processor is not None else []
    imports = {_home(type(model)): [type(model).__name__]}
    if isinstance(trainer.model, PeftModel):
        imports["peft"] = ["PeftModel"]
    if processor is not None:
        imports["transformers"] = ["AutoProcessor", *imports.get("transformers", [])]
    if example:
        imports["PIL"] = ["Image"]
    lines = [f"from {home} import {', '.join(imports[home])}" for home in sorted(imports, key=str.lower)]
    lines += ["", *_loading(trainer.model, where, to_be_published=trainer.hub_model_id is not None)]
    lines += [f'processor = AutoProcessor.from_pretrained("{where}")'] if processor is not None else []
    return "\n".join([*lines, *example]) + "\n"


def _home(model_class: type) -> str:
    """The module to import a model class from."""
    package = model_class.__module__.split(".")[0]
    return package if package in ("transformers", "hf_dpclip") else model_class.__module__


def _loading(model: nn.Module, where: str, to_be_published: bool) -> list[str]:
    # `Any`: torch does not declare that a module has a configuration.
    inner: Any = base_model(model)
    name = type(inner).__name__
    if not isinstance(model, PeftModel):
        return [f'model = {name}.from_pretrained("{where}")']
    start = inner.config.name_or_path
    # A folder on this machine is of no use to others, and its name is private.
    is_known = start and not (to_be_published and Path(start).is_dir())
    base = f'{name}.from_pretrained("{start}")' if is_known else "...  # the weights that training started from"
    return [f"base = {base}", f'model = PeftModel.from_pretrained(base, "{where}")']


def _example(model: nn.Module, processor: ProcessorMixin) -> list[str]:
    """Code that uses the model on an image that the reader replaces."""
    settings = ", ".join(f"{name}={value!r}" for name, value in text_settings(processor).items())
    image = ["", 'image = Image.new("RGB", (224, 224))  # yours']
    if isinstance(model, CLIPForVisualQuestionAnswering):
        return [
            *image,
            f'inputs = processor(text=["what is it"], images=image, {settings}, return_tensors="pt")',
            "answer = model(**inputs).logits.argmax(dim=-1).item()",
            "print(model.config.id2label[answer])",
        ]
    if _task(model) == ZERO_SHOT:
        return [
            *image,
            'texts = ["a photo of a cat", "a photo of a dog"]',
            f'inputs = processor(text=texts, images=image, {settings}, return_tensors="pt")',
            "print(model(**inputs).logits_per_image)  # the higher, the better the text fits",
        ]
    return []


def _introduction(trainer: "PublishingTrainer", facts: TrainingSummary) -> str:
    kind = "An adapter of" if isinstance(trainer.model, PeftModel) else "A fine-tuned version of"
    base = _hub_id(facts.finetuned_from)
    link = f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the Hub"
    how = "without privacy" if trainer.privacy_statement().not_private_because else "with differential privacy"
    return f"# {facts.model_name}\n\n{kind} {link}, trained {how} by `hf_dpclip`."


def _training_data(trainer: "PublishingTrainer", facts: TrainingSummary) -> str:
    names = ", ".join(map(str, _listed(facts.dataset))) or "a dataset that is not named here"
    statement = trainer.privacy_statement()
    plan = statement.plan
    units = f"{plan.num_examples:,} privacy units (one unit = one {plan.privacy_unit}) of {names}."
    if statement.not_private_because:
        return f"## Training data\n\n{units}"
    return (
        f"## Training data\n\n{units} Nothing on this card was computed from these records, but for what the "
        "guarantee covers: no training loss, no gradient norm, no size of a batch."
    )


def _evaluation(evaluations: list[Evaluation], has_figure: bool, best: "BestWeights | None") -> str:
    if not evaluations:
        return "## Evaluation\n\nNo metrics were computed by the trainer."
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    rows = [
        [f"{each.step:,}", _number(each.epsilon), *(_number(each.metrics.get(name)) for name in names)]
        for each in evaluations
    ]
    shown = table(["step", "ε", *names], rows)
    image = f"\n\n![Metric against ε spent]({FIGURE_NAME})" if has_figure else ""
    of_best = f" The weights are the best ones, of step {best.step:,}; their ε is that of all steps." if best else ""
    return f"## Evaluation\n\nOn held-out records, which are not covered by the guarantee.{of_best}\n\n{shown}{image}"


def _procedure(trainer: "PublishingTrainer", facts: TrainingSummary) -> str:
    parameters = trainer.model.parameters()
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    settings = {"trainable_parameters": f"{trainable:,}", **(facts.hyperparameters or {})}
    libraries = {"hf_dpclip": __version__, **{name: version(name) for name in ("transformers", "peft")}}
    lists = ["\n".join(f"- {name}: {value}" for name, value in each.items()) for each in (settings, libraries)]
    return f"## Training procedure\n\n{lists[0]}\n\n### Framework versions\n\n{lists[1]}"


def _results(trainer: "PublishingTrainer", facts: TrainingSummary, metrics: dict[str, float]) -> list[EvalResult]:
    identifiers, names = _listed(facts.dataset_tags), _listed(facts.dataset)
    return [
        EvalResult(
            task_type=_task(trainer.model) or "other",
            dataset_type=identifiers[0] if identifiers else "unknown",
            dataset_name=names[0] if names else "held-out records",
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def _tags(trainer: "PublishingTrainer") -> list[str]:
    private = not trainer.privacy_statement().not_private_because
    tags = ["hf_dpclip", *(("differential-privacy", "dp-sgd") if private else ("not-private",))]
    if isinstance(trainer.model, PeftModel):
        tags.append(trainer.model.active_peft_config.peft_type.value.lower())
    return tags


def _draw(evaluations: list[Evaluation], chosen: str | None, path: Path) -> bool:
    """Writes the figure, if there are points to join and matplotlib is installed. Returns whether it did."""
    spent = [(each.epsilon, each.metrics) for each in evaluations if each.epsilon is not None]
    if len(spent) < 2 or find_spec("matplotlib") is None:
        return False
    names = sorted(set.intersection(*(set(metrics) for _, metrics in spent)), key=lambda name: name.endswith("loss"))
    if not names:
        return False
    chosen = (chosen or "").removeprefix("eval_")
    metric = chosen if chosen in names else names[0]
    plot_privacy_utility([epsilon for epsilon, _ in spent], [metrics[metric] for _, metrics in spent], metric, path)
    return True


def _task(model: nn.Module) -> str | None:
    return TASKS.get(type(base_model(model)).__name__)


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a model on the Hub, rather than a folder on this machine."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
