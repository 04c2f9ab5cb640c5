"""The page about class probabilities."""

from dataclasses import replace

import numpy as np
import pytest

from vqa_sft.data.class_probs import keep_likely, write_class_probs
from vqa_sft.report.report_classes import most_confused

NAMES = ("sedan", "<script>van</script>", "소나타", "cab")


def drawn(seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(9).integers(4, size=200).astype(np.int32)
    logits = rng.normal(size=(200, 4)) * noise + 2 * np.eye(4)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return replace(keep_likely([f"r{i}" for i in range(200)], NAMES, probs, num_kept=3), labels=labels)


def test_confused_pairs_are_counted_as_a_loop_counts_them():
    table = drawn(noise=2.0)
    best, labels = table.indices[:, 0], table.labels
    for pair in most_confused(table):
        label, predicted = NAMES.index(pair.label), NAMES.index(pair.predicted)
        assert label != predicted
        assert pair.num_rows == sum(y == label and b == predicted for y, b in zip(labels, best, strict=True))
        assert pair.other_way == sum(y == predicted and b == label for y, b in zip(labels, best, strict=True))
        assert pair.of_label == sum(y == label for y in labels)
    counts = [pair.num_rows for pair in most_confused(table)]
    assert counts == sorted(counts, reverse=True) and sum(counts) == (best != labels).sum()


@pytest.mark.parametrize("num_files", [1, 2])
def test_the_page_has_metrics_calibration_and_confused_classes(tmp_path, run, num_files):
    names = []
    for number in range(num_files):
        write_class_probs(tmp_path / f"p{number}.parquet", drawn(number))
        names.append(f"run {number}={tmp_path / f'p{number}.parquet'}")
    code, printed, _ = run("report", *names, "--output", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert code == 0 and "of 200 rows with a label" in printed
    for part in ("macro F1", "Reliability", "Most confused classes", "소나타", "&lt;script&gt;van"):
        assert part in page
    assert "<script" not in page and "http:" not in page.replace("http://www.w3.org", "")
    assert ("2 minus 1" in page) == (num_files == 2)
    assert run("report", *names, "--output", tmp_path / "r.html")[0] == 0  # over its own page


def test_without_labels_there_is_a_page_about_confidence(tmp_path, run):
    write_class_probs(tmp_path / "p.parquet", replace(drawn(), labels=np.full(200, -1, np.int32)))
    code, _, _ = run("report", tmp_path / "p.parquet", "--output", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert code == 0 and "--answers names a file" in page and "Confidence: mean" in page
    (tmp_path / "a.csv").write_text("id,label\n" + "".join(f"r{i},cab\n" for i in range(200)))
    assert (
        run("report", tmp_path / "p.parquet", "--answers", tmp_path / "a.csv", "--output", tmp_path / "r.html")[0] == 0
    )
    assert "Most confused classes" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert run("report", tmp_path / "p.parquet", "--data", tmp_path / "a.csv", "--output", tmp_path / "r.html")[0] == 2
