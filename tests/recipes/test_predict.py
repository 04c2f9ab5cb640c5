"""recipes/predict.py: several runs at once, their own validation rows, streams, and predictions that were killed."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from contest import write_csv
from PIL import Image
from scripts import RECIPES, run_forked, run_script

from vqa_sft import Predictor
from vqa_sft.data import examples as data
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.inference import passes, results, rows
from vqa_sft.models import scoring
from vqa_sft.predictions.calibration import calibrate_run, read_calibration
from vqa_sft.predictions.ensemble import write_ensemble
from vqa_sft.predictions.file import read_predictions, write_predictions
from vqa_sft.predictions.metrics import softmax
from vqa_sft.predictions.submission import submit
from vqa_sft.runs import folder as run_folder
from vqa_sft.runs.out_of_fold import write_out_of_fold
from vqa_sft.tiny import TINY_PATH

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def predict(runs, output, *more):
    runs = runs if isinstance(runs, list) else [runs]
    run_script("predict", "--run", *runs, "--output", output, "--num_workers", 0, "--use_cpu", *more)
    return read_predictions(Path(output).with_suffix(".parquet"))


def logits_of(predictions):
    return np.array(predictions.choice_logits)


def test_runs_that_take_turns_on_one_base_answer_as_each_alone(three, tmp_path, capsys):
    contest, run = three
    test = ("--data", contest / "test.csv", "--orders", "rotations")
    together = predict(run, tmp_path / "out.csv", *test)
    assert "loaded again" not in capsys.readouterr().out
    alone = [predict(run / f"fold{fold}", tmp_path / f"alone{fold}.csv", *test) for fold in range(3)]
    for fold, expected in enumerate(alone):
        found = read_predictions(tmp_path / f"out.fold{fold}.parquet")
        assert np.array_equal(logits_of(found), logits_of(expected))
        assert found.metadata == expected.metadata
    assert not np.allclose(logits_of(alone[0]), logits_of(alone[1]), atol=1e-3)
    probs = [softmax(found.choice_logits) for found in alone]
    geometric = np.exp(np.mean(np.log(probs), axis=0))
    np.testing.assert_allclose(np.exp(logits_of(together)), geometric / geometric.sum(1, keepdims=True), atol=1e-6)
    mean = predict(run, tmp_path / "mean.csv", *test, "--average_runs", "mean")
    np.testing.assert_allclose(np.exp(logits_of(mean)), np.mean(probs, axis=0), atol=1e-6)
    assert together.metadata["run"] == str(run)
    made_of = [made["run"] for made in together.metadata["ensemble"]["files"]]
    assert made_of == [str(run / f"fold{fold}") for fold in range(3)]


def test_a_yaml_predicts_as_the_command_line_does(three, tmp_path):
    contest, run = three
    by_flags = predict(run / "fold0", tmp_path / "flags.csv", "--data", contest / "test.csv", "--orders", 2)
    (tmp_path / "predict.yaml").write_text(
        f"run: {run / 'fold0'}\ndata: {contest / 'test.csv'}\norders: rotations\nuse_cpu: true\nnum_workers: 0\n"
    )
    run_script("predict", "--config", tmp_path / "predict.yaml", "--orders", 2, "--output", tmp_path / "yaml.csv")
    assert by_flags.metadata["orders"] == 2
    assert (tmp_path / "yaml.parquet").read_bytes() == (tmp_path / "flags.parquet").read_bytes()


def test_a_run_of_another_kind_has_the_base_loaded_anew(three, tmp_path, capsys):
    contest, run = three
    runs = [run / "fold0", run.parent / "other", run / "fold1"]
    predict(runs, tmp_path / "out.csv", "--data", contest / "test.csv")
    assert f"loaded again for {run.parent / 'other'}" in capsys.readouterr().out
    for folder in runs:
        expected = predict(folder, tmp_path / "alone.csv", "--data", contest / "test.csv")
        found = read_predictions(tmp_path / f"out.{folder.name}.parquet")
        assert np.array_equal(logits_of(found), logits_of(expected))


def test_the_validation_rows_of_a_run_are_its_own_and_of_folds_those_out_of_fold(three, tmp_path, capsys):
    _, run = three
    own = predict(run / "fold1", tmp_path / "own.csv", "--part", "validation")
    saved = read_predictions(run / "fold1" / "validation.parquet")
    assert own.ids == saved.ids and own.answers == saved.answers
    np.testing.assert_allclose(logits_of(own), logits_of(saved), atol=1e-5)
    found = predict(run, tmp_path / "all.csv", "--part", "validation")
    out_of_fold = read_predictions(run / "out_of_fold.parquet")
    assert found.ids == out_of_fold.ids and found.answers == out_of_fold.answers
    np.testing.assert_allclose(logits_of(found), logits_of(out_of_fold), atol=1e-5)
    assert found.metadata["split"] == "out-of-fold"
    rotated = predict(run, tmp_path / "rotated.csv", "--part", "validation", "--orders", "rotations")
    assert rotated.ids == found.ids and not np.allclose(logits_of(rotated), logits_of(found), atol=1e-3)
    with pytest.raises(SystemExit):
        predict([run / "fold0", run.parent / "other"], tmp_path / "twice.csv", "--part", "validation")
    assert "several of the runs validate on" in capsys.readouterr().err


def test_scales_count_as_calibrate_found_them_on_the_rows_out_of_fold(three, tmp_path, capsys):
    contest, run = three
    shutil.copytree(run, run := tmp_path / "run")
    scales, test = ("--scales", "0.5,1"), ("--data", contest / "test.csv")
    held_out = predict(run, tmp_path / "held_out.csv", *scales, "--part", "validation")
    assert "What each scale is worth" not in capsys.readouterr().out
    equal = predict(run, tmp_path / "equal.csv", *scales, *test)
    assert capsys.readouterr().out.count("they count equally") == 1
    calibrate_run(run, tmp_path / "held_out.parquet")
    path = run / "calibration.json"
    entries = json.loads(path.read_text())
    key = "orders identity, scales 0.5 1.0"
    entry = entries[key]
    assert entry["scale_weights"].keys() == {"0.5", "1.0"} and entry["rows"] == len(held_out.ids)
    # The found ones may be 0 and 1.
    path.write_text(json.dumps({key: entry | {"scale_weights": {"0.5": 0.25, "1.0": 0.75}}}))
    predict(run, tmp_path / "out.csv", *scales, *test)
    assert "is not known" not in capsys.readouterr().out
    for fold in range(3):
        found = read_predictions(tmp_path / f"out.fold{fold}.parquet")
        parts = [predict(run / f"fold{fold}", tmp_path / "one.csv", "--scales", scale, *test) for scale in ("0.5", "1")]
        weighed = 0.25 * np.exp(logits_of(parts[0])) + 0.75 * np.exp(logits_of(parts[1]))
        expected = softmax(np.log(weighed), entry["temperature"], entry["bias"])
        np.testing.assert_allclose(found.probs, expected, atol=1e-6)
        assert np.array_equal(logits_of(found), logits_of(read_predictions(tmp_path / f"equal.fold{fold}.parquet")))
    assert equal.ids == found.ids
    predictor = Predictor(run / "fold2", scales=[1.0, 0.5], use_cpu=True)
    with (contest / "test.csv").open() as file:
        row = next(csv.DictReader(file))
    asked = predictor(contest / row["path"], row["question"], [row[letter] for letter in "abcd"])
    np.testing.assert_allclose(asked, found.probs[0], atol=1e-5)


def test_a_stream_is_answered_as_the_whole_file_in_its_order(three, tmp_path, monkeypatch):
    contest, run = three
    test = ("--data", contest / "test.csv", "--batch_size", 2)
    whole = predict(run / "fold0", tmp_path / "whole.csv", *test)
    monkeypatch.setattr(rows, "BLOCK_ROWS", 10)  # three blocks, the last of four rows
    streamed = predict(run / "fold0", tmp_path / "stream.csv", *test, "--streaming")
    assert streamed.ids == whole.ids
    assert np.array_equal(logits_of(streamed), logits_of(whole))
    assert (tmp_path / "stream.csv").read_text() == (tmp_path / "whole.csv").read_text()


def break_after(monkeypatch, num_batches):
    """Let scoring end after some batches, as Ctrl-C would."""
    whole = scoring.score_batches

    def some(*args, **kwargs):
        for number, scored in enumerate(whole(*args, **kwargs)):
            if number == num_batches:
                raise KeyboardInterrupt
            yield scored

    monkeypatch.setattr(scoring, "score_batches", some)


def count_batches(monkeypatch):
    """The sizes of the batches that are scored from now on."""
    sizes, whole = [], scoring.score_batches

    def counted(model, examples, batches, *args, **kwargs):
        sizes.extend(map(len, batches))
        return whole(model, examples, batches, *args, **kwargs)

    monkeypatch.setattr(scoring, "score_batches", counted)
    return sizes


def test_a_prediction_that_was_broken_off_goes_on_where_it_stopped(three, tmp_path, monkeypatch, capsys):
    contest, run = three
    test = ("--data", contest / "test.csv", "--batch_size", 4)
    predict(run, tmp_path / "whole.csv", *test)
    with monkeypatch.context() as patched:
        break_after(patched, 3)
        with pytest.raises(SystemExit):
            predict(run, tmp_path / "out.csv", *test)
    assert not (tmp_path / "out.csv").exists() and (tmp_path / "out.csv.parts").is_dir()
    with monkeypatch.context() as patched:
        sizes = count_batches(patched)
        predict(run, tmp_path / "out.csv", *test)
    assert sizes == [4, 4, 4]  # and not six
    assert "Resuming with what" in capsys.readouterr().out
    for suffix in (".csv", ".parquet", ".fold1.parquet"):
        found, expected = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("out", "whole"))
        assert found == expected
    assert not (tmp_path / "out.csv.parts").exists()


@pytest.mark.parametrize("change", ["orders", "shown", "rows", "weights", "images", "stream", "streamed images"])
def test_what_another_prediction_left_is_not_taken_over(three, tmp_path, monkeypatch, change):
    contest, run = three
    contest = shutil.copytree(contest, tmp_path / "contest")
    test, more = ["--data", contest / "test.csv", "--batch_size", 4], []
    if "stream" in change:
        test.append("--streaming")
    with monkeypatch.context() as patched:
        break_after(patched, 3)
        with pytest.raises(SystemExit):
            predict(run / "fold0", tmp_path / "out.csv", *test)
    if change == "orders":
        more = ["--orders", 2]
    elif change == "shown":
        more = ["--images", "blank"]
    elif change in ("rows", "stream"):
        text = (contest / "test.csv").read_text()
        (contest / "test.csv").write_text(text.replace("Which colour", "What colour"))
    elif "images" in change:
        os.utime(next((contest / "images").iterdir()))
    else:
        os.utime(run / "fold0" / "adapter_model.safetensors")
    sizes = count_batches(monkeypatch)
    predict(run / "fold0", tmp_path / "out.csv", *test, *more)
    assert sum(sizes) == 24


def test_a_stream_goes_on_where_it_was_broken(three, tmp_path, monkeypatch):
    contest, run = three
    test = ("--data", contest / "test.csv", "--batch_size", 4, "--streaming")
    monkeypatch.setattr(rows, "BLOCK_ROWS", 10)
    whole = predict(run / "fold0", tmp_path / "whole.csv", *test)
    with monkeypatch.context() as patched:
        break_after(patched, 2)
        with pytest.raises(SystemExit):
            predict(run / "fold0", tmp_path / "out.csv", *test)
    sizes = count_batches(monkeypatch)
    assert predict(run / "fold0", tmp_path / "out.csv", *test).choice_logits == whole.choice_logits
    assert sum(sizes) == 24 - 8


def test_a_broken_block_of_a_lost_machine_is_scored_again(three, tmp_path, monkeypatch):
    contest, run = three
    test = ("--data", contest / "test.csv")
    predict(run / "fold0", tmp_path / "whole.csv", *test)
    with monkeypatch.context() as patched:
        patched.setattr(results, "_join_files", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            predict(run / "fold0", tmp_path / "out.csv", *test)
    (tmp_path / "out.csv.parts" / "pass0-block0.parquet").write_bytes(b"PAR1")
    predict(run / "fold0", tmp_path / "out.csv", *test)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


# What the environment says, and what is said of it.
NO_LAUNCHER = [
    ({"RANK": "1"}, "the environment says RANK=1, which no launcher does"),
    ({"RANK": "x"}, "the environment says RANK=x"),
    ({"WORLD_SIZE": "abc"}, "the environment says WORLD_SIZE=abc"),
    ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "the environment says RANK=0, LOCAL_RANK=0, WORLD_SIZE=0"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "the processes do not find each other"),
]


@pytest.fixture(scope="module")
def launched_by_nobody(three, tmp_path_factory):
    """Exit code, output and errors under each environment of NO_LAUNCHER."""
    folder = tmp_path_factory.mktemp("launched_by_nobody")
    command = ["recipes/predict.py", "--run", three[1] / "fold0", "--data", three[0] / "test.csv"]
    command += ["--output", folder / "s.csv", "--use_cpu", "--num_workers", "0"]
    return [ended for [ended] in run_forked([[(command, environment)] for environment, _ in NO_LAUNCHER], folder)]


@pytest.mark.parametrize("number", range(len(NO_LAUNCHER)))
def test_an_environment_that_no_launcher_makes_is_an_error(launched_by_nobody, number):
    code, _, error = launched_by_nobody[number]
    assert code == 2 and error.count("error: ") == 1 and NO_LAUNCHER[number][1] in error
    assert "Traceback" not in error


def test_a_folder_that_is_in_the_way_is_left_alone(three, tmp_path, capsys):
    contest, run = three
    (tmp_path / "out.csv.parts").mkdir()
    (tmp_path / "out.csv.parts" / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit):
        predict(run / "fold0", tmp_path / "out.csv", "--data", contest / "test.csv")
    assert "is in the way" in capsys.readouterr().err
    assert (tmp_path / "out.csv.parts" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("run/out_of_fold.csv", "holds the run's own validation predictions"),
        ("run/fold0/validation.csv", "holds the run's own validation predictions"),
        ("", "must end in .csv; got nothing"),
        ("run", "must end in .csv"),
        ("folds.csv", "is no submission of ours"),
        ("folder.csv", "is a folder. Name a file."),
    ],
)
def test_what_is_no_submission_of_ours_is_never_replaced(three, capsys, output, part):
    contest, runs = three
    (runs.parent / "folder.csv").mkdir(exist_ok=True)
    files = {path: path.read_bytes() for path in runs.parent.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        predict(runs / "fold0", runs.parent / output if output else "", "--data", contest / "test.csv")
    assert end.value.code == 2 and part in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in runs.parent.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--orders", "121"], "orders must be identity, rotations, all or a number from 1 to 120; got 121"),
        (["--scales", "1,1"], "scales must be different numbers; got [1.0, 1.0]"),
        (["--scales", "abc"], "scales must be a list of numbers from 0.25 to 4, such as 0.9,1.0,1.1; got 'abc'"),
        (["--columns", "{"], "`columns` must be a mapping; got '{'"),
    ],
)
def test_an_option_that_means_nothing_is_told_what_is_needed(three, tmp_path, capsys, options, part):
    with pytest.raises(SystemExit) as end:
        predict(three[1] / "fold0", tmp_path / "s.csv", "--data", three[0] / "test.csv", *options)
    assert end.value.code == 2 and part in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("file", "content", "options", "part"),
    [
        ("calibration.json", b"[", ["--data", "test.csv"], "calibration.json is damaged"),
        ("chat_template.jinja", b"\xff\xfe{% if", ["--data", "test.csv"], "cannot be loaded"),
        ("rows.csv", b"\xff\xfe", ["--part", "validation"], "rows.csv, which says what the run was trained on"),
        ("rows.csv", None, ["--part", "validation"], "rows.csv, which says what the run was trained on"),
        ("rows.csv", b"part,id\ntrain,x\n", ["--part", "validation"], "Give --data with the rows that it was"),
    ],
)
def test_a_damaged_run_is_told_before_rows_are_scored(
    three, tmp_path, monkeypatch, capsys, file, content, options, part
):
    contest, runs = three
    monkeypatch.chdir(contest)
    run = shutil.copytree(runs / "fold0", tmp_path / "run")
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_bytes(content)
    rows = count_batches(monkeypatch)
    with pytest.raises(SystemExit) as end:
        predict(run, tmp_path / "s.csv", *options)
    assert end.value.code == 2 and part in capsys.readouterr().err and not rows


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("columns", "choices"), 5),
        (("columns", "context"), 5),
        (("recipe", "empty_cells"), 5),
        (("recipe", "dtype"), "x"),
    ],
)
def test_a_run_whose_description_has_other_types_is_damaged(three, tmp_path, keys, value):
    described = json.loads((three[1] / "fold0" / run_folder.RUN).read_text())
    described[keys[0]][keys[1]] = value
    (tmp_path / run_folder.RUN).write_text(json.dumps(described))
    with pytest.raises(InputError, match="run.json is damaged"):
        run_folder.read_run(tmp_path)


def num_done(folder):
    """Rows in the shards of a prediction that may be writing them."""
    return sum(len(pq.read_table(path)) for path in (folder / "out.csv.parts").glob("pass*-block0/*.parquet"))


@pytest.mark.slow
def test_a_prediction_killed_at_any_moment_gives_the_same_bytes(three, tmp_path, pytestconfig):
    contest, run = three
    many = tmp_path / "many"
    many.mkdir()
    (many / "images").symlink_to(contest / "images")
    with (contest / "test.csv").open() as file:
        first = [*csv.DictReader(file)]
    rows = [row | {"id": f"{row['id']}_{n}"} for n in range(20) for row in first]
    for number, row in enumerate(rows):
        row["question"] += "?" * (number % 7)
    with (many / "test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*first[0]])
        writer.writeheader()
        writer.writerows(rows)
    code = "import runpy, sys; from vqa_sft.inference import passes; passes.EVERY_S = 0.2; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(RECIPES / "predict.py"), "--run", str(run), "--use_cpu"]
    command += ["--data", str(many / "test.csv"), "--batch_size", "8", "--num_workers", "0", "--orders", "rotations"]
    how = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--output", str(tmp_path / "whole.csv")], check=True, **how)
    rng, found = random.Random(0), []
    command += ["--output", str(tmp_path / "out.csv")]
    kills = pytestconfig.getoption("kills")
    for number in range(kills):
        child = subprocess.Popen(command, **how)
        while num_done(tmp_path) < len(rows) * number / (kills + 1) and child.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.1))
        # Once by a SIGTERM, which writes what is scored first.
        child.send_signal(signal.SIGTERM if number == 1 else signal.SIGKILL)
        assert child.wait() in (-signal.SIGKILL, 128 + signal.SIGTERM)
        found.append(num_done(tmp_path))
    print("rows done after each kill:", found)
    subprocess.run(command, check=True, **how)
    for suffix in (".csv", ".parquet", ".fold2.parquet"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_broken_shard_of_a_lost_machine_is_scored_again(tmp_path):
    folder = tmp_path / "pass0-block0"
    shard = passes.Shards(folder, every_s=0)
    shard.add([2, 0], [[[-1.0, -0.5]], [[-0.1, -2.0]]], [[1.0], [1.0]], [[[]], [[]]])
    shard.add([1], [[[-0.7, -0.7, -3.0]]], [[0.5]], [[[]]])
    assert passes.rows_done(folder) == {0, 1, 2}
    assert passes.read_shards(folder)["row"].to_pylist() == [0, 1, 2]
    next(folder.iterdir()).write_bytes(b"PAR1")
    assert passes.rows_done(folder) < {0, 1, 2}


# --- vqa_sft.Predictor ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor(three):
    return Predictor(three[1] / "fold0", use_cpu=True)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"orders": 0}, "orders must be identity"),
        ({"orders": True}, "orders must be identity"),
        ({"orders": "foo"}, "orders must be identity"),
        ({"orders": 121}, "orders must be identity"),
        ({"scales": ()}, "scales must be a list"),
        ({"scales": 1.0}, "scales must be a list"),
        ({"scales": "1,2"}, "scales must be a list"),
        ({"scales": (0,)}, "scales must be a list"),
        ({"scales": (1, 1.0)}, "scales must be different"),
        ({"average": "max"}, "average must be mean or log"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 2.5}, "batch_size must be"),
    ],
)
def test_a_predictor_refuses_the_options_that_predict_refuses(three, options, part):
    with pytest.raises(InputError, match=part):
        Predictor(three[1] / "fold0", use_cpu=True, **options)


def test_a_predictor_of_no_run_is_an_error_and_so_is_a_run_under_two_names(three, tmp_path):
    for runs, part in (
        ([], "no run"),
        ([tmp_path / "nowhere"], "no such run folder"),
        ([three[1] / "fold0", three[1] / "fold1" / ".." / "fold0"], "is given twice"),
    ):
        with pytest.raises(InputError, match=part):
            Predictor(*runs, use_cpu=True)


TWO = ["cat", "dog"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ((None, "What?", "cat"), "choices of question 1 must be a list of texts; got 'cat' .str."),
        ((None, "What?", {"cat", "dog"}), "choices of question 1 must be a list"),
        ((None, "What?", None), "choices of question 1 must be a list"),
        ((None, "What?", ["cat"]), "needs 2 to 4 choices"),
        ((None, "What?", [*"abcde"]), "needs 2 to 4 choices"),
        ((None, " ", TWO), "question 1 is empty"),
        ((None, "What?\0", TWO), "question 1 holds a null byte"),
        ((None, "What?", ["cat", "cat "]), "choices of question 1 are all the same"),
        ((None, "What?", ["cat", None]), "a choice of question 1 is no text: None"),
        ((None, "What?", ["cat", float("nan")]), "a choice of question 1 is no text: nan"),
        ((None, "What?", ["cat", "\ud800"]), "a choice of question 1 holds half a character"),
        ((None, None, TWO), "questions of several questions are a list; got None"),
        (([None, None], ["What?", None], [TWO, TWO]), "question 2 is no text: None"),
        ((None, ["What?"], [TWO]), "images of several questions are a list; got None"),
        (([None, None], ["What?"], [TWO]), "as many questions as images and choices"),
        (([None], ["What?"], ["ab"]), "choices of question 1 must be a list"),
        ((np.zeros((8, 8, 3), np.uint8), "What?", TWO), "of an array: Image.fromarray"),
        (([np.zeros((8, 8, 3), np.uint8)], "What?", TWO), "of an array: Image.fromarray"),
        ((io.BytesIO(b"x"), "What?", TWO), "an image of question 1 is a path"),
        ((Image.new("RGB", (0, 0)), "What?", TWO), "an image of question 1 cannot be read"),
        (("nowhere.png", "What?", TWO), "cannot be read"),
        ((b"", "What?", TWO), "cannot be read"),
    ],
)
def test_a_predictor_says_what_is_wrong_with_a_question(predictor, given, part):
    with pytest.raises(InputError, match=part):
        predictor(*given)


def test_a_predictor_takes_images_and_choices_of_any_usual_kind(predictor):
    image = Image.new("RGB", (32, 32), "red")
    expected = predictor(image, "What?", ["1", "2"])
    file = io.BytesIO()
    image.save(file, "PNG")
    for same in (file.getvalue(), image.convert("RGBA"), [image], (image,)):
        assert predictor(same, "What?", (1, 2)) == pytest.approx(expected, abs=1e-6)
    assert predictor([image], ["What?"], [np.array(["1", "2"])])[0] == pytest.approx(expected, abs=1e-6)
    for other in (Image.new("RGB", (1, 1)), Image.new("I;16", (40, 40)), image.convert("L"), None):
        assert predictor(other, "What?", TWO).sum() == pytest.approx(1)


def test_folds_that_a_later_training_put_aside_are_not_scored(three, tmp_path):
    _, run = three
    for name in ("fold0", "fold1", "fold0.old", "fold1_merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / run_folder.MARKER).touch()
    assert run_folder.runs_in([str(tmp_path)]) == [str(tmp_path / "fold0"), str(tmp_path / "fold1")]


def test_a_base_that_has_moved_since_is_named(three, tmp_path, capsys):
    contest, run = three
    expected = predict(run, tmp_path / "expected.csv", "--data", contest / "test.csv")
    shutil.copytree(run, moved := tmp_path / "moved")
    for fold in range(3):
        path = moved / f"fold{fold}" / run_folder.RUN
        described = json.loads(path.read_text())
        described["recipe"]["model_name_or_path"] = "gone/other"
        path.write_text(json.dumps(described))
    with pytest.raises(SystemExit):
        predict(moved, tmp_path / "out.csv", "--data", contest / "test.csv")
    error = capsys.readouterr().err
    assert "'gone/other' cannot be loaded" in error
    assert f"If the base of {moved / 'fold0'} is elsewhere now, give its place as model" in error
    found = predict(moved, tmp_path / "out.csv", "--data", contest / "test.csv", "--model", TINY_PATH)
    assert np.array_equal(logits_of(found), logits_of(expected))
    with (contest / "test.csv").open() as file:
        row = next(csv.DictReader(file))
    asked = (contest / row["path"], row["question"], [row[letter] for letter in "abcd"])
    np.testing.assert_allclose(
        Predictor(moved, model=TINY_PATH, use_cpu=True)(*asked), np.exp(logits_of(expected)[0]), atol=1e-5
    )
    with pytest.raises(SystemExit):
        predict([run / "fold0", moved / "fold1"], tmp_path / "two.csv", "--data", contest / "test.csv", "--model", "x")
    assert "model names one base, and the runs have several" in capsys.readouterr().err


def test_new_out_of_fold_predictions_end_an_earlier_temperature(three, tmp_path):
    _, run = three
    shutil.copytree(run, tmp_path / "run")
    folds = [tmp_path / "run" / f"fold{fold}" for fold in range(3)]
    write_out_of_fold(tmp_path / "run", folds)
    (tmp_path / "run" / "calibration.json").write_text('{"orders identity": {"temperature": 2.0}}')
    write_out_of_fold(tmp_path / "run", folds)  # the same as before
    assert read_calibration(folds[0], {}).temperature == 2
    shutil.copytree(folds[0], tmp_path / "run" / "soup")
    assert read_calibration(tmp_path / "run" / "soup", {}) is None  # lies beside the folds and is none of them
    changed = read_predictions(folds[0] / "validation.parquet")
    changed.choice_logits[0] = [-1.0, -2.0, -3.0, -0.5]
    write_predictions(folds[0] / "validation.parquet", changed)
    write_out_of_fold(tmp_path / "run", folds)
    assert read_calibration(folds[0], {}) is None


def test_an_id_twice_in_a_stream_is_told(three, tmp_path, capsys, monkeypatch):
    contest, run = three
    monkeypatch.setattr(data, "_HEAD", 10)  # rows that are read before the others
    with (contest / "test.csv").open() as file:
        rows = [*csv.DictReader(file)]
    (tmp_path / "images").symlink_to(contest / "images")
    write_csv(tmp_path / "test.csv", [row | {"id": f"row_{number % 20}"} for number, row in enumerate(rows)])
    with pytest.raises(SystemExit):
        predict(run / "fold0", tmp_path / "out.csv", "--data", tmp_path / "test.csv", "--streaming")
    assert "row_0 is in the data more than once" in capsys.readouterr().err


def test_rows_left_out_of_a_stream_do_not_change_the_numbers_of_the_others(tmp_path):
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue", "black")]
    rows = {"image": images, "question": [f"Which, {i}?" for i in range(4)], "choices": [["a", "b"]] * 4}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "part": datasets.Value("string")}
    features |= {"choices": datasets.List(datasets.Value("string"))}
    rows["part"] = ["x", "y", "x", "y"]
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    how = {"answers": "optional", "keep_rows": {"part": "y"}}
    streamed = [
        (row["id"], row["question"]) for row in stream_examples(str(tmp_path / "saved"), ReadOptions(**how)).examples
    ]
    examples = read_examples(str(tmp_path / "saved"), ReadOptions(**how)).examples
    assert streamed == [(row["id"], row["question"]) for row in examples] == [("1", "Which, 1?"), ("3", "Which, 3?")]


def test_answers_are_written_as_in_training_whatever_an_empty_template_says(three, tmp_path, capsys):
    contest, run = three
    ids = [f"row_{i:03d}" for i in range(24)]
    (tmp_path / "t.csv").write_text("id,answer\n" + "".join(f"{row_id},\n" for row_id in ids))
    test = ("--data", contest / "test.csv", "--template", tmp_path / "t.csv")
    found = predict(run / "fold0", tmp_path / "out.csv", *test)
    assert "written as in the run's data (letter, lower case)" in capsys.readouterr().out
    written = {"id": "id", "column": "answer", "format": "letter", "is_upper": False}
    assert found.metadata["answers"].items() >= written.items()
    expected = [f"{row_id},{'abcd'[best]}" for row_id, best in zip(ids, found.best, strict=True)]
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == expected
    predict(run / "fold1", tmp_path / "other.csv", *test)
    write_ensemble([str(tmp_path / "out.parquet"), str(tmp_path / "other.parquet")], tmp_path / "both.parquet")
    for template in (None, tmp_path / "t.csv"):
        submit(tmp_path / "both.parquet", tmp_path / "s.csv", template=template)
        cells = [line.split(",")[1] for line in (tmp_path / "s.csv").read_text().splitlines()[1:]]
        assert cells == ["abcd"[best] for best in read_predictions(tmp_path / "both.parquet").best]


def test_every_prediction_file_knows_its_rows_by_digests(three, tmp_path):
    contest, run = three
    expected = digests_of(read_examples(str(contest / "test.csv"), ReadOptions(answers="optional")).examples)
    for more in ((), ("--streaming",)):
        assert predict(run, tmp_path / "out.csv", "--data", contest / "test.csv", *more).digests == expected
        assert read_predictions(tmp_path / "out.fold1.parquet").digests == expected
    trained = digests_of(read_examples(str(contest / "train.csv")).examples)
    assert read_predictions(run / "out_of_fold.parquet").digests == trained
    assert read_predictions(run / "fold1" / "validation.parquet").digests == trained[1::3]
    assert read_predictions(run / "fold1" / "validation.parquet").metadata["answers"]["is_upper"] is False


def test_columns_of_probabilities_go_by_the_texts_of_the_data(three, tmp_path, capsys):
    contest, run = three
    with (contest / "test.csv").open() as file:
        rows = [*csv.DictReader(file)]
    colours = ["red", "green", "blue", "black"]
    rows = [row | dict(zip("abcd", colours[i % 4 :] + colours[: i % 4], strict=True)) for i, row in enumerate(rows)]
    write_csv(tmp_path / "test.csv", rows)
    template = "id,blue,red,black,green\n" + "".join(f"{row['id']},0,0,0,0\n" for row in rows)
    (tmp_path / "t.csv").write_text(template)
    test = ("--data", tmp_path / "test.csv", "--image_root", contest, "--template", tmp_path / "t.csv")
    found = predict(run / "fold0", tmp_path / "out.csv", *test)
    assert "blue is that of 'blue'" in capsys.readouterr().out
    with (tmp_path / "out.csv").open() as file:
        for line, row, probs in zip(csv.DictReader(file), rows, found.probs, strict=True):
            assert [float(line[row[letter]]) for letter in "abcd"] == pytest.approx(probs, abs=2e-6)
    (tmp_path / "t.csv").write_text(template.replace("blue,red,black,green", "one,two,three,four"))
    with pytest.raises(SystemExit):
        predict(run / "fold0", tmp_path / "out2.csv", *test)
    assert "one, two, three, four are named after neither" in capsys.readouterr().err
