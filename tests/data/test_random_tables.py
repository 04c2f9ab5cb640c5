"""Whatever a table holds, the loader gives canonical rows or an error with a name."""

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from vqa_sft.data.columns import USUAL_NAMES
from vqa_sft.data.examples import FEATURES, load_examples, read_examples, stream_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.questions.letters import LETTERS
from vqa_sft.questions.types import TYPES

NAMES = st.sampled_from(
    [name for usual in USUAL_NAMES.values() for name in usual] + [*"abcdABC", "choice_1", "choice_2"]
)
WORDS = st.sampled_from(
    ["", "a", "B", "0", "2", "cat", "[1, 2]", '["x", "y"]', "../x", "/x.png", "=1+1", "<b>", "예", "\0"]
)
TEXTS = WORDS | st.text(max_size=30)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ABc"), inner, max_size=3),
    max_leaves=6,
)
# Mostly rows as users have them, so that not every table stops at its columns and many rows are good.
PLAIN = st.text("abcXYZ예 ?", min_size=3, max_size=9).map(lambda text: f"x{text}")
MOSTLY = PLAIN | PLAIN | PLAIN | PLAIN | TEXTS
USUAL = {"id": st.uuids().map(str) | TEXTS, "path": MOSTLY, "question": MOSTLY, "a": MOSTLY, "b": MOSTLY, "c": MOSTLY}
USUAL |= {"answer": st.sampled_from("abcABC") | st.sampled_from("abcABC") | TEXTS}
ODD = {name: VALUES for name in ("id", "image", "question", "choices", "answer", "hint")}
TABLES = st.one_of(
    st.lists(st.fixed_dictionaries(USUAL), min_size=1, max_size=8),
    st.lists(st.fixed_dictionaries(ODD), min_size=1, max_size=8),
    st.lists(st.dictionaries(NAMES | TEXTS, VALUES, max_size=8), max_size=5),
)
OPTIONS = {"answers": st.sampled_from(["required", "optional"]), "limit": st.none() | st.integers(1, 4)}
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def check_that_it_is_canonical_or_named(source, folder, options):
    try:
        loaded = read_examples(str(source), ReadOptions(**options))
    except InputError as error:
        assert len(str(error)) > 20
        return
    bad = set(loaded.problems.bad_rows())
    assert loaded.examples.features == FEATURES and len(loaded.examples) == len(loaded.numbers) > 0
    for number, row in zip(loaded.numbers, loaded.examples, strict=True):
        assert row["question_type"] in TYPES and row["context"] is not None
        if number in bad:
            continue
        assert row["id"] and row["question"] and 2 <= len(row["choices"]) <= len(LETTERS)
        assert row["answer"] is None or row["choices"][row["answer"]]
        assert row["answer"] is not None or options["answers"] == "optional"
        assert all(image["bytes"] is not None or image["path"].startswith(str(folder)) for image in row["images"])
    if bad:
        with pytest.raises(InputError, match="has rows that cannot be used"):
            load_examples(str(source), ReadOptions(**options))


@pytest.mark.medium
@QUICK
@given(table=TABLES, options=st.fixed_dictionaries(OPTIONS))
def test_random_json_lines(folder, table, options):
    source = folder / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in table), encoding="utf-8")
    check_that_it_is_canonical_or_named(source, folder, options)


@pytest.mark.medium
@QUICK
@given(table=TABLES, options=st.fixed_dictionaries(OPTIONS), separator=st.sampled_from(",;\t"))
def test_random_csv_files(folder, table, options, separator):
    source = folder / "rows.csv"
    names = list(dict.fromkeys(name for row in table for name in row))
    with source.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(names)
        writer.writerows([row.get(name) for name in names] for row in table)
    check_that_it_is_canonical_or_named(source, folder, options)


LISTS = ["{} {}", "A. {}\nB. {}", "(a) {} (b) {}", "{}; {}", "{} | {}; x", "['{}' '{}']", '["{}", "{}"]']
CELLS = ["a", "B", "(b)", "Option A", "1", "0", "2", "①", "2번", "나", "A. cat", "True", "yes", '["b"]', "cat"]
SPELLED = st.fixed_dictionaries(
    {
        "lists": st.lists(st.sampled_from(LISTS[1:]), min_size=1, max_size=1)
        | st.lists(st.sampled_from(LISTS), min_size=2),
        "words": st.lists(st.sampled_from(["cat", "yes", "no", "1", "A. cat", "a; b", "B. x"]), min_size=2, max_size=4),
        "answers": st.sampled_from([["a", "B"], ["Option A"], ["가", "나."]])
        | st.lists(st.sampled_from([*CELLS, "İ", "", "?"]), min_size=1, max_size=3),
        "more": st.just({})
        | st.dictionaries(st.sampled_from(["label", "correct_idx", "hint", "options"]), st.sampled_from(CELLS)),
        "in_columns": st.booleans(),
        "e": st.sampled_from([None, "7", "owl", ""]),
    }
)


def load_stream(source, options):
    stream = stream_examples(source, options)
    return list(stream.examples), stream.columns


def read_or_refuse(load, source, answers):
    try:
        examples, columns = load(source, ReadOptions(answers=answers))
    except InputError:
        return "refused"
    return sorted((row["id"], row["choices"], row["answer"]) for row in examples), columns


@QUICK
@given(spelled=SPELLED, answers=OPTIONS["answers"])
def test_a_stream_reads_what_a_table_reads_or_both_refuse(folder, spelled, answers):
    rows = []
    for i in range(7):
        pick = [spelled["words"][(i + j) % len(spelled["words"])] for j in range(2)]
        row = {"id": str(i), "path": "x.png", "question": f"Which, {i}?"} | spelled["more"]
        row |= {"answer": spelled["answers"][i % len(spelled["answers"])]}
        if spelled["in_columns"]:
            row |= dict(zip("ab", pick, strict=True)) | ({} if spelled["e"] is None else {"C": spelled["e"]})
        else:
            row |= {"choices": spelled["lists"][i % len(spelled["lists"])].format(*pick)}
        rows.append(row)
    source = folder / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    read = [read_or_refuse(load, str(source), answers) for load in (load_examples, load_stream)]
    assert read[0] == read[1]


@QUICK
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]))
def test_random_bytes_of_any_name(folder, content, suffix):
    source = folder / f"rows{suffix}"
    source.write_bytes(content)
    check_that_it_is_canonical_or_named(source, folder, {"answers": "required"})
