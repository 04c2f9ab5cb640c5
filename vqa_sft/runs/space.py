"""A Space for a run that was pushed: the page of `vqa-sft try` beside it on the Hub.

space/
  app.py              the page, of the model repository; with the conformal threshold of the run's validation rows
  requirements.txt    what vqa_sft and the page import
  README.md           the card that a Space is configured by
  vqa_sft/            this package, for it is in no registry

No row of the data is in it, so the page of a Space has no examples.
"""

import importlib.metadata
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from vqa_sft.config.packaged import PACKAGE, TINY
from vqa_sft.errors import InputError
from vqa_sft.predictions.uncertainty import Threshold, threshold_of_run
from vqa_sft.runs.folder import read_run

GRADIO = "6.31.0"  # with which the page was tested
COVERAGE = 0.9
APP = '''"""The page of `vqa-sft try` for {model}."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from vqa_sft.cli.try_page import serve
from vqa_sft.predictions.uncertainty import Threshold

MODEL = {model!r}
run = MODEL if Path(MODEL).is_dir() else snapshot_download(MODEL)
host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", 7860))
serve(run, host=host, port=port, threshold={threshold}, title=Path(MODEL).name)
'''
CARD = """---
title: "{title}"
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
{models}---

The page of `vqa-sft try` for `{model}`: drop an image, type a question and options.
"""


def check_base(folder: str | Path) -> None:
    """Raises InputError where another machine cannot load the run: its base is a folder of this one."""
    base = read_run(folder).base_model
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    if is_adapter and Path(base).exists() and base != TINY:  # that one is in the package, which a Space has
        raise InputError(
            f"the base of {folder} is a folder of this machine ({base}), which a Space cannot load. Merge the run "
            "(vqa-sft export), and push what you get."
        )


def write_space(run: str | Path, target: str | Path, model: str) -> None:
    """The files of a Space into the folder `target`, for a run that is on the Hub as `model`. Raises InputError where
    vqa-sft is not installed, so that what it needs is unknown."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    app = APP.format(model=model, threshold=_as_code(threshold_of_run(run, COVERAGE)))
    (target / "app.py").write_text(app, encoding="utf-8")
    (target / "requirements.txt").write_text("\n".join([*_requirements(), f"gradio=={GRADIO}", ""]), encoding="utf-8")
    is_on_hub = not Path(model).exists()
    models = f"models:\n- {model}\n" if is_on_hub else ""
    card = CARD.format(title=f"vqa-sft {Path(model).name}"[:60], gradio=GRADIO, model=model, models=models)
    (target / "README.md").write_text(card, encoding="utf-8")
    shutil.copytree(PACKAGE, target / "vqa_sft", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def push_space(run: str | Path, model: str, space: str, *, private: bool | None = None) -> str:
    """Upload a Space for the run that is on the Hub as `model`, a name or its address; the Space's address. Raises
    InputError where that fails."""
    try:
        api = HfApi()
        repo = api.create_repo(space, repo_type="space", space_sdk="gradio", exist_ok=True, private=private)
        with tempfile.TemporaryDirectory() as folder:
            write_space(run, folder, "/".join(model.rstrip("/").split("/")[-2:]))
            api.upload_folder(repo_id=repo.repo_id, repo_type="space", folder_path=folder)
    except InputError:
        raise
    except Exception as error:  # offline, no token, no rights, ...: the run is there all the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{model} is pushed, but not the Space {space}: {reason}") from error
    return str(repo)


def _requirements() -> list[str]:
    try:
        lines = importlib.metadata.requires("vqa-sft") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "vqa-sft is not installed, so what a Space needs is unknown. Install it: pip install ."
        ) from error
    return [line for line in lines if "extra ==" not in line]


def _as_code(threshold: Threshold | None) -> str:
    if threshold is None:
        return "None"
    return f'Threshold({threshold.coverage}, float("{threshold.value}"), {threshold.num_rows})'
