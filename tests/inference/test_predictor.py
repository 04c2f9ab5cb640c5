"""`vqa_sft.Predictor`: the same probabilities as recipes/predict.py, from Python."""

import csv
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from captures import Capture
from contest import write_csv
from PIL import Image
from scripts import run_script

import vqa_sft
from vqa_sft.errors import InputError
from vqa_sft.models.fast import graphs, speedups
from vqa_sft.predictions.file import read_predictions


def rows_of(contest):
    with (contest / "test.csv").open() as file:
        return [*csv.DictReader(file)]


def asked(contest, rows):
    images = [contest / row["path"] for row in rows]
    return images, [row["question"] for row in rows], [[row[letter] for letter in "abcd"] for row in rows]


@pytest.mark.parametrize("how", [{}, {"orders": "rotations", "scales": [1.0, 1.2], "average": "log"}])
@pytest.mark.parametrize("folds", [["fold0"], ["fold0", "fold2"]])
def test_one_row_or_many_have_the_probabilities_of_the_recipe(three, tmp_path, how, folds):
    contest, run = three
    runs = [run / fold for fold in folds]
    given = [f"--{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in how.items()]
    given += ["--data", contest / "test.csv", "--output", tmp_path / "out.csv", "--num_workers", 0, "--use_cpu"]
    run_script("predict", "--run", *runs, *given)
    expected = read_predictions(tmp_path / "out.parquet").probs
    predict = vqa_sft.Predictor(*runs, use_cpu=True, batch_size=10, **how)
    images, questions, choices = asked(contest, rows_of(contest))
    for found, row in zip(predict(images, questions, choices), expected, strict=True):
        np.testing.assert_allclose(found, row, atol=1e-5)
    np.testing.assert_allclose(predict(images[3], questions[3], choices[3]), expected[3], atol=1e-5)


@pytest.mark.parametrize("orders", ["identity", "rotations"])
def test_graphs_give_the_probabilities_of_the_forward_and_are_captured_beforehand(three, monkeypatch, orders):
    contest, run = three
    plain = vqa_sft.Predictor(run / "fold0", use_cpu=True, orders=orders)
    capture = Capture()
    monkeypatch.setattr(speedups, "use_graphs", lambda model: graphs.use_graphs(speedups.base_of(model), capture))
    predict = vqa_sft.Predictor(run / "fold0", use_cpu=True, orders=orders, compile_layers=orders == "identity")
    images, questions, choices = asked(contest, rows_of(contest)[:4])
    predict.warm_up(images[0], "?", choices[0], longer=64)
    num_captured = capture.count
    assert num_captured >= 2
    for each in zip(images, questions, choices, strict=True):
        np.testing.assert_allclose(predict(*each), plain(*each), atol=1e-5)
    # Choices of other lengths make rows that share less.
    assert capture.count - num_captured <= (0 if orders == "identity" else 2)


def test_a_image_is_a_path_the_bytes_of_a_file_or_in_memory(three):
    contest, run = three
    predict = vqa_sft.Predictor(run / "fold0", use_cpu=True)
    (path,), (question,), (choices,) = asked(contest, rows_of(contest)[:1])
    expected = predict(path, question, choices)
    opened = Image.open(path)
    for image in (str(path), path.read_bytes(), opened, opened.convert("RGBA"), [path]):
        np.testing.assert_allclose(predict(image, question, choices), expected, atol=1e-6)
    assert not np.allclose(predict(None, question, choices), expected, atol=1e-3)
    assert predict([path, path], question, choices[:2]).shape == (2,)


def test_the_temperature_of_the_run_is_applied(three, tmp_path):
    contest, run = three
    images, questions, choices = asked(contest, rows_of(contest)[:4])
    kept = (run / "calibration.json").read_text()
    # Few rows prove no temperature: it is written here.
    (run / "calibration.json").write_text(re.sub(r'"temperature": [0-9.]+', '"temperature": 2.0', kept))
    found = vqa_sft.Predictor(run / "fold1", use_cpu=True)(images, questions, choices)
    other = vqa_sft.Predictor(run / "fold1", use_cpu=True, orders="rotations")
    assert other.metadata[0]["calibration"]["temperature"] == 1  # found for one order alone
    (run / "calibration.json").rename(tmp_path / "aside.json")
    try:
        raw = vqa_sft.Predictor(run / "fold1", use_cpu=True)(images, questions, choices)
    finally:
        (run / "calibration.json").write_text(kept)
    assert [row.argmax() for row in found] == [row.argmax() for row in raw]
    assert not np.allclose(found, raw, atol=1e-9)


def test_a_row_is_read_as_the_recipe_reads_it(three, tmp_path):
    """Spaces around texts are no part of them, and empty choices at the end are none."""
    contest, run = three
    row = rows_of(contest)[0]
    row |= {"question": f" {row['question']} ", "a": f"{row['a']} ", "c": "", "d": ""}
    write_csv(contest / "odd.csv", [row])
    given = ["--data", contest / "odd.csv", "--output", tmp_path / "out.csv", "--num_workers", 0, "--use_cpu"]
    run_script("predict", "--run", run / "fold0", *given)
    expected = read_predictions(tmp_path / "out.parquet").probs[0]
    (path,), (question,), (choices,) = asked(contest, [row])
    found = vqa_sft.Predictor(run / "fold0", use_cpu=True)(path, question, choices)
    assert len(expected) == 2 and found.shape == (4,) and not found[2:].any()
    np.testing.assert_allclose(found[:2], expected, atol=1e-5)


def test_what_cannot_be_asked_is_an_input_error(three):
    contest, run = three
    predict = vqa_sft.Predictor(run / "fold0", use_cpu=True)
    path = contest / rows_of(contest)[0]["path"]
    with pytest.raises(InputError, match="2 to 4 choices, A to D as in training; got 5"):
        predict(path, "Which?", list("abcde"))
    with pytest.raises(InputError, match="2 questions, 1 images"):
        predict([path], ["Which?", "What?"], [["a", "b"]] * 2)
    with pytest.raises(InputError, match="an image of question 1 cannot be read"):
        predict(contest / "test.csv", "Which?", ["a", "b"])
    with pytest.raises(InputError, match="an image of question 2 cannot be read"):
        predict([path, contest / "test.csv"], ["Which?"] * 2, [["a", "b"]] * 2)
    with pytest.raises(InputError, match="Give runs of one kind"):
        vqa_sft.Predictor(run / "fold0", run.parent / "other")
    with pytest.raises(InputError, match="no such run folder"):
        vqa_sft.Predictor(run / "fold7")


def test_a_run_that_was_trained_with_contexts_asks_for_one(three):
    contest, run = three
    predict = vqa_sft.Predictor(run / "fold0", use_cpu=True)
    (path,), (question,), (choices,) = asked(contest, rows_of(contest)[:1])
    bare = predict(path, question, choices)
    with pytest.raises(InputError, match="trained without contexts, and question 1 has one"):
        predict(path, question, choices, context="It is night.")
    predict.has_context = True
    assert not np.allclose(predict(path, question, choices, context="It is night, and all is dark."), bare, atol=1e-9)
    with pytest.raises(InputError, match="trained with contexts, and question 1 has none"):
        predict(path, question, choices)
    np.testing.assert_array_equal(predict([path], [question], [choices], [""])[0], bare)


@pytest.mark.parametrize("orders", ["identity", "rotations"])
def test_any_number_of_threads_get_the_numbers_of_one(three, request, capsys, orders):
    """One question or two with texts of other lengths, which the tokenizer pads; `--calls 1000` for the long one."""
    contest, run = three
    num_calls = request.config.getoption("--calls") if orders == "identity" else 32
    predict = vqa_sft.Predictor(run / "fold0", run / "fold2", use_cpu=True, orders=orders)
    images, questions, choices = asked(contest, rows_of(contest)[:8])
    questions = [question + " Look closely." * number for number, question in enumerate(questions)]
    places = [slice(start, start + 1 + start % 2) for start in range(6)]

    def ask(number):
        place = places[number % len(places)]
        return predict(images[place], questions[place], choices[place])

    expected = [ask(number) for number in range(len(places))]
    started_s = time.perf_counter()
    for number in range(num_calls // 4):
        ask(number)
    alone = (num_calls // 4) / (time.perf_counter() - started_s)
    numbers = [*range(num_calls)]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(ask, numbers)]
    together = len(numbers) / (time.perf_counter() - started_s)
    with capsys.disabled():
        print(f"\n{len(numbers):,} calls by 16 threads: {together:.1f} a second; by one {alone:.1f}")
    other = [n for n, rows in zip(numbers, found, strict=True) if not same(rows, expected[n % len(places)])]
    assert not other, f"{len(other)} of {len(numbers)} answers have other numbers"


def same(rows, others):
    return all(np.array_equal(row, other) for row, other in zip(rows, others, strict=True))


def test_the_package_itself_needs_no_torch():
    code = "import sys, vqa_sft; assert 'torch' not in sys.modules and 'Predictor' in vqa_sft.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
