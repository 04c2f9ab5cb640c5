"""Cases that need a run: how answers are written and matched, with files as people have them. One run serves all."""

import csv
import shutil

import pytest
from cases import PETS, four, row
from contest import write_csv
from PIL import Image
from scripts import run_script

from vqa_sft.errors import InputError
from vqa_sft.predictions.ensemble import write_ensemble
from vqa_sft.predictions.file import read_predictions
from vqa_sft.predictions.submission import submit


@pytest.fixture(scope="module")
def folder(tmp_path_factory, families):
    """run/: a run on train.csv, whose answers are small letters; test.csv: the same rows without answers; img/."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "img").mkdir()
    for i in range(12):
        Image.effect_noise((64, 64), 30 + 15 * i).convert("RGB").save(folder / f"img/{i}.png")
    rows = [four(i, PETS, answer="abcd"[i % 4]) for i in range(8)]
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", [{key: cell for key, cell in row.items() if key != "answer"} for row in rows])
    values = {"train_data": folder / "train.csv", "output_dir": folder / "run", "max_steps": 1, "use_cpu": True}
    values |= {"model_name_or_path": families("qwen2_5_vl"), "dataloader_num_workers": 0, "disable_tqdm": True}
    run_script("sft", *(token for key, value in values.items() for token in (f"--{key}", value)))
    return folder


def predict(folder, data, output, *options):
    arguments = ("--run", folder / "run", "--data", folder / data, "--output", output, "--use_cpu", "--num_workers", 0)
    run_script("predict", *arguments, *options)
    return output


def column(path, name):
    with open(path, newline="", encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_answers_keep_the_letter_case_of_training_through_template_ensemble_and_submit(folder, tmp_path):
    write_csv(folder / "sample.csv", [{"id": f"r{i}", "answer": ""} for i in range(8)])
    out = predict(folder, "test.csv", tmp_path / "out.csv", "--template", folder / "sample.csv")
    assert {*column(out, "answer")} <= {*"abcd"}
    parquet = str(out.with_suffix(".parquet"))
    submit(parquet, tmp_path / "again.csv")
    shutil.copy(parquet, tmp_path / "copy.parquet")
    write_ensemble([parquet, str(tmp_path / "copy.parquet")], tmp_path / "both.parquet")
    submit(tmp_path / "both.parquet", tmp_path / "both.csv", template=folder / "sample.csv")
    for name in ("again.csv", "both.csv"):
        assert column(tmp_path / name, "answer") == column(out, "answer")


def test_columns_of_probabilities_are_matched_to_the_choices_by_name(folder, tmp_path, capsys):
    colours = ["red", "green", "blue"]
    write_csv(folder / "colours.csv", [row(i, a="red", b="green", c="blue", answer=colours[i % 3]) for i in range(9)])
    write_csv(folder / "columns.csv", [{"id": f"r{i}", "blue": 0.33, "green": 0.33, "red": 0.34} for i in range(9)])
    out = predict(folder, "colours.csv", tmp_path / "out.csv", "--template", folder / "columns.csv")
    probs = read_predictions(out.with_suffix(".parquet")).probs
    for place, colour in enumerate(colours):
        assert [float(cell) for cell in column(out, colour)] == pytest.approx([row[place] for row in probs], abs=1e-5)
    assert "blue" in capsys.readouterr().out  # the mapping is printed


@pytest.mark.parametrize("name", ["answer", "prediction"])
def test_an_answer_and_a_confidence_are_no_pair_of_probabilities(folder, tmp_path, capsys, name):
    write_csv(folder / "pairs.csv", [row(i, a="Yes", b="No", answer="ab"[i % 2]) for i in range(8)])
    write_csv(folder / "confidence.csv", [{"id": f"r{i}", name: 0, "confidence": 0} for i in range(8)])
    with pytest.raises(SystemExit, match="2"):
        predict(folder, "pairs.csv", tmp_path / "out.csv", "--template", folder / "confidence.csv")
    said = capsys.readouterr().err
    assert name in said and "confidence" in said and not (tmp_path / "out.csv").exists()


def test_a_submission_of_texts_has_as_many_rows_for_pandas_as_were_answered(folder, tmp_path):
    import pandas

    write_csv(folder / "returns.csv", [four(i, ["one\rtwo", "dog\u2028cat", "fox\x0b", "owl"]) for i in range(4)])
    out = predict(folder, "returns.csv", tmp_path / "out.csv", "--answer_format", "text")
    assert len(pandas.read_csv(out)) == 4 == len(column(out, "answer"))


def test_rows_with_the_same_numbers_of_other_files_are_not_the_same_rows(folder, tmp_path):
    for name in ("one", "other"):
        rows = [four(i, PETS, answer="abcd"[i % 4]) | {"question": f"{name} {i}?"} for i in range(8)]
        write_csv(folder / f"{name}.csv", [{key: cell for key, cell in row.items() if key != "id"} for row in rows])
    files = [
        str(predict(folder, f"{name}.csv", tmp_path / f"{name}_out.csv").with_suffix(".parquet"))
        for name in ("one", "other")
    ]
    with pytest.raises(InputError, match="other"):
        write_ensemble(files, tmp_path / "both.parquet")
    assert not (tmp_path / "both.parquet").exists()
