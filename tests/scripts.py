"""The scripts of recipes/, run in this process: the same code as a launch, without ten seconds of imports."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"
# Runs groups of commands, those of a group at once, each in a process of its own; prints exit codes. Imports once.
FORKS = """
import json, os, runpy, sys, traceback
from vqa_sft.environment import set_library_defaults

set_library_defaults()
import vqa_sft.inference.scorer, vqa_sft.models.memory.out_of_memory, vqa_sft.training.trainer

def begin(name, command, environment):
    if pid := os.fork():
        return pid
    for output in (1, 2):
        os.dup2(os.open(f"{sys.argv[2]}/{name}-{output}.txt", os.O_WRONLY | os.O_CREAT), output)
    os.environ.update(environment)
    sys.argv, code = command, 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for number, group in enumerate(json.loads(sys.argv[1])):
    pids = [begin(f"{number}-{which}", *command) for which, command in enumerate(group)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
"""


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


def run_forked(groups, folder):
    """Of every command of every group, `(["recipes/predict.py", ...], {"RANK": "1"})`, its exit code, output, errors.
    The commands of a group run at once."""
    root = RECIPES.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    given = json.dumps([[([*map(str, command)], own) for command, own in group] for group in groups])
    process = [sys.executable, "-c", FORKS, given, str(folder)]
    done = subprocess.run(process, stdout=subprocess.PIPE, text=True, cwd=root, env=environment, check=True)
    return [
        [
            (int(code), *((folder / f"{number}-{which}-{output}.txt").read_text() for output in (1, 2)))
            for which, code in enumerate(line.split())
        ]
        for number, line in enumerate(done.stdout.splitlines())
    ]


def train(**values):
    """`train(output_dir=path, key=value, ...)` is recipes/sft.py with --key value for each."""
    run_script("sft", *(token for key, value in values.items() for token in (f"--{key}", value)))
