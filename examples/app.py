"""Plan private training, and try a private CLIP model beside its privacy statement, in a browser.

    python examples/app.py --model outputs/private-clip

The model is a folder that `train.py` wrote, or a repository on the Hub. A Space starts this file without arguments and
names the model in its variable MODEL. Nothing is loaded from other servers, and nothing is sent to them.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


# Before gradio is imported: it would report every start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor, ProcessorMixin
from transformers.utils import cached_file

from hf_dpclip import PrivacyPlan, PrivacyStatement
from hf_dpclip.advice import HOPELESS_SIGNAL_TO_NOISE, advice, is_hopeless, total_signal_to_noise
from hf_dpclip.collators import encoded_texts
from hf_dpclip.data import class_prompts
from hf_dpclip.figures import draw_epsilon
from hf_dpclip.markdown import table
from hf_dpclip.planning import steps_in
from hf_dpclip.presets import DIGITS
from hf_dpclip.privacy import STATEMENT_NAME
from hf_dpclip.privacy_section import privacy_section


# Fonts of the system, since others would come from another server.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Tables of names and values have an empty head; the label of a gallery lies on its first pictures.
CSS = ".prose thead { display: none; } .grid-wrap { margin-top: 28px; }"

BY_EPSILON, BY_NOISE = "target ε", "noise multiplier σ"
# Beyond these, the accountant takes longer than a visitor waits.
LIMITS = {BY_EPSILON: (0.01, 100), BY_NOISE: (0.1, 1000)}
MAX_STEPS = 1_000_000

PLANNER_INPUTS = {
    "records n": 60_000,
    "expected batch size B": 1024,
    "epochs": 6,
    "microbatches per step K": 128,
    "trainable parameters d": 300_000,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MODEL", "outputs/private-clip")
    parser.add_argument("--model", default=default, help="folder or repository on the Hub (default: %(default)s)")
    parser.add_argument("--port", type=int, default=None, help="(default: the first free one from 7860)")
    args = parser.parse_args()
    try:
        model = PrivateModel(args.model)
    except (ValueError, OSError) as error:
        sys.exit(f"app.py: {error}")
    build(model).launch(server_port=args.port, theme=THEME, css=CSS, footer_links=[])


# ---- The planner ----


def plan_from_inputs(n: int, batch: int, epochs: float, microbatches: int, given: str, value: float) -> PrivacyPlan:
    """The plan that the inputs describe. Raises `ValueError` for inputs that describe none."""
    for name, number in {"records n": n, "batch size B": batch, "epochs": epochs, given: value}.items():
        if number is None or not number > 0:
            raise ValueError(f"{name} must be a number above 0.")
    low, high = LIMITS[given]
    if not low <= value <= high:
        raise ValueError(f"{given} = {value:g} is outside of what this page computes: {low:g} to {high:g}.")
    num_steps = steps_in(epochs, n, batch)
    if num_steps > MAX_STEPS:
        raise ValueError(f"{num_steps:,} steps are more than this page computes: raise B, or lower the epochs.")
    fields = {"num_examples": n, "expected_batch_size": batch, "num_steps": num_steps}
    if given == BY_EPSILON:
        return PrivacyPlan.calibrate(target_epsilon=value, num_microbatches=microbatches, **fields)
    return PrivacyPlan(noise_multiplier=value, num_microbatches=microbatches, **fields)


def plan_and_draw(
    n: int, batch: int, epochs: float, microbatches: int, num_parameters: int, given: str, value: float
) -> tuple[str, Figure | None]:
    """What the planner shows: the plan in words, and its curves."""
    try:
        plan = plan_from_inputs(n, batch, epochs, microbatches, given, value)
        if not num_parameters or num_parameters < 1:
            raise ValueError("trainable parameters d must be at least 1.")
    except ValueError as error:
        return f"**This plan is not possible.** {error}", None
    return describe(plan, num_parameters), draw(plan, num_parameters)


def describe(plan: PrivacyPlan, num_parameters: int) -> str:
    """The plan as Markdown, with advice."""
    of_a_step, of_the_run = plan.signal_to_noise(num_parameters), total_signal_to_noise(plan, num_parameters)
    rows = {
        "ε after all steps": f"**{plan.epsilon():.3g}** at δ = {plan.target_delta:.2g}",
        "noise multiplier σ": f"**{plan.noise_multiplier:.3g}**",
        "steps T": f"{plan.num_steps:,}",
        "sampling probability q": f"{plan.sampling_probability:.3g}",
        "sensitivity Δ": "C, one record per microbatch" if plan.one_unit_per_microbatch else "2 C",
        "signal-to-noise, at most": f"{of_a_step:.3g} in a step, {of_the_run:.3g} in the run",
    }
    return f"{table(['', ''], rows.items())}\n\n{remarks(plan, num_parameters)}\n\n{arguments_of(plan)}"


def remarks(plan: PrivacyPlan, num_parameters: int) -> str:
    """What to change, or what to mind."""
    if is_hopeless(plan, num_parameters):
        return f"**Warning:** {advice(plan, num_parameters)}"
    if plan.one_unit_per_microbatch:
        return "One record per microbatch: a contrastive loss then needs `public_negatives`."
    return "No warning: the signal can stand out from the noise."


def arguments_of(plan: PrivacyPlan) -> str:
    """The plan as arguments for a script."""
    if plan.expected_batch_size % plan.num_microbatches:
        return (
            f"K = {plan.num_microbatches} does not divide B = {plan.expected_batch_size}: a trainer cannot follow it."
        )
    noise = f"noise_multiplier={plan.noise_multiplier:g}"
    if plan.target_epsilon is not None:
        noise = f"target_epsilon={plan.target_epsilon:g}"
    return (
        f"```python\nDPTrainingArguments(\n    {noise},\n"
        f"    per_device_train_batch_size={plan.expected_batch_size},  # on one process\n"
        f"    microbatch_size={plan.expected_batch_size // plan.num_microbatches},\n"
        f"    max_steps={plan.num_steps},\n)\n```"
    )


def draw(plan: PrivacyPlan, num_parameters: int) -> Figure:
    """ε over the steps, and the signal-to-noise ratio of the run over the number of microbatches."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_epsilon(left, plan)
    left.set_title("Privacy spent")
    draw_signal_to_noise(right, plan, num_parameters)
    for axes, empty_corner in ((left, "lower right"), (right, "upper left")):
        axes.grid(alpha=0.3)
        axes.legend(loc=empty_corner, frameon=False)
    return figure


def draw_signal_to_noise(axes: Any, plan: PrivacyPlan, num_parameters: int) -> None:
    """Several records to a microbatch on a line, and one record, which costs half the noise, as a point."""
    batch = plan.expected_batch_size

    def of_the_run(microbatches: int) -> float:
        other = PrivacyPlan(plan.num_examples, batch, microbatches, plan.num_steps, plan.noise_multiplier)
        return total_signal_to_noise(other, num_parameters)

    several = [2**power for power in range(batch.bit_length()) if 2**power < batch]
    axes.plot(several, [of_the_run(count) for count in several], label="several records per microbatch")
    axes.plot([batch], [of_the_run(batch)], "D", color="tab:green", label="one record per microbatch")
    axes.plot(
        [plan.num_microbatches],
        [of_the_run(plan.num_microbatches)],
        "o",
        ms=11,
        mfc="none",
        mec="k",
        label="this plan",
    )
    axes.axhline(HOPELESS_SIGNAL_TO_NOISE, color="tab:red", linestyle="--", label="below: hardly learns")
    axes.set(title="Signal-to-noise of the run, at most", xlabel="microbatches per step K", xscale="log", yscale="log")


# ---- The model ----


class PrivateModel:
    """A model with its processor, and what may be claimed of it.

    Args:
        name (`str`): a folder, or a repository on the Hub.

    Raises `ValueError` if there is no model of images and texts under that name.
    """

    def __init__(self, name: str):
        self.name = name
        try:
            self.model = AutoModel.from_pretrained(name).eval()
            self.processor = AutoProcessor.from_pretrained(name)
        except OSError as error:
            raise ValueError(
                f"{name} is neither a folder with a model nor on the Hub ({error}). Make one with `accelerate launch "
                "examples/train.py`, or name another with --model."
            ) from error
        if not isinstance(self.processor, ProcessorMixin):
            raise ValueError(f"{name} is no model of images and texts: name a CLIP or SigLIP model with --model.")

    def claim(self) -> str:
        """The privacy statement as Markdown, or why there is none. ε is computed anew from the plan."""
        try:
            section = privacy_section(PrivacyStatement.load(self._folder_of_the_statement()))
        except (OSError, ValueError) as error:
            return f"## Privacy\n\n**Nothing can be claimed of this model.** {error}"
        return f"{section}\nChecked when this page was started: ε follows from the plan and the steps taken.\n"

    def _folder_of_the_statement(self) -> Path:
        if Path(self.name).is_dir():
            return Path(self.name)
        return Path(cached_file(self.name, STATEMENT_NAME)).parent

    @torch.no_grad()
    def similarities(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """Logits of shape `[images, texts]`."""
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        return self.model(pixel_values=pixels, **encoded_texts(self.processor, texts)).logits_per_image

    def classify(self, image: Image.Image | None, names: str, template: str) -> dict[str, float]:
        """The share of each class name. Raises `ValueError` for inputs that leave nothing to choose."""
        classes = [name.strip() for name in names.split(",") if name.strip()]
        if image is None:
            raise ValueError("There is no picture: upload one.")
        if len(set(classes)) < 2 or len(set(classes)) < len(classes):
            raise ValueError("Give at least two classes, each once, separated by commas.")
        logits = self.similarities([image], class_prompts(classes, template))
        return dict(zip(classes, logits[0].softmax(dim=0).tolist()))

    def search(self, gallery: list[tuple[Image.Image, str | None]] | None, text: str) -> list[tuple[Image.Image, str]]:
        """The pictures, the most similar one first. Raises `ValueError` if there is nothing to search in or for."""
        if not gallery:
            raise ValueError("There are no pictures to search in: upload some.")
        if not text.strip():
            raise ValueError("Say what to search for.")
        images = [image for image, _ in gallery]
        scores = self.similarities(images, [text.strip()])[:, 0]
        return [(images[place], f"{scores[place]:.1f}") for place in scores.argsort(descending=True).tolist()]


def in_words(function: Callable) -> Callable:
    """Returns the result with an empty message, or nothing with a message that says what was wrong."""

    @wraps(function)
    def answer(*inputs) -> tuple[Any, str]:
        try:
            return function(*inputs), ""
        except ValueError as error:
            return None, f"**{error}**"

    return answer


def drawn_digits() -> list[Image.Image]:
    """Pictures to begin with: a printed digit each."""
    font = ImageFont.load_default(size=22)
    pictures = []
    for digit in range(len(DIGITS)):
        picture = Image.new("RGB", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), font=font, fill="white", anchor="mm")
        pictures.append(picture)
    return pictures


# ---- The page ----


def build(model: PrivateModel) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Private CLIP", analytics_enabled=False) as page:
        gr.Markdown(
            "# Private CLIP\nDifferentially private training of image-text models: plan it, and try its result."
        )
        with gr.Tab("Plan"):
            planner(page)
        with gr.Tab("Classify"), gr.Row():
            with gr.Column():
                classification(model)
            gr.Markdown(f"`{model.name}`\n{model.claim()}", container=True)
        with gr.Tab("Search"), gr.Row():
            with gr.Column():
                retrieval(model)
            gr.Markdown(f"`{model.name}`\n{model.claim()}", container=True)
    return page


def planner(page: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            numbers = [
                gr.Number(value, label=name, precision=None if name == "epochs" else 0)
                for name, value in PLANNER_INPUTS.items()
            ]
            given = gr.Radio([BY_EPSILON, BY_NOISE], value=BY_EPSILON, label="given")
            amount = gr.Number(3.0, label="its value")
        with gr.Column(scale=2):
            words = gr.Markdown()
            curves = gr.Plot(show_label=False)
    inputs = [*numbers, given, amount]
    changes = [component.change for component in inputs]

    def answer(*values) -> tuple[str, Any]:
        text, figure = plan_and_draw(*values)
        return text, gr.update(value=figure, visible=figure is not None)

    gr.on(
        [page.load, *changes],
        answer,
        inputs,
        [words, curves],
        trigger_mode="always_last",
        show_progress="minimal",
    )


def classification(model: PrivateModel) -> None:
    image = gr.Image(drawn_digits()[3], type="pil", label="picture", sources=["upload", "clipboard"], height=240)
    names = gr.Textbox(", ".join(DIGITS), label="classes, separated by commas")
    template = gr.Textbox("a handwritten digit {}", label="description of a class, with {} for its name")
    button = gr.Button("Classify", variant="primary")
    message = gr.Markdown()
    shares = gr.Label(label="share of each class", num_top_classes=5)
    button.click(in_words(model.classify), [image, names, template], [shares, message])


def retrieval(model: PrivateModel) -> None:
    pictures = gr.Gallery(drawn_digits(), type="pil", label="pictures", columns=5, height=270, interactive=True)
    text = gr.Textbox("a handwritten digit seven", label="description")
    button = gr.Button("Search", variant="primary")
    message = gr.Markdown()
    found = gr.Gallery(label="most similar first, with the similarity", columns=5, height=270, interactive=False)
    gr.on([button.click, text.submit], in_words(model.search), [pictures, text], [found, message])


if __name__ == "__main__":
    main()
