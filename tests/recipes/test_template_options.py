"""Options of the chat template: the same bytes from training to every later use of the run."""

import json
import shutil
from pathlib import Path

import pytest
from contest import rows_of
from scripts import run_script

import vqa_sft
from vqa_sft.batch import collator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.examples import load_examples
from vqa_sft.images import open_image
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs.export import export_run
from vqa_sft.runs.folder import read_run
from vqa_sft.tiny import TINY_PATH

OPTIONS = {"enable_thinking": False, "effort": "low"}
CLOSED, OPEN = "<think>\n\n</think>\n\n", "<think>\n"


@pytest.fixture
def thinking(tmp_path):
    """The tiny base with a template that thinks unless it is told not to, as Qwen3.5, and writes how hard into the
    system text."""
    folder = tmp_path / "thinking"
    shutil.copytree(TINY_PATH, folder)
    path = folder / "chat_template.jinja"
    template = path.read_text()
    asks = '{{- "<|im_start|>assistant\\n" -}}'
    assert asks in template and '{{- "<|im_start|>" + message.role + "\\n" -}}' in template
    off = '{%- if enable_thinking is defined and enable_thinking is false -%}{{- "<think>\\n\\n</think>\\n\\n" -}}'
    template = template.replace(asks, f'{asks}{off}{{%- else -%}}{{{{- "<think>\\n" -}}}}{{%- endif -%}}')
    role = '{{- "<|im_start|>" + message.role + "\\n" -}}'
    effort = '{%- if message.role == "system" -%}{{- "Effort: " + (effort or "high") + ". " -}}{%- endif -%}'
    shown = '{%- if message.role == "assistant" -%}{{- "<think>\\n\\n</think>\\n\\n" -}}{%- endif -%}'
    path.write_text(template.replace(role, role + effort + shown))
    return folder


@pytest.fixture
def rendered(monkeypatch):
    """The prompts of all batches, in their order."""
    texts, render = [], collator.render_prompt

    def record(processor, row, order, prompts):
        text = render(processor, row, order, prompts)
        if row["id"] != "sample":  # by which the model is checked
            texts.append(text)
        return text

    monkeypatch.setattr(collator, "render_prompt", record)
    return texts


def taken(rendered):
    texts = sorted(rendered)
    rendered.clear()
    return texts


def predict(contest, output, *arguments):
    more = ["--data", contest / "test.csv", "--output", output, "--use_cpu", "--num_workers", 0]
    run_script("predict", *arguments, *more)
    return read_predictions(output.with_suffix(".parquet")).metadata


def test_training_prediction_merging_and_the_base_read_the_same_bytes(
    thinking, contest, sft, tmp_path, rendered, capsys, run
):
    given = "{effort: low}"
    folder = sft(thinking, tmp_path / "run", template_options=given, shuffle_choices=False, fast=False)
    assert capsys.readouterr().out.count("Thinking is off: the chat template gets enable_thinking: false") == 1
    texts = taken(rendered)
    assert len(texts) == 24 and all(text.endswith(f"<|im_start|>assistant\n{CLOSED}") for text in texts)
    assert all("<|im_start|>system\nEffort: low. Answer" in text for text in texts)

    description = json.loads((folder / "run.json").read_text())
    assert description["prompts"]["template_options"] == OPTIONS
    digest = description["prompts_digest"]
    assert digest == Prompts(template_options=OPTIONS).digest != Prompts().digest
    assert str(OPTIONS) in (folder / "README.md").read_text()

    assert predict(contest, tmp_path / "run.csv", "--run", folder)["prompts_digest"] == digest
    assert taken(rendered) == texts
    assert "Thinking is off" not in capsys.readouterr().out  # a run knows

    row = rows_of(contest)[0]
    image = open_image(load_examples(str(contest / "train.csv"))[0][0]["images"][0])
    vqa_sft.Predictor(folder, use_cpu=True)(image, row["question"], [row[letter] for letter in "abcd"])
    assert {*taken(rendered)} < {*texts}

    base = ["--run", "none", "--model", thinking]
    found = predict(contest, tmp_path / "base.csv", *base, "--template_options", given)
    assert found["prompts_digest"] == digest and taken(rendered) == texts
    assert "Thinking is off" in capsys.readouterr().out

    export_run(str(folder), str(tmp_path / "merged"))
    assert read_run(tmp_path / "merged").prompts == read_run(folder).prompts

    given = ["--model_name_or_path", thinking, "--train_data", contest / "train.csv", "--output_dir", tmp_path / "x"]
    code, out, err = run(
        "check", write(tmp_path / "r.yaml", given), "--json", "-", "--template_options", "{effort: low}"
    )
    assert code == 0 and "Thinking is off" in err and json.loads(out)["data"][0]["tokens"]["rows"] == 24


def write(path, given):
    lines = [f"{name.removeprefix('--')}: {value}\n" for name, value in zip(given[::2], given[1::2], strict=True)]
    path.write_text("".join(lines))
    return path


def unfinish(folder):
    """As a run that was killed after its first checkpoint."""
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoint-2")


def test_a_resumed_run_keeps_the_prompts_that_it_began_with(thinking, contest, sft, tmp_path, rendered):
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "fast": False, "system_prompt": "Look."}
    folder = sft(thinking, tmp_path / "run", **values)
    assert all(text.endswith(CLOSED) for text in taken(rendered))
    template = thinking / "chat_template.jinja"
    changed = template.read_text().replace("enable_thinking", "thinks")  # the base was changed meanwhile
    template.write_text(changed)
    unfinish(folder)
    sft(thinking, folder, **values)
    assert read_run(folder).prompts == Prompts(system="Look.", template_options={"enable_thinking": False})

    # One from before there were options: nothing goes to the template.
    template.write_text(changed.replace("thinks", "enable_thinking"))
    unfinish(folder)
    (folder / "prompts.json").unlink()
    rendered.clear()
    sft(thinking, folder, **values)
    assert read_run(folder).prompts == Prompts(system="Look.")
    assert all(text.endswith(OPEN + "\n</think>\n\n") for text in rendered) and rendered

    unfinish(folder)
    (folder / "prompts.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        sft(thinking, folder, **values)
    assert stop.value.code == 2


def test_options_that_the_template_does_not_know_end_before_the_model_is_loaded(
    thinking, contest, sft, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        sft(thinking, tmp_path / "run", template_options="{enable_thinkng: true}")
    assert stop.value.code == 2 and not Path(tmp_path / "run").exists()
    assert "has no option 'enable_thinkng'. Did you mean 'enable_thinking'?" in capsys.readouterr().err
