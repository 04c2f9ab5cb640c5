"""A classification of ten digits by words: trained on candidates, predicted, its held-out rows out of fold."""

import csv
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from candidates import write_candidates
from contest import write_csv
from scripts import run_script, train
from transformers import pipeline

from vqa_sft.data.class_probs import read_class_probs
from vqa_sft.data.folds import write_folds
from vqa_sft.errors import InputError
from vqa_sft.inference.predictor import Predictor
from vqa_sft.models import scoring
from vqa_sft.predictions.ensemble import align, write_ensemble
from vqa_sft.predictions.file import read_predictions
from vqa_sft.predictions.fuse import fuse_files
from vqa_sft.runs import folder as run_folder
from vqa_sft.runs.export import export_run
from vqa_sft.runs.out_of_fold import METRICS, OUT_OF_FOLD
from vqa_sft.tiny import TINY_PATH
from vqa_sft.tiny.digits import split_digits, to_picture

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CLASSES = sorted(WORDS)
QUICK = {"use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True, "per_device_train_batch_size": 16}
PREDICTED = ("--use_cpu", "true", "--num_workers", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train.csv of 96 digits, test.csv of 60, and the candidates of both by a classifier that is often wrong."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "img").mkdir()
    digits, train_rows, test_rows = split_digits(0)
    for name, numbers in (("train", train_rows[:96]), ("test", test_rows[:60])):
        rows = []
        for number in map(int, numbers):
            to_picture(digits.images[number]).save(folder / f"img/{number}.png")
            word = WORDS[digits.target[number]]
            rows.append({"id": f"{name}_{number}", "path": f"img/{number}.png", "label": word})
        write_csv(folder / f"{name}.csv", rows)
        labels = [CLASSES.index(row["label"]) for row in rows]
        write_candidates(folder / f"{name}.parquet", [row["id"] for row in rows], CLASSES, labels, num_candidates=4)
    return folder


def recipe_of(data, **values):
    given = {"model_name_or_path": str(TINY_PATH), "train_data": str(data / "train.csv"), "task": "classification"}
    given |= {"fixed_question": "Which digit is written here?", "candidates": str(data / "train.parquet")}
    return given | {"learning_rate": 3e-3, "num_train_epochs": 2} | QUICK | values


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of a recipe in a file, which holds a quarter of its rows out."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(data, output_dir=str(folder / "run"), validation_fraction=0.25)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run_script("sft", "--config", folder / "recipe.yaml")
    return folder / "run"


@pytest.fixture(scope="module")
def predicted(data, run):
    """The test rows, as the candidates stand and in four orders."""
    for name, orders in (("one", "identity"), ("four", "rotations")):
        output = run.parent / f"{name}.csv"
        given = ("--data", data / "test.csv", "--candidates", data / "test.parquet", "--orders", orders)
        run_script("predict", "--run", run, *given, "--output", output, *PREDICTED)
    return run.parent


def labels_of(path):
    with path.open() as file:
        return {row["id"]: row["label"] for row in csv.DictReader(file)}


def check_classes(predictions, data, name, num=4):
    """Candidates, labels and answers of a file, against the data and the classifier's own file."""
    labels, probs = labels_of(data / f"{name}.csv"), read_class_probs(data / f"{name}.parquet")
    place = {row_id: number for number, row_id in enumerate(probs.ids)}
    assert predictions.metadata["classes"] == CLASSES and predictions.metadata["candidates"] == "a noisy classifier"
    rows = zip(predictions.ids, predictions.candidates, predictions.labels, predictions.answers, strict=True)
    for row_id, candidates, label, answer in rows:
        assert candidates == probs.indices[place[row_id], :num].tolist()
        assert CLASSES[label] == labels[row_id]
        assert answer == (candidates.index(label) if label in candidates else None)
    assert None in predictions.answers


def test_a_model_chooses_better_among_candidates_than_the_classifier_that_names_them(data, predicted):
    predictions = read_predictions(predicted / "four.parquet")
    check_classes(predictions, data, "test")
    chosen = [of_row[best] for of_row, best in zip(predictions.candidates, predictions.best, strict=True)]
    accuracy = np.mean([one == label for one, label in zip(chosen, predictions.labels, strict=True)])
    prior = np.mean(
        [of_row[0] == label for of_row, label in zip(predictions.candidates, predictions.labels, strict=True)]
    )
    assert accuracy > prior + 0.15 and accuracy <= 1 - predictions.answers.count(None) / 60
    with (predicted / "four.csv").open() as file:
        assert [*csv.reader(file)] == [
            ["id", "label"],
            *([row_id, CLASSES[one]] for row_id, one in zip(predictions.ids, chosen, strict=True)),
        ]


def test_other_orders_name_the_same_classes_with_nearly_the_same_numbers(data, predicted):
    one, four = (read_predictions(predicted / f"{name}.parquet") for name in ("one", "four"))
    check_classes(one, data, "test")
    assert (one.candidates, one.labels, one.answers) == (four.candidates, four.labels, four.answers)
    assert np.mean([a == b for a, b in zip(one.best, four.best, strict=True)]) > 0.9
    assert min(four.agreement) < 1 and one.choice_logits != four.choice_logits


def asked_of(data):
    """Images of the test rows, the question of each, and its four candidates."""
    probs, names = (
        read_class_probs(data / "test.parquet"),
        [row_id.split("_")[1] for row_id in labels_of(data / "test.csv")],
    )
    choices = [[CLASSES[place] for place in row[:4]] for row in probs.indices]
    return [data / f"img/{name}.png" for name in names], ["Which digit is written here?"] * len(names), choices


@pytest.mark.parametrize(("name", "orders"), [("one", "identity"), ("four", "rotations")])
def test_a_predictor_asked_for_a_rows_candidates_has_the_probabilities_of_the_recipe(data, predicted, name, orders):
    predict, expected = (
        Predictor(predicted / "run", use_cpu=True, orders=orders),
        read_predictions(predicted / f"{name}.parquet"),
    )
    images, questions, choices = asked_of(data)
    for found, row in zip(predict(images[:12], questions[:12], choices[:12]), expected.probs, strict=False):
        np.testing.assert_allclose(found, row, atol=1e-5)
    np.testing.assert_allclose(
        predict(images[3], questions[3], [f" {text} " for text in choices[3]]), expected.probs[3], atol=1e-5
    )
    assert predict(images[0], questions[0], choices[0][:2]).shape == (2,)


def test_the_exported_run_gives_a_rows_candidates_the_probabilities_of_the_recipe(data, predicted, tmp_path):
    output = tmp_path / "merged"
    export_run(str(predicted / "run"), str(output), dtype="fp32")
    expected, decide = read_predictions(predicted / "one.parquet"), pipeline("decision", model=str(output))
    predict = Predictor(output, use_cpu=True)
    for number in range(5):
        image, question, choices = (
            asked_of(data)[0][number],
            "Which digit is written here?",
            expected.candidates[number],
        )
        names = [CLASSES[place] for place in choices]
        asked = {"type": "choice", "instructions": question, "criteria": dict.fromkeys(names)}
        request = {"state": "image-1", "questions": {"one": asked}, "assets": {"image-1": str(image)}}
        found = decide(request)["one"]["probabilities"]
        assert [*found] == names
        np.testing.assert_allclose([*found.values()], expected.probs[number], atol=1e-5)
        np.testing.assert_allclose(predict(image, question, names), expected.probs[number], atol=1e-5)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert '"Which digit is written here?", "criteria": {"eight": None, "five": None}' in card
    assert "classes of the run, spelt so" in card


def test_a_predictor_takes_classes_of_the_run_and_nothing_else(data, predicted):
    predict = Predictor(predicted / "run", use_cpu=True)
    (image, *_), (question, *_), _ = asked_of(data)
    wanted = "The choices of this run are 2 to 4 of its 10 classes, the most likely first"
    for choices, message in (
        (["one", "sevn"], rf"a choice of question 1 is no class of the run: 'sevn'; is 'seven' meant\? {wanted}"),
        (["one", "two", "", ""], f"a choice of question 1 is no class of the run: ''. {wanted}"),
        (["one", "one ", "two"], "question 1 has the class 'one' twice"),
        (CLASSES[:5], f"question 1 has 5 classes. {wanted}"),
        (["one"], f"question 1 has 1 classes. {wanted}"),
    ):
        with pytest.raises(InputError, match=message):
            predict(image, question, choices)
    with pytest.raises(InputError, match="a choice of question 1 is no class of the run: 'cat'"):
        predict.decide(
            {
                "state": {"images": ["image-1"]},
                "questions": {
                    "animal": {"type": "choice", "instructions": question, "criteria": {"cat": None, "one": None}}
                },
                "assets": {"image-1": str(image)},
            }
        )


def test_held_out_rows_are_in_the_run_folder_and_predicted_the_same_with_their_own_candidates(data, run):
    own = read_predictions(run / run_folder.VALIDATION)
    check_classes(own, data, "train")
    metrics = json.loads((run / run_folder.METRICS).read_text())
    assert metrics["answerable"] == pytest.approx(1 - own.answers.count(None) / len(own.ids), abs=1e-5)
    known = [row for row, answer in enumerate(own.answers) if answer is not None]
    assert metrics["accuracy"] == pytest.approx(np.mean([own.best[i] == own.answers[i] for i in known]), abs=1e-5)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == len(own.ids) and "seven" in page
    output = run.parent / "oof.csv"
    run_script("predict", "--run", run, "--part", "validation", "--output", output, *PREDICTED)
    again = read_predictions(output.with_suffix(".parquet"))
    check_classes(again, data, "train")
    place = {row_id: number for number, row_id in enumerate(again.ids)}
    for row_id, logits, digest in zip(own.ids, own.choice_logits, own.digests, strict=True):
        assert again.choice_logits[place[row_id]] == pytest.approx(logits, abs=1e-4)
        assert again.digests[place[row_id]] == digest


def test_folds_end_with_one_file_of_all_rows_out_of_fold(data, tmp_path):
    ids = [*labels_of(data / "train.csv")]
    write_folds(tmp_path / "folds.csv", ids, [number % 2 for number in range(len(ids))])
    values = recipe_of(data, folds_file=tmp_path / "folds.csv", fold="all", output_dir=tmp_path / "run", max_steps=2)
    train(**values, candidate_pool=5, class_balance="weight", absent="drop")
    together = read_predictions(tmp_path / "run" / OUT_OF_FOLD)
    assert together.ids == ids
    check_classes(together, data, "train")
    content = json.loads((tmp_path / "run" / METRICS).read_text())
    assert content["unanswered"] == together.answers.count(None) and content["rows"] == 96 - content["unanswered"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 96
    given = ("--data", data / "test.csv", "--candidates", data / "test.parquet", "--output", tmp_path / "both.csv")
    run_script("predict", "--run", tmp_path / "run", *given, *PREDICTED)
    for name in ("both", "both.fold0", "both.fold1"):
        check_classes(read_predictions(tmp_path / f"{name}.parquet"), data, "test")
    fuse_files([str(tmp_path / "both.parquet")], output=tmp_path / "fused.parquet")
    fitted = f"{tmp_path}/run/{OUT_OF_FOLD} and {data}/train.parquet"
    assert fitted in read_class_probs(tmp_path / "fused.parquet").metadata["source"]
    run_script("predict", "--run", tmp_path / "run", "--part", "validation", "--output", tmp_path / "o.csv", *PREDICTED)
    assert read_predictions(tmp_path / "o.parquet").ids == ids
    check_classes(read_predictions(tmp_path / "o.parquet"), data, "train")


def test_a_prediction_that_was_broken_off_resumes_with_the_same_candidates(data, predicted, monkeypatch, capsys):
    whole, batches = scoring.score_batches, []

    def some(*args, **kwargs):
        for scored in whole(*args, **kwargs):
            if len(batches) == 3:
                raise KeyboardInterrupt
            batches.append(scored)
            yield scored

    given = ("--data", data / "test.csv", "--candidates", data / "test.parquet", "--orders", "rotations")
    given = ("--run", predicted / "run", *given, "--output", predicted / "again.csv", *PREDICTED)
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_batches", some)
        with pytest.raises(SystemExit):
            run_script("predict", *given)
    run_script("predict", *given)
    assert "Resuming with what" in capsys.readouterr().out
    for suffix in (".csv", ".parquet"):
        assert (predicted / f"again{suffix}").read_bytes() == (predicted / f"four{suffix}").read_bytes()


def test_validation_rows_of_a_file_of_their_own_have_candidates_of_their_own(data, tmp_path, capsys):
    values = recipe_of(data, output_dir=tmp_path / "run", validation_data=data / "test.csv", max_steps=2)
    with pytest.raises(SystemExit):  # whose candidates are those of other rows
        train(**values)
    assert "no candidates are known of the row" in capsys.readouterr().err
    labels = [CLASSES.index(label) for label in labels_of(data / "test.csv").values()]
    write_candidates(tmp_path / "c.parquet", [*labels_of(data / "test.csv")], CLASSES, labels, num_candidates=5)
    with pytest.raises(SystemExit):
        train(**values, validation_candidates=tmp_path / "c.parquet")
    assert "training and validation rows would have 4 and 5 choices: set num_candidates" in capsys.readouterr().err
    train(**values, validation_candidates=data / "test.parquet", class_balance="sample")
    check_classes(read_predictions(tmp_path / "run" / run_folder.VALIDATION), data, "test")
    given = ("--run", tmp_path / "run", "--part", "validation", "--output", tmp_path / "v.csv")
    run_script("predict", *given, *PREDICTED)
    check_classes(read_predictions(tmp_path / "v.parquet"), data, "test")
    for file in (tmp_path / "run" / run_folder.VALIDATION, tmp_path / "v.parquet"):
        assert read_predictions(file).metadata["candidates_file"] == str(data / "test.parquet")


def test_a_run_is_not_resumed_or_looked_at_with_other_candidates(data, run, tmp_path, capsys):
    labels = [CLASSES.index(label) for label in labels_of(data / "train.csv").values()]
    other = tmp_path / "other.parquet"
    write_candidates(other, [*labels_of(data / "train.csv")], CLASSES, labels, num_candidates=4, seed=1)
    given = ("--run", run, "--part", "validation", "--output", tmp_path / "v.csv", *PREDICTED)
    with pytest.raises(SystemExit):
        run_script("predict", *given, "--candidates", other)
    assert "the data have changed since the run" in capsys.readouterr().err
    moved = tmp_path / "moved.parquet"
    moved.write_bytes((data / "train.parquet").read_bytes())
    run_script("predict", *given, "--candidates", moved)
    check_classes(read_predictions(tmp_path / "v.parquet"), data, "train")


def test_the_command_that_a_prediction_of_two_runs_ends_with_fuses_both(data, run, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(run, tmp_path / name)
    given = ("--data", data / "test.csv", "--candidates", data / "test.parquet", "--output", tmp_path / "out.csv")
    run_script("predict", "--run", tmp_path / "a", tmp_path / "b", *given, *PREDICTED)
    files = re.search(r"vqa-sft fuse (.*) --output fused.parquet", capsys.readouterr().out)[1].split()
    assert files == [f"{tmp_path}/out.a.parquet", f"{tmp_path}/out.b.parquet"]
    fuse_files(files, output=tmp_path / "fused.parquet")
    assert len(read_class_probs(tmp_path / "fused.parquet")) == 60


def test_none_of_these_is_the_last_choice_and_never_the_name_in_the_submission(data, tmp_path):
    train(**recipe_of(data, output_dir=tmp_path / "run", validation_fraction=0.25, max_steps=3, absent="none_of_these"))
    own = read_predictions(tmp_path / "run" / run_folder.VALIDATION)
    assert all(of_row[-1] == -1 and len(of_row) == 5 for of_row in own.candidates) and None not in own.answers
    assert {4} < {*own.answers}
    given = ("--data", data / "test.csv", "--candidates", data / "test.parquet", "--output", tmp_path / "out.csv")
    run_script("predict", "--run", tmp_path / "run", *given, "--orders", "rotations", *PREDICTED)
    found = read_predictions(tmp_path / "out.parquet")
    assert all(of_row[-1] == -1 and len(of_row) == 5 for of_row in found.candidates)
    assert {*labels_of(tmp_path / "out.csv").values()} <= {*CLASSES}
    predict, (image, *_) = Predictor(tmp_path / "run", use_cpu=True, orders="rotations"), asked_of(data)[0]
    question, choices = "Which digit is written here?", [CLASSES[place] for place in found.candidates[0][:-1]]
    np.testing.assert_allclose(predict(image, question, [*choices, "None of these"]), found.probs[0], atol=1e-5)
    with pytest.raises(InputError, match="trained with 'None of these' as the last choice, and question 1 has not"):
        predict(image, question, choices)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "needs candidates, .*`vqa-sft candidates`"),
        (("--candidates", "train.parquet"), "no candidates are known of the row"),
        (("--candidates", "test.parquet", "--template", "t.csv"), "leave out --streaming, --template"),
        (("--candidates", "test.parquet", "--streaming", "true"), "leave out --streaming, --template"),
    ],
)
def test_what_a_prediction_cannot_do_is_said_before_anything_is_loaded(data, run, tmp_path, capsys, given, message):
    given = [data / word if word.endswith(".parquet") else word for word in given]
    with pytest.raises(SystemExit):
        run_script("predict", "--run", run, "--data", data / "test.csv", "--output", tmp_path / "o.csv", *given)
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said


def test_predictions_among_other_candidates_are_not_averaged_by_place(predicted, tmp_path):
    one = predicted / "one.parquet"
    table, metadata = pq.read_table(one), pq.read_schema(one).metadata
    rows = table["candidates"].to_pylist()
    answers = [None if answer is None else 3 - answer for answer in table["answer"].to_pylist()]
    for name, column in (("candidates", [row[::-1] for row in rows]), ("answer", answers)):
        place = table.schema.names.index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(column, table[name].type))
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "other.parquet")
    files = [read_predictions(one), read_predictions(tmp_path / "other.parquet")]
    with pytest.raises(InputError, match="chose among other candidates"):
        align(files, ["one", "other"])
    write_ensemble([str(one), str(predicted / "four.parquet")], tmp_path / "mean.parquet")
    assert read_predictions(tmp_path / "mean.parquet").candidates == rows
