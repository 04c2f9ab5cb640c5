import pytest

from vqa_sft.data.answers import FORMATS, infer_format
from vqa_sft.data.cells import is_upper_case, read_answer, unwrap, write_answer
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
        ("B)", "letter", 1),
        ("[c]", "letter", 2),
        ("Option B", "letter", 1),
        ("option_a", "letter", 0),
        ("The answer is (C).", "letter", 2),
        ("정답: 나", "letter", 1),
        ("(다)", "letter", 2),
        ("Ｂ", "letter", 1),
        ("B. dog", "letter", 1),
        ("b) DOG", "letter", 1),
        ("B. cat", "letter", None),
        ("B. dog", "text", 1),
        ('["A"]', "letter", 0),
        ("['dog']", "text", 1),
        ("['A', 'B']", "letter", None),
        ("②", "index_from_1", 1),
        ("②", "index_from_0", None),
        ("②", "letter", None),
        ("3번", "index_from_1", 2),
        ("27번", "index_from_1", None),
        ("2. dog", "index_from_1", 1),
        ("1. dog", "index_from_1", None),
        ("Option 2", "index_from_1", 1),
        ("２", "index_from_0", 2),
        *((text, answer_format, None) for text in ("İ", "ı", "ß", "ſ", "K", "ﬀ", "ㄲ") for answer_format in FORMATS),
    ],
)
def test_an_answer_is_read_in_its_format(cell, answer_format, index):
    assert read_answer(cell, CHOICES, answer_format) == index


@pytest.mark.parametrize(
    ("cell", "choices", "index"),
    [
        ("True", ["yes", "no"], 0),
        ("False", ["Yes", "No"], 1),
        ("1", ["No", "Yes"], 1),
        ("true", ["False", "True"], 1),
        ("True", ["O", "X"], 0),
        ("no", ["true", "false"], 1),
        ("True", ["cat", "dog"], None),
        ("True", ["yes", "no", "unknown"], None),
        ("3.0", ["1", "3", "2"], 1),
        ("3", ["2.0", "3.0"], 1),
        ("Us", ["us", "US"], None),
        ("us", ["US", "us"], 1),
        ("e\u0301te", ["hiver", "\u00e9te"], 1),
    ],
)
def test_a_text_is_compared_by_what_it_says(cell, choices, index):
    assert read_answer(cell, choices, "text") == index


@pytest.mark.parametrize(
    ("cell", "inner"),
    [
        (["A"], "A"),
        ([2], 2),
        ('["A"]', "A"),
        ("[2]", 2),
        (["A", "B"], ["A", "B"]),
        ("[A", "[A"),
        ("[A]", "[A]"),
        ([["A"]], [["A"]]),
        ("[" * 3_000, "[" * 3_000),
        (None, None),
    ],
)
def test_what_stands_alone_in_a_list_is_taken_out(cell, inner):
    assert unwrap(cell) == inner


@pytest.mark.parametrize("answer_format", FORMATS)
def test_a_written_answer_is_read_back(answer_format):
    for choice in range(3):
        assert read_answer(write_answer(choice, CHOICES, answer_format, False), CHOICES, answer_format) == choice
    assert write_answer(1, CHOICES, "letter", True) == "B"


@pytest.mark.parametrize(
    ("cells", "answer_format"),
    [
        (["a", "B", "c"], "letter"),
        (["0", "1", "2"] * 3, "index_from_0"),
        (["1", "2", "3"] * 3, "index_from_1"),
        (["①", "②", "③"], "index_from_1"),
        (["1번", "2번", "1번"], "index_from_1"),
        (["dog", "cat", "Fox"], "text"),
        (["a", "b", "z", "", "c"], "letter"),
        (["0", "0", "0", "1", "9"], "index_from_0"),
        (["A", "B. dog", "Option C", "가"], "letter"),
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
    assert "answer '1' of ['cat', 'dog', 'Fox'] is choice 2 (index_from_0) or 1 (index_from_1)" in message
    assert message.endswith("Set answer_format to one of index_from_0, index_from_1.")


def test_a_stray_row_does_not_decide_between_counting_from_0_and_from_1():
    with pytest.raises(InputError, match="index_from_0 .3 of 4 rows. and index_from_1 .2 of 4"):
        infer_format([(cell, CHOICES) for cell in ("0", "0", "1", "3")])


TURNS = [["1", "2", "3", "4"], ["2", "1", "4", "3"], ["3", "4", "1", "2"], ["4", "3", "2", "1"]]


@pytest.mark.parametrize(
    "odd", [[], [("4", ["5", "6", "7", "8"])], [("x", TURNS[0])], [("9", ["9", "1", "2", "3"])] * 2]
)
def test_every_format_that_is_left_is_named_whatever_one_or_two_odd_rows_say(odd):
    rows = list(zip("31421423", TURNS * 2, strict=True)) + odd
    with pytest.raises(InputError) as error:
        infer_format(rows)
    message = str(error.value)
    for name in ("text", "index_from_1"):
        assert f"{name} (" in message.partition(":")[0] and name in message.partition("Set answer_format")[2]
    assert "is choice" in message and "letter" not in message


@pytest.mark.parametrize(("num_rows", "odd"), [(20, 3), (1_000, 10)])
def test_three_rows_and_one_in_a_hundred_that_only_another_format_reads_rule_a_format_out(num_rows, odd):
    rows = [("2", ["1", "2", "3"]), ("1", ["3", "2", "1"])] * ((num_rows - odd) // 2)
    only_text = ("9", ["9", "8", "7"])
    assert infer_format(rows + [only_text] * (num_rows - len(rows))) == "text"
    with pytest.raises(InputError, match="text .*index_from_1"):
        infer_format(rows + [only_text] * (odd - 1))


def test_one_row_rules_a_format_out_where_no_row_may_be_odd():
    assert infer_format([(cell, CHOICES) for cell in "021"], may_be_odd=False) == "index_from_0"


def test_numbers_of_yes_and_no_may_mean_truth_or_place():
    with pytest.raises(InputError, match="index_from_0 .*text .*is choice 1 .index_from_0. or 2 .text."):
        infer_format([(str(i % 2), ["yes", "no"]) for i in range(100)])
    assert infer_format([(str(i % 2), ["no", "yes"]) for i in range(100)]) in ("index_from_0", "text")
    rows = [(str(i % 4), ["cat", "dog", "fox", "owl"]) for i in range(100)]
    assert infer_format([*rows, ("0", ["yes", "no"]), ("1", ["yes", "no"])]) == "index_from_0"


def test_numbers_as_choices_make_an_index_ambiguous_unless_they_agree():
    with pytest.raises(InputError, match="can be read as"):
        infer_format([("2", ["1", "2", "3"]), ("1", ["3", "2", "1"])])
    assert infer_format([("1", ["0", "1", "2"]), *[("0", ["0", "1", "2"])] * 3]) == "index_from_0"


def test_letters_as_choices_are_ambiguous_only_where_they_disagree():
    assert infer_format([("a", ["a", "b"]), ("b", ["a", "b"])]) == "letter"
    with pytest.raises(InputError, match="as letter .1 of 1 rows. and text"):
        infer_format([("a", ["b", "a"])])


def test_the_case_of_letters_is_that_of_most_whatever_stands_around_them():
    assert is_upper_case(["Option A", "(B)", "c"]) and not is_upper_case(["answer: b", "가", "İ"])
