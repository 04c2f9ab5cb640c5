import re
import shlex
import subprocess
import sys
from pathlib import Path

from vqa_sft.config.prediction import read_prediction
from vqa_sft.config.recipe import read_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]


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


def test_every_launch_of_the_docs_parses(tmp_path):
    (tmp_path / "predict.yaml").write_text("run: [runs/folds]\ndata: test.csv\noutput: out.csv\norders: rotations\n")
    lines = [
        line.strip() for page in PAGES for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    ]
    launches = [shlex.split(line, comments=True) for line in lines if line.startswith("accelerate launch")]
    parsed = {"recipes/sft.py": 0, "recipes/predict.py": 0}
    for words in launches:
        script = next(word for word in words if word.endswith(".py"))
        own = [
            word.replace("predict.yaml", str(tmp_path / "predict.yaml")) for word in words[words.index(script) + 1 :]
        ]
        own = [str(ROOT / word) if word.startswith("recipes/") else word for word in own]
        assert read_recipe(own) if script == "recipes/sft.py" else read_prediction(own)
        parsed[script] += 1
    assert parsed["recipes/sft.py"] >= 3 and parsed["recipes/predict.py"] >= 6


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


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_the_map_names_every_package_and_nothing_else():
    block = README[README.index("## The map") :].split("```")[1]
    indents = {match[2]: len(match[1]) for match in re.finditer(r"^( *)([\w/]+)/ ", block, re.MULTILINE)}
    parts = {
        name: f"vqa_sft/{name}" if indent == 2 else f"vqa_sft/models/{name}" if indent == 4 else name
        for name, indent in indents.items()
    }
    packages = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("vqa_sft/*/**/__init__.py")}
    tops = {"recipes", "accelerate_configs", "tests"}
    assert set(parts.values()) == packages | tops and all((ROOT / part).is_dir() for part in parts.values())
    shared = next(line for line in block.splitlines() if line.strip().startswith("errors"))
    files = {path.stem for path in ROOT.glob("vqa_sft/*.py") if not path.stem.startswith("__")}
    assert files == set(re.split(r",? +", shared.strip().partition("   ")[0]))
    assert len(block.strip().splitlines()) <= 20 and len(README.splitlines()) <= 150


def test_the_launch_lines_in_the_scripts_are_those_of_real_files():
    for script in ROOT.glob("recipes/*.py"):
        for name in re.findall(r"(?:recipes|accelerate_configs)/\w+\.(?:py|yaml)", script.read_text()):
            assert (ROOT / name).is_file()
