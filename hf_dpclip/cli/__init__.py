"""`hf-dpclip`, the command line.

Each command is a module of this package with a `SUMMARY`, `add_arguments(parser)` and `run(arguments)`, which returns
the exit code: 0 for yes, 1 for no. Modules import what is heavy when they run, so that `--help` is immediate.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__


COMMANDS: list[str] = ["audit", "card", "check", "ledger", "plan"]

# argparse's own exit code for a wrong command line.
WRONG_USAGE = 2
# What shells report of a program that stopped because nobody reads on, such as `head`.
NOBODY_READS = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*): the command line; by default that of the process.

    Returns the exit code: 0 for success, 1 where the command's answer is no, 2 for input that it cannot use, 141 if
    nobody reads what it prints.
    """
    arguments = _parser().parse_args([_with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)])
    try:
        code = arguments.run(arguments)
        # Not when Python ends, which would complain by itself.
        print(end="", flush=True)
        return code
    except BrokenPipeError:
        # What is left to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except (ImportError, OSError, ValueError) as error:
        print(f"hf-dpclip {arguments.command}: {_with_options(str(error), {*vars(arguments)})}", file=sys.stderr)
        return WRONG_USAGE


def _with_dashes(word: str) -> str:
    """`--num_canaries` is `--num-canaries`, as in scripts of transformers."""
    name, *value = word.split("=", 1)
    return "=".join([name.replace("_", "-"), *value]) if word.startswith("--") else word


def _with_options(message: str, names: set[str]) -> str:
    """A message of the library about an argument, `num_steps=0 is not possible`, in terms of the command line."""
    name, equals, rest = message.partition("=")
    return f"--{name.replace('_', '-')} {rest}" if equals and name in names else message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-dpclip", description="Differentially private training of CLIP models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name}")
        subparser = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser
