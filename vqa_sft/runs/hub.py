"""The model card of a run, and pushing the run to the Hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from vqa_sft.errors import InputError
from vqa_sft.runs.folder import METRICS, RECIPE, SHARED_FILES, Run, read_run

# Patterns match across folders: the second one excludes the weights of checkpoints.
_UPLOADED = {"allow_patterns": list(SHARED_FILES), "ignore_patterns": ["*/*"]}


def write_card(folder: str | Path) -> None:
    """README.md of a finished run: base model, data, recipe, metrics, how to load it."""
    folder = Path(folder)
    run = read_run(folder)
    base = run.base_model
    metrics_file = folder / METRICS
    metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else {}
    is_adapter = (folder / "adapter_config.json").is_file()
    data = ModelCardData(
        # The Hub accepts names there and no local paths.
        base_model=None if Path(base).exists() else base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["vqa-sft", "visual-question-answering", "multiple-choice"],
    )
    text = _card_text(folder, run, metrics, is_adapter)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _card_text(folder: Path, run: Run, metrics: dict[str, float], is_adapter: bool) -> str:
    recipe, base, prompts = run.recipe, run.base_model, run.prompts
    name = Path(recipe["output_dir"]).name
    imports, loading = "", "model = AutoModelForImageTextToText.from_pretrained(folder)"
    if is_adapter:
        imports = "from peft import PeftModel\n"
        loading = f'base = AutoModelForImageTextToText.from_pretrained("{base}")'
        loading += "\nmodel = PeftModel.from_pretrained(base, folder)"
    sources = recipe["train_data"] if isinstance(recipe["train_data"], list) else [recipe["train_data"]]
    num_rows = run.content["num_rows"]["train"]
    trained_on = f"{'a stream of' if num_rows is None else num_rows} rows of `{', '.join(sources)}`"
    of_types = "".join(f"\nFor {kind} questions: `{text!r}`.\n" for kind, text in prompts.types.items())
    options = f"\nOptions of the chat template: `{prompts.template_options}`.\n" if prompts.template_options else ""
    rows = [f"| {key} | {metrics[key]:.4f} |" for key in ("accuracy", "nll", "ece") if key in metrics]
    validation = "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "None was asked for."
    return f"""# {name}

`{base}`, fine-tuned with vqa-sft to answer multiple-choice questions about images
by the letter of the right choice. Trained on {trained_on}.

## Validation

{validation}

## Use

    python recipes/predict.py --run {recipe["output_dir"]} --data test.csv --output submission.csv

or load it in plain transformers; the answer is the letter with the largest logit at the last position of the prompt:

```python
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{recipe["output_dir"]}"  # or the name of this repository
processor = AutoProcessor.from_pretrained(folder)
{loading}
```

## Prompt

System: `{prompts.system}`

User, after the image: `{prompts.user!r}`, each choice as `{prompts.choice!r}`.
{of_types}{options}
## Recipe

```yaml
{(folder / RECIPE).read_text(encoding="utf-8").strip()}
```

Versions: {", ".join(f"{key} {value}" for key, value in run.content["versions"].items() if value)}.
"""


def push_run(
    folder: str | Path, repo_id: str | None = None, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished run to the Hub and return its address. Raises InputError where that fails."""
    folder = Path(folder)
    recipe = read_run(folder).recipe
    name = repo_id or recipe.get("hub_model_id") or Path(recipe["output_dir"]).name
    try:
        api = HfApi(token=token)
        repo = api.create_repo(name, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **_UPLOADED)
    except Exception as error:  # offline, no token, no rights, ...: the run is saved all the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the run in {folder} is saved, but could not be pushed: {reason}\nPush it later: vqa-sft push {folder}"
        ) from error
    return str(repo)
