"""The documentation is true: its snippets and commands run, its outputs are what they print, its links lead somewhere.

A page is run from top to bottom, like a notebook, in a folder of its own, where a tiny model lies under the name of
the one on the Hub. What cannot run here is marked in the page, `<!-- not run: REASON -->` above the block.
"""

import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
from functools import lru_cache
from itertools import chain

import pytest
import torch
import yaml
from datasets import Dataset
from factories import IMAGE_SIZE, arguments, clap_processor, tiny_clap, tiny_clip, tiny_processor
from pages import PAGES, Block, Command, all_blocks, blocks, headings, inline_commands, setup_arguments
from PIL import Image
from scripts import ROOT, load_script
from transformers import BlipConfig, BlipForQuestionAnswering, ClapModel, ClapProcessor, CLIPModel

import hf_dpclip
from hf_dpclip import DPTrainingArguments, ImageTextCollator, PrivacyPlan, PrivacyStatement, metrics, privacy
from hf_dpclip.cli import main as command_line
from hf_dpclip.privacy import GaussianMechanism, Randomness


REFERENCE = "docs/api.md"

LANGUAGES = {"python", "bash", "output", "text", "yaml", "json", "diff", ""}

# Why a block may be exempt. Whoever adds a reason weakens the promise that the docs run.
REASONS = {
    "needs an account on the Hub",
    "is a script of transformers",
    "decodes sound files, for which datasets needs torchcodec",
}

# What makes a command short; scripts that are not named here are asked for their help.
SHORT = ["--max_steps", "2", "--max_eval_samples", "60", "--use_cpu"]
QUICK = {
    "examples/train.py": [*SHORT, "--per_device_train_batch_size", "32"],
    "examples/train_vqa.py": [*SHORT, "--max_train_samples", "500", "--per_device_train_batch_size", "5"],
}

COMMANDS = {str(command): command for block in all_blocks("bash") for command in block.commands()}
SCRIPTS = {name: command for name, command in COMMANDS.items() if command.script}
TRAININGS = {name: command for name, command in SCRIPTS.items() if command.script in QUICK}
ALONE = [command for command in TRAININGS.values() if command.num_processes == 1]
TOGETHER = [block for block in all_blocks("bash") if any(command.num_processes > 1 for command in block.commands())]


# ---- Stand-ins for what a reader has ----


def records(n: int, seed: int = 0) -> Dataset:
    """Images of noise with whatever columns the pages speak of."""
    pixels = torch.randint(0, 255, (n, IMAGE_SIZE, IMAGE_SIZE, 3), generator=torch.Generator().manual_seed(seed))
    images = [Image.fromarray(image) for image in pixels.to(torch.uint8).numpy()]
    texts = [f"report {'abcdefghijklmnopqrs'[number % 19]}" for number in range(n)]
    answers = [["yes", "no"][number % 2] for number in range(n)]
    ids = {"patient": [number // 2 for number in range(n)], "image_id": list(range(n))}
    return Dataset.from_dict(
        {"image": images, "scan": images, "text": texts, "report": texts, **ids}
        | {"question": texts, "answer": answers, "finding": answers}
    )


def names(folder) -> dict:
    """The variables that pages may take for granted."""
    processor = tiny_processor()
    return {
        "__name__": "__main__",
        "model": tiny_clip(),
        "clip": tiny_clip(),
        "processor": processor,
        "args": arguments(folder / "args", microbatch_size=4),
        "collator": ImageTextCollator(processor),
        "train_dataset": records(640),
        "held_out": records(64, seed=1),
    }


def names_of_examples(folder) -> dict:
    """For docstrings, moreover all that is public, and what an evaluation produces."""
    rooms = [importlib.import_module(f"hf_dpclip.{room}") for room in ("metrics", "privacy", "evaluation")]
    embeddings = {name: torch.randn(64, 8).numpy() for name in ("image_embeds", "text_embeds")}
    similarities = {"logits_per_image": torch.eye(3).tolist(), "labels": [0, 1, 2], "batches": [0]}
    public = {name: getattr(hf_dpclip, name) for name in hf_dpclip.__all__}
    modules = {"functools": functools, "peft": importlib.import_module("peft"), "CLIPModel": CLIPModel}
    modules |= {"ClapModel": ClapModel, "ClapProcessor": ClapProcessor}
    everything = {name: value for room in rooms for name, value in vars(room).items()}
    given = names(folder)
    return {**everything, **public, **modules, **given, **embeddings, **similarities, **a_step(given["model"])}


def a_step(model) -> dict:
    """What the trusted core works with."""
    parameters = list(model.parameters())
    plan = PrivacyPlan(64, 8, 4, 2, noise_multiplier=1.0)
    return {
        "mechanism": GaussianMechanism(plan, parameters, Randomness().noise()),
        "microbatches": range(4),
        "loss": lambda microbatch: sum(parameter.sum() for parameter in parameters),
        "optimizer": torch.optim.SGD(parameters),
    }


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages name: the repository's, models in the Hub's layout, a table of pairs."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    save_models(tmp_path)
    (tmp_path / "private-clip").mkdir()
    PrivacyStatement(PrivacyPlan(64, 8, 4, 2, noise_multiplier=1.0), steps=2).save(tmp_path / "private-clip")
    table = ["scan,report,asked,finding"]
    (tmp_path / "path" / "to").mkdir(parents=True)
    for number, record in enumerate(records(90)):
        record["scan"].save(tmp_path / "path" / "to" / f"{number}.png")
        table.append(f"{number}.png,{record['report']},{record['question']},{record['finding']}")
    (tmp_path / "path" / "to" / "pairs.csv").write_text("\n".join(table))
    return tmp_path


def two_steps(*args, **kwargs) -> DPTrainingArguments:
    """What a page asks for, cut short."""
    return DPTrainingArguments(*args, **{**kwargs, "max_steps": 2})


def save_models(folder):
    clip, blip = folder / "openai" / "clip-vit-base-patch32", folder / "Salesforce" / "blip-vqa-base"
    tiny_clip().save_pretrained(clip)
    tiny_processor().save_pretrained(clip)
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0, "sep_token_id": 49}
    text = {**layer, **special, "encoder_hidden_size": 16, "projection_dim": 8}
    vision = {**layer, "image_size": IMAGE_SIZE, "patch_size": 4}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(blip)
    tiny_processor().save_pretrained(blip)
    clap = folder / "laion" / "clap-htsat-unfused"
    tiny_clap().save_pretrained(clap)
    clap_processor().save_pretrained(clap)


# ---- Snippets ----


def run_page(page: str, namespace: dict):
    printed = io.StringIO()
    for block in blocks(page):
        if block.language == "output":
            assert printed.getvalue().rstrip() == block.text.rstrip(), f"{page}:{block.line} shows another output"
        elif block.language == "python" and block.reason is None:
            printed = run(block, namespace)


def run(block: Block, namespace: dict) -> io.StringIO:
    """Returns what the block prints. Line numbers of a traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.text, str(PAGES[block.page]), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed


def guides_with_python():
    with_python = {block.page for block in all_blocks("python")}
    return sorted(with_python - {REFERENCE})


@pytest.mark.parametrize("page", guides_with_python())
def test_snippets_run_and_print_what_the_page_shows(page, workplace, monkeypatch):
    monkeypatch.setattr(hf_dpclip, "DPTrainingArguments", two_steps)
    run_page(page, names(workplace))


def examples():
    return [block for block in all_blocks("python") if block.page == REFERENCE]


@pytest.mark.parametrize("block", examples(), ids=lambda block: str(block.line))
def test_examples_of_the_reference_run_each_by_itself(block, workplace):
    run(block, names_of_examples(workplace))


def test_a_snippet_that_fails_is_found(monkeypatch):
    block = Block("README.md", 3, "python", "train_dataset.no_such_method()", None)
    monkeypatch.setattr("test_docs.blocks", lambda page: (block,))
    with pytest.raises(AttributeError, match="no_such_method"):
        run_page("README.md", {"train_dataset": []})


# ---- Commands ----


@lru_cache
def help_of(script: str) -> str:
    """What `--help` prints."""
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            load_script(ROOT / script).main()
    finally:
        sys.argv = argv
    assert stop.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_scripts_have_the_options_that_commands_give_them(page):
    fenced = [command for block in all_blocks("bash") if block.page == page for command in block.commands()]
    for command in [*fenced, *inline_commands(page)]:
        assert command.script is None or (ROOT / command.script).is_file(), f"{page}: {command}"
        unknown = [option for option in command.options if option not in help_of(command.script)]
        assert not unknown, f"{page}: {command} has no {unknown}"


@pytest.mark.parametrize("command", ALONE, ids=str)
def test_trainings_run(command, workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.script, *command.arguments, *QUICK[command.script]])
    load_script(ROOT / command.script).main()
    assert re.search(r"Privacy.*: ε = .* after 2 steps", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("block", TOGETHER, ids=lambda block: f"{block.page}:{block.line}")
def test_trainings_on_several_processes_run(block, workplace):
    """Commands that name a machine rank start together, others one after another."""
    commands = [command for command in block.commands() if command.num_processes > 1]
    if any("--machine_rank" in command.words for command in commands):
        finish(list(map(start, commands)))
    else:
        for command in commands:
            finish([start(command)])


def start(command: Command) -> subprocess.Popen:
    # The first machine of the pages is this one.
    words = [word.replace("10.0.0.1", "127.0.0.1") for word in [*command.words, *QUICK[command.script]]]
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}
    line = [sys.executable, "-m", modules[words[0]], *words[1:]]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen]):
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-4000:]
    assert re.search(r"Privacy.*: ε = .* after 2 steps", "\n".join(outputs))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("hf-dpclip")])
def test_the_command_line_answers(name, workplace, capsys):
    assert command_line(COMMANDS[name].words[1:]) == 0
    assert capsys.readouterr().out


def test_installations_name_extras_and_requirements_that_exist():
    declared = setup_arguments()
    requirements = chain(declared["install_requires"], *declared["extras_require"].values())
    known = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    for name, command in COMMANDS.items():
        if command.words[:2] != ("pip", "install"):
            continue
        for word in command.words[2:]:
            extras = re.fullmatch(r"(?:\.|hf_dpclip)\[(.+)\]", word)
            wanted, offered = (extras[1].split(","), declared["extras_require"]) if extras else ([word], known)
            assert word == "-e" or set(wanted) <= set(offered), f"{name}: {word} is not in setup.py"


def test_every_other_command_is_one_that_tests_run():
    """Whatever starts no script installs, is the command line, or is part of this suite."""
    others = [command.words for command in COMMANDS.values() if command.script is None]
    known = [("pip", "install"), ("hf-dpclip",), ("python", "-m", "pytest"), ("ruff",)]
    assert all(any(words[: len(start)] == start for start in known) for words in others), others


# ---- The pages themselves ----


def test_every_block_says_what_it_is():
    untold = [(block.page, block.line) for page in PAGES for block in blocks(page) if block.language not in LANGUAGES]
    assert not untold


def test_few_blocks_are_exempt():
    reasons = [block.reason for page in PAGES for block in blocks(page) if block.reason]
    assert set(reasons) <= REASONS
    assert len(reasons) <= 6


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        path = (PAGES[page].parent / name) if name else PAGES[page]
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in headings(path), f"{page} links to {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in index for path in ROOT.glob("docs/*.md") if path.name != "README.md")


# ---- What is made or repeated ----


MAKE_API = load_script(ROOT / "docs" / "make_api.py")


def test_the_reference_is_up_to_date():
    assert MAKE_API.PAGE.read_text(encoding="utf-8") == MAKE_API.render(), "run `python docs/make_api.py`"


@pytest.mark.parametrize("name", [*hf_dpclip.__all__, *metrics.__all__, *privacy.__all__])
def test_every_public_name_is_in_the_reference(name):
    is_constant = name.isupper()
    assert is_constant or f"### {name}\n" in MAKE_API.render(), (
        f"add the module of {name} to MODULES in docs/make_api.py"
    )


def test_changelog_and_citation_name_this_version():
    citation = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_dpclip.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert f"## {hf_dpclip.__version__}" in (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8")
