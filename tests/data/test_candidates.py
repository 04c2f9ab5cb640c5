"""Candidates of a classification's rows: joined by id, by digest and by the names of classes."""

from dataclasses import replace

import numpy as np
import pytest
from candidates import candidates_of, write_candidates
from contest import noise, write_csv

from vqa_sft.data.candidates import settle_absent
from vqa_sft.data.class_probs import read_class_probs, write_class_probs
from vqa_sft.data.classes import Classes
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.split import TRAIN, VALIDATION, choose_parts, read_parts, write_parts
from vqa_sft.errors import InputError

NAMES = ("Audi", "BMW", "Fiat", "Kia", "Opel", "Seat", "쏘나타")
OPTIONS = ReadOptions(task="classification", fixed_question="Which car?")


@pytest.fixture
def rows(tmp_path):
    """A CSV of 14 rows, two of each class."""
    (tmp_path / "img").mkdir()
    for i in range(14):
        noise(tmp_path / f"img/{i}.png", i)
    write_csv(
        tmp_path / "train.csv",
        [{"id": f"r{i}", "img_path": f"img/{i}.png", "label": NAMES[i % 7]} for i in range(14)],
    )
    return tmp_path / "train.csv"


@pytest.fixture
def path(rows, tmp_path):
    path = tmp_path / "candidates.parquet"
    candidates_of(path, read_examples(str(rows), OPTIONS))
    return path


def joined(rows, path, **how):
    return read_examples(str(rows), replace(OPTIONS, candidates=str(path), **how))


def test_the_most_likely_classes_are_the_choices_and_the_answer_is_the_place_of_the_label(rows, tmp_path):
    path = tmp_path / "c.parquet"
    probs = candidates_of(path, read_examples(str(rows), OPTIONS), strength=0.5, num_candidates=3)
    loaded = joined(rows, path)
    assert loaded.num_choices == 3 and loaded.classes.names == NAMES and loaded.candidates == "a noisy classifier"
    answers = []
    for row, example in enumerate(loaded.examples):
        likely = sorted(range(7), key=lambda place, row=row: -probs[row, place])  # by hand
        assert example["candidates"] == likely[:3] and example["pool"] == likely[:6]
        assert example["choices"] == [NAMES[place] for place in likely[:3]]
        label = row % 7
        assert example["answer"] == (likely.index(label) if label in likely[:3] else None)
        answers.append(example["answer"])
    assert None in answers and len({*answers}) > 2
    share = sum(answer is not None for answer in answers) / 14
    assert any(f"the class of {share:.2%} of 14 rows is among them" in note for note in loaded.notes)


def test_how_many_are_shown_is_what_the_recipe_says_else_the_file_and_at_most_all_classes(rows, path, tmp_path):
    assert joined(rows, path).num_choices == 7 and joined(rows, path, num_candidates=4).num_choices == 4
    pools = {len(row["pool"]) for row in joined(rows, path, num_candidates=3, candidate_pool=5).examples}
    assert pools == {5}
    few = tmp_path / "few.parquet"
    candidates_of(few, read_examples(str(rows), OPTIONS), num_kept=4)
    with pytest.raises(InputError, match="has 4 classes of each row, fewer than num_candidates 5"):
        joined(rows, few, num_candidates=5)
    with pytest.raises(InputError, match="candidate_pool 6: a row shows 3 of them"):
        joined(rows, few, num_candidates=3, candidate_pool=6)


def test_rows_without_candidates_are_all_named(rows, tmp_path):
    names, labels = NAMES, [i % 7 for i in range(2, 14)]
    write_candidates(tmp_path / "c.parquet", [f"r{i}" for i in range(2, 14)], names, labels)
    loaded = joined(rows, tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"no candidates are known of the row: rows r0, r1 \(2 of 14\)"):
        loaded.problems.raise_if_any(loaded.name)
    loaded.problems.raise_if_any(loaded.name, "skip")
    assert loaded.problems.bad_rows() == [0, 1] and loaded.examples[0]["choices"] == []


def test_candidates_of_other_rows_under_the_same_ids_are_refused(rows, path):
    noise_of = rows.read_text().replace("img/3.png", "img/4.png").replace("img/9.png", "img/8.png")
    rows.write_text(noise_of)
    with pytest.raises(InputError, match=r"candidates of other rows under these ids: rows r3, r9 \(2 of 14\)"):
        joined(rows, path)


def test_a_file_without_digests_is_joined_by_id_alone(rows, tmp_path):
    write_candidates(tmp_path / "c.parquet", [f"r{i}" for i in reversed(range(14))], NAMES, [i % 7 for i in range(14)])
    assert len(joined(rows, tmp_path / "c.parquet").examples) == 14


def test_another_classifiers_numbers_must_be_probabilities(rows, tmp_path):
    for first, said in (
        ("0.7", "do not sum to 1 in row r0 .*: they sum to 1.6"),
        ("nan", "NaN or infinite.* in row r0"),
    ):
        lines = [f"r{i},{first if i == 0 else 0.1},{','.join(['0.15'] * 6)}" for i in range(14)]
        (tmp_path / "theirs.csv").write_text("\n".join([f"id,{','.join(NAMES)}", *lines]), encoding="utf-8")
        with pytest.raises(InputError, match=said):
            joined(rows, tmp_path / "theirs.csv")


def test_classes_are_matched_by_name_and_others_are_refused(rows, tmp_path):
    """The file has the classes of the rows in another order, one by another name."""
    (tmp_path / "classes.csv").write_text(
        "name,other_names\n" + "".join(f"{name},{name} Motors\n" for name in NAMES), encoding="utf-8"
    )
    ids, labels = [f"r{i}" for i in range(14)], [6 - i % 7 for i in range(14)]
    mirrored = ["쏘나타", "Seat", "Opel", "Kia Motors", "Fiat", "BMW", "Audi"]
    probs = write_candidates(tmp_path / "c.parquet", ids, mirrored, labels)
    loaded = joined(rows, tmp_path / "c.parquet", classes=str(tmp_path / "classes.csv"), num_candidates=2)
    for row, example in enumerate(loaded.examples):
        likely = np.argsort(-probs[row])[:2]
        assert example["candidates"] == [6 - place for place in likely]
        assert example["choices"] == [NAMES[6 - place] for place in likely]
    write_candidates(tmp_path / "more.parquet", ids, [*mirrored, "Lada", "Škoda"], labels)
    with pytest.raises(InputError, match=r"2 names that are no class of .*: 'Lada', 'Škoda'"):
        joined(rows, tmp_path / "more.parquet", classes=str(tmp_path / "classes.csv"))
    write_candidates(tmp_path / "less.parquet", ids, mirrored[1:], [max(label - 1, 0) for label in labels])
    with pytest.raises(InputError, match=r"lacks 1 of the .* classes of .*classes.csv.*: '쏘나타'"):
        joined(rows, tmp_path / "less.parquet", classes=str(tmp_path / "classes.csv"))


def test_without_a_list_of_their_own_rows_have_the_classes_of_the_file(rows, tmp_path):
    ids = [f"r{i}" for i in range(14)]
    write_candidates(tmp_path / "c.parquet", ids, [*NAMES[::-1], "Lada"], [6 - i % 7 for i in range(14)])
    loaded = joined(rows, tmp_path / "c.parquet")
    assert loaded.classes.names == (*NAMES[::-1], "Lada") and loaded.examples[0]["class_index"] == 6
    write_candidates(tmp_path / "c.parquet", ids, NAMES[:6], [i % 6 for i in range(14)])
    with pytest.raises(InputError, match=r"the label is no class of the list: rows r6 \('쏘나타'\), r13"):
        loaded = joined(rows, tmp_path / "c.parquet")
        loaded.problems.raise_if_any(loaded.name)


def test_test_rows_have_candidates_and_no_answer(rows, path):
    table = [line.rsplit(",", 1)[0] for line in rows.read_text().splitlines()]
    rows.write_text("\n".join(table) + "\n")
    loaded = joined(rows, path, answers="optional", num_candidates=3)
    assert loaded.examples["answer"][:] == loaded.examples["class_index"][:] == [None] * 14
    assert all(len(choices) == 3 for choices in loaded.examples["choices"])


def test_none_of_these_is_a_choice_more_and_answers_rows_whose_class_is_no_candidate(rows, tmp_path):
    candidates_of(tmp_path / "c.parquet", read_examples(str(rows), OPTIONS), strength=0)
    loaded = joined(rows, tmp_path / "c.parquet", num_candidates=3, none_of_these="None of these")
    seen = set()
    for example in loaded.examples:
        *named, last = example["candidates"]
        assert last == -1 and example["choices"][3] == "None of these" and len(named) == 3
        is_there = example["class_index"] in named
        assert example["answer"] == (named.index(example["class_index"]) if is_there else 3)
        seen.add(is_there)
    assert seen == {True, False}
    with pytest.raises(InputError, match="adds 'Kia', which is a class"):
        joined(rows, tmp_path / "c.parquet", none_of_these="Kia")


def test_a_class_that_is_no_candidate_is_put_in_the_last_place_of_training_rows_alone(rows, tmp_path):
    candidates_of(tmp_path / "c.parquet", read_examples(str(rows), OPTIONS), strength=0)
    loaded = joined(rows, tmp_path / "c.parquet", num_candidates=2, candidate_pool=3)
    before, trained = loaded.examples, [*range(0, 14, 2)]
    after, left, _ = settle_absent(before, trained, "insert", loaded.classes)
    assert left == trained and after.features == before.features and after.column_names == before.column_names
    absent = [row for row in range(14) if before[row]["answer"] is None]
    assert {*absent} & {*trained} and {*absent} - {*trained}
    for row, (was, now) in enumerate(zip(before, after, strict=True)):
        if row not in absent or row not in trained:
            assert was == now
            continue
        label = row % 7
        assert now["candidates"] == [was["candidates"][0], label] and now["answer"] == 1
        assert now["choices"] == [was["choices"][0], NAMES[label]]
        assert now["pool"] == (was["pool"] if label in was["pool"] else [*was["pool"][:2], label])
    same, left, (said,) = settle_absent(before, trained, "drop", loaded.classes)
    assert left == [row for row in trained if row not in absent] and same is before
    assert all(f"r{row}" in said for row in sorted({*absent} & {*trained})[:5])


def test_a_rows_digest_is_that_of_its_question_and_images_whatever_its_candidates(rows, path):
    plain = digests_of(read_examples(str(rows), OPTIONS).examples)
    assert digests_of(joined(rows, path, num_candidates=3).examples) == plain and len({*plain}) == 14


def test_a_run_notices_another_class_though_neither_is_a_candidate(rows, path, tmp_path):
    loaded = joined(rows, path, num_candidates=2, classes=Classes(NAMES, "a list"))
    parts = choose_parts([loaded])
    write_parts(tmp_path, [loaded], parts)
    assert read_parts(tmp_path, [loaded]) == parts
    row = loaded.examples["answer"][:].index(None)
    table = rows.read_text().splitlines()
    shown = loaded.examples[row]["candidates"]
    other = next(name for place, name in enumerate(NAMES) if place not in (*shown, row % 7))
    table[row + 1] = f"r{row},img/{row}.png,{other}"
    rows.write_text("\n".join(table) + "\n", encoding="utf-8")
    changed = joined(rows, path, num_candidates=2, classes=Classes(NAMES, "a list"))
    changed.image_digests = loaded.image_digests
    with pytest.raises(InputError, match=f"labels of row r{row} "):
        read_parts(tmp_path, [changed])


def test_a_run_notices_other_candidates_to_draw_from_under_the_same_name(rows, path, tmp_path):
    loaded = joined(rows, path, num_candidates=2)
    parts = choose_parts([loaded], validation_fraction=0.25)
    write_parts(tmp_path, [loaded], parts)
    probs = read_class_probs(path)
    probs.indices = probs.indices[:, [0, 1, 2, 4, 3, 5, 6]]  # two are shown, of four
    write_class_probs(path, probs)
    changed = replace(joined(rows, path, num_candidates=2), image_digests=loaded.image_digests)
    assert changed.examples["choices"][:] == loaded.examples["choices"][:]
    first, num = f"r{parts[0].index(TRAIN)}", parts[0].count(TRAIN)
    with pytest.raises(InputError, match=rf"began: candidates of rows {first}, .*\({num} of 14\)\."):
        read_parts(tmp_path, [changed])
    assert read_parts(tmp_path, [changed], part=VALIDATION) == parts  # which draw none


def test_candidates_of_training_rows_that_do_not_say_that_they_are_out_of_fold_are_noted(rows, path, tmp_path):
    candidates_of(tmp_path / "in.parquet", read_examples(str(rows), OPTIONS), out_of_fold=False)
    assert any("does not say that it is out of fold" in note for note in joined(rows, tmp_path / "in.parquet").notes)
    assert not any("out of fold" in note for note in joined(rows, path).notes)
    # Those of validation rows are by a classifier of the training rows.
    columns = read_examples(str(rows), OPTIONS).columns
    assert not any("out of fold" in note for note in joined(rows, tmp_path / "in.parquet", trained=columns).notes)
    assert not any("out of fold" in note for note in joined(rows, tmp_path / "in.parquet", answers="optional").notes)
