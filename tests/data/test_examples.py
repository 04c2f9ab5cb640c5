import base64
import io
import json

import datasets
import pytest
from contest import rows_of, write_csv
from PIL import Image

from vqa_sft.data.columns import Columns
from vqa_sft.data.digests import row_digest
from vqa_sft.data.examples import FEATURES, load_examples, read_examples, stream_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.images import open_image


def load(contest, **options):
    return load_examples(str(contest / "train.csv"), ReadOptions(**options))


def test_a_csv_becomes_canonical_examples(contest):
    examples, columns = load(contest)
    row = rows_of(contest)[5]
    assert examples.features == FEATURES
    assert examples[5] == {
        "id": "row_005",
        "images": [{"bytes": None, "path": str(contest / "images/005.png")}],
        "question": "Which colour has the square?",
        "choices": [row[letter] for letter in "abcd"],
        "answer": "abcd".index(row["answer"]),
        "context": "",
        "question_type": "colour",
    }
    assert columns == Columns("id", ("path",), "question", ("a", "b", "c", "d"), "answer", None, "letter", False)


def test_the_digest_of_a_row_follows_its_texts_and_images_and_neither_its_id_nor_its_folder(contest):
    row = load(contest)[0][0]
    moved = [{"bytes": None, "path": "/elsewhere/000.PNG"}]
    assert row_digest(row) == row_digest(row | {"id": "0", "answer": None, "images": moved})
    others = [{"question": "?"}, {"choices": row["choices"][::-1]}, {"images": []}]
    assert len({row_digest(row | other) for other in [{}, *others]}) == 4


def test_a_choice_may_read_none_or_look_like_a_number(contest):
    rows = rows_of(contest)
    rows[0] |= {"a": "None", "b": "NA", "c": "007", "d": "1.0"}
    write_csv(contest / "train.csv", rows)
    assert load(contest)[0][0]["choices"] == ["None", "NA", "007", "1.0"]


def test_rows_may_have_fewer_choices_and_upper_case_answers(contest):
    rows = [row | {"answer": "B", "d": ""} for row in rows_of(contest)]
    write_csv(contest / "train.csv", rows)
    examples, columns = load(contest)
    assert len(examples[0]["choices"]) == 3 and examples[0]["answer"] == 1 and columns.answers_are_upper


def test_a_korean_csv_with_a_byte_order_mark_is_read(contest):
    text = (contest / "train.csv").read_text().replace("Which colour has the square?", "무슨 색인가요?")
    (contest / "train.csv").write_text(text, encoding="utf-8-sig")
    assert load(contest)[0][0]["question"] == "무슨 색인가요?"


def test_a_dataset_with_images_inside_gives_the_same_pixels(contest, tmp_path):
    examples, _ = load(contest)
    rows = [{key: row[key] for key in row if key != "path"} for row in rows_of(contest)]
    inside = datasets.Dataset.from_list(rows)
    inside = inside.add_column("image", [image[0]["path"] for image in examples["images"]])
    inside.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    inside.cast_column("image", datasets.Image()).to_parquet(tmp_path / "hub" / "train.parquet")
    for source in ("saved", "hub"):
        # `to_parquet` leaves the images where they are, and only their paths in the table.
        loaded, columns = load_examples(str(tmp_path / source), ReadOptions(image_root=str(contest)))
        assert columns.image == ("image",)
        assert loaded["choices"][:] == examples["choices"][:] and loaded["answer"][:] == examples["answer"][:]
        for i in (0, 7):
            ours, theirs = open_image(loaded[i]["images"][0]), open_image(examples[i]["images"][0])
            assert ours.tobytes() == theirs.tobytes()


def test_every_bad_row_is_named_at_once(contest):
    rows = rows_of(contest)
    rows[1]["answer"] = "z"
    rows[2]["answer"] = ""
    rows[4]["id"] = rows[3]["id"]
    rows[9]["path"] = "../../outside.png"
    rows[10] |= {"b": "", "answer": "a"}
    rows[11] |= {"question": " "}
    rows[12] |= dict.fromkeys("abcd", "same")
    rows[13] |= {"b": "", "c": "", "d": "", "answer": "a"}
    rows[14]["path"] = "https://example.org/cat.png"
    rows[15]["id"] = ""
    rows[16]["path"] = ""
    write_csv(contest / "train.csv", rows)
    with pytest.raises(InputError) as error:
        load(contest)
    message = str(error.value)
    for part in (
        "the answer is none of the choices: row row_001 ('z') (1 of 24)",
        "the answer is empty: row row_002",
        "duplicate id: row row_003",
        "the image lies outside the image folder: row row_009 (../../outside.png)",
        "the question is empty: row row_011",
        "all choices are equal: row row_012",
        "fewer than two choices: row row_013",
        "the image is an address on the web: row row_014 (https://example.org/cat.png)",
        "the id is empty: row number 15",
    ):
        assert part in message
    assert "row_010" not in message and "row_016" not in message  # warnings do not stop a run


def test_warnings_are_collected_and_the_rows_stay(contest):
    rows = rows_of(contest)
    rows[0] |= {"b": rows[0]["a"]}
    rows[1] |= {"a": "", "answer": "b"}
    rows[2]["path"] = ""
    rows[3]["question"] = "why " * 6_000
    write_csv(contest / "train.csv", rows)
    loaded = read_examples(str(contest / "train.csv"))
    found = {key: labels for key, _, labels in loaded.problems}
    assert found == {
        "equal_choices": [f"row_000 ({rows[0]['a']!r})"],
        "empty_choice": ["row_001"],
        "no_image": ["row_002"],
        "long_text": ["row_003"],
    }
    assert loaded.examples[1]["choices"][0] == "" and loaded.examples[1]["answer"] == 1
    assert loaded.examples[2]["images"] == [] and len(loaded.examples) == 24


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def question(**fields):
    return {"id": "r", "image": "x.png", "question": "Which?", "choices": ["cat", "dog"], "answer": "a"} | fields


@pytest.mark.parametrize(
    ("cell", "choices"),
    [
        (["cat", "dog", "fox"], ["cat", "dog", "fox"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ("['cat', \"dog's\", 'fox']", ["cat", "dog's", "fox"]),
        ({"A": "cat", "B": "dog"}, ["cat", "dog"]),
        ([3, 4.5, "x"], ["3", "4.5", "x"]),
        ("[2.50, 1e3]", ["2.50", "1e3"]),
        (["cat", "dog", None, ""], ["cat", "dog"]),
    ],
)
def test_choices_in_one_column_are_a_list_or_a_text_that_spells_one(tmp_path, cell, choices):
    source = write_jsonl(tmp_path / "rows.jsonl", [question(choices=cell)])
    assert load_examples(source)[0][0]["choices"] == choices


@pytest.mark.parametrize("cell", ["cat, dog", "[1, 2", "[" * 3_000, 7, None, {"cat": 1, "dog": 2}])
def test_choices_that_are_no_list_name_their_row(tmp_path, cell):
    source = write_jsonl(tmp_path / "rows.jsonl", [question(), question(id="bad", choices=cell)])
    with pytest.raises(InputError, match="the choices are no list: row bad"):
        load_examples(source)


SPELLINGS = {
    "brackets": "(a) {} (b) {} (c) {}",
    "lines": "A. {}\nB. {}\nC. {}",
    "circled": "① {} ② {} ③ {}",
    "semicolons": "{};{}; {}",
    "bars": "{} | {} | {}",
    "plain lines": "{}\n{}\n{}",
    "numpy": "['{}' '{}' '{}']",
    "numpy in lines": "['{}'\n '{}'\n \"{}\"]",
    "objects": '[{{"label": "A", "text": "{}"}}, {{"label": "B", "text": "{}"}}, {{"label": "C", "text": "{}"}}]',
    "numbered": '{{"1": "{}", "2": "{}", "3": "{}"}}',
    "two lists": '{{"text": ["{}", "{}", "{}"], "label": ["A", "B", "C"]}}',
    "in a key": '{{"choices": ["{}", "{}", "{}"]}}',
    "pairs": '[["A", "{}"], ["B", "{}"], ["C", "{}"]]',
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_column_of_choices_is_read_however_they_are_spelled(tmp_path, spelling):
    turns = [["cat", "a (small) dog", "fox"], ["fox", "cat, or not", "a (small) dog"]] * 3
    rows = [
        question(id=str(i), choices=SPELLINGS[spelling].format(*turn), answer="abc"[i % 3])
        for i, turn in enumerate(turns)
    ]
    sources = [write_jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.csv")]
    write_csv(tmp_path / "rows.csv", rows)
    for source in sources:
        loaded = read_examples(source)
        assert loaded.examples["choices"][:] == turns and loaded.examples["answer"][:] == [0, 1, 2] * 2
        assert not loaded.problems.errors()
        told = any("become choices by" in note for note in loaded.notes)
        assert told == (rows[0]["choices"][0] not in "[{")


def test_a_semicolon_inside_a_listed_choice_splits_nothing(tmp_path):
    rows = [question(id=str(i), choices=["red; blue", "green; black"]) for i in range(3)]
    rows += [question(id=str(i), choices=f'["red; {i}", "x; y"]') for i in range(3, 6)]
    assert load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))[0]["choices"][5] == ["red; 5", "x; y"]
    rows.append(question(id="text", choices="red; blue"))
    with pytest.raises(InputError, match="the choices are no list: row text .*'red; blue'"):
        load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_a_text_that_is_not_split_as_the_others_names_its_row(tmp_path):
    rows = [question(id=str(i), choices=f"cat {i}; dog; fox") for i in range(5)]
    rows.append(question(id="odd", choices="cat / dog"))
    with pytest.raises(InputError, match="the choices are no list: row odd"):
        load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(InputError, match="the choices are no list: row odd"):
        list(stream_examples(write_jsonl(tmp_path / "rows.jsonl", rows)).examples)


@pytest.mark.parametrize(
    "labels",
    [("A. ", "B. ", "C. "), ("(a) ", "(b) ", "(c) "), ("1) ", "2) ", "3) "), ("①", "②", "③"), ("가. ", "나. ", "다. ")],
)
@pytest.mark.parametrize("answers", ["ABC", ["{}cat", "{}dog", "{}fox"], ["cat", "dog", "fox"]])
def test_labels_before_the_choices_of_every_row_are_left_out(tmp_path, labels, answers):
    names = ["cat", "dog", "fox"]
    choices = [label + name for label, name in zip(labels, names, strict=True)]
    cells = [answer.format(label) for answer, label in zip(answers, labels, strict=True)]
    rows = [question(id=str(i), choices=choices, answer=cells[i % 3]) for i in range(9)]
    columns = [dict(zip("abc", choices, strict=True)) | row for row in rows]
    for row in columns:
        del row["choices"]
    rows.append(question(id="two", choices=choices[:2], answer=cells[1]))
    write_csv(tmp_path / "rows.csv", columns)
    for source in (write_jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.csv")):
        loaded = read_examples(source)
        assert loaded.examples["choices"][:9] == [names] * 9
        assert loaded.examples["answer"][:9] == [0, 1, 2] * 3 and not loaded.problems.errors()
        assert any("labels before the choices" in note for note in loaded.notes)
        assert [row["choices"] for row in stream_examples(source, ReadOptions(answers="optional")).examples][:9] == [
            names
        ] * 9


@pytest.mark.parametrize(
    "choices", [["cat", "B. dog"], ["B. cat", "A. dog"], ["A.D.", "B.C."], ["A.", "B."], ["1.5", "2.5"], ["", "A. dog"]]
)
def test_labels_stay_where_one_choice_of_one_row_has_another_or_none(tmp_path, choices):
    rows = [question(id=str(i), choices=["A. cat", "B. dog"]) for i in range(5)]
    rows.append(question(id="odd", choices=choices, answer="b"))
    examples, _ = load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert examples["choices"][0] == ["A. cat", "B. dog"] and examples["choices"][5] == choices


def test_a_row_of_a_stream_without_the_labels_of_the_first_rows_is_an_error(tmp_path):
    rows = [question(id=str(i), choices=["A. cat", "B. dog"]) for i in range(1_200)]
    rows[1_100]["choices"] = ["cat", "dog"]
    stream = stream_examples(write_jsonl(tmp_path / "rows.jsonl", rows), ReadOptions(answers="optional"))
    with pytest.raises(InputError, match="row 1100 .not labelled as in the other rows"):
        list(stream.examples)


def numbered(values, **cells):
    """Rows with the choices a to d and a column more for each of `cells`."""
    rows = [question(id=str(i)) | dict(zip("abcd", ["cat", "dog", "fox", "owl"], strict=True)) for i in range(8)]
    for i, row in enumerate(rows):
        del row["choices"]
        row |= {"answer": values[i % len(values)]} | {name: cell[i % len(cell)] for name, cell in cells.items()}
    return rows


@pytest.mark.parametrize("name", ["E", "e"])
@pytest.mark.parametrize("answers", ["abcd", "0123", "1234", ["cat", "dog", "owl"], [""]])
def test_numbers_in_a_column_after_the_choices_are_left_out_and_said(tmp_path, name, answers):
    write_csv(tmp_path / "rows.csv", numbered(answers, **{name: [0.5, "", 1, "nan"]}))
    formats = {"0123": "index_from_0", "1234": "index_from_1"}
    options = {"answers": "optional", "answer_format": formats.get(str(answers))}
    loaded = read_examples(str(tmp_path / "rows.csv"), ReadOptions(**options))
    assert loaded.columns.choices == ("a", "b", "c", "d") and loaded.num_choices == 4
    assert loaded.problems.bad_rows("stray_column") == [0, 2, 3, 4, 6, 7]
    assert any(
        f"{name} is no choice and left out" in note and f"choices: [a, b, c, d, {name}]" in note
        for note in loaded.notes
    )
    stream = stream_examples(str(tmp_path / "rows.csv"), ReadOptions(**options))
    assert stream.columns.choices == ("a", "b", "c", "d")
    given = {"columns": {"choices": ["a", "b", "c", "d", name]}}
    assert read_examples(str(tmp_path / "rows.csv"), ReadOptions(**options, **given)).num_choices == 5


@pytest.mark.parametrize(
    ("answers", "cells"),
    [
        ("abcde", {"e": [1, 2]}),  # it is the answer
        (["cat", "7"], {"e": [7, 7]}),
        ("01400402", {"e": [1, 2]}),
        ("abcd", {"e": ["ant", 2]}),  # a word
        ("abcd", {"a": [1], "b": [2], "c": [3], "d": [4], "e": [5]}),  # numbers beside numbers
        ("abcd", {"e": [5, *[""] * 7]}),  # one row says little
        ("abcdE", {"E": ["ant"]}),  # another case, and the answer
    ],
)
def test_a_fifth_choice_stays(tmp_path, answers, cells):
    write_csv(tmp_path / "rows.csv", numbered(answers, **cells))
    loaded = read_examples(str(tmp_path / "rows.csv"))
    assert len(loaded.columns.choices) == 5 and not loaded.problems.errors()


def test_a_choice_in_few_rows_that_is_never_the_answer_stays_and_is_said(tmp_path):
    rows = [row | {"id": str(i), "e": ""} for i, row in enumerate(numbered("abcd") * 5)]
    rows[30]["e"] = "ant"
    write_csv(tmp_path / "rows.csv", rows)
    loaded = read_examples(str(tmp_path / "rows.csv"))
    assert loaded.examples["choices"][30][4] == "ant" and loaded.problems.bad_rows("sparse_column") == [30]
    rows[30]["answer"] = "e"
    write_csv(tmp_path / "rows.csv", rows)
    assert not read_examples(str(tmp_path / "rows.csv")).problems.found("sparse_column")


def test_a_column_in_another_case_that_is_never_the_answer_is_no_choice(tmp_path):
    write_csv(tmp_path / "rows.csv", numbered("abcd", E=["an explanation"]))
    loaded = read_examples(str(tmp_path / "rows.csv"))
    assert loaded.columns.choices == ("a", "b", "c", "d") and len(loaded.problems.bad_rows("stray_column")) == 8


@pytest.mark.parametrize("name", ["label", "correct_idx", "gold"])
def test_two_columns_that_may_be_different_answers_are_both_named(tmp_path, name):
    write_csv(tmp_path / "rows.csv", numbered("abcd", **{name: [0, 1]}))
    for load in (load_examples, stream_examples):
        with pytest.raises(InputError, match=f"answer and {name} may both be the answer"):
            load(str(tmp_path / "rows.csv"))
        assert load(str(tmp_path / "rows.csv"), ReadOptions(columns={"answer": "answer"}))
    assert load_examples(str(tmp_path / "rows.csv"), ReadOptions(answer_format="letter"))[1].answer == "answer"


@pytest.mark.parametrize(
    ("cells", "answer"),
    [
        ({"answer": ["cat", "dog", "fox"], "answer label": ["A", "B", "C"]}, "answer"),  # the same
        ({"answer": ["a", "b", "c"], "correct_idx": [0, 1, 2]}, "answer"),
        ({"answer": ["a", "b", "c"], "label": ["animal", "plant", "stone"]}, "answer"),  # no answers
        ({"answer": ["It is a cat.", "No.", "Red."], "correct_option": ["B", "A", "C"]}, "correct_option"),
        ({"answer": ["", "", ""], "correct_option": ["B", "A", "C"]}, "correct_option"),
    ],
)
def test_of_two_columns_that_are_named_as_answers_one_is_read_and_said(tmp_path, cells, answer):
    write_csv(tmp_path / "rows.csv", numbered([""], **cells))
    loaded = read_examples(str(tmp_path / "rows.csv"))
    assert loaded.columns.answer == answer and not loaded.problems.errors()
    (other,) = cells.keys() - {answer}
    assert any("not read" in note and f"{other} (answer)" in note for note in loaded.notes)


def test_two_columns_of_choices_are_both_named_unless_they_hold_the_same(tmp_path):
    write_csv(tmp_path / "rows.csv", numbered("abcd", options=['["cat", "dog", "fox", "owl"]']))
    assert load_examples(str(tmp_path / "rows.csv"))[1].choices == ("a", "b", "c", "d")
    write_csv(tmp_path / "rows.csv", numbered("abcd", options=['["owl", "fox", "dog", "cat"]']))
    with pytest.raises(InputError, match="a, b, c, d and options may both be the choices and differ"):
        load_examples(str(tmp_path / "rows.csv"))
    rows = [question(options=["dog", "cat"])]
    with pytest.raises(InputError, match="choices and options may both be the choices"):
        load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert load_examples(str(tmp_path / "rows.jsonl"), ReadOptions(columns={"choices": "options"}))[0][0][
        "choices"
    ] == [
        "dog",
        "cat",
    ]


def test_two_columns_of_images_are_both_named_where_both_hold_other_files(tmp_path):
    for name in ("left.png", "right.png"):
        (tmp_path / name).write_bytes(image_bytes())
    rows = [question(image="left.png", file_name="right.png", prompt="Look.")]
    with pytest.raises(InputError, match="image and file_name name different files"):
        load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    rows[0]["file_name"] = "IMG_2034.PNG"
    loaded = read_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert loaded.columns.image == ("image",) and "not read, though their names are usual" in loaded.notes[-2]
    assert "file_name (image)" in loaded.notes[-2] and "prompt (question)" in loaded.notes[-2]


def test_images_themselves_come_before_a_path_to_them(tmp_path):
    rows = [question(image={"bytes": image_bytes(), "path": None}, image_path="gone.png", path="gone/too.png")]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "rows.parquet")
    loaded = read_examples(str(tmp_path / "rows.parquet"))
    assert loaded.columns.image == ("image",) and loaded.examples[0]["images"][0]["bytes"]


@pytest.mark.parametrize("cell", ["NaN", "nan", "N/A", "NULL", "None", "<NA>"])
def test_a_choice_that_a_tool_wrote_for_nothing_is_a_warning(tmp_path, cell):
    rows = [question(), question(id="nan", choices=["cat", "dog", cell])]
    loaded = read_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert loaded.problems.found("nan_choice") == [(f"nan ({cell!r})", 1)] and not loaded.problems.errors()
    loaded = read_examples(str(tmp_path / "rows.jsonl"), ReadOptions(empty_cells=[cell]))
    assert loaded.examples["choices"][1] == ["cat", "dog"] and not loaded.problems.found("nan_choice")


def test_answers_of_other_types_mean_what_their_texts_mean(tmp_path):
    for i, (answers, choices, indices) in enumerate(
        [
            ([True, False, True], ["no", "yes"], [1, 0, 1]),
            ([0.0, 1.0, 0.0], ["cat", "dog"], [0, 1, 0]),
            ([["A"], ["B"], ["A"]], ["cat", "dog"], [0, 1, 0]),
            ([3.0, 1.0, 3.0], [1, 3], [1, 0, 1]),
        ]
    ):
        rows = [question(id=str(n), choices=[*map(str, choices)], answer=answers[n % 3]) for n in range(9)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{i}.parquet")
        texts = [row | {"answer": str(row["answer"])} for row in rows]
        write_jsonl(tmp_path / f"{i}.jsonl", rows)
        write_jsonl(tmp_path / f"{i}_text.jsonl", texts)
        for name in (f"{i}.parquet", f"{i}.jsonl", f"{i}_text.jsonl"):
            assert load_examples(str(tmp_path / name))[0]["answer"][:] == indices * 3, name


def test_rows_differ_in_their_number_of_choices_up_to_26(tmp_path):
    many = [question(id=str(n), choices=[f"c{i}" for i in range(n)], answer="b") for n in (2, 5, 26)]
    loaded = read_examples(write_jsonl(tmp_path / "rows.jsonl", many))
    assert list(map(len, loaded.examples["choices"])) == [2, 5, 26] and loaded.num_choices == 26
    source = write_jsonl(tmp_path / "more.jsonl", [*many, question(choices=[f"c{i}" for i in range(27)])])
    with pytest.raises(InputError, match="more than 26 choices: row r"):
        load_examples(source)


@pytest.mark.parametrize(
    ("answers", "answer_format", "indices"),
    [
        (["B", "a", "c"], "letter", [1, 0, 2]),
        ([0, 2, 1], "index_from_0", [0, 2, 1]),
        (["3", "1", "2"], "index_from_1", [2, 0, 1]),
        (["fox", "cat", "dog"], "text", [2, 0, 1]),
    ],
)
def test_the_way_in_which_answers_are_written_is_inferred(tmp_path, answers, answer_format, indices):
    rows = [question(id=str(i), choices=["cat", "dog", "fox"], answer=cell) for i, cell in enumerate(answers * 3)]
    examples, columns = load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert columns.answer_format == answer_format and examples["answer"][:] == indices * 3


def test_class_labels_count_by_their_names(tmp_path):
    features = datasets.Features({"answer": datasets.ClassLabel(names=["B", "A"])})
    rows = datasets.Dataset.from_list([question(answer=0) for _ in range(3)])
    rows.cast_column("answer", features["answer"]).remove_columns("id").save_to_disk(tmp_path / "saved")
    examples, columns = load_examples(str(tmp_path / "saved"), ReadOptions(image_root=str(tmp_path)))
    assert columns.answer_format == "letter" and examples["answer"][:] == [1, 1, 1]
    assert examples["id"][:] == ["0", "1", "2"]  # without an id, rows are named by their number


def test_the_context_is_kept_and_rows_can_be_left_out(tmp_path):
    rows = [question(id=str(i), hint=f"hint {i}", kind="open" if i == 1 else "choice") for i in range(4)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = read_examples(source, ReadOptions(keep_rows={"kind": ["choice"]}))
    assert loaded.examples["context"][:] == ["hint 0", "hint 2", "hint 3"] and loaded.numbers == [0, 2, 3]
    assert "(1 left out by keep_rows)" in loaded.notes[-1]
    with pytest.raises(InputError, match="keep_rows names columns that are not in .*: sort"):
        load_examples(source, ReadOptions(keep_rows={"sort": "open"}))
    with pytest.raises(InputError, match="has no rows that keep_rows .*'closed'.* keeps: kind holds 'choice', 'open'"):
        load_examples(source, ReadOptions(keep_rows={"kind": "closed"}))


def image_bytes(colour="red", size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_a_row_has_none_one_or_several_images(tmp_path):
    several = [question(id="two", image=["1.png", "2.png"]), question(id="none", image=None), question(id="one")]
    examples, _ = load_examples(write_jsonl(tmp_path / "rows.jsonl", several))
    names = [[image["path"].rpartition("/")[2] for image in images] for images in examples["images"]]
    assert names == [["1.png", "2.png"], [], ["x.png"]]


def test_images_inside_a_dataset_may_be_missing_or_stand_in_several_columns(tmp_path):
    rows = [question(id=str(i)) for i in range(3)]
    for i, row in enumerate(rows):
        del row["image"]
        row |= {"image_1": {"bytes": image_bytes("red"), "path": None} if i else None}
        row |= {"image_2": {"bytes": image_bytes("blue"), "path": None} if i == 2 else None}
    features = datasets.Features(
        {"image_1": datasets.Image(), "image_2": datasets.Image(), "choices": datasets.List(datasets.Value("string"))}
        | {name: datasets.Value("string") for name in ("id", "question", "answer")}
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    loaded = read_examples(str(tmp_path / "saved"))
    colours = [[open_image(image).getpixel((0, 0)) for image in images] for images in loaded.examples["images"]]
    assert colours == [[], [(255, 0, 0)], [(255, 0, 0), (0, 0, 255)]]
    assert loaded.problems.bad_rows("no_image") == [0] and loaded.columns.image == ("image_1", "image_2")


def test_paths_inside_a_table_must_stay_in_the_image_folder_too(tmp_path):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(image_bytes())
    rows = [question(image={"bytes": None, "path": path}) for path in ("x.png", str(tmp_path / "out/x.png"))]
    rows[1]["id"] = "outside"
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(
        {"image": struct, "choices": datasets.List(datasets.Value("string"))}
        | {name: datasets.Value("string") for name in ("id", "question", "answer")}
    )
    source = str(tmp_path / "in/rows.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(source)
    with pytest.raises(InputError, match="outside the image folder: row outside"):
        load_examples(source)
    with pytest.raises(InputError, match="outside the image folder: row outside"):
        list(stream_examples(source).examples)
    examples, _ = load_examples(source, ReadOptions(limit=1))
    assert examples[0]["images"] == [{"bytes": None, "path": str(tmp_path / "in/x.png")}]


def test_a_text_column_that_holds_bytes_is_an_error(tmp_path):
    datasets.Dataset.from_list([question(question=b"Which?")]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="question must hold text; got images or bytes"):
        load_examples(str(tmp_path / "rows.parquet"))


def test_ids_with_line_breaks_are_an_error(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [question(), question(id="a\rb")])
    with pytest.raises(InputError, match="null bytes, half a character or a list: row 'a.*the id"):
        load_examples(source)


def test_unknown_answers_of_a_test_set_tell_nothing_about_how_answers_are_written(tmp_path):
    rows = [question(id=str(i), answer="?") for i in range(3)]
    _, columns = load_examples(write_jsonl(tmp_path / "rows.jsonl", rows), ReadOptions(answers="optional"))
    assert columns.answer_format is None
    rows = [question(id=str(i), answer="a" if i else "B") for i in range(3)]
    assert not load_examples(write_jsonl(tmp_path / "rows.jsonl", rows))[1].answers_are_upper


def test_a_cell_can_be_declared_empty(tmp_path):
    rows = [question(id="1", image="nan", choices=["x", "y", "nan"], hint="nan"), question(id="2", hint="look")]
    loaded = read_examples(write_jsonl(tmp_path / "rows.jsonl", rows), ReadOptions(empty_cells=["nan"]))
    assert loaded.examples[0]["images"] == [] and loaded.examples[0]["choices"] == ["x", "y"]
    assert loaded.examples["context"][:] == ["", "look"]


def test_a_list_of_images_and_plain_bytes_are_images(tmp_path):
    rows = [question(image=[{"bytes": image_bytes(), "path": None}] * 2)]
    features = datasets.Features(
        {"image": datasets.List(datasets.Image()), "choices": datasets.List(datasets.Value("string"))}
        | {name: datasets.Value("string") for name in ("id", "question", "answer")}
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "lists")
    datasets.Dataset.from_list([question(image=image_bytes())]).to_parquet(tmp_path / "bytes.parquet")
    for source, count in (("lists", 2), ("bytes.parquet", 1)):
        images = load_examples(str(tmp_path / source))[0][0]["images"]
        assert len(images) == count and open_image(images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_base64_images_of_benchmark_files_are_read(tmp_path):
    text = base64.b64encode(image_bytes(size=(400, 300))).decode()
    (tmp_path / "bench.tsv").write_text(f"index\timage\tquestion\tA\tB\tanswer\n7\t{text}\tWhich?\tx\ty\tB\n")
    examples, _ = load_examples(str(tmp_path / "bench.tsv"))
    assert open_image(examples[0]["images"][0]).size == (400, 300) and examples[0]["answer"] == 1


def test_a_source_without_any_image_is_an_error_unless_it_is_meant(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [question(image=""), question(id="s", image=None)])
    with pytest.raises(InputError, match="no row of .*rows.jsonl has an image in image"):
        load_examples(source)
    assert load_examples(source, ReadOptions(columns={"image": []}))[0]["images"][:] == [[], []]


def test_null_bytes_and_half_characters_name_their_row(tmp_path):
    rows = [question(id="1", question="a\0b"), question(id="2", choices=["\ud800", "x"]), question(id="3")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match="null bytes, half a character or a list: rows 1 .*, 2 "):
        load_examples(str(path))


def test_missing_columns_are_listed_with_the_ones_found(contest):
    write_csv(contest / "train.csv", [{"id": 1, "pic": "x", "question": "?", "a": 1, "b": 2, "answer": "a"}])
    with pytest.raises(InputError, match="missing columns: image .*The data has: id, pic, question, a, b, answer"):
        load(contest)


def test_prediction_needs_no_answers_but_training_does(contest):
    test_file = str(contest / "test.csv")
    assert set(load_examples(test_file, ReadOptions(answers="optional"))[0]["answer"]) == {None}
    with pytest.raises(InputError, match="missing columns: answer"):
        load_examples(test_file)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("nowhere.csv", None, "no such file"),
        ("empty.csv", b"", "cannot be read as CSV"),
        ("header.csv", b"id,path,question,a,b,answer\n", "has no rows"),
        ("bytes.csv", b"id,\xff\xfe\xfd\n", "not UTF-8 text"),
        ("data.txt", b"x", "not a CSV file"),
        ("twice.csv", b"id,path,question,a,a,answer\n1,x,q,y,z,a\n", "more than one column 'a'"),
        ("gap.csv", b"id,path,question,a,b,d,answer\n1,x,q,y,z,w,a\n", "a, b, d leave one out"),
        ("long.csv", b"id,path,question,a,b,answer\n1,x,q,y,z,a,\n2,x,q,y,z,a,\n", "rows longer than its header"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, part):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=part):
        load_examples(str(tmp_path / name))


def test_a_name_that_is_nothing_says_what_it_could_be():
    with pytest.raises(InputError, match="neither a file, nor a folder"):
        load_examples("nobody/nothing")


def test_limit_takes_the_first_rows_only(contest):
    assert load(contest, limit=3)[0]["id"][:] == ["row_000", "row_001", "row_002"]


def test_other_column_names_can_be_given(contest):
    renamed = {"id": "key", "path": "pic", "question": "text", "answer": "y"} | {
        "a": "o1",
        "b": "o2",
        "c": "o3",
        "d": "o4",
    }
    write_csv(contest / "train.csv", [{renamed[name]: row[name] for name in row} for row in rows_of(contest)])
    columns = {"id": "key", "image": "pic", "question": "text", "choices": ["o1", "o2", "o3", "o4"], "answer": "y"}
    assert load(contest, columns=columns)[0][0]["choices"] == [rows_of(contest)[0][f"o{i}"] for i in range(1, 5)]


def test_a_stream_gives_the_rows_of_the_table(contest, tmp_path):
    examples, columns = load(contest)
    inside = examples.remove_columns(["answer", "context", "question_type", "images"])
    inside = inside.add_column("image", [images[0]["path"] for images in examples["images"]])
    inside = inside.add_column("answer", [int(answer) for answer in examples["answer"]])
    (tmp_path / "hub").mkdir()
    inside.cast_column("image", datasets.Image()).to_parquet(tmp_path / "hub/train.parquet")
    for source in (str(contest / "train.csv"), str(tmp_path / "hub")):
        stream = stream_examples(source, ReadOptions(image_root=str(contest)))
        rows = sorted(stream.examples, key=lambda row: row["id"])
        assert [row["id"] for row in rows] == examples["id"][:] and stream.num_choices == 4
        for name in ("question", "choices", "answer", "question_type"):
            assert [row[name] for row in rows] == examples[name][:]
        assert open_image(rows[3]["images"][0]).tobytes() == open_image(examples[3]["images"][0]).tobytes()


def test_a_bad_row_of_a_stream_raises_when_it_comes(tmp_path):
    rows = [question(id=str(i)) for i in range(1_500)]
    rows[1_200]["answer"] = "q"
    stream = stream_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(InputError, match="the answer is none of the choices: row 1200"):
        list(stream.examples)
    rows[1_200] = question(id="more", choices=["cat", "dog", "fox"])
    with pytest.raises(InputError, match="more choices than the rows before: row more .*Set max_choices"):
        list(stream_examples(write_jsonl(tmp_path / "rows.jsonl", rows)).examples)
    assert len(list(stream_examples(str(tmp_path / "rows.jsonl"), ReadOptions(max_choices=4)).examples)) == 1_500
