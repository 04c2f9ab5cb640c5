import csv
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from contest import write_contest, write_csv
from families import FAMILIES
from safetensors.torch import load_file
from scripts import RECIPES, run_script
from trl import ModelConfig

import vqa_sft
from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.examples import load_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.models import load as models
from vqa_sft.models.scoring import find_letter_ids, letter_logits, to_choice_logits
from vqa_sft.predictions.calibration import read_calibration
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import hub
from vqa_sft.tiny import TINY_PATH


def predict(run, contest, output, *more, data="test.csv"):
    run_script("predict", "--run", run, "--data", contest / data, "--output", output, "--num_workers", 0, *more)
    return read_predictions(Path(output).with_suffix(".parquet"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_saves_loads_and_predicts(families, contest, sft, tmp_path, family):
    run = sft(families(family), tmp_path / "run", validation_fraction=0.25)
    predictions = predict(run, contest, run / "submission.csv")
    for name in ("adapter_model.safetensors", "tokenizer.json", "recipe.yaml", "metrics.json", "validation.parquet"):
        assert (run / name).is_file()
    with (contest / "test.csv").open() as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    assert predictions.ids == ids
    lines = (run / "submission.csv").read_text().splitlines()
    best = ["abcd"[choice] for choice in predictions.best]
    assert lines == ["id,answer", *(f"{row_id},{letter}" for row_id, letter in zip(ids, best, strict=True))]

    # The adapter moved, it was loaded, and merging it changes nothing.
    base = predict("none", contest, tmp_path / "base.csv", "--model", families(family))
    assert torch.tensor(base.choice_logits).sub(torch.tensor(predictions.choice_logits)).abs().max() > 1e-4
    processor = models.load_processor(str(run))
    args = ModelConfig(model_name_or_path=families(family), dtype=None)
    merged = models.load_trained(str(run), args, "fp32").merge_and_unload().eval()
    examples, _ = load_examples(str(contest / "test.csv"), ReadOptions(answers="optional"))
    batch = AnswerCollator(processor, Prompts(), 4)(list(examples))
    with torch.no_grad():
        logits = letter_logits(merged, batch, find_letter_ids(processor, 4))
    rows = to_choice_logits(logits, batch["orders"], batch["num_choices"])
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(predictions.choice_logits), atol=1e-4, rtol=1e-4)


def test_a_run_folder_describes_itself(families, contest, sft, tmp_path):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", validation_fraction=0.25, system_prompt="Look closely.", seed=3)
    description = json.loads((run / "run.json").read_text())
    assert description["prompts"]["system"] == "Look closely." and description["num_letters"] == 4
    assert (
        description["precision"] == "fp32"
        and description["versions"]["torch"]
        and sum(description["num_rows"].values()) == 24
    )
    assert yaml.safe_load((run / "recipe.yaml").read_text())["seed"] == 3
    metrics = json.loads((run / "metrics.json").read_text())
    validation = read_predictions(run / "validation.parquet")
    correct = [best == answer for best, answer in zip(validation.best, validation.answers, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(correct) / len(correct))
    assert validation.metadata["prompts_digest"] == Prompts(system="Look closely.").digest
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == len(validation.ids) and "loss by step" in page
    assert f"{run} was trained with no image of these rows, nor nearly the same one." in page
    card = (run / "README.md").read_text()
    assert "Look closely." in card and "seed: 3" in card and f"{metrics['nll']:.4f}" in card
    # Predict shows the same prompt, because the folder says so.
    saved = predict(run, contest, tmp_path / "out.csv").metadata
    assert saved["prompts_digest"] == description["prompts_digest"] and saved["orders"] == "identity"


def test_choices_that_refer_to_others_keep_their_places_from_training_to_the_predictor(contest, sft, tmp_path, capsys):
    with (contest / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[:6]:
        row["d"] = "Both A and B"
    rows[6]["d"] = "None of the above"
    write_csv(contest / "train.csv", rows)
    write_csv(contest / "test.csv", rows)
    said = (
        "never shuffled: 6 of 24 rows keep the order of their choices, such as row_000 ('Both A and B'); "
        "1 of 24 rows keep their last choice, such as row_006 ('None of the above')"
    )
    sft(TINY_PATH, tmp_path / "plain", shuffle_choices="false")
    assert not (tmp_path / "plain" / "report.html").exists()  # nobody answered rows that it was not trained on
    assert said not in capsys.readouterr().out
    run = sft(TINY_PATH, tmp_path / "run")
    out = capsys.readouterr().out
    assert said in out and "images: at most 7,100 pixels, 9 tokens each (Qwen2_5_VL: 28 px a token)" in out
    identity = predict(run, contest, tmp_path / "identity.csv", "--use_cpu")
    rotated = predict(run, contest, tmp_path / "rotated.csv", "--use_cpu", "--orders", "rotations")
    assert said in capsys.readouterr().out
    moved = [
        (torch.tensor(one) - torch.tensor(other)).abs().max() > 1e-4
        for one, other in zip(identity.choice_logits, rotated.choice_logits, strict=True)
    ]
    assert moved == [False] * 6 + [True] * 18
    predictor = vqa_sft.Predictor(run, orders="rotations", use_cpu=True)
    choices = [[row[letter] for letter in "abcd"] for row in rows[:8]]
    found = predictor([contest / row["path"] for row in rows[:8]], [row["question"] for row in rows[:8]], choices)
    torch.testing.assert_close(
        torch.tensor([*map(list, found)]),
        torch.tensor([*map(list, rotated.probs[:8])]),
        atol=1e-5,
        rtol=0,
        check_dtype=False,
    )


@pytest.mark.parametrize(
    "name, value, got",
    [("orders", "0", "0"), ("orders", "1.5", "1.5"), ("scales", "1,x", "'1,x'"), ("scales", "1,1.0", "[1.0, 1.0]")],
)
def test_views_that_are_none_end_in_a_message(contest, tmp_path, capsys, name, value, got):
    with pytest.raises(SystemExit) as stop:
        predict("none", contest, tmp_path / "out.csv", "--model", TINY_PATH, f"--{name}", value)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and name in said and "must be" in said and f"got {got}" in said


def test_scales_are_averaged_and_other_families_refuse_them(families, contest, tmp_path, capsys):
    def of(scales, family="qwen2_5_vl"):
        output = tmp_path / f"{scales}.csv"
        return predict("none", contest, output, "--model", families(family), "--scales", scales).choice_logits

    parts = [torch.tensor(of(scales)).exp() for scales in ("1.0", "1.4")]
    assert (parts[0] - parts[1]).abs().max() > 1e-5
    torch.testing.assert_close(torch.tensor(of("1.0,1.4")).exp(), sum(parts) / 2)
    with pytest.raises(SystemExit) as stop:
        of("0.9", "llava")
    assert stop.value.code == 2 and "images at one scale. Remove --scales." in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"bf16": True}, {"load_in_4bit": True}, {}], ids=["bf16", "4 bit", "fp32"])
def test_validation_rows_get_the_same_logits_in_training_and_in_prediction(contest, sft, tmp_path, values):
    run = sft(TINY_PATH, tmp_path / "run", validation_data=contest / "validation.csv", **values)
    again = predict(run, contest, tmp_path / "again.csv", "--batch_size", 8, "--use_cpu", data="validation.csv")
    validation = read_predictions(run / "validation.parquet")
    assert again.ids == validation.ids
    torch.testing.assert_close(again.choice_logits, validation.choice_logits, atol=1e-5, rtol=0)


@pytest.fixture
def contest(contest):
    """With a validation file beside the others."""
    with (contest / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    write_csv(contest / "validation.csv", [row | {"id": f"v_{row['id']}"} for row in rows[:8]])
    return contest


def test_columns_and_letter_case_of_the_training_data_serve_the_test_data(families, contest, sft, tmp_path):
    renamed = {"a": "first", "b": "second", "c": "third", "d": "fourth"}
    for name in ("train.csv", "test.csv"):
        with (contest / name).open() as file:
            rows = [{renamed.get(key, key): value for key, value in row.items()} for row in csv.DictReader(file)]
        write_csv(
            contest / name, [row | ({"answer": row["answer"].upper()} if "answer" in row else {}) for row in rows]
        )
    columns = ["--columns", "{choices: [first, second, third, fourth]}"]
    run_script(
        "sft", "--model_name_or_path", families("qwen2_5_vl"), "--train_data", contest / "train.csv", "--max_steps", 1,
        "--output_dir", tmp_path / "run", "--use_cpu", "--dataloader_num_workers", 0, *columns,
    )  # fmt: skip
    predict(tmp_path / "run", contest, tmp_path / "out.csv")
    answers = [line.split(",")[1] for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]
    assert len(answers) == 24 and set(answers) <= set("ABCD")


def test_a_token_for_the_hub_is_not_written_anywhere(families, sft, tmp_path):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", hub_token="hf_secret", max_steps=1)
    texts = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert texts and not any(b"hf_secret" in text for text in texts)


def test_a_push_that_fails_loses_nothing_and_says_how_to_push_later(families, sft, tmp_path, capsys):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", push_to_hub=True, max_steps=1)
    error = capsys.readouterr().err
    assert "could not be pushed" in error and f"vqa-sft push {run}" in error and "Traceback" not in error
    assert (run / "adapter_model.safetensors").is_file() and (run / "run.json").is_file()


def test_a_run_is_calibrated_before_it_is_pushed_and_predictions_use_it(contest, sft, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(hub, "push_run", lambda folder, **_: pushed.extend(os.listdir(folder)) or "address")
    write_contest(contest, num_rows=60)
    run = sft(TINY_PATH, tmp_path / "run", push_to_hub=True, max_steps=1, validation_fraction=0.5)
    assert {"adapter_model.safetensors", "calibration.json"} <= {*pushed}
    assert "alibrated" in capsys.readouterr().out
    found = read_calibration(run, {}).as_dict
    assert predict(run, contest, tmp_path / "out.csv").metadata["calibration"] == found
    assert "no temperature is known" not in capsys.readouterr().out


def test_a_4_bit_base_trains_fp32_adapters_and_keeps_its_image_tower(contest, sft, tmp_path):
    # The tiny base, because bitsandbytes packs weights for the CPU in blocks of 64.
    run = sft(TINY_PATH, tmp_path / "run", load_in_4bit=True, max_steps=2)
    assert {tensor.dtype for tensor in load_file(run / "adapter_model.safetensors").values()} == {torch.float32}
    assert len(predict(run, contest, tmp_path / "out.csv").ids) == 24
    args = ModelConfig(model_name_or_path=str(TINY_PATH), dtype=None, load_in_4bit=True)
    model = models.load_model(args, "fp32")
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantised and all(".language_model." in name for name in quantised)


def test_full_fine_tuning_saves_a_model_that_predict_loads(families, contest, sft, tmp_path):
    run = sft(families("llava"), tmp_path / "run", use_peft=False, max_steps=2)
    assert (run / "model.safetensors").is_file() and not (run / "adapter_config.json").exists()
    assert len(predict(run, contest, tmp_path / "out.csv").ids) == 24


def test_rows_with_two_to_four_choices_train_and_predict(families, contest, sft, tmp_path):
    with (contest / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row |= {"answer": "A" if i % 2 else "B"} | ({"c": "", "d": ""} if i % 3 == 0 else {})
    write_csv(contest / "train.csv", rows)
    run = sft(families("qwen2_5_vl"), tmp_path / "run", validation_fraction=0.25)
    predictions = predict(run, contest, run / "submission.csv", data="train.csv")
    assert [len(logits) for logits in predictions.choice_logits] == [2 if i % 3 == 0 else 4 for i in range(24)]
    answers = {line.split(",")[1] for line in (run / "submission.csv").read_text().splitlines()[1:]}
    assert answers <= set("ABCD")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_opens_with_its_launch_line(path):
    recipe = read_recipe(["--config", str(path), "--use_cpu", "true"])
    assert recipe.arguments.prompts and recipe.model_args().lora_r and recipe.arguments.validates
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    launch = next(line for line in comments if "accelerate launch" in line).split()
    for option in ("--config_file", "--config"):
        assert (RECIPES.parent / launch[launch.index(option) + 1]).is_file()


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a weight is loaded."""
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("a weight was loaded"))


@pytest.fixture
def fails(capsys, no_weights):
    """`fails(function, ..., says="...")`: exit code 2, the message on stderr, no traceback."""

    def check(function, *args, says, **kwargs):
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and "Traceback" not in error, error
        return error

    return check


def test_bad_input_to_training_ends_with_a_message_before_any_weight_is_loaded(families, contest, sft, fails, tmp_path):
    model, run = families("qwen2_5_vl"), tmp_path / "run"
    fails(sft, model, run, lora_rr=8, says="Did you mean `lora_r`")
    fails(sft, model, run, train_data=contest / "none.csv", says="no such file")
    fails(sft, model, run, image_root=tmp_path, says="image is missing: rows row_000 (images/000.png), row_001")
    fails(sft, tmp_path / "no_model", run, says="cannot be loaded: there is no such folder. Check the path.")
    fails(
        sft,
        families("llava"),
        run,
        max_pixels=9999,
        says="shows every image at 3,136 pixels, whatever its size; remove max_pixels",
    )

    assert not (run / "run.json").exists()


def test_bad_input_to_prediction_ends_with_a_message_before_any_weight_is_loaded(families, contest, fails, tmp_path):
    out = tmp_path / "out.csv"
    fails(predict, tmp_path / "nowhere", contest, out, says="no such run folder")
    (tmp_path / "empty").mkdir()
    fails(predict, tmp_path / "empty", contest, out, says="holds no finished run")
    fails(predict, "none", contest, out, says="--run none needs --model")
    fails(predict, "none", contest, tmp_path / "out.txt", "--model", "x", says="must end in .csv")


def test_target_modules_that_the_model_does_not_have_are_an_error(families, sft, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sft(families("llava"), tmp_path / "run", lora_target_modules="nope")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "has no 'nope' (nearest: " in error


def test_training_never_deletes_what_it_did_not_write(families, contest, sft, fails, tmp_path):
    model, files = families("qwen2_5_vl"), sorted(contest.rglob("*"))
    (contest / "recipe.yaml").write_text("mine: true\n")
    (contest / "checkpoint-best").mkdir()
    for values in ({}, {"overwrite": True}):
        fails(sft, model, contest, **values, says="is not empty and holds no run of ours")
    (contest / ".vqa-sft").touch()  # even if it had been a run
    fails(sft, model, contest, overwrite=True, says="holds what the run reads")
    fails(sft, model, contest / "train.csv" / "run", says="cannot be written")
    assert set(files) <= set(contest.rglob("*")) and (contest / "recipe.yaml").read_text() == "mine: true\n"


def test_an_overwritten_run_moves_aside_with_all_that_lies_in_its_folder(families, sft, tmp_path):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1, seed=1)
    (run / "notes.md").write_text("mine")
    weights = (run / "adapter_model.safetensors").read_bytes()
    sft(families("qwen2_5_vl"), run, max_steps=1, seed=2, overwrite=True)
    assert (tmp_path / "run.old" / "notes.md").read_text() == "mine"
    assert (tmp_path / "run.old" / "adapter_model.safetensors").read_bytes() == weights
    assert not (run / "notes.md").exists() and (run / "run.json").is_file()


def test_images_may_stand_in_another_column_than_in_training(families, contest, sft, tmp_path):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)
    with (contest / "test.csv").open() as file:
        rows = [
            {"image" if key == "path" else key: value for key, value in row.items()} for row in csv.DictReader(file)
        ]
    write_csv(contest / "images.csv", rows)
    assert len(predict(run, contest, tmp_path / "out.csv", data="images.csv").ids) == 24


def test_rows_with_more_choices_than_any_in_training_are_scored_and_said(families, contest, sft, tmp_path, capsys):
    with (contest / "train.csv").open() as file:
        rows = [row | {"d": "", "answer": "a"} for row in csv.DictReader(file)]
    write_csv(contest / "train.csv", rows)
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)
    assert {*map(len, predict(run, contest, tmp_path / "out.csv").choice_logits)} == {4}
    assert "rows of up to 4 choices, and training had at most 3; letters after C" in capsys.readouterr().out


def test_a_column_of_one_letter_that_is_no_choice_is_left_alone(families, contest, sft, tmp_path):
    for name in ("train.csv", "test.csv"):
        with (contest / name).open() as file:
            rows = [row | {"x": "1"} for row in csv.DictReader(file)]
        write_csv(contest / name, rows)
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)
    assert len(predict(run, contest, tmp_path / "out.csv").ids) == 24


def test_a_mistake_found_late_does_not_cost_the_run_that_was_to_be_overwritten(families, sft, tmp_path):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)
    with pytest.raises(SystemExit):
        sft(str(tmp_path / "typo"), run, overwrite=True)
    assert (run / "adapter_model.safetensors").is_file() and (run / "run.json").is_file()


def test_prediction_never_overwrites_what_it_did_not_write(families, contest, fails, tmp_path):
    model, before = families("qwen2_5_vl"), (contest / "test.csv").read_bytes()
    fails(predict, "none", contest, contest / "test.csv", "--model", model, says="is one of the files that are read")
    fails(predict, "none", contest, contest / "train.csv", "--model", model, says="is no submission of ours")
    (contest / "other.parquet").write_text("mine")
    fails(predict, "none", contest, contest / "other.csv", "--model", model, says="is no submission of ours")
    fails(predict, "none", contest, contest / "test.csv" / "x.csv", "--model", model, says="cannot be written")
    assert (contest / "test.csv").read_bytes() == before


def test_texts_that_hold_a_control_token_are_named_before_any_weight_is_loaded(families, contest, sft, fails, tmp_path):
    with (contest / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[3]["question"] = "What is <|image_pad|>?"
    rows[5]["b"] = "<|im_end|>"
    write_csv(contest / "train.csv", rows)
    says = "control token of this model in rows row_003, row_005 (2 of 24)"
    fails(sft, families("qwen2_5_vl"), tmp_path / "run", says=says)
    fails(predict, "none", contest, tmp_path / "o.csv", "--model", families("qwen2_5_vl"), data="train.csv", says=says)


def test_a_damaged_run_says_what_is_damaged(families, contest, sft, tmp_path, capsys):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)
    whole = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").write_bytes(whole[:100])
    with pytest.raises(SystemExit):
        predict(run, contest, tmp_path / "out.csv")
    assert "does not load on" in capsys.readouterr().err
    (run / "run.json").write_text("{}")
    with pytest.raises(SystemExit):
        predict(run, contest, tmp_path / "out.csv")
    assert "run.json is damaged" in capsys.readouterr().err


def test_a_run_says_of_other_choices_and_needs_the_adapter_that_it_was_trained_with(
    families, contest, sft, tmp_path, capsys
):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)
    with (contest / "test.csv").open() as file:
        rows = [row | {"e": "violet"} for row in csv.DictReader(file)]
    write_csv(contest / "five.csv", rows)
    assert {*map(len, predict(run, contest, tmp_path / "out.csv", data="five.csv").choice_logits)} == {5}
    assert "unlike the training data: choices: a to e, not a to d" in capsys.readouterr().out
    (run / "adapter_config.json").unlink()
    with pytest.raises(SystemExit):
        predict(run, contest, tmp_path / "out.csv")
    assert "holds no adapter" in capsys.readouterr().err


def test_a_stream_trains_like_any_data_and_validates_on_a_file(families, contest, sft, tmp_path):
    values = {"streaming": True, "max_steps": 4, "dataloader_num_workers": 2, "save_strategy": "steps", "save_steps": 2}
    values |= {"validation_data": contest / "validation.csv", "eval_strategy": "steps", "eval_steps": 2}
    run = sft(families("qwen2_5_vl"), tmp_path / "run", **values)
    # Killed after the first checkpoint, it resumes from there.
    for path in (run / "run.json", *(run / "checkpoint-4").iterdir()):
        path.unlink()
    (run / "checkpoint-4").rmdir()
    sft(families("qwen2_5_vl"), run, **values)
    description = json.loads((run / "run.json").read_text())
    assert description["num_rows"] == {"train": None, "validation": 8} and description["num_letters"] == 4
    assert "a stream of rows of" in (run / "README.md").read_text()
    assert len(predict(run, contest, tmp_path / "out.csv").ids) == 24


def test_a_bad_row_of_a_stream_ends_with_its_message_also_from_a_worker(families, contest, sft, tmp_path, capsys):
    (contest / "images/007.png").write_bytes(b"no image")
    for workers in (0, 2):
        values = {"streaming": True, "max_steps": 8, "dataloader_num_workers": workers}
        with pytest.raises(SystemExit) as exit:
            sft(families("qwen2_5_vl"), tmp_path / f"run{workers}", **values)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and "the image of row row_007" in error and "Traceback" not in error


def test_rows_with_bad_images_are_left_out_of_training_where_the_recipe_says_so(families, contest, sft, tmp_path):
    (contest / "images/003.png").write_bytes(b"no image")
    run = sft(families("qwen2_5_vl"), tmp_path / "run", on_bad_row="skip", validation_fraction=0.25, max_steps=1)
    parts = [line.split(",")[:2] for line in (run / "rows.csv").read_text().splitlines()[1:]]
    assert [row_id for part, row_id in parts if part == "left_out"] == ["row_003"]
    assert json.loads((run / "run.json").read_text())["num_rows"]["train"] == sum(part == "train" for part, _ in parts)


def test_prediction_answers_rows_with_bad_images_where_it_is_told_to(families, contest, tmp_path, capsys):
    whole = predict("none", contest, tmp_path / "whole.csv", "--model", families("qwen2_5_vl"))
    (contest / "images/003.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as exit:
        predict("none", contest, tmp_path / "out.csv", "--model", families("qwen2_5_vl"))
    assert exit.value.code == 2 and "the file is no image that can be read: row row_003" in capsys.readouterr().err
    arguments = ("--model", families("qwen2_5_vl"), "--on_bad_row", "guess")
    blanked = predict("none", contest, tmp_path / "out.csv", *arguments)
    assert [i for i, is_blank in enumerate(blanked.blanked) if is_blank] == [3] and not any(whole.blanked)
    assert "Guessed, because something of them could not be used: row row_003 (1 of 24)" in capsys.readouterr().out
    for i, (ours, theirs) in enumerate(zip(blanked.choice_logits, whole.choice_logits, strict=True)):
        assert (ours == pytest.approx(theirs, abs=1e-4)) == (i != 3)
