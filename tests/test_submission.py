import pytest
from test_predictions import THREE

from vqa_sft.columns import Columns
from vqa_sft.submission import write_submission

CHOICES = [["cat", "dog"], ["1", "2", "3"], ["yes", "no"]]


@pytest.mark.parametrize(
    ("answer_format", "is_upper", "answers"),
    [
        (None, False, "aba"),
        ("letter", True, "ABA"),
        ("index_from_0", False, "010"),
        ("index_from_1", False, "121"),
        ("text", False, ["cat", "2", "yes"]),
    ],
)
def test_a_submission_is_written_as_the_data_write_their_answers(tmp_path, answer_format, is_upper, answers):
    columns = Columns("key", ("path",), "question", ("a", "b", "c"), "label", None, answer_format, is_upper)
    write_submission(tmp_path / "s.csv", THREE, columns, CHOICES)
    lines = [f"{row_id},{answer}" for row_id, answer in zip("xyz", answers, strict=True)]
    assert (tmp_path / "s.csv").read_text().splitlines() == ["key,label", *lines]
