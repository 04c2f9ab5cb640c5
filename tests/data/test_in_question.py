import pytest

from vqa_sft.data.in_question import split_choices


@pytest.mark.parametrize(
    ("question", "stem", "choices"),
    [
        ("Which?\nA. cat\nB. dog", "Which?", ["cat", "dog"]),
        ("How many triangles? Select answers from A-D. \n A) 10 B) 12 C) 14 D) 16", None, ["10", "12", "14", "16"]),
        ("Which?\n- A. cat\n- B. dog", "Which?", ["cat", "dog"]),
        ("Which?\nA. cat\nB. dog\nUse the map.", "Which?\nUse the map.", ["cat", "dog"]),
        ("어느 것인가요?\n① 고양이\n② 개", "어느 것인가요?", ["고양이", "개"]),
    ],
)
def test_choices_written_in_a_question_are_taken_out_of_it(question, stem, choices):
    found = split_choices(question)
    assert found[1] == choices
    assert stem is None or found[0] == stem


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("What choice (A, B, C, or D) should be in place of the question mark?", "ABCD"),
        ("Which choices in the image (A-D) belong to the green category?", "ABCD"),
        ("Which of the proposals A, B, C or D completes the diagrams?", "ABCD"),
        ("Who is the odd-one-out? Select answers from A-I", "ABCDEFGHI"),
        ("Select which of options A to F corresponds to the rule.", "ABCDEF"),
        ("Which is the correct answer according to the image? Select from 1-5", "12345"),
        ("Choose from 1, 2 and 3.", "123"),
        ("Which of A/B/C is larger?", "ABC"),
    ],
)
def test_choices_that_a_question_only_names_are_their_letters_or_numbers(question, choices):
    assert split_choices(question) == (question, [*choices])


@pytest.mark.parametrize(
    "question",
    [
        "How many cats are there?",
        "Is there a number from 1 to 5 on the wall?",
        "Is A larger than C?",
        "Which of A, C and D fits?",
        "Select from A-D, or from A-E if it is red.",
        "A cat or a dog?",
        "Vitamin A-rich food?",
        "",
    ],
)
def test_a_question_without_choices_has_none(question):
    assert split_choices(question) == (question, None)
