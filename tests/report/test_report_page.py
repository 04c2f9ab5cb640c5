import base64
import csv
import errno
import html
import io
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from contest import rows_of, write_csv
from PIL import Image

from vqa_sft.batch.prompts import builtin_prompts
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.split import write_parts
from vqa_sft.errors import InputError
from vqa_sft.predictions.blind import paired
from vqa_sft.predictions.compare import describe as describe_changes
from vqa_sft.predictions.file import Predictions, answers_as, read_predictions, write_predictions
from vqa_sft.predictions.metrics import describe, differences, full_metrics, softmax, with_intervals
from vqa_sft.report.report_groups import find_language, make_groups, share_of
from vqa_sft.report.report_inputs import read_inputs
from vqa_sft.report.report_page import PAGE_START, report_new, write_report
from vqa_sft.report.report_plots import bins_of
from vqa_sft.report.report_wall import choose, rank_rows, whole_starts
from vqa_sft.runs import folder as run_folder

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "svg": '<svg onload="alert(2)"><img src=x onerror=alert(3)>',
    "emoji": "👩\u200d🚀 and 🇰🇷",
    "arabic": "ما لون المربع؟",
    "turned": "a\u202eb\x1b[31m",
}


def scored(contest, seed=0, name="train.csv", **more):
    """A prediction file of all rows of the contest; most answers are right."""
    loaded = read_examples(str(contest / name))
    rng = np.random.default_rng(seed)
    logits = []
    for row in loaded.examples:
        numbers = rng.normal(size=len(row["choices"]))
        numbers[row["answer"]] += 1.5
        logits.append(np.log(softmax([numbers])[0]).tolist())
    metadata = {"answers": answers_as(loaded.columns)} | more.pop("metadata", {})
    examples = loaded.examples
    values = {"digests": digests_of(examples)} | more
    path = contest / f"scored_{seed}.parquet"
    write_predictions(path, Predictions(examples["id"][:], logits, examples["answer"][:], metadata, **values))
    return path


def page_of(contest, *files, data="train.csv", answers=None, **options):
    said = write_report([*map(str, files)], answers, data and str(contest / data), output=contest / "r.html", **options)
    return (contest / "r.html").read_text(encoding="utf-8"), said


def cards_of(page):
    """Id -> the card's tag and what is in it."""
    found = re.findall(r"<article (.*?)</article>", page, re.DOTALL)
    return {html.unescape(re.search(r'data-id="(.*?)"', card, re.DOTALL)[1]): card for card in found}


def cells_of(row):
    """Of a line of a table, those with intervals."""
    return [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td[^>]*>([^<]*<span.*?)</td>", row)]


@pytest.fixture
def hostile(contest):
    rows = rows_of(contest)
    for row, (name, text) in zip(rows, HOSTILE.items(), strict=False):
        row |= {"id": f"{name} {text}", "question": text, "a": text}
    rows[6]["path"] = "images/<svg onload=alert(6)>.png"
    rows[7]["path"] = "../outside.png"
    Image.new("RGB", (50, 50), "red").save(contest.parent / "outside.png")
    (contest / "images" / "008.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (90, 40), "red").save(contest / "images" / "009.png", exif=exif)
    write_csv(contest / "train.csv", rows)
    return contest


def test_the_page_needs_nothing_but_itself(hostile):
    page, _ = page_of(hostile, scored(hostile))
    assert page.startswith(PAGE_START)
    assert re.findall(r"<(script|link|iframe|object|embed|base)\b", page) == ["script"]
    sources = re.findall(r"<[^>]*\s(?:src|href|xlink:href)\s*=\s*\"([^\"]+)", page)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page and "http:" not in page
    assert "default-src 'none'" in page and len(page) < 1_000_000


def test_texts_of_users_are_escaped_wherever_they_stand(hostile):
    file = scored(hostile)
    named = hostile / "<script>alert(4).parquet"
    named.write_bytes(file.read_bytes())
    page, _ = page_of(hostile, named, f"<svg onload alert(5)>={file}")
    assert "alert(1)" in page and "alert(4)" in page and "alert(5)" in page
    assert not re.search(r"<script>alert|<svg onload|<img src=x|\u202e|\x1b", re.sub('data-id=".*?"', "", page))
    tags = re.findall(r"<[a-zA-Z][^>]*>", page)
    assert not any(re.search(r"\son\w+\s*=", re.sub(r'"[^"]*"', "", tag)) for tag in tags)
    assert "👩\u200d🚀 and 🇰🇷" in page and "ما لون المربع؟" in page and r"a\u202eb\x1b[31m" in page
    assert set(cards_of(page)) == set(read_predictions(file).ids)  # the ids that are copied are those of the data


def test_an_image_is_turned_as_the_loader_turns_it_and_a_missing_one_is_named(hostile):
    cards = cards_of(page_of(hostile, scored(hostile))[0])
    data = re.search(r"base64,([^\"]+)", cards["row_009"])[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 90) and "40 x 90 pixels" in cards["row_009"]
    for row, said in ((6, "is missing"), (7, "lies outside the image folder"), (8, "is no image")):
        assert "<img" not in cards[f"row_00{row}"] and re.search(f'class="no-image">[^<]*{said}', cards[f"row_00{row}"])


def test_metrics_are_those_of_score_and_groups_add_up(contest):
    file = scored(contest, metadata={"calibration": {"temperature": 2.0, "bias": None}})
    predictions = read_predictions(file)
    page, _ = page_of(contest, file)
    rows = re.findall(r"<tr><th scope=\"row\"><bdi>.*?</tr>", page)
    for row, probs in zip(rows, (softmax(predictions.choice_logits), predictions.probs), strict=True):
        values = with_intervals(probs, predictions.answers)
        assert describe(values, [*full_metrics(probs, predictions.answers)]) == cells_of(row)
    right = [best == answer for best, answer in zip(predictions.best, predictions.answers, strict=True)]
    for group in make_groups(read_inputs([str(file)], data=str(contest / "train.csv"))):
        assert sum(line.num_rows for line in group.lines) == 24
        assert round(sum(line.num_rows * line.shares[0].accuracy for line in group.lines)) == sum(right)
    letters = next(group for group in make_groups(read_inputs([str(file)])) if "letter" in group.title)
    of_b = [one for one, answer in zip(right, predictions.answers, strict=True) if answer == 1]
    line = next(line for line in letters.lines if line.label == "B")
    assert (line.num_rows, line.shares[0].accuracy) == (len(of_b), np.mean(of_b))
    assert f'<td class="number">{np.mean(of_b):.3f} <span' in page


def test_an_interval_is_wilsons():
    share = share_of(8, 10)
    z, p, n = 1.959963984540054, 0.8, 10
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (share.low, share.high) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    )


def test_bins_of_the_diagram_hold_their_upper_end():
    assert bins_of(np.array([0.0, 1 / 15, 0.07, 1.0])).tolist() == [0, 0, 1, 14]


def test_lists_hold_confident_errors_uncertain_disagreeing_and_changed_rows(contest):
    agreement = [1.0] * 24
    agreement[3], agreement[5] = 0.5, 0.25
    one, other = scored(contest, agreement=agreement), scored(contest, seed=1)
    inputs = read_inputs([str(one), str(other)], data=str(contest / "train.csv"))
    lists = {ranked.key: ranked for ranked in rank_rows(inputs)}
    first, second = inputs.inputs
    errors = [row for row in range(24) if first.best[row] != inputs.answers[row]]
    assert lists["errors"].rows == sorted(errors, key=lambda row: -first.probs[row].max()) and len(errors) > 1
    margins = [np.sort(probs)[-1] - np.sort(probs)[-2] for probs in first.probs]
    assert lists["uncertain"].rows == sorted(range(24), key=lambda row: margins[row])
    assert lists["disagree"].rows == [5, 3]
    assert sorted(lists["changed2"].rows) == np.flatnonzero(first.best != second.best).tolist()
    assert lists["changed2"].note in describe_changes(one, other) and "p = " in lists["changed2"].note
    lost = [row for row in lists["changed2"].rows if first.best[row] == inputs.answers[row]]
    assert lists["changed2"].rows[: len(lost)] == lost
    given = np.array([probs[answer] for probs, answer in zip(first.probs, inputs.answers, strict=True)])
    likely = [row for row in errors if first.probs[row].max() >= given.mean()]
    assert lists["labels"].rows == sorted(likely, key=lambda row: given[row]) and likely
    cards = cards_of(page_of(contest, one, other)[0])
    assert "Views that agree: 1: 25%, 2: 100%" in cards["row_005"] and "Views that" not in cards["row_006"]


def test_runs_side_by_side_have_paired_differences_by_metric_and_by_kind(contest):
    files = [scored(contest), scored(contest, seed=1), scored(contest, seed=2)]
    inputs = read_inputs([*map(str, files)], data=str(contest / "train.csv"))
    page, _ = page_of(contest, *files)
    was, other, now = (one.probs for one in inputs.inputs)
    row = re.search(r"<bdi>3 minus 1</bdi>.*?</tr>", page)[0]
    cells = describe(differences(was, now, inputs.answers), [*full_metrics(was, inputs.answers)], sign="+")
    assert cells == cells_of(row)
    letters = next(group for group in make_groups(inputs) if group.title == "letter of the answer")
    line = next(line for line in letters.lines if line.label == "B")
    right = [one.best[inputs.answers == 1] == 1 for one in inputs.inputs]
    assert [more.accuracy for more in line.differences] == [one.mean() - right[0].mean() for one in right[1:]]
    more = line.differences[1]
    assert [more.low, more.high] == paired(right[2], right[0]) and f"{more.accuracy:+.3f} <span" in page
    changed = [ranked for ranked in rank_rows(inputs) if ranked.key.startswith("changed")]
    assert [ranked.title for ranked in changed] == ["Changed from 1 to 2", "Changed from 1 to 3"]
    for ranked, file in zip(changed, files[1:], strict=True):
        assert ranked.note in describe_changes(files[0], file)
    results = ["correct" if one.best[4] == inputs.answers[4] else "wrong" for one in inputs.inputs]
    assert f'data-results="{" ".join(results)}"' in cards_of(page)["row_004"]


@pytest.mark.parametrize("has_none", [False, True])
def test_of_a_classification_rows_are_grouped_by_the_rank_of_their_class(tmp_path, has_none):
    logits = [np.array([2.0, 1.0, 0.0])] * 5
    candidates = [[4, 7, -1 if has_none else 0]] * 5
    found = Predictions(
        [f"r{i}" for i in range(5)], logits, [0, 1, 0, 2, None], {"classes": [f"c{i}" for i in range(9)]}
    )
    found.candidates, found.labels = candidates, [4, 7, 4, 0, 8]
    write_predictions(tmp_path / "p.parquet", found)
    groups = {group.title: group for group in make_groups(read_inputs([str(tmp_path / "p.parquet")]))}
    assert "letter of the answer" not in groups
    lines = groups["rank of the class among the candidates"].lines
    third = "none of these" if has_none else "3"
    counted = [(line.label, line.num_rows, line.shares[0].accuracy) for line in lines]
    assert counted == [("1", 2, 1.0), ("2", 1, 0.0), (third, 1, 0.0)]


def test_every_list_has_its_first_rows_on_the_page_and_no_holes(contest):
    inputs = read_inputs([str(scored(contest)), str(scored(contest, seed=1))])
    lists = rank_rows(inputs)
    chosen = choose(lists, 7)
    assert len(chosen) == 7 and {ranked.rows[0] for ranked in lists} <= set(chosen)
    for key, rows in whole_starts(lists, chosen).items():
        assert rows and rows == next(ranked.rows for ranked in lists if ranked.key == key)[: len(rows)]
    page, said = page_of(contest, *sorted(contest.glob("*.parquet")), max_rows=7)
    assert len(cards_of(page)) == 7 and "7 of 24 rows are on this page: the first ones" in page
    assert said.endswith("7 of 24 rows are on the page; its numbers are of all.")


def test_answer_and_prediction_are_marked_with_words(contest):
    file = scored(contest)
    predictions = read_predictions(file)
    cards = cards_of(page_of(contest, file)[0])
    for row_id, answer, best in zip(predictions.ids, predictions.answers, predictions.best, strict=True):
        items = re.findall(r"<li.*?</li>", cards[row_id], re.DOTALL)
        assert [i for i, item in enumerate(items) if "&#10003; answer" in item] == [answer]
        assert [i for i, item in enumerate(items) if "&#9664; predicted" in item] == [best]
    widths = re.findall(r"width:([\d.]+)%", cards[predictions.ids[0]])
    assert [float(width) for width in widths] == pytest.approx((100 * predictions.probs[0]).tolist(), abs=0.051)


def test_without_answers_and_without_data_the_page_shows_what_there_is(contest):
    file = scored(contest)
    predictions = read_predictions(file)
    predictions.answers = [None] * 24
    write_predictions(contest / "open.parquet", predictions)
    page, said = page_of(contest, contest / "open.parquet", data=None)
    assert "of which 0 have a known answer" in page and "<h2>Metrics" not in page and "--data names the rows" in said
    assert "Least certain" in page and 'id="result"' not in page and len(cards_of(page)) == 24
    predictions.choice_logits = predictions.choice_logits[::-1]
    write_predictions(contest / "other.parquet", predictions)
    page, _ = page_of(contest, contest / "open.parquet", contest / "other.parquet", data=None)
    assert "Changed from 1 to 2" in page and "minus 1" not in page and "McNemar" not in page
    for source in ({"answers": str(contest / "test_answers.csv"), "data": None}, {"data": "train.csv"}):
        page, _ = page_of(contest, contest / "open.parquet", **source)
        assert "of which 24 have a known answer" in page and "<h2>Metrics" in page


def test_answers_of_some_rows_give_the_metrics_of_these(contest):
    file = scored(contest)
    predictions = read_predictions(file)
    known = predictions.answers[:10]
    predictions.answers[10:] = [None] * 14
    write_predictions(file, predictions)
    page, _ = page_of(contest, file, data=None)
    accuracy = full_metrics(predictions.probs[:10], known)["accuracy"]
    assert "of which 10 have a known answer" in page and f'data-name="accuracy">{accuracy:.4f} <span' in page


def make_run(contest, folder, parts=None, validation="train.csv", **recipe):
    """A finished run, as far as a page reads it. `parts` are those of its rows, which `validation` has some of."""
    folder.mkdir(parents=True)
    loaded = read_examples(str(contest / "train.csv"))
    columns = loaded.columns
    if parts:
        write_parts(folder, [loaded], [parts])
    values = {"model_name_or_path": "tiny", "train_data": str(contest / "train.csv")} | recipe
    run = run_folder.Run(str(folder), values, builtin_prompts("en"), 4, columns, "fp32")
    run_folder.describe(run, num_rows={}, num_processes=1, micro_batch=1, accumulation=1)
    (folder / "log.csv").write_text("step,epoch,accuracy,eval_loss,loss\n1,0.5,0.25,,1.5\n2,1,0.5,1.25,1.25\n")
    scored(contest, name=validation).rename(folder / "validation.parquet")
    return folder


def test_a_run_brings_its_own_data_and_its_curves(contest):
    run = make_run(contest, contest / "run")
    page, said = page_of(contest, run, data=None)
    assert "Which colour has the square?" in page and "<img" in page and said.count("\n") == 0
    assert "loss by step, in validation 1.250 at the end" in page and "accuracy by step" in page
    (contest / "train.csv").rename(contest / "moved.csv")
    page, said = page_of(contest, run, data=None)
    assert "Questions and images are not shown: no such file: " in said and "Give --data" in html.unescape(page)
    page, said = page_of(contest, run, data="moved.csv")
    assert "Which colour has the square?" in page


def test_a_training_ends_with_a_page_or_with_why_there_is_none(contest, monkeypatch):
    run = make_run(contest, contest / "run")
    assert report_new(run) == f"Wrote {run / 'report.html'}: 24 of 24 rows are on the page; its numbers are of all."
    loaded = read_examples(str(contest / "train.csv"))
    (contest / "train.csv").rename(contest / "moved.csv")  # as a Hub dataset, which no page downloads
    assert "not shown" in report_new(run) and report_new(run, [loaded]).startswith("Wrote")
    page, later = (run / "report.html").read_bytes(), f"Later: vqa-sft report {run} --output {run / 'report.html'}"
    for error, says in (
        (OSError(errno.ENOSPC, "No space left on device"), "no room is left on the disk"),
        (InputError("the log is damaged."), "No page was written: the log is damaged. The run is whole."),
        (MemoryError(), "No page was written: MemoryError"),
    ):
        monkeypatch.setattr("vqa_sft.report.report_page.render", Mock(side_effect=error))
        said = report_new(run)
        assert says in said and said.endswith(later) and "\n" not in said and (run / "report.html").read_bytes() == page


def test_a_run_that_was_asked_whether_it_looks_says_it(contest):
    run = make_run(contest, contest / "run")
    assert "blind" not in page_of(contest, run, data=None)[1]
    (run / "blind.json").write_text('{"looks": false, "says": "Beware: the image hardly matters: <b>"}')
    page, said = page_of(contest, run, data=None)
    assert "Beware: the image hardly matters: &lt;b&gt;" in page and "run: Beware" in said
    (run / "blind.json").write_text("[")
    assert "blind.json cannot be read (JSONDecodeError)" in page_of(contest, run, data=None)[1]


def test_a_run_whose_data_changed_shows_no_questions(contest):
    run = make_run(contest, contest / "run")
    rows = rows_of(contest)
    rows[4]["question"] = "Another?"
    write_csv(contest / "train.csv", rows)
    page, said = page_of(contest, run, data=None)
    assert "lacks row row_004 (1 of 24), or has other rows under these ids" in said and "Which colour" not in page


def test_folds_are_one_input_with_a_curve_of_each(contest):
    for fold in (0, 1):
        make_run(contest, contest / "run" / f"fold{fold}")
    (contest / "run" / "fold0" / "validation.parquet").rename(contest / "run" / "out_of_fold.parquet")
    page, _ = page_of(contest, contest / "run", data=None)
    assert "in validation 1.250 at the end, mean of 2 folds" in page and "Which colour has the square?" in page


def test_mistakes_are_one_line(contest, run, tmp_path):
    file = scored(contest)
    other = read_predictions(file)
    other.ids = [f"other_{i}" for i in range(24)]
    write_predictions(contest / "other.parquet", other)
    (contest / "mine.html").write_text("mine")
    for arguments, said in (
        ((file, contest / "other.parquet"), "lacks rows row_000"),
        ((file, "--output", contest / "mine.html"), "exists and is no page of `vqa-sft report`"),
        ((file, "--output", contest / "page.txt"), "--output must end in .html"),
        ((file, "--rows", 0), "--rows must be at least 1"),
        ((file, "--data", contest / "test_answers.csv"), "error: "),
        ((contest / "images",), "holds no out_of_fold.parquet and no validation.parquet"),
    ):
        code, out, err = run("report", *arguments)
        assert code == 2 and not out and said in err and len(err.splitlines()) == 1, err
    assert (contest / "mine.html").read_text() == "mine"
    code, out, _ = run("report", file, "--data", contest / "train.csv", "--output", contest / "new.html")
    assert (
        code == 0 and out == f"Wrote {contest / 'new.html'}: 24 of 24 rows are on the page; its numbers are of all.\n"
    )
    assert run("report", file, "--output", contest / "new.html")[0] == 0  # a page of ours is replaced


def test_a_full_disk_leaves_the_page_that_was_there(contest, run, monkeypatch):
    file = scored(contest)
    assert run("report", file, "--output", contest / "r.html")[0] == 0
    before, names = (contest / "r.html").read_bytes(), sorted(contest.iterdir())

    def fill(path, text, **_):
        path.write_bytes(text[:100].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    code, _, err = run("report", file, "--rows", 3, "--output", contest / "r.html")
    assert code == 2 and "no room is left on the disk" in err and len(err.splitlines()) == 1
    assert (contest / "r.html").read_bytes() == before and sorted(contest.iterdir()) == names


def test_what_does_not_fit_the_page_is_left_out_and_said(contest, monkeypatch):
    monkeypatch.setattr("vqa_sft.report.report_cards.MAX_CARD_BYTES", 20_000)
    page, said = page_of(contest, scored(contest))
    num_cards = len(cards_of(page))
    assert 0 < num_cards < 24 and f"{num_cards} of 24 rows are on this page" in page and len(page) < 200_000


def test_languages_are_told_by_their_letters():
    texts = {
        "이 사진은 무엇?": "Korean",
        "これは何ですか": "Japanese",
        "这是什么": "Chinese characters",
        "12?": "no letters",
    }
    texts |= {"What is this?": "Latin letters", "ما هذا؟": "Arabic letters", "Что это? OK": "Cyrillic letters"}
    assert {text: find_language(text) for text in texts} == texts


def test_ids_of_the_page_find_their_lines_of_the_csv(hostile, run):
    cards = cards_of(page_of(hostile, scored(hostile))[0])
    wrong = {row_id for row_id, card in cards.items() if 'data-results="wrong"' in card} | {[*cards][1], "row_006"}
    (hostile / "ids.txt").write_text("".join(f"{row_id}\n" for row_id in wrong), encoding="utf-8")
    for option, is_named in (("--only", True), ("--without", False)):
        command = ("check", hostile / "train.csv", option, hostile / "ids.txt", "--fix", hostile / f"{is_named}.csv")
        code, out, _ = run(*command)
        usable = [row for i, row in enumerate(rows_of(hostile)) if i not in (4, 6, 7, 8)]
        rows = [row for row in usable if (row["id"] in wrong) == is_named]
        num_others = len(cards) - len(wrong) if is_named else len(wrong)
        assert f": {len(rows)} rows, {24 - len(rows)} left out.\n  by the list of ids ({num_others})\n" in out
        with (hostile / f"{is_named}.csv").open(newline="", encoding="utf-8") as file:
            assert [*csv.DictReader(file)] == rows and rows


def test_ids_are_copied_as_keep_rows_takes_them(contest):
    page, _ = page_of(contest, scored(contest))
    assert '<button type="button" id="keep" data-column="id">' in page
    kept = json.dumps({"id": ["row_003", "row_005"]})  # as the script writes it (test_report_browser.py)
    options = ReadOptions(keep_rows=json.loads(kept))
    assert read_examples(str(contest / "train.csv"), options).examples["id"][:] == ["row_003", "row_005"]
