"""Runs a script of recipes/, in this process or through `accelerate launch`."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import yaml

from vqa_sft.config.packaged import find_packaged, packaged
from vqa_sft.errors import InputError

HELP = """--accelerate_config NAME_OR_FILE starts `accelerate launch` with this configuration, such as cpu or zero3;
--num_processes N starts N processes. All other options are those of the script:
"""


def run_script(
    name: str,
    arguments: list[str],
    accelerate_config: str | None,
    num_processes: int | None,
    *,
    waits: bool = False,
) -> None:
    """Run it as `python recipes/NAME.py` does. Does not return after a launch, unless it `waits` for one that succeeds,
    whose output then goes to stderr."""
    script = str(packaged("recipes") / f"{name}.py")
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(HELP)
    if accelerate_config is None:
        if num_processes is not None:
            raise InputError("--num_processes goes with --accelerate_config, such as multi_gpu.")
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return
    options = launch_options(accelerate_config, num_processes)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, script, *arguments]
    sys.stdout.flush()
    if not waits:
        os.execv(sys.executable, command)
    elif code := subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(code)


def launch_options(accelerate_config: str, num_processes: int | None) -> list[str]:
    """What `accelerate launch` is given. Raises InputError where there is no such configuration."""
    config = find_packaged(accelerate_config, "accelerate_configs")
    if not Path(config).is_file():
        own = ", ".join(sorted(path.stem for path in packaged("accelerate_configs").glob("*.yaml")))
        raise InputError(f"no such configuration: {accelerate_config}. Name a file, or one of ours: {own}.")
    options = ["--config_file", config]
    if num_processes is not None:
        options += ["--num_processes", str(num_processes)]
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    deepspeed = values.get("deepspeed_config", {}).get("deepspeed_config_file")
    if deepspeed and (found := find_packaged(deepspeed, "deepspeed_configs")) != deepspeed:
        options += ["--deepspeed_config_file", found]
    return options
