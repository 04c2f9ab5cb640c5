import pytest

from vqa_sft.data.cells import read_label, read_list, split_labelled, split_text, strip_labels
from vqa_sft.data.settle_columns import find_split
from vqa_sft.errors import InputError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A. cat", (0, "cat")),
        ("(b) dog", (1, "dog")),
        ("3) 1", (2, "1")),
        ("②여우", (1, "여우")),
        ("（Ｃ）　owl", (2, "owl")),
        ("다. 새", (2, "새")),
        ("B.개", (1, "개")),
        ("[D] x", (3, "x")),
        ("C: red", (2, "red")),
        ("A.D.", None),
        ("1.5", None),
        ("1:30", None),
        ("A cat", None),
        ("a", None),
        ("A.", None),
        ("(A)", None),
        ("İ. x", None),
        ("0. x", None),
        ("ß) x", None),
        ("ㄲ. x", None),
        ("27) x", None),
        ("", None),
    ],
)
def test_a_label_before_a_text_says_its_place(text, found):
    assert read_label(text) == found


@pytest.mark.parametrize(
    ("text", "stem", "choices"),
    [
        ("Which?\nA. cat\nB. dog\nC. fox", "Which?", ["cat", "dog", "fox"]),
        ("(a) Open (b) Closed", "", ["Open", "Closed"]),
        ("Which is it? A) cat B) dog", "Which is it?", ["cat", "dog"]),
        ("Which?\r\nChoices:\r\n(A) 1\r\n(B) 2", "Which?", ["1", "2"]),
        ("어느 것?\n① 고양이 ② 개 ③ 새", "어느 것?", ["고양이", "개", "새"]),
        ("무엇인가요?\n가. 고양이\n나. 개", "무엇인가요?", ["고양이", "개"]),
        ("Which hold?\n1. It is red.\n2. It is big.\nA. 1 only\nB. both", "Which hold?\n1. It is red.\n2. It is big.")
        + (["1 only", "both"],),
        ("Which?\nA. cat (1) or\nkitten (2)\nB. dog", "Which?", ["cat (1) or\nkitten (2)", "dog"]),
        ("Which?\nA. cat\nB. dog\nAnswer with the letter.", "Which?\nAnswer with the letter.", ["cat", "dog"]),
        ("Which?\nA. cat\nB. dog\n\nLook closely.", "Which?\nLook closely.", ["cat", "dog"]),
        (
            "What did Dr. B. do?\nA. cat\nB. dog\nC. both A. and B.",
            "What did Dr. B. do?",
            ["cat", "dog", "both A. and B."],
        ),
    ],
)
def test_labelled_choices_are_split_from_the_text_before_them(text, stem, choices):
    assert split_labelled(text) == (stem, choices)


@pytest.mark.parametrize(
    "text",
    [
        "Which is it?",
        "A. cat",
        "Which?\nB. cat\nC. dog",
        "Which?\nA. cat\nC. dog",
        "Which?\nA. cat\nb. dog",
        "Which?\nA. cat\nB)",
        "Which of (A) and (B)? (A) cat (B) dog",
        "(A) cat (B) dog (C) both (A) and (B)",
        "Which is larger, ① or ②?",
        "Is (a) the same as (b) here?",
        "From 1.5 to 2.5, or 1:30 to 2:30?",
        "",
    ],
)
def test_a_text_whose_labels_may_mean_something_else_is_not_split(text):
    assert split_labelled(text) is None


@pytest.mark.parametrize(
    ("cell", "choices"),
    [
        ("['cat' 'dog']", ["cat", "dog"]),
        ("[1 2 3]", ["1", "2", "3"]),
        ("array(['cat', \"dog's\"], dtype=object)", ["cat", "dog's"]),
        ({"label": ["A", "B"], "text": ["cat", "dog"]}, ["cat", "dog"]),
        ({"options": ["cat", "dog"]}, ["cat", "dog"]),
        ({"option_a": "cat", "option_b": "dog"}, ["cat", "dog"]),
        ({0: "cat", 1: "dog"}, ["cat", "dog"]),
        ([{"A": "cat"}, {"B": "dog"}], ["cat", "dog"]),
        ([{"text": "cat"}, {"text": "dog"}], ["cat", "dog"]),
        ((("a", "cat"), ("b", "dog")), ["cat", "dog"]),
        ({"label": ["B", "A"], "text": ["cat", "dog"]}, None),  # an answer "A" may mean either
        ([{"label": "B", "text": "cat"}, {"label": "A", "text": "dog"}], None),
        ([{"id": 17, "text": "cat"}, {"id": 18, "text": "dog"}], None),
        ({"B": "cat", "A": "dog"}, None),
        ({"A": ["cat", "dog"]}, None),
        ("['cat' 'dog', 'fox']", None),  # Python would join the first two
        ("[red fox]", None),
        ("[" * 3_000, None),
        (7, None),
    ],
)
def test_a_list_is_read_in_its_spellings_and_only_where_its_order_is_certain(cell, choices):
    assert read_list(cell) == choices


@pytest.mark.parametrize(
    ("cells", "how", "first"),
    [
        (["(a) Open (b) Closed"] * 3, "labels", ["Open", "Closed"]),
        (["A. cat; B. dog"] * 3, "labels", ["cat", "dog"]),
        (["A. red; blue\nB. green; black"] * 3, "labels", ["red; blue", "green; black"]),
        (["cat; dog;", "fox;owl"], ";", ["cat", "dog"]),
        (["cat|dog", "fox | owl; bee", "x|y", "y|z"] * 3, "|", ["cat", "dog"]),
        (["cat\ndog"], "lines", ["cat", "dog"]),
        (["cat, dog"] * 3, None, None),
        ([["cat", "dog"], ["fox; owl", "bee"], "a; b"], None, None),
        ([None, ""], None, None),
    ],
)
def test_one_way_to_split_is_found_for_all_texts_of_a_column(cells, how, first):
    assert find_split(cells) == how
    assert how is None or split_text(cells[0], how) == first


def test_two_separators_that_mean_other_choices_are_both_named():
    for cells in (["cat; dog | fox; owl"] * 9, ["cat | dog"] * 2 + ["cat; dog | fox"]):
        with pytest.raises(InputError, match="by ';' .* and by '|' "):
            find_split(cells)


def test_labels_are_stripped_only_in_their_own_places():
    assert strip_labels(["A. cat", "", "C. dog"]) == ["cat", "", "dog"]
    assert strip_labels(["A. cat", "C. dog"]) is None and strip_labels(["A. cat", "dog"]) is None
