import re
import shlex
import subprocess
import sys
from pathlib import Path

from vqa_sft.config.recipe import read_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """The lines of the README's shell blocks, continued lines joined, comments dropped."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_every_make_target_of_the_readme_exists():
    targets = {words[1] for words in commands() if words[0] == "make"}
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"} and all(f"\n{target}:" in makefile for target in targets)


def test_every_launch_line_of_the_readme_names_real_files_and_parses():
    launches = [words for words in commands() if words[:2] == ["accelerate", "launch"]]
    assert len(launches) >= 2
    for words in launches:
        assert words[2] == "--config_file" and (ROOT / words[3]).is_file() and (ROOT / words[4]).is_file()
        if words[4] == "recipes/sft.py":
            assert read_recipe([str(ROOT / word) if word.startswith("recipes/") else word for word in words[5:]])


def test_every_command_of_ours_in_the_readme_exists():
    ours = [words for words in commands() if words[0] == "vqa-sft"]
    assert ours
    for words in ours:
        shown = subprocess.run(
            [sys.executable, "-m", "vqa_sft.cli", words[1], "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0
        assert all(word in shown.stdout for word in words if word.startswith("--"))
        assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))


def test_every_link_and_every_file_of_the_map_exists_and_no_module_is_missing():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    named = set(re.findall(r"^\| ([\w/]+\.py) \|", README, re.MULTILINE))
    modules = [*ROOT.glob("recipes/*.py"), *ROOT.glob("vqa_sft/**/*.py")]
    assert named == {str(path.relative_to(ROOT)) for path in modules if not path.name.startswith("__")}


def test_the_launch_lines_in_the_scripts_are_those_of_real_files():
    for script in ROOT.glob("recipes/*.py"):
        for name in re.findall(r"(?:recipes|accelerate_configs)/\w+\.(?:py|yaml)", script.read_text()):
            assert (ROOT / name).is_file()
