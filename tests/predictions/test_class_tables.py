"""Metrics, comparison, calibration and ensembles of class probabilities, against dense tables in loops."""

from dataclasses import replace

import numpy as np
import pytest
from prediction_rows import THREE

from vqa_sft.data.class_probs import keep_likely, read_class_probs, write_class_probs
from vqa_sft.errors import InputError
from vqa_sft.predictions.class_ensemble import fit_temperature, learn, mean_of, tempered
from vqa_sft.predictions.class_metrics import METRICS, class_metrics, differences, with_intervals
from vqa_sft.predictions.class_scores import entropies, margins
from vqa_sft.predictions.class_tables import align_tables, with_labels
from vqa_sft.predictions.file import write_predictions
from vqa_sft.predictions.metrics import ece

NAMES = ("sedan", "van", "소나타", "bus, long", "coupé", "truck", "pickup", "cab")


def drawn(num_rows=300, seed=0, num_kept=8, sharpness=2.0, noise=0.0, kind="r"):
    """Rows whose labels follow softmax(logits); the table is that of `noise` more, and of a sharper softmax."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, len(NAMES))) * 2
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(len(NAMES), p=row) for row in true], np.int32)
    shown = np.exp((logits + np.random.default_rng(seed + 100).normal(size=logits.shape) * noise) * sharpness / 2)
    table = keep_likely(
        [f"{kind}{i}" for i in range(num_rows)], NAMES, shown / shown.sum(1, keepdims=True), num_kept=num_kept
    )
    return replace(table, labels=labels, digests=[f"d{kind}{i}" for i in range(num_rows)])


def slow_metrics(dense, labels):
    best = [int(np.argmax(row)) for row in dense]
    scores = []
    for c in {*best, *labels.tolist()}:
        tp = sum(b == c and y == c for b, y in zip(best, labels, strict=True))
        wrong = sum((b == c) != (y == c) for b, y in zip(best, labels, strict=True))
        scores.append(2 * tp / (2 * tp + wrong))
    five = [y in np.argsort(-row)[:5] for row, y in zip(dense, labels, strict=True)]
    return {
        "accuracy": np.mean([b == y for b, y in zip(best, labels, strict=True)]),
        "top_5": np.mean(five),
        "nll": np.mean([-np.log(row[y]) for row, y in zip(dense, labels, strict=True)]),
        "macro_f1": np.mean(scores),
        "ece": ece(dense, labels),
    }


@pytest.mark.parametrize("num_kept", [5, 8])
def test_metrics_equal_loops_over_the_full_table(num_kept):
    table = drawn(num_kept=num_kept)
    assert class_metrics(table) == pytest.approx(slow_metrics(table.dense(), table.labels), rel=1e-5)


def test_intervals_are_those_of_resampled_rows():
    table = drawn(80)
    found = with_intervals(table, num_resamples=40, seed=3)
    rng, values = np.random.default_rng(3), []
    for _ in range(40):
        rows = rng.integers(80, size=80)
        values.append(slow_metrics(table.dense()[rows], table.labels[rows]))
    for name in METRICS:
        middle = np.percentile([one[name] for one in values], [2.5, 97.5])
        assert found[f"{name}_95"] == pytest.approx(middle, rel=1e-4), name


def test_differences_are_paired():
    one, other = drawn(noise=0.5), drawn(noise=0.6)
    found, (was, now) = differences(one, other), (with_intervals(table) for table in (one, other))
    assert found["nll"] == pytest.approx(now["nll"] - was["nll"])
    assert np.diff(found["nll_95"]) < np.diff(now["nll_95"])  # rows that are hard are hard for both
    assert differences(one, one)["accuracy_95"] == [0, 0]


def test_margin_and_entropy_are_over_all_classes():
    table = drawn(50, num_kept=3)
    dense = np.sort(table.dense(), axis=1)[:, ::-1]
    assert margins(table) == pytest.approx(dense[:, 0] - dense[:, 1], abs=1e-5)
    assert entropies(table) == pytest.approx([-sum(p * np.log(p) for p in row) for row in dense], abs=1e-4)


def test_tables_are_aligned_by_id_and_class_name():
    table = drawn(40)
    order = np.random.default_rng(0).permutation(8)
    moved = keep_likely(table.ids, [NAMES[i] for i in order], table.dense()[:, order])
    moved = replace(moved, labels=np.argsort(order)[table.labels].astype(np.int32)).take(np.arange(40)[::-1])
    one, other = align_tables([replace(table, labels=np.full(40, -1, np.int32)), moved], ["a", "b"])
    np.testing.assert_allclose(other.dense(), table.dense(), rtol=1e-5)
    assert (one.labels == table.labels).all() and other.names == NAMES
    for wrong, said in (
        (table.take([*range(39)]), "b lacks row r39"),
        (replace(table, names=(*NAMES[:-1], "tram")), "b lacks 'cab'; a lacks 'tram'"),
        (replace(table, digests=["other"] * 40), "same ids and other"),
        (replace(table, labels=(table.labels + 1) % 8), "other labels in rows r0"),
    ):
        with pytest.raises(InputError, match=said):
            align_tables([table, wrong], ["a", "b"])


def test_an_ensemble_is_the_mean_and_learned_weights_favour_the_better_table():
    good, bad = drawn(noise=0.2), drawn(noise=3.0, num_kept=4)
    mean = mean_of([good, bad], [0.25, 0.75])
    np.testing.assert_allclose(mean.dense(), 0.25 * good.dense() + 0.75 * bad.dense(), rtol=1e-4)
    weights, nll, of_equal = learn([good, bad])
    assert weights[0] > 0.8 and nll < of_equal
    assert learn([good, good])[0] is None


def test_a_temperature_is_found_again_and_tempers_all_classes():
    table = drawn(4_000, sharpness=5.0)  # 2.5 times too sharp
    assert fit_temperature(table) == pytest.approx(2.5, rel=0.05)
    cut = drawn(20, num_kept=3)
    slow = cut.dense() ** (1 / 1.7)
    np.testing.assert_allclose(tempered(cut, 1.7).dense(), slow / slow.sum(axis=1, keepdims=True), rtol=1e-4)


def test_labels_are_read_by_id_and_name(tmp_path):
    table = drawn(3)
    (tmp_path / "a.csv").write_text("image_id,class\nr2, van\nr0,소나타\nr1,sedan\nother,sedan\n", encoding="utf-8")
    how = {"columns": {"id": "image_id"}}
    assert with_labels(table, "t", str(tmp_path / "a.csv"), **how).labels.tolist() == [2, 0, 1]
    for content, said in (
        ("id,label\nr0,van\nr1,van\n", r"no label for row r2"),
        ("id,label\nr0,van\nr1,van\nr2,tram\n", "no class of t in row r2 .*'tram'"),
        ("id,label\nr0,van\nr1,van\nr2,van\nr2,bus\n", "more than once: row r2"),
        ("id,x\nr0,van\n", "columns id and label"),
    ):
        (tmp_path / "b.csv").write_text(content)
        with pytest.raises(InputError, match=said):
            with_labels(table, "t", str(tmp_path / "b.csv"))


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for name, table in (
        ("a", drawn(noise=0.5)),
        ("b", drawn(noise=1.0, num_kept=5)),
        ("oof_a", drawn(seed=1, noise=0.5, kind="o")),
        ("oof_b", drawn(seed=1, noise=1.0, kind="o")),
    ):
        write_class_probs(tmp_path / f"{name}.parquet", table)
    write_predictions(
        tmp_path / "letters.parquet",
        replace(THREE, candidates=[[4, 0], [2, 3, 1], [1, 0]], labels=[4, None, 0], metadata={"classes": [*NAMES]}),
    )
    return tmp_path


def test_score_recognises_class_probabilities(files, run):
    code, printed, _ = run("score", f"mine={files / 'a.parquet'}", files / "b.parquet")
    found = class_metrics(read_class_probs(files / "a.parquet"))
    assert code == 0 and "macro F1" in printed and "mine" in printed
    assert f"{found['nll']:.4f} [" in printed and f"{found['macro_f1']:.4f} [" in printed


def test_diff_names_the_classes_that_changed(files, run):
    code, printed, _ = run("diff", files / "a.parquet", files / "b.parquet")
    a, b = (read_class_probs(files / f"{name}.parquet").indices[:, 0] for name in "ab")
    assert code == 0 and f"{(a != b).sum()} of 300 rows" in printed and "McNemar" in printed
    assert "difference" in printed and any(name in printed for name in NAMES)
    changed = [f"r{row}" for row in np.flatnonzero(a != b)]
    assert f"Changed: {', '.join(changed[:20])} ... and {len(changed) - 20} more: --all" in printed
    assert f"Changed: {', '.join(changed)}" in run("diff", files / "a.parquet", files / "b.parquet", "--all")[1]
    assert run("diff", files / "a.parquet", files / "b.parquet", "--data", "x.csv")[0] == 2


def test_uncertainty_writes_a_line_for_every_row(files, run):
    code, printed, _ = run("uncertainty", files / "a.parquet", "--output", files / "u.csv")
    lines = (files / "u.csv").read_text(encoding="utf-8").splitlines()
    assert code == 0 and len(lines) == 301 and lines[0] == "id,best,probability,margin,entropy"
    assert "error by margin" in printed
    code, _, error = run("uncertainty", files / "a.parquet", "--coverage", 0.9, "--calibrate-on", files / "b.parquet")
    assert code == 2 and "--coverage is for prediction files" in error


def test_ensemble_averages_by_class_name_and_learns_on_other_rows(files, run):
    names = [files / "a.parquet", files / "b.parquet"]
    assert run("ensemble", *names, "--output", files / "e.parquet")[0] == 0
    tables = [read_class_probs(name) for name in names]
    mean = (tables[0].dense() + tables[1].dense()) / 2
    np.testing.assert_allclose(read_class_probs(files / "e.parquet").dense(), mean, rtol=1e-4)
    how = ["--output", files / "e.parquet", "--weights", "learned", "--learn-on"]
    code, printed, _ = run("ensemble", *names, *how, files / "oof_a.parquet", files / "oof_b.parquet")
    assert code == 0 and "cross-fitted" in printed
    code, _, error = run("ensemble", *names, *how, *names)
    assert code == 2 and "share rows r0" in error


def test_calibrate_writes_a_copy_at_the_temperature_of_other_rows(files, run):
    write_class_probs(files / "sharp.parquet", tempered(read_class_probs(files / "oof_a.parquet"), 0.3))
    how = ["--output", files / "c.parquet", "--predictions"]
    code, printed, _ = run("calibrate", files / "a.parquet", *how, files / "sharp.parquet")
    found = read_class_probs(files / "c.parquet")
    assert code == 0 and "before" in printed and found.metadata["temperature"] > 2
    known = read_class_probs(files / "a.parquet")
    np.testing.assert_allclose(found.dense(), tempered(known, found.metadata["temperature"]).dense(), rtol=1e-4)
    code, _, error = run("calibrate", files / "a.parquet", *how, files / "a.parquet")
    assert code == 2 and "share rows" in error
    assert run("calibrate", files / "a.parquet")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["ensemble", "letters", "letters", "--output", "o.parquet"],
        ["uncertainty", "letters"],
        ["diff", "letters", "letters"],
        ["score", "letters", "--answers", "answers.csv"],
    ],
)
def test_predictions_of_candidates_are_no_answers_yet(files, run, arguments):
    names = [
        str(files / f"{one}.parquet") if one == "letters" else str(files / one) if "." in one else one
        for one in arguments
    ]
    code, _, error = run(*names)
    assert code == 2 and "candidates" in error and "vqa-sft fuse" in error


def test_files_of_two_kinds_are_not_compared(files, run):
    code, _, error = run("score", files / "a.parquet", files / "letters.parquet")
    assert code == 2 and "files of one kind" in error
