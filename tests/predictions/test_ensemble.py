import json
from dataclasses import replace

import numpy as np
import pytest
from prediction_rows import drawn

from vqa_sft.errors import InputError
from vqa_sft.predictions import ensemble
from vqa_sft.predictions.ensemble import align, combine, experts_of, learn, write_ensemble
from vqa_sft.predictions.file import Predictions, read_predictions, write_predictions
from vqa_sft.predictions.metrics import nll, softmax
from vqa_sft.predictions.pooling import learn_weights, pool


def predictions_of(probs, answers, **metadata):
    logits = [np.log(row).tolist() for row in probs]
    return Predictions([f"r{i}" for i in range(len(probs))], logits, list(answers), metadata)


def ragged(num_rows=60, seed=0, temperature=1.0):
    logits, answers = drawn(num_rows, 1.0, seed)
    return predictions_of(softmax(logits, temperature), answers)


def other_model(first, seed=1, noise=1.0):
    """The same rows, answered by another model."""
    rng = np.random.default_rng(seed)
    noisy = [np.array(row) + rng.normal(scale=noise, size=len(row)) for row in first.choice_logits]
    return replace(first, choice_logits=[np.log(row).tolist() for row in softmax(noisy)])


@pytest.mark.parametrize("average", ["mean", "log"])
def test_a_file_with_itself_is_itself(average):
    one = replace(ragged(), metadata={"calibration": {"temperature": 1.7, "bias": [0.1, -0.2]}})
    both = combine([one, one], ["a", "b"], [0.3, 0.7], average)
    for row, own in zip(both.probs, one.probs, strict=True):
        assert row == pytest.approx(own, abs=1e-6)
    assert both.best == one.best and both.agreement == pytest.approx([1.0] * 60)
    assert "calibration" not in both.metadata  # it is in the probabilities already


def test_pools_equal_a_loop_over_rows():
    one, other = ragged(), other_model(ragged())
    weights = [0.25, 0.75]
    for average in ensemble.AVERAGES:
        both = combine([one, other], ["a", "b"], weights, average)
        for p, q, found, agreement in zip(one.probs, other.probs, both.probs, both.agreement, strict=True):
            if average == "mean":
                expected = 0.25 * p + 0.75 * q
            elif average == "log":
                expected = p**0.25 * q**0.75 / sum(p**0.25 * q**0.75)
            else:
                expected = np.full(len(p), 0.01 / len(p))
                expected[np.argmax(p)] += 0.99 * 0.25
                expected[np.argmax(q)] += 0.99 * 0.75
            assert found == pytest.approx(expected, abs=1e-9)
            votes = [np.argmax(row) == np.argmax(expected) for row in (p, q)]
            assert agreement == pytest.approx(np.dot(votes, weights))


def test_a_probability_of_0_does_not_end_up_in_the_file(tmp_path):
    sure = Predictions(["x"], [[0.0, -5000.0]], [1])
    for average in ensemble.AVERAGES:
        write_predictions(tmp_path / "p.parquet", combine([sure, sure], "ab", [0.5, 0.5], average))
        assert read_predictions(tmp_path / "p.parquet").probs[0][0] > 0.98


def mixture(num_rows, share, seed=0):
    """Two models that disagree, and answers of which `share` follow the first and the rest the second."""
    rng = np.random.default_rng(seed)
    first, second = rng.dirichlet(np.full(4, 0.4), size=(2, num_rows))
    answers = [int(rng.choice(4, p=p if rng.random() < share else q)) for p, q in zip(first, second, strict=True)]
    return [predictions_of(np.maximum(probs, 1e-6), answers) for probs in (first, second)]


@pytest.mark.parametrize("share", [0.8, 0.3])
def test_learned_weights_are_those_of_a_planted_mixture(share):
    found = learn(mixture(2000, share), "mean")
    assert found.weights == pytest.approx([share, 1 - share], abs=0.05) and found.nll < found.nll_of_mean


@pytest.mark.parametrize("average", ["mean", "log", "vote"])
def test_learned_weights_are_the_lowest_point_of_a_grid(average):
    files = mixture(300, 0.7)
    experts, answers = experts_of(files, average), files[0].answers
    grid = np.linspace(0, 1, 1001)
    losses = [nll(pool(experts, [w, 1 - w], average), answers) for w in grid]
    assert learn_weights(experts, answers, average)[0] == pytest.approx(grid[np.argmin(losses)], abs=2e-3)


@pytest.mark.parametrize("average", ["mean", "log"])
def test_a_model_that_adds_nothing_gets_no_weight_at_all_though_it_is_nearly_as_good(average):
    first = ragged(2000)
    files = [first, other_model(first, noise=0.1), other_model(first, 2, noise=0.2)]
    experts, answers = experts_of(files, average), np.array(first.answers)
    found = learn_weights(experts, answers, average)
    assert found.sum() == pytest.approx(1) and ((found == 0) | (found > 1e-6)).all()
    rows = np.arange(len(answers))

    def loss(weights):
        return -np.log(pool(experts, weights, average)[rows, answers]).mean()

    grid = [(a / 40, b / 40, 1 - (a + b) / 40) for a in range(41) for b in range(41 - a)]
    assert loss(found) <= min(map(loss, grid)) + 1e-8


@pytest.mark.parametrize("average", ["mean", "log"])
def test_a_useless_model_gets_about_nothing(average):
    logits, answers = drawn(600, 1.0)
    rng = np.random.default_rng(5)
    guesses = [np.log(rng.dirichlet(np.ones(len(row)))) for row in logits]
    files = [predictions_of(softmax(logits), answers), predictions_of(softmax(guesses), answers)]
    found = learn(files, average)
    assert found.weights[1] < 0.04 and sum(found.weights) == pytest.approx(1)


@pytest.mark.parametrize("average", ["mean", "log"])
def test_two_equally_noisy_models_keep_equal_weights(average):
    fell_back = 0
    for seed in range(10):
        true = ragged(200, seed)
        fell_back += learn([other_model(true, 100 + seed), other_model(true, 200 + seed)], average).weights is None
    assert fell_back >= 8


def test_an_advantage_within_chance_is_none():
    found = [learn(mixture(60, 0.65, seed), "mean") for seed in range(20)]
    better = [one for one in found if one.nll < one.nll_of_mean]
    assert 0 < sum(one.weights is not None for one in better) < len(better)
    assert all(one.weights is None for one in found if one.nll >= one.nll_of_mean)


# --- aligned files ----------------------------------------------------------------------------------------------------


def shuffled(file, seed=0):
    rows = np.random.default_rng(seed).permutation(len(file.ids))
    names = [name for name in ("ids", "choice_logits", "answers", "blanked", "agreement") if getattr(file, name)]
    return replace(file, **{name: [getattr(file, name)[i] for i in rows] for name in names})


@pytest.fixture
def files(tmp_path):
    """`files(a, b, ...)`: their paths."""

    def write(*many):
        paths = [str(tmp_path / f"{name}.parquet") for name in "abcdef"[: len(many)]]
        for path, file in zip(paths, many, strict=True):
            write_predictions(path, file)
        return paths

    return write


def test_the_order_of_rows_of_the_second_file_changes_nothing(files, tmp_path):
    one = replace(ragged(), blanked=[i == 3 for i in range(60)])
    other = replace(other_model(ragged()), blanked=[i == 5 for i in range(60)])
    for name, second in (("same", other), ("shuffled", shuffled(other))):
        write_ensemble(files(one, second), tmp_path / f"{name}.parquet")
    same = read_predictions(tmp_path / "same.parquet")
    assert same == read_predictions(tmp_path / "shuffled.parquet")
    assert same.ids == one.ids and [i for i in range(60) if same.blanked[i]] == [3, 5]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ids": ["z1", *[f"r{i}" for i in range(1, 60)]]}, "lacks row r0 (1 of 60)"),
        ({"ids": ["r1", *[f"r{i}" for i in range(1, 60)]]}, "ids are not unique: row r1"),
        ({"choice_logits": [[-0.1] * 7] * 60}, "other numbers of choices in rows r0, r1"),
        ({"answers": [1, *[None] * 59]}, "other answers than the files before it in row r0"),
    ],
)
def test_files_of_other_rows_are_errors(files, tmp_path, change, part):
    one = ragged()
    one.answers[0] = 0
    with pytest.raises(InputError) as error:
        write_ensemble(files(one, replace(one, **change)), tmp_path / "out.parquet")
    assert part in str(error.value) and not (tmp_path / "out.parquet").exists()


def test_rows_that_the_first_file_does_not_have_are_errors(files, tmp_path):
    one = ragged()
    fewer = Predictions(one.ids[1:], one.choice_logits[1:], one.answers[1:])
    with pytest.raises(InputError, match="b.parquet also has row r0"):
        write_ensemble(files(fewer, one), tmp_path / "out.parquet")


def test_an_answer_that_one_file_knows_is_kept():
    one = ragged()
    unknown = replace(one, answers=[None] * 60)
    assert align([unknown, one], "ab")[0].answers == one.answers


# --- the command ------------------------------------------------------------------------------------------------------


def test_weights_are_learned_saved_given_again_and_printed(files, tmp_path):
    first, second = mixture(400, 0.9)
    tests = [replace(file, ids=[f"t{i}" for i in range(400)], answers=[None] * 400) for file in (first, second)]
    paths = files(*tests, first, shuffled(second))
    how = {"weights": "learned", "learn_on": paths[2:], "save_weights": tmp_path / "w.json"}
    said = write_ensemble(paths[:2], tmp_path / "out.parquet", **how)
    assert "Weights learned on 400 rows" in said and "Wrote 400 rows" in said
    found = read_predictions(tmp_path / "out.parquet")
    saved = json.loads((tmp_path / "w.json").read_text())
    weights = [one["weight"] for one in saved["files"]]
    assert weights[0] == pytest.approx(0.9, abs=0.07)
    made_of = found.metadata["ensemble"]
    assert made_of["average"] == "mean" and made_of["learn_on"] == paths[2:] and made_of["weights_from"] == "learned"
    assert [(one["file"], one["weight"]) for one in made_of["files"]] == list(zip(paths[:2], weights, strict=True))
    for given in (str(tmp_path / "w.json"), f"{weights[0]},{weights[1]}", f"{2 * weights[0]},{2 * weights[1]}"):
        write_ensemble(paths[:2], tmp_path / "again.parquet", weights=given)
        again = read_predictions(tmp_path / "again.parquet")
        assert np.concatenate(again.probs) == pytest.approx(np.concatenate(found.probs), abs=1e-6)


def test_saved_weights_go_by_the_names_of_the_files_where_these_are_the_same(files, tmp_path):
    one, other, moved = files(ragged(), other_model(ragged()), other_model(ragged()))
    write_ensemble([one, other], tmp_path / "out.parquet", weights="0.9,0.1", save_weights=tmp_path / "w.json")
    for names, first in (([other, one], 0.1), ([moved, one], 0.9)):
        write_ensemble(names, tmp_path / "out.parquet", weights=str(tmp_path / "w.json"))
        made_of = read_predictions(tmp_path / "out.parquet").metadata["ensemble"]["files"]
        assert made_of[0]["weight"] == pytest.approx(first)


def test_learned_weights_that_are_no_better_are_not_used_with_a_note(files, tmp_path):
    true = ragged(200)
    paths = files(other_model(true, 101), other_model(true, 201))
    said = write_ensemble(paths, tmp_path / "out.parquet", weights="learned", learn_on=paths)
    assert "are no better than equal ones on 200 rows" in said and said.count("0.5000  ") == 2


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            ({"run": "runs/c"}, {"run": "runs/b"}),
            "Beware: 2.parquet (runs/c, orders identity) may not stand for 0.parquet",
        ),
        (
            ({"run": "runs/a", "orders": "all"}, {"run": "runs/b"}),
            "Beware: 2.parquet (runs/a, orders all) may not stand",
        ),
        (({"run": "moved/a"}, {"run": "runs/b"}), ""),
        (({}, {}), ""),
    ],
)
def test_a_note_warns_of_weights_learned_on_rows_of_other_runs_or_views(files, tmp_path, runs, said):
    first, second = mixture(400, 0.9)
    tests = [replace(first, metadata={"run": "runs/a"}), replace(second, metadata={"run": "runs/b"})]
    held_out = [replace(file, metadata=given) for file, given in zip((first, second), runs, strict=True)]
    paths = files(*tests, *held_out)
    found = write_ensemble(paths[:2], tmp_path / "out.parquet", weights="learned", learn_on=paths[2:])
    assert "Weights learned" in found and ("Beware" in found) == bool(said)
    assert said in found.replace(paths[2], "2.parquet").replace(paths[0], "0.parquet")


def test_held_out_rows_in_another_order_of_the_runs_are_refused(files, tmp_path):
    first, second = mixture(400, 0.9)
    runs = [replace(first, metadata={"run": "runs/a"}), replace(second, metadata={"run": "runs/b"})]
    paths = files(*runs, *reversed(runs))
    with pytest.raises(InputError, match="in the order of those that they stand for"):
        write_ensemble(paths[:2], tmp_path / "out.parquet", weights="learned", learn_on=paths[2:])
    assert not (tmp_path / "out.parquet").exists()


def test_weights_are_learned_on_probabilities_calibrated_as_those_that_they_are_for(files, tmp_path):
    true, sure = ragged(400, seed=3), ragged(400, seed=3, temperature=0.2)
    calibrated = replace(sure, metadata={"calibration": {"temperature": 5.0, "bias": None}})
    paths = files(true, calibrated, true, sure)
    said = write_ensemble(paths[:2], tmp_path / "out.parquet", weights="learned", learn_on=paths[2:])
    assert "are no better than equal ones" in said  # as good as each other, once both are calibrated


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"weights": "0.5"}, "1 weights for 2 files"),
        ({"weights": "1,-1"}, "no weight may be below 0"),
        ({"weights": "0,0"}, "no weight may be below 0, and one must be above"),
        ({"weights": "nan,1"}, "no weight may be"),
        ({"weights": "1e308,1e308"}, "no weight may be"),  # their sum is infinite
        ({"weights": "best"}, "--weights must be mean, learned"),
        ({"weights": "nowhere.json"}, "--weights must be mean, learned"),
        ({"weights": "learned"}, "belong together"),
        ({"learn_on": ["a.parquet"]}, "belong together"),
        ({"weights": "learned", "learn_on": ["a.parquet"]}, "one file for each of the 2"),
        ({"save_weights": "w.txt"}, "must end in .json"),
    ],
)
def test_options_that_mean_nothing_are_errors(files, tmp_path, options, part):
    with pytest.raises(InputError) as error:
        write_ensemble(files(ragged(), ragged()), tmp_path / "out.parquet", **options)
    assert part in str(error.value) and not (tmp_path / "out.parquet").exists()


def test_nothing_but_an_ensemble_is_replaced(files, tmp_path):
    paths = files(ragged(), other_model(ragged()), ragged())
    (tmp_path / "w.json").write_text("{}")
    for output, part in ((paths[0], "one of the files that are read"), (paths[2], "is no ensemble"), ("x.csv", "end")):
        with pytest.raises(InputError, match=part):
            write_ensemble(paths[:2], output)
    with pytest.raises(InputError, match="is no file of --save-weights"):
        write_ensemble(paths[:2], tmp_path / "out.parquet", save_weights=tmp_path / "w.json")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(InputError, match="at least; got 1"):
        write_ensemble(paths[:1], tmp_path / "out.parquet")
    for again in (paths[0], str(tmp_path / ".." / tmp_path.name / "a.parquet")):
        with pytest.raises(InputError, match=r"a\.parquet is given twice"):
            write_ensemble([*paths[:2], again], tmp_path / "out.parquet")
    write_ensemble(paths[:2], tmp_path / "out.parquet", average="log", save_weights=tmp_path / "new.json")
    write_ensemble(paths[:2], tmp_path / "out.parquet", average="log", save_weights=tmp_path / "new.json")
    with pytest.raises(InputError, match="are for --average log; got mean"):
        write_ensemble(paths[:2], tmp_path / "out.parquet", weights=str(tmp_path / "new.json"))


def test_answers_are_written_as_the_data_of_the_first_file_where_others_differ(tmp_path):
    own = {"id": "id", "column": "label", "format": "index_from_1", "is_upper": False}
    paths = [str(tmp_path / f"{name}.parquet") for name in "abc"]
    for path, answers in zip(paths, (None, own, own | {"format": "letter"}), strict=True):
        write_predictions(path, replace(ragged(), metadata={"answers": answers} if answers else {}))
    said = write_ensemble(paths, tmp_path / "all.parquet")
    way = "in different ways; a submission is written as those of the first file that has one: label (index_from_1)"
    assert way in said
    assert read_predictions(tmp_path / "all.parquet").metadata["answers"] == own
    assert "in other ways" not in write_ensemble(paths[:2], tmp_path / "two.parquet")


def test_held_out_rows_with_the_numbers_of_other_rows_are_not_taken_for_these(tmp_path):
    one, other = ragged(300), other_model(ragged(300), noise=3.0)
    paths = {}
    for part in ("t", "v"):
        for name, file in (("one", one), ("other", other)):
            paths[part, name] = str(tmp_path / f"{part}_{name}.parquet")
            write_predictions(paths[part, name], replace(file, digests=[f"{part}{i}" for i in range(300)]))
    test, held_out = ([paths[part, name] for name in ("one", "other")] for part in ("t", "v"))
    said = write_ensemble(test, tmp_path / "a.parquet", weights="learned", learn_on=held_out)
    assert "Weights learned" in said and "rows of this ensemble" not in said
    said = write_ensemble(test, tmp_path / "b.parquet", weights="learned", learn_on=test)
    assert "rows of this ensemble" in said
