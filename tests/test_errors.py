"""How a script ends that nobody reads any more, or that is interrupted."""

import os
import signal
import subprocess
import sys

import pytest
from scripts import RECIPES

ENVIRONMENT = os.environ | {"PYTHONPATH": str(RECIPES.parent), "PYTHONUNBUFFERED": ""}
SCRIPT = """
import sys, time
from vqa_sft.errors import InputError, exits_with_message

@exits_with_message
def main():
    {body}
main()
"""


def run(body, then=""):
    """A script under a shell; its own exit code, and what the shell printed."""
    code = SCRIPT.format(body=body)
    command = f'"{sys.executable}" -c "$CODE" {then}; echo "codes ${{PIPESTATUS[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT | {"CODE": code})
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("for i in range(100_000): print(i, 'a line of some length')", 141),  # in the middle
        ("print('one'); print('two'); time.sleep(0.5)", 0),  # when Python ends
        ("print('one'); sys.stdout.flush(); time.sleep(0.5); print('two'); raise InputError('three')", 2),
    ],
    ids=["in the middle", "at the end", "with an error"],
)
def test_an_output_that_nobody_reads_ends_a_script_quietly(body, code):
    said, error = run(body, "| head -1")
    assert said.splitlines()[-1] == f"codes {code} 0"
    assert error == ("error: three\n" if code == 2 else "")


def test_the_help_of_the_command_may_be_cut():
    command = f'"{sys.executable}" -m vqa_sft.cli --help | head -1; echo "codes ${{PIPESTATUS[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "codes 0 0" and not done.stderr


def test_a_pipe_that_breaks_elsewhere_keeps_its_traceback():
    said, error = run("raise BrokenPipeError(32, 'of a worker')")
    assert said == "codes 1\n" and "Traceback" in error and "of a worker" in error


def test_an_interrupted_script_says_one_word():
    code = SCRIPT.format(body="print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # What is started in the background ignores it, and so would what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "Interrupted.\n" and process.returncode == 130


@pytest.mark.parametrize(
    "write",
    ["open({path!r}, 'wb').write(bytes(20_000))", "import numpy as np; save_file({{'a': np.zeros(2000)}}, {path!r})"],
    ids=["python", "safetensors"],
)
def test_a_file_that_may_not_be_so_large_ends_a_script_in_one_line(tmp_path, write):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    write = write.format(path=str(tmp_path / "file"))
    said, error = run(f"{limit}from safetensors.numpy import save_file; {write}")
    assert said == "codes 2\n" and error.startswith("error: a file is too large on the disk (") and "ulimit" in error
    assert len(error.splitlines()) == 1
