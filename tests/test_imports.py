import ast
import subprocess
import sys
from pathlib import Path

import vqa_sft

PACKAGE = Path(vqa_sft.__file__).parent
WITHOUT_TORCH = (
    "errors",
    "files",
    "quiet",
    "mcq",
    "fields",
    "problems",
    "sources",
    "paths",
    "columns",
    "answers",
    "question_types",
    "data",
    "images",
    "scan",
    "duplicates",
    "folds",
    "split",
    "prompts",
    "metrics",
    "pooling",
    "predictions",
    "matched",
    "score",
    "calibration",
    "ensemble",
    "diff",
    "doubt",
    "submission",
    "shards",
    "results",
    "check",
    "fix",
    "report",
    "config",
    "cli",
)


def test_the_laptop_modules_load_without_torch():
    imports = "; ".join(f"import vqa_sft.{name}" for name in WITHOUT_TORCH)
    check = "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"{imports}; {check}"]).returncode == 0


def imported_names(path):
    """Modules of ours that a file names in its import statements, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vqa_sft"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_nobody_imports_recipes_and_only_recipes_and_cli_read_config():
    for path in PACKAGE.rglob("*.py"):
        names = imported_names(path)
        assert not any(name.startswith("recipes") for name in names)
        # The ladder is a leaf as the cli is; a run folder holds its recipe, and the scorer reads it there.
        if path.stem not in ("config", "cli", "ladder", "scorer"):
            assert "vqa_sft.config.recipe" not in names, path


def test_only_scoring_undoes_an_order_and_mcq_imports_nothing_of_ours():
    assert not any(name.startswith("vqa_sft") for name in imported_names(PACKAGE / "mcq.py"))
    undoing = [path.stem for path in PACKAGE.glob("*.py") if "scatter_(" in path.read_text()]
    assert undoing == ["scoring"]
