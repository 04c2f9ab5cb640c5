from pathlib import Path

import pytest
from matplotlib.figure import Figure

DRAWN = {"test_classification_run", "test_recipes"}  # and in tests/report/ and training/test_curves.py


@pytest.fixture(autouse=True, scope="module")
def plots_are_not_drawn(request):
    """Every run draws five plots, which takes a quarter of a tiny run; these are made, and then not laid out."""

    def save(self, file, **kwargs):
        if hasattr(file, "write"):
            file.write("<svg></svg>")
        else:
            Path(file).touch()

    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in DRAWN:
            patch.setattr(Figure, "savefig", save)
        yield
