"""Inputs as people have them, and what is right for each: a table that test_cases.py goes through.

Case(rows, answers=[...])       rows that are read so, whatever is noted
Case(rows, refused=("a", "b"))  a refusal whose message holds these words
`warns` are words of the warnings of `vqa-sft check`, `notes` of what is printed, `choices` those of the first row.
"""

import csv
import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

PETS = ["cat", "dog", "fox", "owl"]
NUM_IMAGES = 12


@dataclass(frozen=True)
class Case:
    rows: list[dict] | str  # a str is the text of a file
    options: dict[str, Any] = field(default_factory=dict)  # of a recipe
    answers: list[int] | None = None
    choices: list[str] | None = None
    refused: tuple[str, ...] = ()
    warns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    suffix: str = ".csv"
    encoding: str = "utf-8"


def row(i, question="Which is it?", **cells):
    return {"id": f"r{i}", "image": f"img/{i % NUM_IMAGES}.png", "question": question, **cells}


def four(i, words, **cells):
    return row(i, **dict(zip("abcd", words, strict=True)), **cells)


def listed(i, **cells):
    return row(i, f"Which, {i}?", **cells)


TURNS = [[1, 2, 3, 4], [2, 1, 4, 3], [3, 4, 1, 2], [4, 3, 2, 1], [2, 3, 4, 1], [1, 3, 2, 4], [4, 1, 3, 2], [3, 1, 4, 2]]
COUNTS = [
    four(i, turn, answer=right) for i, (turn, right) in enumerate(zip(TURNS, [3, 1, 4, 2, 1, 4, 2, 3], strict=True))
]
KEYED = {
    str(i): {"image": f"img/{i}.png", "question": f"Which, {i}?", "choices": PETS[:3], "answer": i % 3}
    for i in range(9)
}
IN_TEXT = [row(i, f"Which, {i}?\nA. cat\nB. dog\nC. fox\nD. owl", answer="ABCD"[i % 4]) for i in range(8)]

CASES = {
    # How answers are written
    "counts that are texts or places": Case(COUNTS, refused=("text", "index_from_1", "answer_format")),
    "counts, and one row that no text answers": Case(
        COUNTS + [four(8, [5, 6, 7, 8], answer=4)], refused=("text", "index_from_1")
    ),
    "counts, said to be texts": Case(COUNTS, {"answer_format": "text"}, answers=[2, 1, 1, 2, 3, 3, 3, 0]),
    "two columns of answers": Case(
        [four(i, PETS, label=i % 2, correct_answer="ab"[i // 2 % 2]) for i in range(8)],
        refused=("label", "correct_answer"),
    ),
    "small letters": Case([four(i, PETS, answer="abcd"[i % 4]) for i in range(8)], answers=[0, 1, 2, 3] * 2),
    "circled numbers": Case([four(i, PETS, answer="①②③④"[i % 4]) for i in range(8)], answers=[0, 1, 2, 3] * 2),
    "Korean numbers": Case([four(i, PETS, answer=f"{i % 4 + 1}번") for i in range(8)], answers=[0, 1, 2, 3] * 2),
    "Option A": Case([four(i, PETS, answer=f"Option {'ABCD'[i % 4]}") for i in range(8)], answers=[0, 1, 2, 3] * 2),
    "a dotted capital I": Case(
        [four(i, PETS, answer="abcd"[i % 4] if i else "\u0130") for i in range(8)],
        refused=("r0", "none of the choices"),
    ),
    # Choices that refer
    "both A and B": Case(
        [four(i, ["cat", "dog", "Both A and B", "None of the above"], answer="abcd"[i % 4]) for i in range(8)],
        answers=[0, 1, 2, 3] * 2,
        warns=("shuffl",),
    ),
    "letters that stand in the image": Case(
        [row(i, "Which figure fits?", choices='["A", "B", "C", "D"]', answer="ABCD"[i % 4]) for i in range(8)],
        answers=[0, 1, 2, 3] * 2,
        warns=("shuffl",),
    ),
    "choices with their labels": Case(
        [row(i, A="A. cat", B="B. dog", C="C. fox", answer="ABC"[i % 3]) for i in range(9)],
        answers=[0, 1, 2] * 3,
        choices=PETS[:3],
        notes=("labels",),
    ),
    # Cells
    "NaN beside words": Case(
        [row(i, a="cat", b="dog", c="NaN" if i % 2 else "fox", answer="ab"[i % 2]) for i in range(8)],
        answers=[0, 1] * 4,
        warns=("NaN",),
    ),
    "a column E that is no choice": Case(
        [four(i, PETS, E=i * 0.5, answer="abcd"[i % 4]) for i in range(8)],
        answers=[0, 1, 2, 3] * 2,
        choices=PETS,
        warns=("E",),
    ),
    "choices in brackets": Case(
        [listed(i, options="(a) Open (b) Closed", answer=["(a)", "(b)"][i % 2]) for i in range(8)],
        answers=[0, 1] * 4,
        choices=["Open", "Closed"],
    ),
    "choices between semicolons": Case(
        [listed(i, options="cat;dog;fox", answer="abc"[i % 3]) for i in range(9)],
        answers=[0, 1, 2] * 3,
        choices=PETS[:3],
    ),
    "choices as objects with labels": Case(
        [
            listed(
                i, options=[{"label": x, "text": w} for x, w in zip("AB", PETS[:2], strict=True)], answer="AB"[i % 2]
            )
            for i in range(8)
        ],
        answers=[0, 1] * 4,
        choices=PETS[:2],
        suffix=".jsonl",
    ),
    "answers in lists": Case(
        [listed(i, choices=PETS[:3], answer=["ABC"[i % 3]]) for i in range(9)],
        answers=[0, 1, 2] * 3,
        suffix=".jsonl",
    ),
    "choices as numpy prints them": Case(
        [listed(i, choices="['cat' 'dog' 'fox']", answer="abc"[i % 3]) for i in range(9)],
        answers=[0, 1, 2] * 3,
        choices=PETS[:3],
    ),
    # Constants, and choices in the question
    "yes or no": Case(
        [{"image": f"img/{i}.png", "text": f"Is it bright, {i}?", "label": ["yes", "no"][i % 2]} for i in range(8)],
        {"columns": {"question": "text", "answer": "label"}, "fixed_choices": ["yes", "no"]},
        answers=[0, 1] * 4,
    ),
    "labels of images": Case(
        [{"image": f"img/{i}.png", "label": PETS[i % 4]} for i in range(8)],
        {"fixed_question": "Which animal?", "fixed_choices": PETS},
        answers=[0, 1, 2, 3] * 2,
    ),
    "choices in the question": Case(
        IN_TEXT, {"columns": {"choices": "in_question"}}, answers=[0, 1, 2, 3] * 2, choices=PETS, notes=("cat",)
    ),
    "choices in the question, not said": Case(IN_TEXT, refused=("choices", "in_question")),
    "a path of the id": Case(
        [{"id": i, "question": f"Which, {i}?", "a": "cat", "b": "dog", "answer": "ab"[i % 2]} for i in range(8)],
        {"columns": {"image": "img/{id}.png"}},
        answers=[0, 1] * 4,
    ),
    # Files
    "Chinese in GBK": Case(
        [four(i, ["红", "黄", "蓝", "绿"], answer="abcd"[i % 4]) for i in range(8)],
        refused=("encoding",),
        encoding="gbk",
    ),
    "Chinese in GBK, said": Case(
        [four(i, ["红", "黄", "蓝", "绿"], answer="abcd"[i % 4]) for i in range(8)],
        {"encoding": "gbk"},
        answers=[0, 1, 2, 3] * 2,
        choices=["红", "黄", "蓝", "绿"],
        encoding="gbk",
    ),
    "Latin-1": Case(
        [four(i, ["café", "thé", "crème", "eau"], answer="abcd"[i % 4]) for i in range(8)],
        refused=("encoding",),
        encoding="latin-1",
    ),
    "one object keyed by id": Case(json.dumps(KEYED, indent=1), answers=[0, 1, 2] * 3, suffix=".json"),
    "a list under one key": Case(
        json.dumps({"version": 1, "questions": [{"id": key, **value} for key, value in KEYED.items()]}),
        answers=[0, 1, 2] * 3,
        suffix=".json",
    ),
    "lines in a .json file": Case(
        "".join(json.dumps({"id": key, **value}) + "\n" for key, value in KEYED.items()),
        answers=[0, 1, 2] * 3,
        suffix=".json",
    ),
}


def write(case: Case, folder, name="data", rows=None):
    """The case's file in a folder with its images; `rows` in place of its own. Returns the path."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for i in range(NUM_IMAGES):
        path = folder / f"img/{i}.png"
        if not path.exists():
            Image.effect_noise((64, 64), 30 + 15 * i).convert("RGB").save(path)
    path, rows = folder / f"{name}{case.suffix}", case.rows if rows is None else rows
    if isinstance(rows, str):
        path.write_text(rows, encoding=case.encoding)
    elif case.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding=case.encoding)
    else:
        with path.open("w", newline="", encoding=case.encoding) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
