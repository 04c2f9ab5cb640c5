import json

import pytest
from contest import noise, rows_of, write_csv
from reports import report_on
from scipy.stats import chisquare

from vqa_sft.report.check_json import as_dict


def test_the_json_holds_every_row_of_a_problem_under_stable_keys(contest):
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
        row["answer"] = "z" if i < 3 else "a"
    write_csv(contest / "train.csv", rows)
    whole = json.loads(json.dumps(as_dict([report_on(contest / "train.csv")])))
    assert whole["clean"] is False
    (data,) = whole["data"]
    assert list(data) == [
        *("role", "name", "notes", "columns", "rows", "usable_rows", "answers", "classes", "choices"),
        *("question_types", "images_per_row", "images", "tokens", "tokens_note", "problems"),
    ]
    assert (data["role"], data["rows"], data["usable_rows"]) == ("training", 24, 21)
    assert data["answers"] == {
        "counts": {"A": 21, "B": 0, "C": 0, "D": 0},
        "expected": dict.fromkeys("ABCD", 5.25),
        "largest": {"letter": "A", "share": 1.0, "expected_share": 0.25},
        "p_value": pytest.approx(chisquare([21, 0, 0, 0]).pvalue),
        "skewed": True,
    }
    assert (
        data["choices"] == {"4": 24}
        and data["images_per_row"] == {"1": 24}
        and data["tokens"] is data["classes"] is None
    )
    (problem,) = data["problems"]
    assert {key: problem[key] for key in ("kind", "severity", "count")} == {
        "kind": "bad_answer",
        "severity": "error",
        "count": 3,
    }
    assert problem["rows"] == [{"row": i, "id": f"row_{i:03d}", "label": f"row_{i:03d} ('z')"} for i in range(3)]
    images = data["images"]
    assert images["distinct"] == 24 and images["formats"] == {"PNG": 24} and images["near_images"] is None
    assert images["width_px"] == dict.fromkeys(("min", "p5", "p25", "median", "p75", "p95", "max"), 120)


def test_a_set_without_errors_is_clean(contest):
    assert as_dict([report_on(contest / "train.csv")])["clean"]
