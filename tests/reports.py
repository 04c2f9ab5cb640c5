"""What `vqa-sft check` finds in a file of training rows."""

from contest import noise, rows_of, write_csv

from vqa_sft.data.check import TRAINING, check
from vqa_sft.data.examples import read_examples


def report_on(path, **checks):
    return check([(TRAINING, read_examples(str(path)))], distance=None, **checks)[0]


def found(report):
    """Kind of problem -> labels."""
    return {problem.kind: [label for _, _, label in problem.rows] for problem in report.problems}


def make_faulty(contest):
    """24 rows, of which 3 cannot be used and 2 more have choices that are equal."""
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    rows[1] |= {"answer": "z", "question": "How many <script>alert(1)</script> & <b>tags</b>?"}
    rows[2] |= {"path": "images/nowhere.png", "a": '=HYPERLINK("http://evil.example","x")', "answer": "a"}
    rows[3]["path"] = "../outside.png"
    rows[4] |= {"a": "same", "b": "same"}
    rows[5] |= {"a": "같은", "b": "같은", "question": "여기는 어디인가요?"}
    rows[6]["question"] = "Over \x1b[31mred\x1b[0m and \u202eright\nWhere?"
    noise(contest.parent / "outside.png", 99)
    write_csv(contest / "train.csv", rows)
    return contest
