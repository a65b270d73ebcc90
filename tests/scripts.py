"""Example scripts as modules, and code in interpreters of its own."""

import importlib.util
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def load_script(path):
    if str(path.parent) not in sys.path:
        # As when it is run: scripts find one another.
        sys.path.append(str(path.parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their own module up.
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
