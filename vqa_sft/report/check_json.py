"""The object that `vqa-sft check --json` writes:

clean                   true when no row has an error
data                    one object for the training rows, and for the validation and test rows where there are any:
  role, name, notes     "training" | "validation" | "test"; the source; facts about how it was read
  columns               which column was taken for what
  rows, usable_rows
  answers               null without answers, else counts {letter: rows}, expected {letter: rows if no letter were
                        preferred}, largest {letter, share, expected_share}, p_value (null: too few rows), skewed
  classes               null but for a classification: source (of the list), rows {class: rows}, and near_names
                        [{differ_in, names}]
  choices               {number of choices: rows}
  question_types        {type: rows}
  images_per_row        {number of images: rows}
  images                distinct, near_groups, near_images (how many stand in these groups; null: not looked for),
                        formats {name: images}, and width_px, height_px, megapixels: quantiles {min, p5, p25,
                        median, p75, p95, max} or null
  tokens                null where they were not counted (tokens_note says why), else quantiles, rows, and with a
                        max_length: max_length, cut_rows, cut_share
  problems              [{kind, severity, what, fix, count, rows: [{row, id, label}]}], errors first; `row` counts
                        the rows of the source from 0, `label` is the id with the evidence
"""

from collections.abc import Sequence
from typing import Any

from vqa_sft.data.check import Report, Skew, quantiles
from vqa_sft.data.classes import find_near_names
from vqa_sft.questions.letters import LETTERS


def as_dict(reports: Sequence[Report]) -> dict[str, Any]:
    """The object described at the top."""
    return {"clean": not any(report.num_bad for report in reports), "data": [_as_dict(report) for report in reports]}


def _as_dict(report: Report) -> dict[str, Any]:
    return {
        "role": report.role,
        "name": report.loaded.name,
        "notes": report.loaded.notes,
        "columns": vars(report.loaded.columns),
        "rows": report.num_rows,
        "usable_rows": report.num_rows - report.num_bad,
        "answers": _skew_as_dict(report.skew),
        "classes": _classes_as_dict(report),
        "choices": {str(number): count for number, count in report.num_choices.items()},
        "question_types": report.question_types,
        "images_per_row": {str(number): count for number, count in report.images_per_row.items()},
        "images": {
            "distinct": len(report.images),
            "near_groups": None if report.near_groups is None else len(report.near_groups),
            "near_images": None if report.near_groups is None else sum(report.near_groups),
            "formats": report.formats,
            **{name: quantiles(values) for name, values in report.sizes.items()},
        },
        "tokens": _tokens_as_dict(report),
        "tokens_note": report.tokens_note,
        "problems": [
            {
                "kind": found.kind,
                "severity": found.severity,
                "what": found.what,
                "fix": found.fix,
                "count": len(found.rows),
                "rows": [{"row": row, "id": row_id, "label": label} for row, row_id, label in found.rows],
            }
            for found in report.problems
        ],
    }


def _skew_as_dict(skew: Skew | None) -> dict[str, Any] | None:
    if skew is None:
        return None
    return {
        "counts": dict(zip(LETTERS, skew.counts, strict=False)),
        "expected": dict(zip(LETTERS, skew.expected, strict=False)),
        "largest": dict(zip(("letter", "share", "expected_share"), skew.largest, strict=True)),
        "p_value": skew.p_value,
        "skewed": skew.skewed,
    }


def _classes_as_dict(report: Report) -> dict[str, Any] | None:
    classes, rows = report.loaded.classes, report.class_rows
    if classes is None or rows is None:
        return None
    near = [{"differ_in": how, "names": list(names)} for how, names in find_near_names(classes.names)]
    return {
        "source": classes.source,
        "rows": dict(zip(classes.names, rows.tolist(), strict=True)),
        "near_names": near,
    }


def _tokens_as_dict(report: Report) -> dict[str, Any] | None:
    if report.tokens is None:
        return None
    found = {"rows": len(report.tokens), **(quantiles(report.tokens) or {})}
    if report.max_length is not None:
        share = report.num_cut / max(1, len(report.tokens))
        found |= {"max_length": report.max_length, "cut_rows": report.num_cut, "cut_share": share}
    return found
