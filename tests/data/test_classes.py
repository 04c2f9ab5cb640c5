import itertools
import json
import random
import unicodedata
from collections import Counter

import datasets
import pytest
from contest import noise, write_csv
from PIL import Image
from reports import found

from vqa_sft.data.check import TEST, TRAINING, check
from vqa_sft.data.classes import Classes, find_near_names, read_classes
from vqa_sft.data.examples import load_examples, read_examples
from vqa_sft.data.image_folder import open_image_folder
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError

ASKED = {"task": "classification", "fixed_question": "Which car is this?"}
OPTIONS = ReadOptions(**ASKED)
WORDS = ("--task", "classification", "--fixed_question", "Which car is this?")
NAMES = ("Audi A4", "쏘나타 2020", "Škoda Citigo")


def write_folder(folder, counts, seed=0):
    """An image folder with so many images of each class, no two of them alike."""
    seeds = itertools.count(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise(folder / name / f"{i}.png", next(seeds))
    return folder


def write_table(folder, labels, name="train.csv", **more):
    """A CSV with an image and a label a row."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for i in range(len(labels)):
        noise(folder / f"img/{i}.png", i)
    columns = {"label": labels} | more
    write_csv(
        folder / name,
        [
            {"id": f"r{i}", "img_path": f"img/{i}.png"} | {key: column[i] for key, column in columns.items()}
            for i in range(len(labels))
        ],
    )
    return folder / name


def named(loaded):
    """The name of every row's class."""
    return [None if place is None else loaded.classes.names[place] for place in loaded.examples["class_index"]]


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_every_image_of_an_image_folder_becomes_a_row_of_its_folders_class(tmp_path):
    folder = write_folder(tmp_path / "cars", {"Audi A4": 2, "쏘나타 2020": 3})
    (folder / "Audi A4/side").mkdir()
    noise(folder / "Audi A4/side/9.JPG", 9)
    (folder / "Audi A4/.DS_Store").write_text("x")
    (folder / "Audi A4/notes.txt").write_text("x")
    expected = {}
    for path in folder.rglob("*"):  # by hand
        if path.suffix in (".png", ".JPG"):
            expected[path.relative_to(folder).as_posix()] = path.relative_to(folder).parts[0]
    loaded = read_examples(str(folder), OPTIONS)
    assert dict(zip(loaded.examples["id"], named(loaded), strict=True)) == expected and len(expected) == 6
    for row in loaded.examples:
        assert row["images"] == [{"bytes": None, "path": str(folder / row["id"])}]
        assert row["question"] == "Which car is this?" and row["choices"] == [] and row["answer"] is None
    assert any("left out, as they are no images by their suffix (1): 'Audi A4/notes.txt'" in n for n in loaded.notes)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "class labels"])
def test_a_table_with_images_and_labels_and_the_folder_of_its_images_say_the_same(tmp_path, kind):
    labels = [NAMES[i] for i in (1, 0, 2, 2, 1, 0)]
    path = write_table(tmp_path, labels)
    rows = [{"id": f"r{i}", "path": f"img/{i}.png", "label": label} for i, label in enumerate(labels)]
    if kind == "jsonl":
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif kind == "parquet":
        path = tmp_path / "train.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "class labels":
        path = tmp_path / "saved"
        table = datasets.Dataset.from_list(
            [{"image": str(tmp_path / row["path"]), "label": NAMES.index(row["label"])} for row in rows],
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}),
        )
        table.save_to_disk(path)
    loaded = read_examples(str(path), OPTIONS)
    assert named(loaded) == labels and loaded.classes.names == tuple(sorted(NAMES)) and not loaded.problems.errors()


def test_a_label_is_matched_by_name_whatever_its_form_and_spaces_and_in_whatever_order_the_list_is(tmp_path):
    labels = [unicodedata.normalize("NFD", "쏘나타 2020"), " Audi A4 ", unicodedata.normalize("NFD", "Škoda Citigo")]
    path = write_table(tmp_path, labels)
    for order in itertools.permutations(NAMES):
        (tmp_path / "classes.txt").write_text("\n".join(order) + "\n\n", encoding="utf-8")
        loaded = read_examples(str(path), ReadOptions(**ASKED, classes=str(tmp_path / "classes.txt")))
        assert loaded.classes.names == order and named(loaded) == ["쏘나타 2020", "Audi A4", "Škoda Citigo"]


def test_usual_rows_stay_as_they_are(contest):
    examples, _ = load_examples(str(contest / "train.csv"))
    assert "class_index" not in examples.column_names and len(examples[0]["choices"]) == 4


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train": {"a": 1}, "test": {"a": 1}}, "holds the folders 'test', 'train', which are no classes. Name one"),
        ({"Audi": {}, "BMW": {}}, "holds no images"),
    ],
)
def test_a_folder_that_is_no_image_folder_is_refused(tmp_path, layout, message):
    for part, classes in layout.items():
        (tmp_path / "data" / part).mkdir(parents=True)
        write_folder(tmp_path / "data" / part, classes)
    with pytest.raises(InputError, match=message):
        open_image_folder(tmp_path / "data")


# --- Lists of classes -------------------------------------------------------------------------------------------------


def test_a_list_has_names_descriptions_and_other_names(tmp_path):
    rows = [
        {"other names": "소나타; Sonata", "name": " 쏘나타 2020 ", "description": "a saloon", "maker": "Hyundai"},
        {"other names": '["A4", "A4; B9"]', "name": "Audi A4", "description": "", "maker": "Audi"},
    ]
    write_csv(tmp_path / "classes.csv", rows)
    classes = read_classes(str(tmp_path / "classes.csv"))
    assert classes.names == ("쏘나타 2020", "Audi A4") and classes.descriptions == ("a saloon", "")
    assert classes.other_names == (("소나타", "Sonata"), ("A4", "A4; B9")) and "not read: maker" in classes.source
    assert [classes.find(label) for label in ("Sonata", "A4; B9", "Audi A4 ", "audi a4")] == [0, 1, 1, None]
    assert classes.likely("audi-a4") == "Audi A4" and classes.likely("Sonatta") == "Sonata"
    assert classes.likely("bicycle") is None


def test_the_columns_of_a_sample_submission_are_classes(tmp_path):
    write_csv(
        tmp_path / "sample.csv", [{"ID": f"t{i}", "718 박스터": 0, "A4": 0.5, "K5, 2020": "1e-3"} for i in range(3)]
    )
    assert read_classes(str(tmp_path / "sample.csv")).names == ("718 박스터", "A4", "K5, 2020")


def test_numbers_beside_names_are_no_submission(tmp_path):
    write_csv(tmp_path / "classes.csv", [{"class_name": name, "year": 2020, "rows": 3} for name in NAMES])
    assert read_classes(str(tmp_path / "classes.csv")).names == NAMES


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "cat\ndog\ncat \n", "'cat' stands for two classes"),
        ("list.csv", "name,aliases\ncat,puss\ndog,puss\n", "'puss' stands for two classes"),
        ("list.csv", "name,aliases\ncat,dog\ndog,\n", "'dog' stands for two classes"),
        ("list.csv", "name,maker\ncat,x\n,y\n", "the name of class 2 is empty"),
        ("list.txt", "cat\n", "needs two classes or more; got the class 'cat' alone"),
        ("list.txt", "\n", "got no class"),
        ("list.csv", "Audi\nBMW\nKia\n", r"has no column for names .* It has: Audi"),
        ("list.csv", "id,label\n1,cat\n", "needs two classes or more"),
        ("list.csv", "id,name,class\n1,0,0\n", "may be a list of classes .* or a sample submission"),
        ("list.json", "[]", "is no list of classes"),
        (None, "", "is no file. Give a .txt"),
    ],
)
def test_a_bad_list_is_refused_in_one_line(tmp_path, name, text, message):
    if name:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_classes(str(tmp_path / (name or "nowhere.csv")))
    assert "\n" not in str(error.value)


# --- Names that nearly say the same -----------------------------------------------------------------------------------


def slow_words(name):
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    words, word = [], ""
    for char in text + " ":
        if unicodedata.category(char)[0] in "LMN":
            word += char
        elif word:
            words.append(word)
            word = ""
    return words


def slowly_near(one, other):
    """Whether two names are nearly equal, pair by pair."""
    a, b = slow_words(one), slow_words(other)
    if "".join(a) == "".join(b) or sorted(a) == sorted(b):
        return True
    different = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    if len(a) != len(b) or len(different) != 1 or any(char.isdigit() for word in different[0] for char in word):
        return False
    x, y = (unicodedata.normalize("NFD", word) for word in different[0])
    if min(len(x), len(y)) < 5:
        return False
    less = [{word, *(word[:i] + word[i + 1 :] for i in range(len(word)))} for word in (x, y)]
    return bool(less[0] & less[1])


def test_near_names_are_those_that_a_slow_comparison_of_all_pairs_finds():
    rng = random.Random(0)
    names = {
        "K5 2020 3세대",
        "K5 3세대 2020",
        "디 올뉴니로",
        "디 올 뉴 니로",
        "쏘나타",
        "소나타",
        "320i",
        "330i",
        "कमल",
        "कमाल",
    }
    names |= {"Model S", "Model X", "Citroën C4", "Citroen C4", "ＡＵＤＩ A4", "audi-a4", "C++", "C"}
    for _ in range(300):
        name = " ".join(
            rng.choices(["sonata", "sonatta", "avante", "Avante", "avanti", "3", "B7", "GT-R"], k=rng.randint(1, 3))
        )
        names.add(name)
    found_pairs = {
        frozenset(pair) for _, group in find_near_names(sorted(names)) for pair in itertools.combinations(group, 2)
    }
    assert found_pairs == {frozenset(pair) for pair in itertools.combinations(sorted(names), 2) if slowly_near(*pair)}
    assert frozenset({"320i", "330i"}) not in found_pairs and frozenset({"Model S", "Model X"}) not in found_pairs
    assert frozenset({"कमल", "कमाल"}) not in found_pairs and frozenset({"쏘나타", "소나타"}) in found_pairs


# --- What check says --------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path):
    """An image folder with one of each fault: two images in two classes, one image, none, near names."""
    folder = write_folder(tmp_path / "cars", {"Audi A4": 4, "audi_a4": 3, "Kia": 3, "BMW": 1, "Opel": 0})
    (folder / "Kia/copy.png").write_bytes((folder / "Audi A4/0.png").read_bytes())
    Image.open(folder / "audi_a4/1.png").resize((90, 68)).save(folder / "Kia/resized.jpg")
    return folder


def test_check_counts_classes_and_names_what_is_wrong_with_them(faulty):
    loaded = read_examples(str(faulty), OPTIONS)
    (report,) = check([(TRAINING, loaded)], distance=16)
    counted = Counter(path.parent.name for path in faulty.rglob("*.*"))
    assert dict(zip(loaded.classes.names, report.class_rows, strict=True)) == counted | {"Opel": 0}
    assert found(report) == {
        "classes_differ": [
            "Audi A4/0.png ('Audi A4', and 'Kia' in Kia/copy.png)",
            "Kia/copy.png ('Kia', and 'Audi A4' in Audi A4/0.png)",
        ],
        "near_classes_differ": [
            "Kia/resized.jpg ('Kia', and 'audi_a4' in audi_a4/1.png)",
            "audi_a4/1.png ('audi_a4', and 'Kia' in Kia/resized.jpg)",
        ],
        "only_of_class": ["BMW/0.png ('BMW')"],
    }
    notes = "\n".join(loaded.notes)
    for said in (
        "class folders without images (1): 'Opel'",
        "5 classes, those of",
        "classes without rows (1): 'Opel'",
        "classes with one row (1): 'BMW'",
        "differ in case, spaces and marks only: 'Audi A4', 'audi_a4'",
    ):
        assert said in notes
    (report,) = check([(TRAINING, read_examples(str(faulty), OPTIONS))], distance=None)  # equal files alone
    assert found(report).keys() == {"classes_differ", "only_of_class"}


def test_images_under_two_classes_are_those_that_a_comparison_of_all_pairs_finds(tmp_path):
    rng = random.Random(1)
    labels = [rng.choice(NAMES) for _ in range(30)]
    path = write_table(tmp_path, labels)
    image_of = [rng.randrange(12) for _ in labels]
    for i, seed in enumerate(image_of):
        noise(tmp_path / f"img/{i}.png", seed)
    (report,) = check([(TRAINING, read_examples(str(path), OPTIONS))], distance=16)
    rows = range(len(labels))
    slow = {i for i in rows for j in rows if image_of[i] == image_of[j] and labels[i] != labels[j]}
    wrong = {row for problem in report.problems if problem.kind == "classes_differ" for row, _, _ in problem.rows}
    assert wrong == slow and "near_classes_differ" not in found(report)


def test_a_label_that_no_list_has_is_an_error_with_the_name_that_may_be_meant(tmp_path):
    path = write_table(tmp_path, ["Audi A4", "audi a4", "bicycle", "", "Kia"])
    classes = Classes(("Kia", "Audi A4"), "a list")
    loaded = read_examples(str(path), ReadOptions(**ASKED, classes=classes))
    assert named(loaded) == ["Audi A4", None, None, None, "Kia"]
    assert [label for label, _ in loaded.problems.found("unknown_class")] == [
        "r1 ('audi a4'; is 'Audi A4' meant?)",
        "r2 ('bicycle')",
    ]
    assert loaded.problems.found("no_answer") == [("r3", 3)]
    with pytest.raises(InputError, match="the label is no class of the list: rows r1 .* The list is that of a list"):
        loaded.problems.raise_if_any(loaded.name)


def test_a_word_for_an_unknown_class_is_one_only_where_the_list_says_so(tmp_path):
    path = write_table(tmp_path, ["Kia", "none", "BMW", "nan"])
    loaded = read_examples(str(path), OPTIONS)
    assert loaded.classes.names == ("BMW", "Kia") and named(loaded) == ["Kia", None, "BMW", None]
    with pytest.raises(InputError, match=r"r1 \('none'\), r3 \('nan'\) .* name it in `classes`"):
        loaded.problems.raise_if_any(loaded.name)
    (tmp_path / "classes.txt").write_text("BMW\nKia\nnone\nnan\n")
    options = ReadOptions(**ASKED, classes=str(tmp_path / "classes.txt"))
    assert named(read_examples(str(path), options)) == ["Kia", "none", "BMW", "nan"]


def test_a_test_set_may_have_no_labels_and_its_classes_are_those_of_training(tmp_path):
    training = read_examples(str(write_table(tmp_path / "a", ["Audi A4", "Audi A4", "Kia", "Kia"])), OPTIONS)
    classes = Classes((*training.classes.names, "Opel"), "a list")
    options = ReadOptions(**ASKED, answers="optional", classes=classes)
    rows = read_examples(str(write_table(tmp_path / "b", ["Opel", "hidden", "", "Fiat"])), options)
    assert named(rows) == ["Opel", None, None, None]
    test = check([(TRAINING, training), (TEST, rows)], distance=None)[1]
    assert found(test)["class_not_trained"] == ["r0 ('Opel')"] and found(test)["unknown_class"] == ["r3 ('Fiat')"]
    noise(tmp_path / "c.png", 0)
    (tmp_path / "images").mkdir()
    (tmp_path / "c.png").rename(tmp_path / "images/c.png")
    assert named(read_examples(str(tmp_path / "images"), options)) == [None]


def test_two_columns_that_may_be_the_class_must_say_the_same(tmp_path):
    labels = ["Audi A4", "Kia", "Kia", "BMW"]
    same = read_examples(str(write_table(tmp_path, ["1", "2", "2", "3"], class_name=labels)), OPTIONS)
    assert named(same) == labels and any("not read, though their names are usual: label" in n for n in same.notes)
    path = str(write_table(tmp_path, ["1", "2", "1", "3"], class_name=labels))
    with pytest.raises(InputError, match="class_name and label may both be the class"):
        read_examples(path, OPTIONS)
    assert named(read_examples(path, ReadOptions(**ASKED, columns={"answer": "label"}))) == ["1", "2", "1", "3"]


def test_rows_with_choices_are_no_classification(contest):
    with pytest.raises(InputError, match="has rows without choices, and these have them in a, b, c, d"):
        read_examples(str(contest / "train.csv"), OPTIONS)


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_check_prints_classes_as_text_json_and_page(run, faulty, tmp_path):
    code, printed, _ = run("check", faulty, *WORDS, "--html", tmp_path / "page.html", "--json", tmp_path / "r.json")
    assert code == 0 and "choices a row" not in printed
    assert "classes         5; rows a class: least 0 (Opel), median 3, most 5 (Kia)" in printed
    (data,) = json.loads((tmp_path / "r.json").read_text())["data"]
    assert data["classes"]["rows"] == {"Audi A4": 4, "BMW": 1, "Kia": 5, "Opel": 0, "audi_a4": 3}
    assert data["classes"]["near_names"] == [{"differ_in": "case, spaces and marks", "names": ["Audi A4", "audi_a4"]}]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Classes: 5; rows a class" in page and ">Kia</span>" in page and "No row has an answer" not in page


def test_folds_are_balanced_by_class(run, tmp_path):
    folder = write_folder(tmp_path / "cars", {"Audi": 8, "Kia": 4})
    assert run("folds", folder, *WORDS, "--num-folds", 4, "--output", tmp_path / "folds.csv")[0] == 0
    lines = (tmp_path / "folds.csv").read_text().replace('"', "").splitlines()[1:]
    counted = Counter((line.split("/")[0], line.split(",")[1]) for line in lines)
    assert counted == {(name, str(fold)): count for name, count in (("Audi", 2), ("Kia", 1)) for fold in range(4)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--classes", "x.csv"), "classes is the list of a classification"),
        ((*WORDS, "--fixed_choices", "a", "b"), "fixed_choices cannot be set beside task: classification"),
        ((*WORDS, "--columns", "{choices: options}"), "columns: {choices: ...} cannot be set"),
        ((*WORDS, "--answer-format", "letter"), "answer_format cannot be set"),
        ((*WORDS, "--fix", "copy.csv"), "--fix copies files of rows"),
        (("--task", "classification"), "missing columns: question"),
        ((*WORDS, "--columns", "{answer: model}"), "missing columns: model. The data has: id, path, label"),
        (("--task", "classify"), "`task` must be 'multiple_choice' or 'classification'"),
    ],
)
def test_what_does_not_go_with_a_classification_is_refused(run, tmp_path, given, message):
    folder = write_folder(tmp_path / "cars", {"Audi": 1, "Kia": 1})
    code, _, said = run("check", folder, *given)
    assert code == 2 and message in said and "Traceback" not in said


def test_prediction_without_candidates_is_refused_in_one_line(tmp_path):
    from vqa_sft.config.prediction import read_prediction

    argv = ["--run", "none", "--model", "m", "--data", "x.csv", "--output", "out.csv", "--task", "classification"]
    with pytest.raises(InputError, match="needs candidates, .*`vqa-sft candidates`"):
        read_prediction(argv).data_options({}, None)


@pytest.mark.medium
def test_training_without_candidates_is_refused_before_anything_is_loaded(tmp_path, capsys):
    from scripts import run_script

    folder = write_folder(tmp_path / "cars", {"Audi": 1, "Kia": 1})
    values = {"model_name_or_path": "nowhere", "train_data": folder, "output_dir": tmp_path / "run"} | ASKED
    with pytest.raises(SystemExit) as end:
        run_script("sft", *(word for name, value in values.items() for word in (f"--{name}", value)))
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert "needs candidates" in capsys.readouterr().err
