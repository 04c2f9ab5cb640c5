"""Rows that say less than a table of questions: one question for all, choices in the text, other data of a run."""

import json

import pytest
from contest import write_csv
from PIL import Image
from scripts import run_script

from vqa_sft.data.columns import are_here
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.find_columns import find_columns
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        Image.effect_noise((64, 64), 20 + number).convert("RGB").save(tmp_path / f"{number:04d}.png")
    return tmp_path


def write(folder, rows, name="rows.csv"):
    write_csv(folder / name, [{"image": f"{i:04d}.png"} | row for i, row in enumerate(rows)])
    return str(folder / name)


def answers(loaded):
    loaded.problems.raise_if_any(loaded.name)
    return loaded.examples["answer"][:]


# --- One question or the same choices for every row -------------------------------------------------------------------


def test_every_row_may_have_the_same_choices(folder):
    file = write(folder, [{"text": f"Is it {i}?", "label": ["no", "yes"][i % 2]} for i in range(8)])
    how = {"columns": {"question": "text"}, "fixed_choices": ["yes", "no"]}
    loaded = read_examples(file, ReadOptions(**how))
    assert answers(loaded) == [1, 0] * 4 and loaded.examples[0]["choices"] == ["yes", "no"]
    assert any("choices: yes, no (every row)" in note for note in loaded.notes)
    assert [row["answer"] for row in stream_examples(file, ReadOptions(**how)).examples] == [1, 0] * 4


def test_every_row_may_have_the_same_question(folder):
    file = write(folder, [{"label": ["cat", "dog", "fox"][i % 3]} for i in range(9)])
    loaded = read_examples(file, ReadOptions(fixed_question="Which animal?", fixed_choices=["fox", "dog", "cat"]))
    assert answers(loaded) == [2, 1, 0] * 3 and {*loaded.examples["question"]} == {"Which animal?"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed_choices": ["yes", "no"], "columns": {"choices": ["a", "b"]}}, "fixed_choices stands for a column"),
        ({"fixed_question": "?", "columns": {"question": "question"}}, "fixed_question stands for a column"),
    ],
)
def test_a_column_and_what_stands_for_it_are_refused_together(folder, options, message):
    file = write(folder, [{"question": "?", "a": "x", "b": "y", "answer": "a"}] * 4)
    with pytest.raises(InputError, match=message):
        read_examples(file, ReadOptions(**options))


@pytest.mark.parametrize("choices", ["[yes]", "[yes, yes]", "[yes, '']"])
def test_fixed_choices_are_different_texts(folder, choices, capsys):
    file = write(folder, [{"question": "?", "answer": "yes"}] * 4)
    with pytest.raises(SystemExit, match="2"):
        check(file, f"--fixed_choices={choices}")
    assert "fixed_choices must be 2 to 26 different texts" in capsys.readouterr().err


def check(*arguments):
    import sys

    from vqa_sft.cli.main import main

    before, sys.argv = sys.argv, ["vqa-sft", "check", *arguments]
    try:
        main()
    finally:
        sys.argv = before


def test_check_takes_every_data_option_of_a_recipe_for_a_file(folder, capsys):
    rows = [{"label": ["yes", "no"][i % 2], "part": "ab"[i % 3 == 0], "text": f"{i}?"} for i in range(9)]
    options = ("--columns", "{question: text}", "--fixed-choices", "yes", "no", "--keep_rows", "{part: a}")
    with pytest.raises(SystemExit, match="0"):
        check(write(folder, rows), *options, "--json")
    report = json.loads(capsys.readouterr().out)["data"][0]
    assert report["rows"] == 6 and report["choices"] == {"2": 6} and report["usable_rows"] == 6


def test_check_names_an_option_that_no_data_file_has(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        check(write(folder, [{"label": "yes"}] * 4), "--lora_r", "3")
    assert "--lora_r is no option for a data file" in capsys.readouterr().err


# --- Choices in the question's text -----------------------------------------------------------------------------------


def test_choices_are_read_from_the_text_of_the_question(folder):
    rows = [{"question": f"Which, {i}?\nA. cat\nB. dog\nC. fox", "answer": "ABC"[i % 3]} for i in range(9)]
    loaded = read_examples(write(folder, rows), ReadOptions(columns={"choices": "in_question"}))
    assert answers(loaded) == [0, 1, 2] * 3
    assert loaded.examples[4]["question"] == "Which, 4?" and loaded.examples[4]["choices"] == ["cat", "dog", "fox"]
    assert any("'Which, 0?'" in note and "'cat', 'dog', 'fox'" in note for note in loaded.notes)


def test_rows_without_choices_in_their_question_are_named(folder):
    rows = [{"question": "Which?\n1) x\n2) y" if i else "How many?", "answer": "1"} for i in range(6)]
    loaded = read_examples(
        write(folder, rows), ReadOptions(columns={"choices": "in_question"}, answer_format="index_from_1")
    )
    with pytest.raises(InputError, match="no choices are written in the question: row 0 .*How many"):
        answers(loaded)


# --- Paths from a template --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "cells"),
    [("{id:04}.png", lambda i: {"id": i}), ("{stem}.png", lambda i: {"id": f"r{i}", "stem": f"{i:04d}"})],
)
def test_the_path_of_an_image_may_be_made_of_cells(folder, template, cells):
    rows = [cells(i) | {"question": "?", "a": "x", "b": "y", "answer": "ab"[i % 2]} for i in range(6)]
    write_csv(folder / "rows.csv", rows)
    loaded = read_examples(str(folder / "rows.csv"), ReadOptions(columns={"image": template}))
    loaded.problems.raise_if_any(loaded.name)
    assert [images[0]["path"] for images in loaded.examples["images"]] == [f"{folder}/{i:04d}.png" for i in range(6)]


def test_a_template_of_columns_that_are_not_there_is_refused():
    with pytest.raises(InputError, match="missing columns: name"):
        find_columns(["id", "question", "a", "b", "answer"], {"image": "{name}.png"})


# --- A run meets other data -------------------------------------------------------------------------------------------


@pytest.fixture
def run(sft, families, tmp_path):
    return sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1)


def predict(run, file, output, *options):
    arguments = ("--run", run, "--data", file, "--output", output, "--use_cpu", "--num_workers", 0, *options)
    run_script("predict", *arguments)
    from vqa_sft.predictions.file import read_predictions

    return read_predictions(output.with_suffix(".parquet"))


def test_a_run_scores_rows_of_another_shape_and_says_so(run, folder, capsys):
    words = ["cat", "dog", "fox", "owl", "cow", "hen"]
    rows = [
        {
            "id": f"x{i}",
            "image": f"{i:04d}.png",
            "question": "Which?",
            "choices": words[: 2 + i % 5],
            "answer": words[i % 2],
        }
        for i in range(9)
    ]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = predict(run, folder / "other.jsonl", folder / "out.csv")
    said = capsys.readouterr().out
    assert found.answers == [0, 1] * 4 + [0] and [len(row) for row in found.choice_logits] == [
        2 + i % 5 for i in range(9)
    ]
    assert "choices: choices, not a to d; image: image, not path; answers are read as text, not as letter" in said
    assert "rows of up to 6 choices, and training had at most 4" in said


def test_columns_that_the_recipe_names_count_only_where_the_data_have_them():
    names, named = ["id", "image", "question", "a", "b", "answer"], {"question": "ask", "image": "photo", "id": None}
    columns = find_columns(names, are_here(named, names), ReadOptions(answers="optional"))
    assert (columns.id, columns.image, columns.question) == (None, ("image",), "question")


# --- Rows that must be answered ---------------------------------------------------------------------------------------


def test_placeholders_of_a_test_set_are_no_answers(folder):
    rows = [{"question": "?", "a": "x", "b": "y", "answer": "hidden" if i % 2 else "b"} for i in range(12)]
    loaded = read_examples(write(folder, rows), ReadOptions(answers="optional"))
    assert answers(loaded) == [1, None] * 6
    assert any("6 rows have 'hidden' for an answer, which counts as none" in note for note in loaded.notes)


@pytest.mark.parametrize("cell", ["0", "A", "b", "X", "answer"])
def test_one_answer_for_all_rows_of_a_test_set_is_none(folder, cell):
    rows = [{"question": f"{i}?", "a": "x", "b": "y", "answer": cell} for i in range(12)]
    loaded = read_examples(write(folder, rows), ReadOptions(answers="optional"))
    assert answers(loaded) == [None] * 12 and any(repr(cell) in note for note in loaded.notes)


def test_an_answer_format_makes_the_answers_of_a_test_set_count(folder):
    rows = [{"question": f"{i}?", "a": "x", "b": "y", "answer": "b"} for i in range(12)]
    assert (
        answers(read_examples(write(folder, rows), ReadOptions(answers="optional", answer_format="letter"))) == [1] * 12
    )


def test_a_placeholder_that_is_a_choice_is_an_answer(folder):
    rows = [{"question": f"{i}?", "a": "NA", "b": "Y", "answer": ["NA", "Y"][i % 2]} for i in range(8)]
    loaded = read_examples(write(folder, rows), ReadOptions(answers="optional", answer_format="text"))
    assert answers(loaded) == [0, 1] * 4 and not any("counts as none" in note for note in loaded.notes)


def bad_rows(folder):
    """Eight rows of a test set, four of which cannot be used as they are."""
    rows = [
        {"id": f"r{i}", "image": f"{i:04d}.png", "question": "Which?", "a": "cat", "b": "dog", "c": "fox", "d": "owl"}
        for i in range(8)
    ]
    rows[0] |= {"b": "", "c": "", "d": ""}
    rows[1]["question"] = ""
    rows[2]["image"] = "nowhere.png"
    rows[3] |= {"a": "", "b": "", "c": "", "d": ""}
    write_csv(folder / "test.csv", rows)
    return folder / "test.csv"


def test_rows_that_cannot_be_used_are_refused_with_the_option_that_helps(run, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict(run, bad_rows(folder), folder / "out.csv")
    said = capsys.readouterr().err
    assert "fewer than two choices: rows r0, r3 (2 of 8)" in said and "--on_bad_row guess" in said
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_every_row_of_a_test_set_is_answered_and_guesses_are_marked(run, folder, capsys, streaming):
    good = predict(run, bad_rows(folder), folder / "out.csv", "--on_bad_row", "guess", *streaming)
    assert "rows r0, r1, r2, r3 (4 of 8)" in capsys.readouterr().out
    assert good.blanked == [True] * 4 + [False] * 4
    assert [len(row) for row in good.choice_logits] == [1, 4, 4, 1, 4, 4, 4, 4] and good.choice_logits[0] == [0.0]
    lines = (folder / "out.csv").read_text().splitlines()
    assert len(lines) == 9 and lines[1] == "r0,a" and lines[4] == "r3,a"


def test_training_leaves_rows_out_that_cannot_be_used(sft, contest, families, tmp_path, capsys):
    lines = (contest / "train.csv").read_text().splitlines()
    lines[1] = lines[1].rpartition(",")[0] + ",z"  # no choice
    lines[2] = ",".join([*lines[2].split(",")[:2], "", *lines[2].split(",")[3:]])  # no question
    (contest / "train.csv").write_text("\n".join(lines) + "\n")
    run = sft(families("qwen2_5_vl"), tmp_path / "left", on_bad_row="skip", max_steps=1)
    said = capsys.readouterr().out
    assert "22 train, 2 left_out" in said.replace("2 left_out, 22 train", "22 train, 2 left_out")
    assert (run / "rows.csv").read_text().count("left_out,") == 2


def test_equal_ids_are_refused_although_rows_may_be_left_out(sft, contest, families, tmp_path, capsys):
    text = (contest / "train.csv").read_text().replace("row_001", "row_000")
    (contest / "train.csv").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        sft(families("qwen2_5_vl"), tmp_path / "run", on_bad_row="skip", max_steps=1)
    assert "duplicate id: row row_000" in capsys.readouterr().err


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_rows_of_a_sorted_file_are_noticed_where_only_the_first_are_read(folder):
    rows = [{"question": f"{i}?", "a": "x", "b": "y", "answer": "ab"[i // 10]} for i in range(12)]
    assert any(
        "the first 10 rows have one answer" in note
        for note in read_examples(write(folder, rows), ReadOptions(limit=10)).notes
    )
    assert not any("one answer" in note for note in read_examples(write(folder, rows), ReadOptions(limit=11)).notes)


# --- What a review found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["[yes, no]", "['yes', 'no']", "[on, off]"])
def test_bare_words_are_texts_where_choices_or_cells_are_meant(folder, tmp_path, written):
    from vqa_sft.config.recipe import read_recipe

    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"train_data: x.csv\nmodel_name_or_path: m\noutput_dir: {tmp_path}/o\nfixed_choices: {written}\n"
        "keep_rows: {kind: no}\nuse_cpu: yes\naccelerator_config: {split_batches: no}\neval_strategy: no\n"
    )
    values = read_recipe(
        ["--config", str(recipe), "--fixed_choices", *written.strip("[]").replace("'", "").split(", ")]
    ).values
    assert values["fixed_choices"] == written.strip("[]").replace("'", "").split(", ")
    assert read_recipe(["--config", str(recipe)]).values["fixed_choices"] == values["fixed_choices"]
    assert values["keep_rows"] == {"kind": "no"} and values["use_cpu"] is True and values["eval_strategy"] == "no"
    assert values["accelerator_config"] == {"split_batches": False}


def other(folder, trained, rows, name="other.csv", **options):
    """How rows are read that go with those of `trained`."""
    return read_examples(write(folder, rows, name), ReadOptions(answers="optional", trained=trained.columns, **options))


def questions(num_rows=8, **cells):
    words = ["cat", "dog", "fox", "owl"]
    return [
        {"question": f"{i}?"} | dict(zip("abcd", words, strict=True)) | {key: cell(i) for key, cell in cells.items()}
        for i in range(num_rows)
    ]


def test_a_fifth_choice_of_training_is_one_in_test_rows_too(folder):
    trained = read_examples(write(folder, questions(10, E=lambda i: "cow", answer=lambda i: "abcde"[i % 5])))
    assert trained.columns.choices == ("a", "b", "c", "d", "E")
    test = other(folder, trained, questions(E=lambda i: "cow"))
    assert test.columns.choices == ("a", "b", "c", "d", "E")


def test_a_context_that_other_data_lack_is_none_and_not_another_column(folder):
    trained = read_examples(write(folder, questions(hint=lambda i: "h", answer=lambda i: "abcd"[i % 4])))
    from vqa_sft.data.columns import known_columns

    test = other(folder, trained, questions(passage=lambda i: "p"), known_columns=known_columns(trained.columns, None))
    assert {*test.examples["context"]} == {""} and any("no column hint" in note for note in test.notes)


def test_a_template_of_ids_holds_for_data_whose_ids_have_another_name():
    names = ["question_id", "question", "a", "b", "answer"]
    assert are_here({"image": "{id}.png"}, names) == {"image": "{id}.png"}
    assert are_here({"image": "{stem}.png", "question": "ask"}, names) == {}


def test_two_columns_of_answers_stop_other_data_although_training_had_one(folder):
    trained = read_examples(write(folder, questions(label=lambda i: "abcd"[i % 4])))
    rows = questions(label=lambda i: "abcd"[i % 4], answer=lambda i: "bcda"[i % 4])
    with pytest.raises(InputError, match="label"):
        other(folder, trained, rows)


def test_labels_that_training_left_out_are_left_out_where_other_rows_have_them(folder):
    rows = [{"question": "?", "a": "A. cat", "b": "B. dog", "answer": "ab"[i % 2]} for i in range(6)]
    trained = read_examples(write(folder, rows))
    assert trained.columns.has_labels and trained.examples["choices"][0] == ["cat", "dog"]
    test = other(folder, trained, [*rows[:3], rows[3] | {"a": "cat", "b": "dog"}])
    assert test.examples["choices"][:] == [["cat", "dog"]] * 4


@pytest.mark.parametrize(
    ("cells", "written"), [("ABAB", "A"), (["A. cat", "B. dog"] * 2, "A"), ("가나가나", "A"), ("abab", "a")]
)
def test_the_letter_case_of_answers_is_that_of_their_labels(folder, cells, written):
    from vqa_sft.data.cells import write_answer

    rows = [{"question": f"{i}?", "a": "cat", "b": "dog", "answer": cells[i]} for i in range(4)]
    columns = read_examples(write(folder, rows)).columns
    assert write_answer(0, ["cat", "dog"], columns.answer_format, columns.answers_are_upper) == written


def test_one_answer_in_the_first_rows_of_a_longer_stream_is_an_answer(folder):
    rows = [{"question": f"{i}?", "a": "x", "b": "y", "answer": "ab"[i >= 1_100]} for i in range(1_200)]
    file = write(folder, rows)
    examples = stream_examples(file, ReadOptions(columns={"image": []}, answers="optional")).examples
    assert [row["answer"] for row in examples] == [0] * 1_100 + [1] * 100


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_images_that_are_never_opened_are_guessed_and_marked_too(run, folder, streaming):
    rows = questions(
        4, id=lambda i: f"r{i}", image=lambda i: ["https://x.org/1.png", "../../1.png", "0.png", "0002.png"][i]
    )
    write_csv(folder / "web.csv", rows)
    found = predict(run, folder / "web.csv", folder / "out.csv", "--on_bad_row", "guess", *streaming)
    assert found.blanked == [True, True, True, False]


def test_a_row_that_is_left_out_sets_no_number_of_letters(sft, contest, families, tmp_path):
    rows = [json.loads(line) for line in as_lines(contest).splitlines()]
    rows[3]["choices"] = [f"x{i}" for i in range(30)]
    (contest / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"train_data": contest / "train.jsonl", "on_bad_row": "skip", "max_choices": 4, "max_steps": 1}
    run = sft(families("qwen2_5_vl"), tmp_path / "run", **how)
    assert json.loads((run / "run.json").read_text())["num_letters"] == 4


def as_lines(contest):
    import csv

    with (contest / "train.csv").open() as file:
        rows = [row | {"choices": [row[letter] for letter in "abcd"]} for row in csv.DictReader(file)]
    rows = [{key: cell for key, cell in row.items() if key not in {*"abcd"}} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_of_answers_with_equal_ids_are_refused(run, folder, tmp_path):
    from vqa_sft.predictions.matched import read_rows

    rows = [{"id": "r0", "question": "?", "a": "x", "b": "y", "answer": answer} for answer in "ab"]
    with pytest.raises(InputError, match="ids more than once"):
        read_rows(write(folder, rows), None)


def test_labels_that_are_not_those_of_their_places_stop(folder):
    rows = [{"question": f"{i}?", "a": "(B) dog", "b": "(A) cat", "answer": "ab"[i % 2]} for i in range(4)]
    with pytest.raises(InputError, match="not with that of its own place in rows number 0"):
        read_examples(write(folder, rows))


def test_answers_that_read_like_no_answer_are_choices_where_these_say_so(folder):
    rows = [{"question": f"{i}?", "a": "None", "b": "One", "answer": "None"} for i in range(4)]
    assert answers(read_examples(write(folder, rows))) == [0] * 4


def test_an_ambiguity_is_named_where_the_format_of_training_reads_nothing(folder):
    trained = read_examples(write(folder, questions(answer=lambda i: "abcd"[i % 4])))
    with pytest.raises(InputError, match="index_from_0.*index_from_1"):
        other(folder, trained, questions(answer=lambda i: i % 3 + 1))


def test_a_format_in_which_answers_are_to_be_written_need_not_be_that_of_the_data(folder):
    rows = questions(answer=lambda i: "abcd"[i % 4])
    loaded = read_examples(write(folder, rows), ReadOptions(answers="optional", answer_format="text"))
    assert answers(loaded) == [0, 1, 2, 3] * 2 and any("they are read as letter" in note for note in loaded.notes)


def test_an_image_in_json_may_be_written_as_datasets_writes_it(folder):
    rows = [
        row | {"image": {"path": f"{i:04d}.png", "bytes": None}}
        for i, row in enumerate(questions(answer=lambda i: "a"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = read_examples(str(folder / "rows.jsonl")).examples["images"]
    assert [image[0]["path"] for image in images] == [str(folder / f"{i:04d}.png") for i in range(8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        ("<!DOCTYPE html><p>", "page of the web"),
    ],
)
def test_what_is_no_data_is_said(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_examples(str(tmp_path / "x.csv"))


def test_mail_in_iso_2022_is_not_read_as_ascii(folder):
    file = write(folder, questions(answer=lambda i: "abcd"[i % 4]))
    text = (folder / "rows.csv").read_text().replace("cat", "\u732b")
    (folder / "rows.csv").write_bytes(text.encode("iso2022_jp"))
    with pytest.raises(InputError, match="encoding: iso2022_jp"):
        read_examples(file)
    assert read_examples(file, ReadOptions(encoding="iso2022_jp")).examples[0]["choices"][0] == "\u732b"


def test_a_format_that_training_could_not_tell_is_not_believed_where_it_matters(folder):
    def numbers(order, name):
        rows = [
            {"question": f"{i}?"} | dict(zip("abcd", order, strict=True)) | {"answer": order[i % 4]} for i in range(16)
        ]
        return write(folder, rows, name)

    trained = read_examples(numbers([1, 2, 3, 4], "train.csv")).columns
    assert {trained.answer_format, *trained.other_formats} == {"index_from_1", "text"}
    with pytest.raises(InputError, match="index_from_1 or text|text or index_from_1"):
        read_examples(numbers([4, 3, 2, 1], "test.csv"), ReadOptions(answers="optional", trained=trained))
    assert (
        answers(read_examples(numbers([1, 2, 3, 4], "same.csv"), ReadOptions(answers="optional", trained=trained)))
        == [0, 1, 2, 3] * 4
    )
