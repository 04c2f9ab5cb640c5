"""The notebooks of notebooks/: written from one source, and run from top to bottom."""

import sys
from pathlib import Path

import pytest
from contest import write_contest

FOLDER = Path(__file__).parents[1] / "notebooks"
# What a session on the embedded base, without a GPU, sets instead.
TINY = {"CODE": "", "RECIPE": "demo.yaml", "LAUNCH": "cpu", "PREDICT_OPTIONS": "--use_cpu"}
TINY_OPTIONS = "--num_train_epochs 1 --learning_rate 1e-2 --disable_tqdm true --validation_data null"


def build(place):
    sys.path.insert(0, str(FOLDER))
    try:
        import build
    finally:
        sys.path.remove(str(FOLDER))
    return build.build(place), FOLDER / build.NOTEBOOKS[place]


@pytest.mark.parametrize("place", ["kaggle", "colab"])
def test_the_notebooks_are_those_of_their_source(place):
    import nbformat

    notebook, path = build(place)
    # `python notebooks/build.py` writes them.
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("place, settings", [("colab", {"QUICK": True}), ("kaggle", {"QUICK": False, "FOLDS": 2})])
def test_a_notebook_runs_from_the_data_to_the_submission(tmp_path, monkeypatch, place, settings):
    import nbformat
    from nbclient import NotebookClient

    from vqa_sft.tiny import TINY_PATH

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{Path('/usr/bin')}:/bin")
    contest = write_contest(tmp_path / "contest", num_rows=48)
    settings |= TINY | {"DATA": str(contest), "MODEL": str(TINY_PATH), "RUN": str(tmp_path / "run")}
    settings |= {"OPTIONS": TINY_OPTIONS + (" --validation_fraction 0.5" if settings["QUICK"] else "")}
    notebook, _ = build(place)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(lines)))  # as papermill does
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()

    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "accuracy" in printed
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert lines[0] == "id,answer" and len(lines) == 49
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert (tmp_path / "run/check.html").is_file()
