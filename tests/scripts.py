"""The scripts of recipes/, run in this process: the same code as a launch, without ten seconds of imports."""

import atexit
import functools
import importlib.util
import json
import os
import select
import subprocess
import sys
import traceback
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"
# Imports once, and then runs the groups of commands that it is asked for, those of a group at once, each in a process
# of its own; prints the processes of a group, and their exit codes when they have ended.
FORKS = """
import gc, json, os, runpy, sys
from vqa_sft.environment import set_library_defaults

set_library_defaults()
import vqa_sft.inference.scorer, vqa_sft.models.memory.out_of_memory, vqa_sft.training.trainer
gc.freeze()  # or the end of every process copies all of this

def begin(path, command, environment):
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)  # may be killed with its workers
    for output in (1, 2):
        os.dup2(os.open(f"{path}-{output}.txt", os.O_WRONLY | os.O_CREAT), output)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()

while line := sys.stdin.readline():
    pids = [begin(*command) for command in json.loads(line)]
    print(*pids, flush=True)
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
    except SystemExit as end:
        # Let go of what failed: a data loader that is garbage waits five seconds for each of its workers.
        traceback.clear_frames((end.__context__ or end).__traceback__)
        raise
    finally:
        sys.argv = before


@functools.cache
def forks():
    """The process that forks; it ends where its input does, with this one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": RECIPES.parent, "env": environment}
    process = subprocess.Popen([sys.executable, "-c", FORKS], **how)
    atexit.register(process.communicate)
    return process


class Forked:
    """Commands, each `(["recipes/predict.py", ...], {"RANK": "1"})`, that run at once in processes of `pids`, whose
    groups are their own. What they print lies in `folder`, in files that begin with `name`."""

    def __init__(self, commands, folder, name="0"):
        self.paths = [f"{folder}/{name}-{which}" for which in range(len(commands))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
        given = zip(self.paths, commands, strict=True)
        given = [(path, [*map(str, command)], environment | own) for path, (command, own) in given]
        print(json.dumps(given), file=forks().stdin, flush=True)
        self.pids = [int(pid) for pid in forks().stdout.readline().split()]

    def has_ended(self):
        return bool(select.select([forks().stdout], [], [], 0)[0])

    def wait(self):
        """Of every command its exit code, output and errors."""
        codes = map(int, forks().stdout.readline().split())
        return [
            (code, *(Path(f"{path}-{output}.txt").read_text() for output in (1, 2)))
            for code, path in zip(codes, self.paths, strict=True)
        ]


def run_forked(groups, folder):
    """Of every command of every group (see Forked) its exit code, output and errors."""
    return [Forked(group, folder, str(number)).wait() for number, group in enumerate(groups)]


def train(**values):
    """`train(output_dir=path, key=value, ...)` is recipes/sft.py with --key value for each."""
    run_script("sft", *(token for key, value in values.items() for token in (f"--{key}", value)))
