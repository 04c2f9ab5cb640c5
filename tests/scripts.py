"""The scripts of recipes/, run in this process: the same code as a launch, without ten seconds of imports."""

import importlib.util
import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"


def run_script(name, *arguments):
    """`run_script("sft", "--config", path)` is `python recipes/sft.py --config path`."""
    script = RECIPES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


def train(**values):
    """`train(output_dir=path, key=value, ...)` is recipes/sft.py with --key value for each."""
    run_script("sft", *(token for key, value in values.items() for token in (f"--{key}", value)))
