import re

import pytest
from contest import rows_of, write_csv
from reports import found, make_faulty, report_on

from vqa_sft.report.check_page import choose_problem_rows, choose_samples, write_page
from vqa_sft.report.page import shown


@pytest.fixture
def faulty(contest):
    return make_faulty(contest)


def page_of(contest, name="train.csv"):
    write_page(contest / "page.html", [report_on(contest / name)])
    return (contest / "page.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(faulty):
    page = page_of(faulty)
    assert page.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"<(script|link|iframe|object|embed|base|form)\b", page)
    assert not re.search(r"\bon\w+\s*=", re.sub(r"<bdi>.*?</bdi>", "", page))
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert "http" not in page.replace("http://evil.example", "")
    assert len(page) < 1_000_000


def test_texts_of_the_data_are_escaped(faulty):
    page = page_of(faulty)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;tags&lt;/b&gt;?" in page
    assert "=HYPERLINK(&#34;http://evil.example&#34;,&#34;x&#34;)" in page
    assert "\x1b" not in page and "\u202e" not in page and r"Over \x1b[31mred\x1b[0m and \u202eright" in page
    assert "여기는 어디인가요?" in page


def test_joined_emoji_and_lines_stay_and_long_texts_end():
    assert shown("👩\u200d🚀\nnext\ttab") == "👩\u200d🚀\nnext\\ttab"
    assert shown("x" * 700) == "x" * 600 + " ..."


def test_the_answer_is_marked_and_rows_with_problems_show_why(faulty):
    cards = re.findall(r"<article.*?</article>", page_of(faulty), re.DOTALL)
    by_row = {}
    for card in cards:
        by_row.setdefault(re.search(r'class="id">(\w+)<', card)[1], card)
    answer = rows_of(faulty)[7]["answer"].upper()
    assert re.findall(r'class="answer"><span class="letter">(\w)<', by_row["row_007"]) == [answer]
    assert 'class="problem' not in by_row["row_007"] and 'class="answer"' not in by_row["row_001"]
    assert "the answer is none of the choices (&#39;z&#39;)" in by_row["row_001"]
    assert '<div class="no-image">the image is missing</div>' in by_row["row_002"]
    # It exists, and is still not put into a page that others may get.
    assert "<img" not in by_row["row_003"] and "the image lies outside the image folder" in by_row["row_003"]


def test_every_sentence_over_a_plot_says_what_is_seen(faulty):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page_of(faulty))
    assert captions[0].startswith("The answers are not skewed (p = ") or captions[0].startswith(
        "The answers are skewed"
    )
    assert captions[1:] == [
        "The commonest question type is colour: 88%.",
        "The commonest number of images a row is 1: 96%.",
        "Half of the images are wider than 120 pixels, and half are higher than 90.",
    ]


def test_samples_are_spread_over_types_and_rows(faulty):
    report = report_on(faulty / "train.csv")
    samples = dict(choose_samples(report, 8))
    assert list(samples) == ["counting", "colour", "place", "general"]
    assert (samples["counting"], samples["place"], samples["general"]) == ([1], [5], [6]) and len(
        samples["colour"]
    ) == 5
    assert samples["colour"][0] < 6 and samples["colour"][-1] > 18
    assert sum(map(len, dict(choose_samples(report, 48)).values())) == 24


def test_a_few_rows_of_every_kind_of_problem_are_shown_errors_first(faulty):
    rows = rows_of(faulty)
    for row in rows[8:]:
        row["answer"] = ""
    write_csv(faulty / "train.csv", rows)
    report = report_on(faulty / "train.csv")
    assert len(found(report)["no_answer"]) == 16
    chosen = choose_problem_rows(report, 24)
    assert sorted(chosen) == [1, 2, 3, 4, 5, 8, 9, 10] and chosen[-2:] == [4, 5]
