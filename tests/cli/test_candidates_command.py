"""`vqa-sft candidates`: from images to files of candidates, and what is refused before an encoder sees an image."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from contest import noise, write_csv
from encoders import save_encoder
from PIL import Image

from vqa_sft.data.class_probs import read_class_probs, write_class_probs
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.models import candidates as models
from vqa_sft.models.probe import LinearProbe
from vqa_sft.predictions.recall import measure_recall
from vqa_sft.tiny import TINY_PATH
from vqa_sft.tiny.digits import split_digits, to_picture

pytestmark = pytest.mark.medium
QUESTION = "Which digit is this?"
WORDS = ("--fixed_question", QUESTION, "--use_cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Image folders of handwritten digits: train with 12 rows a class, test with 4."""
    folder = tmp_path_factory.mktemp("digits")
    drawn, train, test = split_digits(0)
    for part, rows, wanted in (("train", train, 12), ("test", test, 4)):
        for digit in range(10):
            (folder / part / f"digit {digit}").mkdir(parents=True)
            for row in [row for row in rows if drawn.target[row] == digit][:wanted]:
                to_picture(drawn.images[row]).save(folder / part / f"digit {digit}" / f"{row}.png")
    return folder


@pytest.fixture
def recipe(tmp_path, digits):
    """A recipe of a classification as a file; more of its fields as keywords."""

    def write(**values):
        fields = {"model_name_or_path": TINY_PATH, "output_dir": tmp_path / "run", "train_data": digits / "train"}
        fields |= {"task": "classification", "fixed_question": QUESTION, "use_cpu": True} | values
        lines = [f"{key}: {json.dumps(value, default=str)}" for key, value in fields.items() if value is not None]
        (tmp_path / "recipe.yaml").write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


@pytest.fixture
def sees_nothing(monkeypatch):
    """An encoder must not be asked."""
    monkeypatch.setattr(models, "row_features", lambda *given: pytest.fail("an encoder saw images"))


def rows_of(folder):
    options = ReadOptions(task="classification", fixed_question=QUESTION)
    return read_examples(str(folder), options)


def test_digits_get_candidates_of_the_tiny_bases_own_tower(digits, recipe, tmp_path, run):
    code, out, err = run("candidates", "--config", recipe(), "--test", digits / "test", "--output", tmp_path / "out")
    assert code == 0, err
    for name, part, num_rows in (("train", "train", 120), ("test", "test", 40)):
        probs, rows = read_class_probs(tmp_path / f"out/{name}.parquet"), rows_of(digits / part)
        assert probs.names == rows.classes.names and len(probs) == num_rows
        assert probs.ids == rows.examples["id"][:] and probs.labels.tolist() == rows.examples["class_index"][:]
        assert probs.digests == digests_of(rows.examples)
        recall = measure_recall(probs)
        assert recall.at(1) > 0.8 and recall.log_loss < 0.7  # by chance 0.1 and 2.3
        assert f"{recall.at(1):.1%} (" in out and f"{recall.log_loss:.4f}" in out
        known = probs.metadata
        assert known["out_of_fold"] is (name == "train") and known["recall"]["1"] == recall.at(1)
        assert (known["encoder"], known["classifier"], known["folds"]) == ("own", "linear", 5)
        assert f"num_candidates: {known['num_candidates']} (the smallest number whose recall" in out
    best = measure_recall(read_class_probs(tmp_path / "out/train.parquet")).at(known["num_candidates"])
    assert f"right in at most {best:.1%} of the rows" in out and f"candidates: {tmp_path}/out/train.parquet" in out


def test_a_recipes_validation_rows_and_unlabelled_test_sets_get_files_of_their_own(digits, recipe, tmp_path, run):
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(digits.glob("test/*/*.png"))[:5]):
        (tmp_path / f"flat/{i}.png").write_bytes(path.read_bytes())
    given = ["--config", recipe(validation_data=digits / "test"), "--test", tmp_path / "flat", digits / "test"]
    code, out, err = run("candidates", *given, "--output", tmp_path / "out", "--classifier", "knn")
    assert code == 0, err
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["test.parquet", "test_2.parquet", "train.parquet", "validation.parquet"]
    flat, labelled = (read_class_probs(tmp_path / "out" / name) for name in ("test.parquet", "test_2.parquet"))
    assert flat.labels.tolist() == [-1] * 5 and "no known classes" in out
    assert f"  validation_candidates: {tmp_path}/out/validation.parquet" in out
    assert flat.names == labelled.names and "recall" not in flat.metadata
    place = [path.relative_to(digits / "test").as_posix() for path in sorted(digits.glob("test/*/*.png"))[:5]]
    same = labelled.take([labelled.ids.index(name) for name in place])
    np.testing.assert_allclose(flat.dense(), same.dense(), atol=1e-4)


@pytest.mark.parametrize("classifier", ["linear", "knn", "zero_shot"])
def test_any_encoder_serves_and_the_names_of_classes_where_it_reads_text(digits, tmp_path, run, classifier):
    encoder = save_encoder("CLIP", tmp_path / "clip")
    given = [digits / "train", *WORDS, "--encoder", encoder, "--classifier", classifier, "--output", tmp_path / "out"]
    code, out, err = run("candidates", *given)
    assert code == 0 and "train, out of fold" in out, err
    assert read_class_probs(tmp_path / "out/train.parquet").metadata["source"].endswith(f"features of {encoder}")


def test_the_same_command_gives_the_same_file_and_another_seed_other_folds(digits, tmp_path, run, monkeypatch):
    dealt, files = [], []
    monkeypatch.setattr(LinearProbe, "settings", (1.0,))
    classify = models.classify
    monkeypatch.setattr(models, "classify", lambda *given: dealt.append(given[4]) or classify(*given))
    for seed in (1, 1, 2):
        given = [digits / "train", *WORDS, "--model", TINY_PATH, "--seed", seed, "--output", tmp_path / f"{seed}"]
        assert run("candidates", *given)[0] == 0
        files.append((tmp_path / f"{seed}/train.parquet").read_bytes())  # the second by features that were kept
    assert files[0] == files[1] != files[2]
    assert dealt[0] == dealt[1] != dealt[2] and {*dealt[0]} == {0, 1, 2, 3, 4}


def test_near_duplicates_are_in_one_fold_and_classes_of_one_fold_are_named(tmp_path, run, monkeypatch):
    for i in range(24):
        (tmp_path / f"data/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        noise(tmp_path / f"data/{'ab'[i % 2]}/{i}.png", i)
    (tmp_path / "data/c").mkdir()
    (tmp_path / "data/empty").mkdir()
    noise(tmp_path / "data/c/0.png", 99)
    Image.open(tmp_path / "data/c/0.png").resize((100, 75)).save(tmp_path / "data/c/1.jpg", quality=80)
    dealt = []
    classify = models.classify
    monkeypatch.setattr(models, "classify", lambda *given: dealt.append(given) or classify(*given))
    given = [tmp_path / "data", *WORDS, "--encoder", save_encoder("ConvNext", tmp_path / "conv")]
    code, _, err = run("candidates", *given, "--output", tmp_path / "out", "--folds", 3)
    ((parts, _, _, _, folds, *_),) = dealt
    fold_of = dict(zip(parts[0][0]["id"], folds, strict=True))
    assert code == 0 and fold_of["c/0.png"] == fold_of["c/1.jpg"]
    assert (
        "classes whose rows are all in one fold (1): 'c'" in err and "class folders without images (1): 'empty'" in err
    )


def test_a_class_with_one_image_and_an_empty_folder_stay_classes(digits, recipe, tmp_path, run, monkeypatch):
    monkeypatch.setattr(LinearProbe, "settings", (1.0,))
    for path in [*digits.glob("train/*/*.png")]:
        if path.parent.name != "digit 9" or path == min(digits.glob("train/digit 9/*.png")):
            (tmp_path / "data" / path.parent.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data/empty").mkdir()
    given = ["--config", recipe(train_data=tmp_path / "data", num_candidates=7), "--output", tmp_path / "out"]
    code, out, err = run("candidates", *given)
    assert code == 0 and "classes without rows (1): 'empty'" in err and "the only row of its class" in err, err
    assert "classes whose rows are all in one fold (1): 'digit 9'" in err
    assert "num_candidates: 7, as the recipe says now, counts" in out
    assert read_class_probs(tmp_path / "out/train.parquet").names == (*(f"digit {i}" for i in range(10)), "empty")


def test_rows_that_cannot_be_used_are_named_before_an_encoder_is_loaded(digits, recipe, tmp_path, run, monkeypatch):
    monkeypatch.setattr("vqa_sft.cli.candidates.open_encoder", lambda *given: pytest.fail("an encoder was loaded"))
    (tmp_path / "names.txt").write_text("\n".join(f"digit {i}" for i in range(9)))
    given = ["--config", recipe(classes=tmp_path / "names.txt"), "--use_cpu", "true", "--output", tmp_path / "out"]
    code, _, err = run("candidates", *given)
    assert code == 2 and "the label is no class of the list: rows digit 9/" in err


def test_rows_that_a_recipe_skips_have_no_candidates(digits, recipe, tmp_path, run, monkeypatch):
    monkeypatch.setattr(LinearProbe, "settings", (1.0,))
    (tmp_path / "data").mkdir()
    for path in digits.glob("train/*"):
        (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "data/digit 3").unlink()
    (tmp_path / "data/digit 3").mkdir()
    noise(tmp_path / "data/digit 3/good.png", 0)
    (tmp_path / "data/digit 3/bad.png").write_text("<html>")
    given = ["candidates", "--output", tmp_path / "out"]
    code, _, err = run(*given, "--config", recipe(train_data=tmp_path / "data"))
    assert code == 2 and "the file is no image that can be read" in err
    code, _, err = run(*given, "--config", recipe(train_data=tmp_path / "data", on_bad_row="skip"))
    assert code == 0 and "1 rows that cannot be used are left out" in err
    ids = read_class_probs(tmp_path / "out/train.parquet").ids
    assert "digit 3/good.png" in ids and "digit 3/bad.png" not in ids
    assert "the only row of its class: row digit 3/good.png" in err


# --- Another classifier's probabilities -------------------------------------------------------------------------------


@pytest.fixture
def external(digits, tmp_path):
    """Another classifier's table of the training rows, in another order of rows and classes."""
    rows = rows_of(digits / "train")
    rng = np.random.default_rng(0)
    labels = np.array(rows.examples["class_index"])
    probs = rng.dirichlet(np.full(10, 0.2), len(labels)) * 0.7
    probs[np.arange(len(labels)), labels] += 0.3
    order, columns = rng.permutation(len(labels)), rng.permutation(10)
    ids = np.array(rows.examples["id"])
    path = tmp_path / "theirs.npz"
    np.savez(path, ids=ids[order], classes=np.array(rows.classes.names)[columns], probs=probs[order][:, columns])
    return path, probs, labels


def test_another_classifiers_probabilities_get_what_rows_are_known_by(
    digits, external, recipe, tmp_path, run, sees_nothing
):
    path, probs, labels = external
    given = ["candidates", "--config", recipe(), "--probs", path, "--output", tmp_path / "out"]
    code, _, err = run(*given)
    assert code == 2 and "does not say whether its training rows are out of fold" in err
    code, out, err = run(*given, "--out_of_fold")
    assert code == 0, err
    found, rows = read_class_probs(tmp_path / "out/train.parquet"), rows_of(digits / "train")
    np.testing.assert_allclose(found.dense(), probs, atol=1e-6)
    assert found.ids == rows.examples["id"][:] and found.labels.tolist() == labels.tolist()
    assert found.digests == digests_of(rows.examples) and found.metadata["out_of_fold"] is True
    assert found.metadata["source"] == "theirs.npz" and f"{(probs.argmax(axis=1) == labels).mean():.1%} (" in out
    again = ["candidates", "--config", recipe(), "--probs", tmp_path / "out/train.parquet"]
    assert run(*again, "--output", tmp_path / "again")[0] == 0  # it says itself that it is out of fold


def test_files_of_an_earlier_call_that_this_one_does_not_write_are_removed_and_named(
    digits, external, recipe, tmp_path, run, sees_nothing
):
    path, _, _ = external
    out = tmp_path / "out"
    given = ["candidates", "--config", recipe(), "--out_of_fold", "--output", out, "--probs"]
    assert run(*given, path)[0] == 0
    removed, kept = ["test.parquet", "test_2.parquet", "validation.parquet"], ["mine.parquet", "test_old.parquet"]
    for name in (*removed, *kept):
        (out / name).write_bytes((out / "train.parquet").read_bytes())
    (out / "test_3.parquet").write_text("mine")  # no file of ours
    code, _, err = run(*given, out / "test.parquet")
    assert code == 2 and "one of the files that are read" in err  # and nothing is removed
    code, _, err = run(*given[:-1], "--probs", path, "--task", "multiple_choice")
    assert code == 2 and all((out / name).is_file() for name in removed)
    code, printed, err = run(*given, path)
    assert code == 0, err
    assert sorted(file.name for file in out.iterdir()) == sorted(["train.parquet", "test_3.parquet", *kept])
    assert f"Removed {', '.join(str(out / name) for name in removed)} of an earlier call" in printed
    assert "Removed" not in run(*given, path)[1]


def test_probabilities_of_other_rows_are_refused(digits, external, recipe, tmp_path, run, sees_nothing):
    path, _, _ = external
    given = ["candidates", "--config", recipe(), "--out_of_fold", "--output", tmp_path / "out", "--probs"]
    assert run(*given, path)[0] == 0
    ours = read_class_probs(tmp_path / "out/train.parquet")
    other = tmp_path / "other.parquet"
    for change, said in (
        (lambda probs: probs.take(range(100)), "lacks rows"),
        (lambda probs: setattr(probs, "labels", (probs.labels + 1) % 10), "of other data: another class in rows"),
        (lambda probs: setattr(probs, "digests", [None, *probs.digests[:0:-1]]), "of other data: another question"),
        (lambda probs: probs.digests.reverse(), "of other data: another question or images in rows"),
    ):
        changed = ours.take(range(len(ours)))
        write_class_probs(other, change(changed) or changed)
        code, _, err = run(*given, other)
        assert code == 2 and said in err, err
    write_class_probs(other, replace(ours, digests=[None, *ours.digests[1:]]))
    assert run(*given, other)[0] == 0  # unknown is not another
    code, _, err = run(*given, path, "--test", digits / "test")
    assert code == 2 and "--probs takes one file for each of train, test, in this order; got 1" in err


# --- Refused before an encoder sees an image --------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_an_encoder_sees_an_image(digits, recipe, tmp_path, run, sees_nothing):
    (tmp_path / "others.txt").write_text("\n".join(f"digit {i}" for i in range(9)), encoding="utf-8")
    for i in range(3):
        (tmp_path / "one/cat").mkdir(parents=True, exist_ok=True)
        noise(tmp_path / f"one/cat/{i}.png", i)
    (tmp_path / "strange/digit 77").mkdir(parents=True)
    noise(tmp_path / "strange/digit 77/0.png", 0)
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.parquet").write_text("mine")
    train, out = digits / "train", ("--output", tmp_path / "out")
    own = ("--model", TINY_PATH)
    recipe()
    config = ("--config", tmp_path / "recipe.yaml")
    for given, said in (
        ((*out,), "give --config RECIPE or DATA, one of them"),
        ((train, *config, *out), "give --config RECIPE or DATA, one of them"),
        (("--config", train, *out), "--config is a recipe"),
        ((*config, "--task", "multiple_choice", *out), "Set task: classification"),
        ((train, *WORDS, *out), "--encoder own is the vision tower of a recipe's model"),
        ((train, *WORDS, *own, *out, "--folds", 2), "--folds must be 3 to 100"),
        ((train, *WORDS, *own, *out, "--folds", 100, "--limit", 50), "100 folds need at least 100 different images"),
        ((train, *WORDS, *own, *out, "--seed", -1), "seed must be between"),
        ((train, *WORDS, *own, "--output", tmp_path / "file"), "is a file. Name a folder"),
        ((train, *WORDS, *own, "--output", tmp_path / "mine"), "exists and is no file of class probabilities"),
        ((train, *WORDS, *own, *out, "--classifier", "zero_shot"), "has no encoder of text"),
        ((train, *WORDS, *out, "--encoder", tmp_path / "nowhere"), "cannot be loaded"),
        ((train, *WORDS, *own, *out, "--classes", tmp_path / "others.txt"), "the label is no class of the list"),
        ((tmp_path / "one", *WORDS, *own, *out), "needs two classes or more; got the class 'cat' alone"),
        ((*config, *out, "--test", tmp_path / "strange"), "the label is no class of the list"),
        ((*config, *out, "--test", tmp_path / "nowhere"), "nowhere"),
    ):
        code, printed, err = run("candidates", *given)
        assert code == 2 and said in err and not printed, (given, err)
        assert "Traceback" not in err


def test_a_table_without_images_is_refused(tmp_path, run):
    rows = [{"id": f"r{i}", "image": "", "label": "ab"[i % 2]} for i in range(12)]
    noise(tmp_path / "0.png", 0)
    rows[0]["image"] = "0.png"
    write_csv(tmp_path / "train.csv", rows)
    given = [tmp_path / "train.csv", *WORDS, "--model", TINY_PATH, "--output", tmp_path / "out"]
    code, _, err = run("candidates", *given)
    assert code == 2 and ("needs an image in every row" in err or "need at least" in err)


def test_test_classes_without_training_rows_are_said(digits, recipe, tmp_path, run, monkeypatch):
    monkeypatch.setattr(LinearProbe, "settings", (1.0,))
    names = [f"digit {i}" for i in range(10)]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "path", "label"])
        for path in sorted(digits.glob("train/*/*.png")):
            if path.parent.name != "digit 7":
                writer.writerow([path.stem, path.relative_to(digits / "train"), path.parent.name])
    (tmp_path / "names.txt").write_text("\n".join(names))
    given = {"train_data": tmp_path / "train.csv", "image_root": digits / "train", "classes": tmp_path / "names.txt"}
    code, _, err = run(
        "candidates", "--config", recipe(**given), "--test", digits / "test", "--output", tmp_path / "out"
    )
    assert code == 0 and "no training row has its class: rows digit 7/" in err and "classes without rows (1)" in err
    probs = read_class_probs(tmp_path / "out/test.parquet")
    assert (probs.dense()[:, 7] < 0.05).all()
