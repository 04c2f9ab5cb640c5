import json

import pytest

from vqa_sft.data.columns import Columns, check_columns, known_columns
from vqa_sft.data.find_columns import find_columns, find_others
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.settle_columns import is_sparse, is_stray
from vqa_sft.errors import InputError


def found(names, answers="required", **given):
    return find_columns(names.split(), given, ReadOptions(answers=answers))


@pytest.mark.parametrize(
    ("names", "image", "question", "choices", "answer"),
    [
        ("id path question a b c d answer", ("path",), "question", ("a", "b", "c", "d"), "answer"),
        ("index image question A B C answer", ("image",), "question", ("A", "B", "C"), "answer"),
        ("qid img_path query option1 option2 label", ("img_path",), "query", ("option1", "option2"), "label"),
        ("id file_name Question choice_0 choice_1 gt", ("file_name",), "Question", ("choice_0", "choice_1"), "gt"),
        ("id img q choice_a choice_b choice_c target", ("img",), "q", ("choice_a", "choice_b", "choice_c"), "target"),
        ("id Image Question Options Answer", ("Image",), "Question", "Options", "Answer"),
        ("id image_1 image_2 question options answer", ("image_1", "image_2"), "question", "options", "answer"),
        ("id imagename question a b ans", ("imagename",), "question", ("a", "b"), "ans"),
        ("id figure_path ques a b Answer_Key", ("figure_path",), "ques", ("a", "b"), "Answer_Key"),
        ("id img_name problem mc_choices answer_letter", ("img_name",), "problem", "mc_choices", "answer_letter"),
        ("id image question a b c d E answer", ("image",), "question", ("a", "b", "c", "d", "E"), "answer"),
        ("id image question a b A B answer", ("image",), "question", ("a", "b"), "answer"),
        ("번호 이미지 질문 보기1 보기2 정답", ("이미지",), "질문", ("보기1", "보기2"), "정답"),
    ],
)
def test_usual_names_are_found_without_being_told(names, image, question, choices, answer):
    columns = found(names)
    assert (columns.image, columns.question) == (image, question)
    assert (columns.choices, columns.answer) == (choices, answer)


def test_images_themselves_are_found_before_paths():
    names = ["id", "path", "decoded_image", "question", "a", "b", "answer"]
    columns = find_columns(names, {}, images=["decoded_image"])
    assert columns.image == ("decoded_image",)


def test_other_columns_with_usual_names_are_found_unless_they_are_used_or_given():
    names = ["id", "image", "file_name", "question", "query", "a", "b", "label", "answer", "hint"]
    columns = find_columns(names, {"context": None, "targets": "label"})
    assert find_others(names, columns, {"context": None, "targets": "label"}) == {
        "image": ["file_name"],
        "question": ["query"],
    }
    assert "answer" not in find_others(names, find_columns(names, {"answer": "label"}), {"answer": "label"})


WORDS = ["cat", "dog", "fox"]


@pytest.mark.parametrize(
    ("last", "cells", "stray"),
    [
        (["1", "2", "3"], "abc", True),
        (["0.5", "1e-3", "12%"], "abc", True),
        (["1", "2", "nan"], "abc", False),  # two numbers
        (["1", "2", "ant"], "abc", False),
        (["1", "2", "3"], "abd", False),  # the answer
        (["1", "2", "3"], ["cat", "dog", "3"], False),
        (["1", "2", "3"], ["", "", ""], True),
        (["", "", ""], "abc", False),
    ],
)
def test_a_column_of_numbers_beside_words_that_is_never_the_answer_is_no_choice(last, cells, stray):
    assert is_stray(lambda: zip(cells, [[*WORDS, text] for text in last], strict=True), False) == stray


def test_a_column_that_few_rows_fill_is_sparse_unless_it_is_an_answer():
    rows = [("a", [*WORDS, "ant" if i == 50 else ""]) for i in range(100)]
    assert is_sparse(lambda: iter(rows)) and not is_sparse(lambda: iter(rows[45:60]))
    assert not is_sparse(lambda: iter([*rows, ("d", [*WORDS, "bee"])]))


def test_a_given_column_wins_over_a_usual_name():
    columns = found("id path image question a b answer label", image="image", answer="label", choices=["b", "a"])
    assert (columns.image, columns.answer, columns.choices) == (("image",), "label", ("b", "a"))


def test_rows_without_an_id_column_are_named_by_their_number():
    assert found("path question a b answer").id is None
    assert found("id path question a b answer", id=None).id is None


def test_a_context_is_found_and_can_be_refused():
    assert found("id path question hint a b answer").context == "hint"
    assert found("id path question hint a b answer", context=None).context is None


def test_choice_columns_that_leave_a_letter_out_are_an_error():
    with pytest.raises(InputError, match="a, b, d leave one out"):
        found("id path question a b d answer")
    with pytest.raises(InputError, match="option1, option2, option4 leave one out"):
        found("id path question option1 option2 option4 answer")


def test_a_column_x_far_from_the_choices_is_no_choice():
    assert found("id path question a b x y answer").choices == ("a", "b")


def test_everything_that_is_missing_is_said_at_once_with_what_there_is():
    with pytest.raises(InputError) as error:
        found("key photograph text")
    message = str(error.value)
    for part in ("question (usual names", "image (usual names", "choices (usual names", "answer (usual names"):
        assert part in message
    assert "The data has: key, photograph, text" in message


def test_a_test_set_needs_no_answers():
    assert found("id path question a b", answers="optional").answer is None


def test_pictures_can_be_declared_absent():
    assert found("id question a b answer", image=[]).image == ()


def test_more_columns_than_letters_and_single_choices_are_errors():
    names = " ".join(f"option{i}" for i in range(1, 28))
    with pytest.raises(InputError, match="at most 26 choices have letters; got 27"):
        found(f"id path question answer {names}")
    with pytest.raises(InputError, match="at least two choices; got the column a alone"):
        found("id path question a answer")


@pytest.mark.parametrize("given", [{"picture": "x"}, {"question": 3}, {"choices": [1]}, {"question": None}])
def test_what_cannot_stand_under_columns_is_refused(given):
    with pytest.raises(InputError, match="columns"):
        check_columns(given)


def test_other_data_of_a_run_are_read_with_its_context_or_none():
    assert known_columns(found("id path question hint a b answer"), None) == {"context": "hint"}
    assert known_columns(found("id path question a b answer"), {"id": "key"}) == {
        "context": None,
        "id": "key",
    }


def test_columns_survive_run_json():
    columns = found("id image_1 image_2 question a b answer")
    assert Columns(**json.loads(json.dumps(vars(columns)))) == columns
