"""The page that `vqa-sft check --html` writes: plots, problems, and a wall of rows, in one self-contained file."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vqa_sft.data.check import Report
from vqa_sft.data.examples import CLASS
from vqa_sft.data.problems import KINDS
from vqa_sft.files import write_whole
from vqa_sft.images import ImageFacts, open_image
from vqa_sft.questions.letters import LETTERS
from vqa_sft.questions.types import TYPES
from vqa_sft.report.check_plots import make_plots
from vqa_sft.report.check_text import (
    quantile_rows,
    say_classes,
    say_count,
    say_formats,
    say_near,
    say_rows,
    say_tokens,
    say_verdict,
)
from vqa_sft.report.page import render

# On the wall: rows of every question type, and rows that are shown for their problems.
NUM_TRAINING_ROWS, NUM_OTHER_ROWS = (48, 24), (12, 12)
_PER_KIND = 3
_THUMBNAIL_PX, _SMALL_THUMBNAIL_PX = 256, 128  # the only image of a row; one of several
_MAX_THUMBNAILS = 4
PAGE_START = "<!DOCTYPE html>\n<!-- Written by vqa-sft check -->\n"


def write_page(path: str | Path, reports: Sequence[Report]) -> None:
    """One HTML file that needs nothing else: plots, problems, and a wall of rows. Written whole or not at all."""
    page = render(
        "check_page.html.j2",
        title=Path(reports[0].loaded.name).name,
        verdict=say_verdict(reports),
        clean=not any(report.num_bad for report in reports),
        sections=[
            _section(report, *(NUM_TRAINING_ROWS if report is reports[0] else NUM_OTHER_ROWS)) for report in reports
        ],
    )
    write_whole(path, PAGE_START + page)


def _section(report: Report, num_samples: int, num_problems: int) -> dict:
    of_row = _problems_of_rows(report)

    def cards(rows: Sequence[int]) -> list[dict]:
        return [_card(report, row, of_row) for row in rows]

    return {
        "heading": say_rows(report),
        "notes": report.loaded.notes,
        "plots": list(make_plots(report)),
        "facts": list(_facts(report)),
        "quantiles": quantile_rows(report),
        "problems": report.problems,
        "problem_cards": cards(choose_problem_rows(report, num_problems)),
        "samples": [
            (name, report.question_types[name], cards(rows)) for name, rows in choose_samples(report, num_samples)
        ],
    }


def _facts(report: Report) -> Iterator[str]:
    """Sentences for what needs no plot."""
    if report.class_rows is not None:
        yield f"Classes: {say_classes(report)}."
    elif report.skew is None:
        yield "No row has an answer."
    if len(report.num_choices) == 1 and report.class_rows is None:
        yield f"Every question has {next(iter(report.num_choices))} choices."
    if len(report.images_per_row) == 1:
        number = next(iter(report.images_per_row))
        yield f"Every row has {'one' if number == 1 else number or 'no'} image{'s' if number > 1 else ''}."
    named = say_formats(report)
    if named:
        yield f"{say_count(len(report.images), 'different image')} ({named}); {say_near(report)}."
    if report.tokens is None or not len(report.tokens):
        yield say_tokens(report)


def _problems_of_rows(report: Report) -> dict[int, dict[str, str]]:
    """Number of a row -> kinds of its problems -> what is wrong."""
    of_row: dict[int, dict[str, str]] = {}
    for found in report.problems:
        for number, row_id, label in found.rows:
            evidence = label.removeprefix(row_id or f"number {number}")
            of_row.setdefault(number, {})[found.kind] = found.what + evidence
    return of_row


def choose_problem_rows(report: Report, limit: int) -> list[int]:
    """A few rows of every kind of problem, as positions in the examples; errors first."""
    positions = {number: row for row, number in enumerate(report.loaded.numbers)}
    chosen: dict[int, None] = {}
    for found in report.problems:
        chosen |= dict.fromkeys(list(dict.fromkeys(positions[number] for number, _, _ in found.rows))[:_PER_KIND])
    return list(chosen)[:limit]


def choose_samples(report: Report, limit: int) -> list[tuple[str, list[int]]]:
    """Rows of every question type, evenly spaced over the data: every type gets as many, as far as it has them."""
    rows_of = {name: [] for name in TYPES}
    for row, name in enumerate(report.loaded.examples["question_type"]):
        rows_of[name].append(row)
    slots = dict.fromkeys(TYPES, 0)
    while limit and any(slots[name] < len(rows) for name, rows in rows_of.items()):
        for name, rows in rows_of.items():
            if limit and slots[name] < len(rows):
                slots[name] += 1
                limit -= 1
    spaced = {
        name: [rows[(2 * i + 1) * len(rows) // (2 * slots[name])] for i in range(slots[name])]
        for name, rows in rows_of.items()
    }
    return [(name, rows) for name, rows in spaced.items() if rows]


def _card(report: Report, row: int, problems_of: dict[int, dict[str, str]]) -> dict[str, Any]:
    """One row on the wall: what the template shows of it."""
    example, number = report.loaded.examples[row], report.loaded.numbers[row]
    problems = problems_of.get(number, {})
    facts = [report.scan.images[i] for i in report.scan.of_row[row]]
    images = list(zip(example["images"], facts, strict=True))[:_MAX_THUMBNAILS]
    choices, classes = list(zip(LETTERS, example["choices"], strict=False)), report.loaded.classes
    if classes is not None and example[CLASS] is not None:
        choices, example["answer"] = [("", classes.names[example[CLASS]])], 0
    size = _THUMBNAIL_PX if len(facts) == 1 else _SMALL_THUMBNAIL_PX
    if "path_outside" in problems:  # what the recipe does not allow to be read is not shown to whoever gets the page
        thumbnails: list[tuple[str | None, str]] = [(None, KINDS["path_outside"].what)]
    else:
        thumbnails = [_make_thumbnail(*image, size) for image in images]
    return example | {
        "row_id": example["id"] or f"number {number}",
        "choices": choices,
        "problems": [(KINDS[kind].severity, text) for kind, text in problems.items()],
        "images": thumbnails,
        "num_more": len(facts) - len(images),
    }


def _make_thumbnail(image: dict, facts: ImageFacts, size: int) -> tuple[str | None, str]:
    """Its data address and size, or None and what is wrong with it."""
    if facts.problem not in (None, "long_image"):
        return None, KINDS[facts.problem].what
    thumbnail = open_image(image)
    thumbnail.thumbnail((size, size))
    file = io.BytesIO()
    thumbnail.save(file, format="JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", f"{facts.width} x {facts.height}"
