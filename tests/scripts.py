"""Scripts as modules, and as processes of their own."""

import importlib.util
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
DISTRIBUTED = ROOT / "tests" / "distributed"
# On any free port: another file's processes may run at the same time.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--multi_gpu", "--num_processes", "2"]
# Cuts a training of the examples short.
SHORT = ["--max_steps", "2", "--max_eval_samples", "60", "--use_cpu"]


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


def run_main(monkeypatch, script, *arguments) -> None:
    """What the module of a script does when it is run with these arguments."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


def output_of(*words, timeout: int = 600, **options) -> str:
    """What Python prints when it is started with these words, which must not fail."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(output_of("-c", code).split())
