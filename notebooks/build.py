"""Write kaggle_t4x2.ipynb and colab.ipynb from notebook.py, which jupytext reads.

    python notebooks/build.py

A cell of notebook.py with the tag `kaggle` or `colab` is for that notebook alone.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
NOTEBOOKS = {"kaggle": "kaggle_t4x2.ipynb", "colab": "colab.ipynb"}


def build(place: str) -> nbformat.NotebookNode:
    """The notebook for "kaggle" or "colab"."""
    notebook = jupytext.read(FOLDER / "notebook.py", fmt="py:percent")
    others = NOTEBOOKS.keys() - {place}
    notebook.cells = [cell for cell in notebook.cells if not others & {*cell.metadata.get("tags", ())}]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # drawn at random otherwise
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    for place, name in NOTEBOOKS.items():
        nbformat.write(build(place), FOLDER / name)
