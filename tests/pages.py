"""The documentation's pages, and the code blocks and commands in them."""

import re
import runpy
import shlex
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command_parser
from scripts import ROOT
from torch.distributed.run import get_args_parser


PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`((?:python|accelerate launch|torchrun|hf-dpclip) [^`]+)`")
ASSIGNMENT = re.compile(r"\w+=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, and the line at which its text starts."""

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> list["Command"]:
        """The simple commands of a bash block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [Command.parse(part) for line in lines for part in line.split("&&") if shlex.split(part, comments=True)]


@dataclass(frozen=True)
class Command:
    """A command in words, and the script that it starts, if any, whatever launches it."""

    words: tuple[str, ...]
    script: str | None = None
    arguments: tuple[str, ...] = ()
    num_processes: int = 1

    @classmethod
    def parse(cls, line: str) -> "Command":
        """Raises `SystemExit` for an option that the launcher does not have."""
        words = shlex.split(line, comments=True)
        while ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        if words[:2] == ["accelerate", "launch"]:
            launch = launch_command_parser().parse_args(words[2:])
            # The configurations of the pages are for several processes.
            processes = 2 if launch.config_file else launch.num_processes or 1
        elif words[0] == "torchrun":
            launch = get_args_parser().parse_args(words[1:])
            processes = int(launch.nproc_per_node)
        elif words[0] == "python" and words[1] != "-m":
            return cls(tuple(words), words[1], tuple(words[2:]))
        else:
            return cls(tuple(words))
        return cls(tuple(words), launch.training_script, tuple(launch.training_script_args), processes)

    @property
    def options(self) -> list[str]:
        """The names of the script's options."""
        return [word.split("=")[0] for word in self.arguments if word.startswith("--")]

    def __str__(self) -> str:
        return shlex.join(self.words)


@lru_cache
def blocks(page: str) -> tuple[Block, ...]:
    """All fenced blocks of a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"], match["text"]))
    return tuple(found)


def all_blocks(*languages: str) -> list[Block]:
    """Those of all pages that are in one of the languages."""
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def inline_commands(page: str) -> list[Command]:
    """Commands in running text that start a script."""
    text = FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))
    lines = (" ".join(match[1].split()) for match in INLINE_COMMAND.finditer(text))
    return [Command.parse(line) for line in lines if ".py" in line or line.startswith("hf-dpclip")]


def setup_arguments() -> dict:
    """What setup.py tells setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def headings(path: Path) -> set[str]:
    """The anchors of a page, made from its headings as GitHub does."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
