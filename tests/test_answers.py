import pytest

from vqa_sft.answers import FORMATS, infer_format, read_answer, write_answer
from vqa_sft.errors import InputError

CHOICES = ["cat", "dog", "Fox"]


@pytest.mark.parametrize(
    ("cell", "answer_format", "index"),
    [
        ("b", "letter", 1),
        ("(C)", "letter", 2),
        ("A.", "letter", 0),
        ("d", "letter", None),
        ("bc", "letter", None),
        ("0", "index_from_0", 0),
        ("2.0", "index_from_0", 2),
        ("3", "index_from_0", None),
        ("-1", "index_from_0", None),
        ("3", "index_from_1", 2),
        ("0", "index_from_1", None),
        ("٣", "index_from_0", None),
        ("dog", "text", 1),
        ("FOX", "text", 2),
        ("", "text", None),
        ("do", "text", None),
    ],
)
def test_an_answer_is_read_in_its_format(cell, answer_format, index):
    assert read_answer(cell, CHOICES, answer_format) == index


@pytest.mark.parametrize("answer_format", FORMATS)
def test_a_written_answer_is_read_back(answer_format):
    for choice in range(3):
        assert read_answer(write_answer(choice, CHOICES, answer_format, False), CHOICES, answer_format) == choice
    assert write_answer(1, CHOICES, "letter", True) == "B"


@pytest.mark.parametrize(
    ("cells", "answer_format"),
    [
        (["a", "B", "c"], "letter"),
        (["0", "1", "2"], "index_from_0"),
        (["1", "2", "3"], "index_from_1"),
        (["dog", "cat", "Fox"], "text"),
        (["a", "b", "z", "", "c"], "letter"),
        (["0", "0", "0", "1", "9"], "index_from_0"),
        ([""], "letter"),
        (["?"], "letter"),
    ],
)
def test_the_format_that_fits_most_rows_is_inferred(cells, answer_format):
    assert infer_format([(cell, CHOICES) for cell in cells]) == answer_format


def test_an_index_that_may_count_from_0_or_1_is_an_error_with_the_evidence():
    with pytest.raises(InputError) as error:
        infer_format([("1", CHOICES), ("2", CHOICES)])
    message = str(error.value)
    assert "index_from_0 (2 of 2 rows) and index_from_1 (2 of 2 rows)" in message
    assert "answer '1' of ['cat', 'dog', 'Fox'] is choice 2 or 1" in message and "Set answer_format" in message


def test_a_stray_row_does_not_decide_between_counting_from_0_and_from_1():
    with pytest.raises(InputError, match="index_from_0 .3 of 4 rows. and index_from_1 .2 of 4"):
        infer_format([(cell, CHOICES) for cell in ("0", "0", "1", "3")])


def test_numbers_as_choices_make_an_index_ambiguous_unless_they_agree():
    with pytest.raises(InputError, match="can be read as"):
        infer_format([("2", ["1", "2", "3"]), ("1", ["3", "2", "1"])])
    assert infer_format([("1", ["0", "1", "2"]), ("0", ["0", "1", "2"])]) == "index_from_0"
    assert infer_format([("2", ["1", "2", "3"]), ("0", ["1", "2", "3"])]) == "index_from_0"


def test_letters_as_choices_are_ambiguous_only_where_they_disagree():
    assert infer_format([("a", ["a", "b"]), ("b", ["a", "b"])]) == "letter"
    with pytest.raises(InputError, match="as letter .1 of 1 rows. and text"):
        infer_format([("a", ["b", "a"])])
