"""The model card of a run, and pushing the run to the Hub."""

import contextlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.decision.configuration_utils import DECISION_CONFIG_NAME, DECISION_TEMPLATE_NAME

from vqa_sft.batch.prompts import NONE_OF_THESE
from vqa_sft.errors import InputError
from vqa_sft.models.load import DTYPES, load_processor
from vqa_sft.runs.decision import decision_config
from vqa_sft.runs.folder import METRICS, RECIPE, SHARED_FILES, Run, read_run

# Patterns match across folders: the second one excludes the weights of checkpoints.
_UPLOADED = {"allow_patterns": list(SHARED_FILES), "ignore_patterns": ["*/*"]}

# {folder}, {whole}: of the run, and of whole weights; {how}: what else the pipeline is given; {asked}, {criteria},
# {state}, {assets}: a question as the run was trained on, {note}: what its choices must be.
_DECISION = """
### As a decision model

The probabilities of the run, with its prompt, its letters and its temperature:

```python
from transformers import pipeline

folder = "{folder}"  # or the name of this repository
decide = pipeline("decision", model=folder{how})
question = {{"type": "choice", "instructions": {asked}, "criteria": {criteria}}}
assets = {assets}
request = {{"state": {state}, "questions": {{"one": question}}, "assets": assets}}
print(decide(request)["one"]["probabilities"])
```

{note}{export}    transformers serve {whole} --host 127.0.0.1    # POST /v1/systemone
    vllm serve {whole} --host 127.0.0.1 --generation-config vllm    # POST /v1/chat/completions
    python -m sglang.launch_server --model-path {whole}    # not run
"""
_ASSETS = '{"image-1": "photo.jpg"}  # or {"type": "image", "data_base64": "..."}'


def write_card(folder: str | Path) -> None:
    """README.md of a finished run: base model, data, recipe, metrics, how to load it."""
    _make_card(Path(folder)).save(Path(folder) / "README.md")


def _make_card(folder: Path) -> ModelCard:
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
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


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
    decision = _describe_decision(folder, run, is_adapter)
    candidates = " --candidates test.parquet" if recipe.get("candidates") else ""
    rows = [f"| {key} | {metrics[key]:.4f} |" for key in ("accuracy", "nll", "ece", "answerable") if key in metrics]
    validation = "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "None was asked for."
    return f"""# {name}

`{base}`, fine-tuned with vqa-sft to answer multiple-choice questions about images
by the letter of the right choice. Trained on {trained_on}.

## Validation

{validation}

## Use

    python recipes/predict.py --run {recipe["output_dir"]} --data test.csv{candidates} --output submission.csv

or load it in plain transformers; the answer is the letter with the largest logit at the last position of the prompt:

```python
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{recipe["output_dir"]}"  # or the name of this repository
processor = AutoProcessor.from_pretrained(folder)
{loading}
```
{decision}
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


def _describe_decision(folder: Path, run: Run, is_adapter: bool) -> str:
    name = run.recipe["output_dir"]
    if not (folder / DECISION_CONFIG_NAME).is_file():
        return ""
    shown: dict[str, Any] = {"images": ["image-1"] if run.has_images else []}
    shown |= {"context": "It is night."} if run.has_context else {}
    fields = {"folder": name, "state": json.dumps(shown), "assets": _ASSETS if run.has_images else "{}"}
    fields |= _example(run)
    if not is_adapter:
        return _DECISION.format(**fields, whole=name, how="", export="")
    # Without them transformers takes processor, prompt and dtype of the base.
    dtype = str(DTYPES[run.precision or "bf16"]).removeprefix("torch.")
    how = f', tokenizer=folder, processor=folder, decision_config=folder, dtype="{dtype}"'
    export = f"Servers take whole weights:\n\n    vqa-sft export {name} {name}_whole\n"
    return _DECISION.format(**fields, whole=f"{name}_whole", how=how, export=export)


def _example(run: Run) -> dict[str, str]:
    """A question that the run can be asked, in Python, and a note on its choices."""
    asked, choices, note = "Which animal is it?", ["cat", "dog"], ""
    if run.classes is not None:
        asked, choices, last = run.recipe.get("fixed_question") or "Which is it?", [*run.classes.names[:2]], ""
        if run.recipe.get("absent") == "none_of_these":
            choices.append(NONE_OF_THESE[run.recipe.get("prompt_language") or "en"])
            last = f", and {choices[-1]!r} last"
        note = f"The criteria are classes of the run, spelt so, the most likely first{last}: nothing checks that.\n\n"
    criteria = ", ".join(f"{json.dumps(choice, ensure_ascii=False)}: None" for choice in choices)
    return {"asked": json.dumps(asked, ensure_ascii=False), "criteria": f"{{{criteria}}}", "note": note}


def add_decision(folder: Path, run: Run) -> str | None:
    """Write the files of a decision model beside the weights, and how to use them into a card that nobody changed. A
    run that cannot be expressed so has none; the reason."""
    card, before = folder / "README.md", str(_make_card(folder))
    try:
        processor = load_processor(str(folder), trust_remote_code=bool(run.recipe.get("trust_remote_code")))
        decision_config(run, processor).save_pretrained(folder)
    except Exception as error:  # the weights are pushed all the same, and from where nothing can be written
        with contextlib.suppress(OSError):
            for name in (DECISION_CONFIG_NAME, DECISION_TEMPLATE_NAME):
                (folder / name).unlink(missing_ok=True)
        return f"No decision model: {'' if isinstance(error, InputError) else f'{type(error).__name__}: '}{error}"
    if card.is_file() and card.read_text(encoding="utf-8") == before:
        write_card(folder)
    return None


def push_run(
    folder: str | Path, repo_id: str | None = None, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished run to the Hub and return its address. Raises InputError where that fails."""
    folder = Path(folder)
    run = read_run(folder)
    recipe = run.recipe
    if reason := add_decision(folder, run):
        print(reason)
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
