"""The documentation is true: its snippets and commands run, its outputs are what they print, its links lead somewhere.

A page is run from top to bottom, like a notebook, in a folder of its own, where a tiny model lies under the name of
the one on the Hub (`run_page.py`). The page about publishing is run in a process of its own, whose Hub is on loopback.
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
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import client_of, running_hub
from pages import PAGES, Block, Command, all_blocks, blocks, headings, inline_commands, setup_arguments
from run_page import COMMAND_LINE, furnish, furnish_with_scripts, names, run_page, run_python
from scripts import ROOT, SHORT, load_script, output_of, run_main
from transformers import ClapModel, ClapProcessor, CLIPModel

import hf_dpclip
from hf_dpclip import PrivacyPlan, PrivacyStatement, metrics, privacy
from hf_dpclip.privacy import GaussianMechanism, Randomness


REFERENCE = "docs/api.md"
PUBLISHING = "docs/publishing.md"
RUN_PAGE = ROOT / "tests" / "run_page.py"

LANGUAGES = {"python", "bash", "output", "text", "yaml", "json", "diff", ""}

# What makes a command short; scripts that are not named here are asked for their help.
QUICK = {
    "examples/train.py": [*SHORT, "--per_device_train_batch_size", "32"],
    "examples/train_vqa.py": [*SHORT, "--max_train_samples", "500", "--per_device_train_batch_size", "5"],
    "contrastive_image_text.py": ["--max_steps", "2", "--use_cpu", "--per_device_train_batch_size", "8"],
}

COMMANDS = {str(command): command for block in all_blocks("bash") for command in block.commands()}
SCRIPTS = {name: command for name, command in COMMANDS.items() if command.script}
TRAININGS = {name: command for name, command in SCRIPTS.items() if command.script in QUICK}
ALONE = [command for command in TRAININGS.values() if command.num_processes == 1]
TOGETHER = [block for block in all_blocks("bash") if any(command.num_processes > 1 for command in block.commands())]


def names_of_examples(folder) -> dict:
    """For docstrings, moreover all that is public, and what an evaluation produces."""
    rooms = [importlib.import_module(f"hf_dpclip.{room}") for room in ("data", "metrics", "privacy", "evaluation")]
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
    """A folder with what the pages name."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    return tmp_path


# ---- Snippets ----


def guides():
    """Pages with something to run, except the reference and the page that needs a Hub."""
    commands = [block for block in all_blocks("bash") if COMMAND_LINE in block.text]
    return sorted({block.page for block in [*all_blocks("python"), *commands]} - {REFERENCE, PUBLISHING})


@pytest.mark.parametrize("page", guides())
def test_snippets_run_and_print_what_the_page_shows(page, workplace):
    run_page(page, names(workplace))


def test_what_is_published_is_on_the_hub(tmp_path):
    with running_hub() as hub:
        output_of(RUN_PAGE, PUBLISHING, cwd=tmp_path, env=client_of(hub, tmp_path / "home"))
        assert hub.repositories["model", "me/private-clip"].private
        assert {"model.safetensors", "privacy.json", "README.md"} <= hub.model("me/private-clip", "v1.0").keys()


def examples():
    return [block for block in all_blocks("python") if block.page == REFERENCE]


@pytest.mark.parametrize("block", examples(), ids=lambda block: str(block.line))
def test_examples_of_the_reference_run_each_by_itself(block, workplace):
    run_python(block, names_of_examples(workplace))


def test_a_snippet_that_fails_is_found(monkeypatch):
    block = Block("README.md", 3, "python", "train_dataset.no_such_method()")
    monkeypatch.setattr("run_page.blocks", lambda page: (block,))
    with pytest.raises(AttributeError, match="no_such_method"):
        run_page("README.md", {"train_dataset": []})


# ---- Commands ----


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Where the pages start scripts."""
    folder = tmp_path_factory.mktemp("scripts")
    furnish_with_scripts(folder)
    return folder


@lru_cache
def help_of(script: Path) -> str:
    """What `--help` prints."""
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [script.name, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            load_script(script.resolve()).main()
    finally:
        sys.argv = argv
    assert stop.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_scripts_have_the_options_that_commands_give_them(page, scripts):
    fenced = [command for block in all_blocks("bash") if block.page == page for command in block.commands()]
    for command in filter(lambda command: command.script, [*fenced, *inline_commands(page)]):
        script = scripts / command.script
        assert script.is_file(), f"{page}: {command}"
        unknown = [option for option in command.options if option not in help_of(script)]
        assert not unknown, f"{page}: {command} has no {unknown}"


@pytest.mark.parametrize("command", ALONE, ids=str)
def test_trainings_run(command, workplace, monkeypatch, capsys):
    script = load_script((workplace / command.script).resolve())
    run_main(monkeypatch, script, *command.arguments, *QUICK[command.script])
    statements = [PrivacyStatement.load(path.parent) for path in workplace.rglob("privacy.json")]
    assert statements and all(statement.steps == 2 for statement in statements)
    # The script of transformers has no word about privacy at its end.
    is_ours = command.script.startswith("examples/")
    assert not is_ours or re.search(r"Privacy.*: ε = .* after 2 steps", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("block", TOGETHER, ids=lambda block: f"{block.page}:{block.line}")
@pytest.mark.usefixtures("workplace")
def test_trainings_on_several_processes_run(block):
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
