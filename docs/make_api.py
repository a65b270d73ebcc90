"""Write docs/api.md from the docstrings in hf_dpclip: `python docs/make_api.py`.

Sources are parsed, not imported, so the page does not depend on the versions of the libraries installed.
"""

import argparse
import ast
import math
import re
import textwrap
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "hf_dpclip"

# In the order in which they are read. A test asks for the home of every public name.
MODULES = [
    "trainer",
    "runs",
    "searching",
    "arguments",
    "collators",
    "data",
    "models.lora",
    "models.clip_vqa",
    "models.batch_norm",
    "averaging",
    "evaluation",
    "metrics.zero_shot_accuracy",
    "metrics.retrieval_recall",
    "metrics.vqa_accuracy",
    "losses",
    "presets",
    "privacy.plan",
    "privacy.statement",
    "privacy.sampling",
    "privacy.randomness",
    "privacy.secure_noise",
    "privacy.mechanism",
    "privacy.accounting",
    "privacy.composition",
    "privacy.ledger",
    "audit.game",
    "audit.one_run",
]

HEADER = """# API reference

Made from the docstrings by `python docs/make_api.py`. What `hf_dpclip.__all__` lists is imported from `hf_dpclip`
itself, everything else from the module at the head of its section.
"""

# How docstrings name other classes: [`PrivacyPlan`], [`~transformers.Trainer`].
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
# An entry under `Args:` or `Attributes:`; what follows it, indented, is its continuation.
ENTRY = re.compile(r"^    (\w+(?:, \w+)*)(?: \(((?:[^()]|\([^()]*\))*)\))?: ")
SECTION = re.compile(r"^(Args|Attributes|Example|Formal guarantees):$")


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page."""
    modules = {name: ast.parse(_source(name).read_text(encoding="utf-8")) for name in MODULES}
    known = {node.name for tree in modules.values() for node in _documented(tree.body)}
    text = "\n".join([HEADER, *(_module(name, tree) for name, tree in modules.items())])
    return REFERENCE.sub(lambda match: _linked(match[1].rsplit(".", 1)[-1], known), text)


def _source(module: str) -> Path:
    return ROOT.joinpath(PACKAGE, *module.split(".")).with_suffix(".py")


def _module(name: str, tree: ast.Module) -> str:
    parts = [f"## {PACKAGE}.{name}", _prose(ast.get_docstring(tree))]
    for node in _documented(tree.body):
        parts += [f"### {node.name}", f"```text\n{_signature(node)}\n```", _prose(ast.get_docstring(node))]
        if isinstance(node, ast.ClassDef):
            parts.append("\n".join(map(_member, _documented(node.body))))
    return "\n\n".join(part for part in parts if part) + "\n"


def _documented(body: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef]:
    """Public classes and functions that say what they are for."""
    kinds = ast.ClassDef | ast.FunctionDef
    return [node for node in body if isinstance(node, kinds) and node.name[0] != "_" and ast.get_docstring(node)]


def _member(node: ast.FunctionDef) -> str:
    shown = node.name if "property" in _decorators(node) else _signature(node, width=math.inf)
    first, *rest = _prose(ast.get_docstring(node)).split("\n\n")
    return "\n\n".join([f"- `{shown}`: {' '.join(first.split())}", *(textwrap.indent(part, "  ") for part in rest)])


def _signature(node: ast.ClassDef | ast.FunctionDef, width: float = 100) -> str:
    """What a call looks like, one argument a line where it is long."""
    arguments, returned = _arguments(node), ""
    if isinstance(node, ast.FunctionDef) and node.returns:
        returned = f" -> {_type(node.returns)}"
    line = f"{node.name}({', '.join(arguments)}){returned}"
    if len(line) <= width:
        return line
    return "\n".join([f"{node.name}(", *(f"    {argument}," for argument in arguments), f"){returned}"])


def _arguments(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Of a function its own, of a dataclass its fields, of another class those of `__init__`."""
    if isinstance(node, ast.FunctionDef):
        return _of_function(node)
    if any(decorator.startswith("dataclass") for decorator in _decorators(node)):
        return [_field(member) for member in node.body if isinstance(member, ast.AnnAssign)]
    initializers = [member for member in node.body if getattr(member, "name", "") == "__init__"]
    return _of_function(initializers[0]) if initializers else []


def _of_function(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    shown = [_declaration(argument.arg, *pair) for argument, *pair in _with_types(plain, defaults)]
    if shown and plain[0].arg in ("self", "cls"):
        shown = shown[1:]
    if arguments.vararg or arguments.kwonlyargs:
        shown.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    keywords = _with_types(arguments.kwonlyargs, arguments.kw_defaults)
    shown += [_declaration(argument.arg, *pair) for argument, *pair in keywords]
    return [*shown, f"**{arguments.kwarg.arg}"] if arguments.kwarg else shown


def _with_types(arguments: list[ast.arg], defaults: list[ast.expr | None]) -> list[tuple]:
    return [(argument, argument.annotation, default) for argument, default in zip(arguments, defaults)]


def _field(member: ast.AnnAssign) -> str:
    """One field of a dataclass, with the default that `field(...)` holds, if it has one, or that a factory makes."""
    value = member.value
    if isinstance(value, ast.Call):
        settings = {keyword.arg: keyword.value for keyword in value.keywords}
        value = settings.get("default")
        if "default_factory" in settings:
            value = ast.Call(settings["default_factory"], [], [])
    return _declaration(member.target.id, member.annotation, value)


def _declaration(name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
    if annotation is None:
        return name if default is None else f"{name}={ast.unparse(default)}"
    return f"{name}: {_type(annotation)}" + ("" if default is None else f" = {ast.unparse(default)}")


def _type(annotation: ast.expr) -> str:
    return ast.unparse(annotation).strip("'")


def _decorators(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def _prose(docstring: str) -> str:
    """A docstring as Markdown: sections become bold words, entries of `Args:` a list."""
    lines, section = [], ""
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            section = match[1]
            lines += [f"**{section}**", ""]
        elif section and line and not line.startswith(" "):
            section = ""
            lines.append(line)
        else:
            lines.append(_line(section, line))
    return "\n".join(lines).strip()


def _line(section: str, line: str) -> str:
    if section in ("Args", "Attributes"):
        line = line.replace(" " * 8, "  ", 1)
        return ENTRY.sub(lambda match: f"- **{match[1]}**" + (f" ({match[2]})" if match[2] else "") + ": ", line)
    return line.removeprefix("    ") if section else line


def _linked(name: str, known: set[str]) -> str:
    return f"[`{name}`](#{name.lower()})" if name in known else f"`{name}`"


if __name__ == "__main__":
    main()
