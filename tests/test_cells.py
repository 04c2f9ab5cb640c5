import pytest

from vqa_sft.cells import read_label, split_labelled


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
