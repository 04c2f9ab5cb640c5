import subprocess
import sys
from pathlib import Path

import vqa_sft

PACKAGE = Path(vqa_sft.__file__).parent
WITHOUT_TORCH = ("data", "config", "predictions", "report", "cli")  # and all in them
SOLE_MODULES_WITHOUT_TORCH = (
    "errors",
    "files",
    "images",
    "questions.letters",
    "environment",
    "batch.prompts",
    "inference.results",
)


def test_what_runs_on_a_laptop_loads_without_torch():
    files = [path for package in WITHOUT_TORCH for path in (PACKAGE / package).rglob("*.py")]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files if "__" not in path.name]
    assert len(names) > 30
    imports = "; ".join(f"import vqa_sft.{name}" for name in [*names, *SOLE_MODULES_WITHOUT_TORCH])
    check = "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"{imports}; {check}"]).returncode == 0


def test_only_scoring_undoes_a_permutation():
    undoing = [path.stem for path in PACKAGE.rglob("*.py") if "scatter_(" in path.read_text()]
    assert undoing == ["scoring"]
