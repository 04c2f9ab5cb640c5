import json
import math
from dataclasses import replace

import numpy as np
import pytest
from prediction_rows import drawn

from vqa_sft.errors import InputError
from vqa_sft.predictions import calibration
from vqa_sft.predictions.calibration import (
    CALIBRATION,
    calibrate_new,
    calibrate_run,
    read_calibration,
    views_key,
    worth_of_scales,
)
from vqa_sft.predictions.file import Predictions, read_predictions, write_predictions
from vqa_sft.predictions.fit_calibration import (
    Calibration,
    calibrated_nll,
    cross_fit,
    deal_rows,
    fit,
    fit_temperature,
    is_lower,
    weigh_scales,
)
from vqa_sft.predictions.metrics import full_metrics, nll, softmax
from vqa_sft.runs import folder as run_folder


@pytest.mark.medium
@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0])
def test_the_lowest_nll_is_that_of_a_search_over_all_temperatures(temperature):
    logits, answers = drawn(2000, temperature)
    grid = {t: nll(softmax([row / t for row in logits]), answers) for t in np.geomspace(1, 20, 100)}
    assert calibrated_nll(logits, answers) == pytest.approx(min(grid.values()), abs=1e-4)
    assert min(grid, key=grid.get) == pytest.approx(temperature, rel=0.2)  # the planted one
    assert calibrated_nll(logits, answers) < nll(softmax(logits), answers) - 0.02


def test_what_is_endlessly_wrong_is_finite():
    assert math.isfinite(calibrated_nll([[1e4, 0.0]], [1]))


def test_too_little_confidence_is_not_corrected_by_the_calibrated_nll_and_too_much_is():
    timid, bold = [[0.2, 0.0], [0.0, 0.3]], [[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]
    assert calibrated_nll(timid, [0, 1]) == pytest.approx(nll(softmax(timid), [0, 1]))
    assert calibrated_nll(bold, [0, 1, 1]) < 0.65 < 3 == round(nll(softmax(bold), [0, 1, 1]))


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_planted_temperature_is_found_within_its_standard_error(temperature):
    found = [fit_temperature(*drawn(400, temperature, seed)).temperature for seed in range(40)]
    error = np.std(found, ddof=1)
    assert error < 0.2 * temperature  # so that being within it says something
    assert abs(np.mean(found) - temperature) < 3 * error / math.sqrt(40)


def test_the_temperature_is_the_lowest_point_of_a_fine_grid():
    logits, answers = drawn(60, 3.0)
    grid = np.geomspace(0.05, 20, 4001)
    losses = [60 * nll(softmax(logits, t), answers) + math.log(t) ** 2 / 2 for t in grid]
    assert fit(logits, answers, may_have_bias=False).temperature == pytest.approx(grid[np.argmin(losses)], rel=2e-3)


PLANTED = np.array([0.8, -0.8, 0.3, -0.3])


def drawn_four(num_rows, bias, seed=0, temperature=1.5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(num_rows, 4))
    probs = softmax(logits / temperature + bias)
    return logits.tolist(), [int(rng.choice(4, p=row)) for row in probs]


def test_a_planted_bias_is_found_within_its_standard_error():
    found = [fit(*drawn_four(600, PLANTED, seed), may_have_bias=True) for seed in range(20)]
    assert all(one.bias is not None for one in found)
    for name, values, planted in (
        ("bias", np.array([one.bias for one in found]), PLANTED),
        ("temperature", np.array([[one.temperature] for one in found]), [1.5]),
    ):
        errors = values.std(axis=0, ddof=1)
        assert (errors < 0.25).all(), name
        # The prior draws a little towards 0.
        assert (np.abs(values.mean(axis=0) - planted) < 3 * errors / math.sqrt(20) + 0.02).all(), name


def test_no_bias_is_found_where_there_is_none_or_where_none_may_be():
    found = [fit(*drawn_four(200, np.zeros(4), seed), may_have_bias=True).bias for seed in range(20)]
    assert sum(bias is not None for bias in found) <= 1
    assert fit(*drawn_four(600, PLANTED), may_have_bias=False).bias is None


def test_a_bias_is_found_in_rows_of_different_lengths():
    bias = np.array([1.0, -1.0, 0.5, -0.5, 0.0])
    found = fit(*drawn(3000, 1.0, bias=bias), may_have_bias=True).bias
    assert np.subtract(found, np.mean(found)) == pytest.approx(bias, abs=0.25)


@pytest.mark.parametrize(("margin", "lowest"), [(8.0, 0.75), (3.0, 0.25)])
def test_a_hundred_rows_that_are_all_right_do_not_ask_for_temperature_0(margin, lowest):
    logits = [[margin, 0.0, 0.0, 0.0]] * 100  # 99.9% sure, and 87%
    assert lowest < fit_temperature(logits, [0] * 100).temperature < 1
    assert fit(logits, [0] * 100, may_have_bias=True) == Calibration()  # no error says what they would cost


def test_rows_that_are_all_wrong_ask_for_no_more_than_20():
    assert 15 < fit([[80.0, 0.0]] * 500, [1] * 500, may_have_bias=False).temperature <= 20


def test_few_rows_say_little():
    assert fit_temperature([[8.0, 0.0]], [1]).temperature < 6
    assert 0.8 < fit_temperature([[8.0, 0.0]], [0]).temperature < 1.2
    assert fit([[8.0, 0.0]] * 19, [1] * 19, may_have_bias=True) == Calibration()


def nll_of_new_rows(num_rows, temperature, scale, seed):
    """What a fit on so many rows does to the NLL of 2,000 others: always used, and only where `fit` uses it."""
    rng = np.random.default_rng(seed)

    def rows(number):
        logits = rng.normal(scale=scale, size=(number, 4))
        chosen = np.cumsum(softmax(logits), axis=1) < rng.random((number, 1))  # as rng.choice draws, row by row
        return logits * temperature, chosen.sum(axis=1).tolist()

    own, (logits, answers) = rows(num_rows), rows(2000)
    found = [fit_temperature(*own).temperature, fit(*own, may_have_bias=False).temperature]
    before = nll(softmax(logits), answers)
    return [nll(softmax(logits, temperature), answers) - before for temperature in found], found[1] != 1


@pytest.mark.medium
def test_a_temperature_of_few_rows_does_no_harm_where_none_is_needed_and_a_needed_one_is_used():
    """24 rows of a model that is as sure as it may be: a temperature of every such set costs 0.03 nats."""
    always, proven = np.mean([nll_of_new_rows(24, 1.0, 3, seed)[0] for seed in range(40)], axis=0)
    assert always > 0.015 and proven < always / 5
    assert all(nll_of_new_rows(200, 2.0, 3, seed)[1] for seed in range(10))  # twice as sure as it may be
    assert sum(nll_of_new_rows(400, 0.5, 1.5, seed)[1] for seed in range(10)) == 10  # half as sure


def test_what_a_calibration_does_is_no_worse_than_nothing_on_the_rows_that_choose_it():
    for seed in range(10):
        logits, answers = drawn(24, 1.0, seed)
        found = fit(logits, answers, may_have_bias=True)
        tempered = nll(cross_fit(logits, answers, fit_temperature), answers)
        assert found.temperature == 1 or tempered < nll(softmax(logits), answers)


def test_a_temperature_changes_no_answer():
    logits, answers = drawn(300, 3.0)
    raw = [row.argmax() for row in softmax(logits)]
    for temperature in (0.05, fit(logits, answers, may_have_bias=False).temperature, 20.0):
        assert [row.argmax() for row in Calibration(temperature).probs(logits)] == raw


def test_cross_fitted_rows_are_not_among_those_that_their_temperature_was_fitted_on():
    logits, answers = drawn(50, 2.0)
    probs = cross_fit(logits, answers, fit_temperature)
    folds = deal_rows(50)
    assert sorted(np.bincount(folds)) == [10] * 5
    for fold in range(5):
        others = [i for i in range(50) if folds[i] != fold]
        alone = fit_temperature([logits[i] for i in others], [answers[i] for i in others])
        for i in np.flatnonzero(folds == fold):
            assert probs[i] == pytest.approx(softmax([logits[i]], alone.temperature)[0])


def test_lower_means_by_so_many_standard_errors():
    others = np.zeros(4)
    losses = np.array([-3.0, 1.0, -3.0, 1.0])  # mean -1, standard deviation 2.31, standard error 1.15
    assert is_lower(losses, others, 0.8) and not is_lower(losses, others, 0.9)
    assert not is_lower(others, others, 0) and not is_lower(others, losses, 0)


# --- calibration.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ({}, "orders identity"),
        ({"orders": "identity", "scales": [1.0], "average": "log"}, "orders identity"),
        ({"orders": 1}, "orders identity"),
        ({"orders": 8, "scales": [1.0], "average": "mean"}, "orders 8"),
        ({"orders": "rotations", "scales": [1.0, 0.9, 1.1], "average": "log"},
         "orders rotations, scales 0.9 1.0 1.1, average log"),
        ({"scales": [0.9, 1]}, "orders identity, scales 0.9 1.0"),
    ],
)  # fmt: skip
def test_views_have_one_name(metadata, key):
    assert views_key(metadata) == key


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it, with 300 validation rows of a model that is twice too confident."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    logits, answers = drawn(300, 2.0)
    predictions = Predictions([f"v{i}" for i in range(300)], logits, answers, {"run": str(folder)})
    write_predictions(folder / "validation.parquet", predictions)
    return folder


def test_the_names_of_a_run_folders_files_are_those_of_the_modules_that_write_them():
    assert (calibration.RUN, calibration.VALIDATION) == (run_folder.RUN, run_folder.VALIDATION)


def test_what_is_found_is_written_and_read_for_the_same_views_only(run):
    table = calibrate_run(run)
    found = read_calibration(run, {"orders": "identity"})
    assert found.temperature == pytest.approx(2, rel=0.25) and found.bias is None
    assert read_calibration(run, {"orders": "rotations"}) is None and read_calibration(run.parent, {}) is None
    entry = json.loads((run / CALIBRATION).read_text())["orders identity"]
    predictions = read_predictions(run / "validation.parquet")
    assert entry["rows"] == 300 and entry["source"] == "validation.parquet"
    assert entry["before"]["nll"] == pytest.approx(nll(softmax(predictions.choice_logits), predictions.answers))
    after = full_metrics(
        cross_fit(predictions.choice_logits, predictions.answers, fit_temperature), predictions.answers
    )
    assert {name: entry["after"][name] for name in after} == pytest.approx(after)
    assert entry["after"]["nll"] < entry["before"]["nll"] and entry["after"]["ece"] < entry["before"]["ece"]
    assert f"temperature {found.temperature:.3f}, no bias, from 300 rows" in table and "cross-fitted" in table


def test_other_views_are_kept_and_their_positions_are_no_letters(run):
    logits, answers = drawn_four(600, PLANTED)
    ids = [f"w{i}" for i in range(600)]
    for orders in ("identity", "rotations"):
        predictions = Predictions(ids, logits, answers, {"run": str(run), "orders": orders})
        write_predictions(run.parent / f"{orders}.parquet", predictions)
        table = calibrate_run(run, run.parent / f"{orders}.parquet")
    # With its bias the identity has the lower NLL.
    compared = table[table.index("Known of this run") :]
    assert 0 < compared.index("orders identity") < compared.index("orders rotations")
    assert read_calibration(run, {}).bias is not None
    assert read_calibration(run, {"orders": "rotations"}).bias is None


# --- Scales -----------------------------------------------------------------------------------------------------------


def seen_at_scales(noises, num_rows=600, average="mean", seed=0):
    """Rows whose answers follow logits that each scale sees with so much noise."""
    logits, answers = drawn(num_rows, 1.0, seed)
    rng = np.random.default_rng(seed + 1)
    of_scales = [
        [np.log(softmax([row + rng.normal(scale=noise, size=len(row))])[0]).tolist() for noise in noises]
        for row in logits
    ]
    metadata = {"orders": "rotations", "scales": [1.0, 0.5, 2.0][: len(noises)], "average": average}
    predictions = Predictions([f"w{i}" for i in range(num_rows)], [], answers, metadata, scale_logits=of_scales)
    predictions.choice_logits = predictions.weigh_scales([1 / len(noises)] * len(noises))
    return predictions


@pytest.mark.parametrize("average", ["mean", "log"])
def test_weighed_scales_equal_a_loop_over_rows(average):
    predictions = seen_at_scales([0, 1, 2], 50, average)
    weights = [0.5, 0.2, 0.3]
    for row, of_scales in zip(predictions.weigh_scales(weights), predictions.scale_logits, strict=True):
        logs = np.array(of_scales)
        pooled = np.exp(weights @ logs) if average == "log" else weights @ np.exp(logs)
        assert np.exp(row) == pytest.approx(pooled / pooled.sum(), abs=1e-9)


@pytest.mark.parametrize("average", ["mean", "log"])
def test_a_scale_that_the_model_reads_badly_gets_no_weight_and_equal_weights_would_hurt(average):
    predictions = seen_at_scales([0, 8, 9], average=average)
    found = weigh_scales(predictions, predictions.answers)
    assert found.chosen == "1.0 alone" and found.weights["1.0 alone"] == {"1.0": 1.0, "0.5": 0.0, "2.0": 0.0}
    assert found.nll["equal weights"] > found.nll["1.0 alone"] + 0.05
    assert found.weights["learned weights"]["1.0"] > 0.9


def test_scales_that_know_as_much_as_each_other_are_taken_together():
    predictions = seen_at_scales([3, 3, 3])
    found = weigh_scales(predictions, predictions.answers)
    assert found.chosen != "1.0 alone" and min(found.weights[found.chosen].values()) > 0.2
    assert found.nll[found.chosen] < found.nll["1.0 alone"] - 0.05


def test_the_better_of_two_scales_gets_the_more_weight_whatever_their_order():
    predictions = seen_at_scales([4, 2])
    found = weigh_scales(predictions, predictions.answers)
    assert found.chosen == "learned weights" and found.weights[found.chosen]["0.5"] > 0.6
    turned = [of_scales[::-1] for of_scales in predictions.scale_logits]
    turned = replace(predictions, scale_logits=turned, metadata=predictions.metadata | {"scales": [0.5, 1.0]})
    again = weigh_scales(turned, turned.answers)
    assert again.weights[again.chosen] == pytest.approx(found.weights[found.chosen], abs=1e-6)


def test_the_nll_of_weights_is_that_of_rows_they_were_not_learned_on():
    """Of scales that know nothing, learned weights are noise: on their own rows they look better than they are."""
    predictions = seen_at_scales([9, 9, 9], 60)
    found = weigh_scales(predictions, predictions.answers)
    logits = predictions.weigh_scales([*found.weights["learned weights"].values()])
    own = nll(fit(logits, predictions.answers, may_have_bias=False).probs(logits), predictions.answers)
    assert found.nll["learned weights"] > own


def test_weights_are_kept_with_the_run_and_no_scale_makes_it_worse(run):
    file = run.parent / "scales.parquet"
    for noises, only in (([0, 8, 9], "1.0"), ([3, 3, 3], None)):
        predictions = seen_at_scales(noises)
        predictions.metadata |= {"run": str(run)}
        write_predictions(file, predictions)
        table = calibrate_run(run, file)
        found = read_calibration(run, predictions.metadata)
        assert ("1.0 alone (taken)" in table) == bool(only) and "equal weights" in table
        said = worth_of_scales([run, run], predictions.metadata)
        assert said[0].startswith(f"Of these scales only {only} counts for {run}, {run}: ") if only else said == []
        # As they are used: on other rows, whose file names its scales in another order.
        test = replace(predictions, metadata=predictions.metadata | {"calibration": found.as_dict})
        turned = {"scales": [2.0, 0.5, 1.0], "calibration": found.as_dict}
        turned = replace(test, scale_logits=[row[::-1] for row in test.scale_logits], metadata=turned)
        for row, other in zip(test.probs, turned.probs, strict=True):
            assert row == pytest.approx(other, abs=1e-9)
        alone = [row[0] for row in predictions.scale_logits]
        if only:
            assert np.concatenate(test.probs) == pytest.approx(np.concatenate(found.probs(alone)), abs=1e-6)
        entries = json.loads((run / CALIBRATION).read_text())
        entry = entries["orders rotations, scales 0.5 1.0 2.0"]
        if only:  # that scale alone scores the same
            assert entries["orders rotations"]["temperature"] == entry["temperature"]
        best = fit(alone, test.answers, may_have_bias=False).probs(alone)
        assert entry["after"]["nll"] < nll(best, test.answers) + 0.01


def test_a_note_says_that_the_worth_of_scales_is_unknown(run):
    several = {"orders": "rotations", "scales": [0.5, 1.0]}
    assert f"is not known of {run}: they count equally" in worth_of_scales([run], several)[0]
    for known in ({"scales": [0.5]}, {"orders": "rotations"}):
        assert worth_of_scales([run], known) == []
    entry = {"temperature": 1.0, "scale_weights": {"0.5": 0.5, "1.0": 0.5}}
    (run / CALIBRATION).write_text(json.dumps({"orders rotations, scales 0.5 1.0": entry}))
    assert worth_of_scales([run], several) == []


@pytest.mark.parametrize(
    "weights",
    [
        [0.5, 0.5],
        {},
        {"0.5": 1.0},
        {"0.5": 0.4, "1.0": 0.5},
        {"0.5": -1, "1.0": 2},
        {"0.5": "a", "1.0": 1},
        {"0.5": 10**400, "1.0": 1},
        {"0.5": 0.5, "2.0": 0.5},
    ],
)
def test_damaged_weights_are_an_error(run, weights):
    entry = {"temperature": 1.0, "scale_weights": weights}
    (run / CALIBRATION).write_text(json.dumps({"orders identity, scales 0.5 1.0": entry}))
    with pytest.raises(InputError, match="is damaged: "):
        read_calibration(run, {"scales": [0.5, 1.0]})


def test_a_file_that_does_not_say_what_its_scales_do_is_not_calibrated(run):
    predictions = replace(seen_at_scales([0, 1], 30), scale_logits=[])
    predictions.metadata |= {"run": str(run)}
    write_predictions(run.parent / "p.parquet", predictions)
    with pytest.raises(InputError, match="does not say what each of its scales does"):
        calibrate_run(run, run.parent / "p.parquet")


def test_held_out_rows_of_other_scales_cannot_be_weighed():
    predictions = seen_at_scales([0, 1], 30)
    weighed = {"calibration": {"temperature": 1.0, "scale_weights": {"1.0": 0.3, "0.5": 0.7}}}
    predictions.metadata |= weighed
    assert predictions.calibrated_as(predictions).metadata["calibration"] == weighed["calibration"]
    for other in (replace(predictions, scale_logits=[]), seen_at_scales([0, 1, 2], 30)):
        with pytest.raises(InputError, match="Score them in the same way"):
            other.calibrated_as(predictions)


# --- The file of a run ------------------------------------------------------------------------------------------------


def test_out_of_fold_predictions_come_first_and_a_folds_own_file_is_of_the_whole(run):
    predictions = read_predictions(run / "validation.parquet")
    write_predictions(run / "out_of_fold.parquet", replace(predictions, ids=[f"o{i}" for i in range(300)]))
    calibrate_run(run)
    assert json.loads((run / CALIBRATION).read_text())["orders identity"]["source"] == "out_of_fold.parquet"
    of_fold = replace(predictions, metadata={"run": str(run / "fold0")})
    write_predictions(run.parent / "fold0.parquet", of_fold)
    assert "Wrote" in calibrate_run(run, run.parent / "fold0.parquet")


def test_a_fold_has_its_own_calibration_or_that_of_all_folds(run):
    (run / "fold0").mkdir()
    calibrate_run(run)
    assert read_calibration(run / "fold0", {}) is None  # a run within another is no fold of it
    write_predictions(run / "out_of_fold.parquet", read_predictions(run / "validation.parquet"))
    calibrate_run(run)
    found = read_calibration(run, {})
    assert found is not None and read_calibration(run / "fold0", {}) == found
    assert read_calibration(run / "fold0", {"orders": "all"}) is None
    (run / "fold0" / CALIBRATION).write_text('{"orders identity": {"temperature": 3, "bias": null}}')
    assert read_calibration(run / "fold0", {}) == Calibration(3)


def test_a_training_ends_with_the_temperature_of_its_own_rows_and_keeps_one_that_is_known(run):
    said = calibrate_new(run)
    found = read_calibration(run, {})
    assert f"on the 300 rows of {run / 'validation.parquet'}: temperature {found.temperature:.3f};" in said
    text = (run / CALIBRATION).read_text()
    entry = json.loads(text)["orders identity"]
    assert f"the NLL goes from {entry['before']['nll']:.4f} to {entry['after']['nll']:.4f}" in said
    known = text.replace(f'"temperature": {entry["temperature"]}', '"temperature": 3.5')
    (run / CALIBRATION).write_text(known)
    assert "stays as it is" in calibrate_new(run)
    assert (run / CALIBRATION).read_text() == known != text


def test_a_temperature_that_does_not_lower_the_nll_of_other_rows_is_1_with_a_note(run):
    """24 rows that are all right ask for a temperature below 1."""
    right = Predictions([f"v{i}" for i in range(24)], [[3.0, 0.0, 0.0, 0.0]] * 24, [0] * 24, {"run": str(run)})
    write_predictions(run / "validation.parquet", right)
    said = calibrate_new(run)
    assert said.startswith("Not calibrated: on the 24 rows") and "\n" not in said
    assert read_calibration(run, {}) == Calibration()
    entry = json.loads((run / CALIBRATION).read_text())["orders identity"]
    assert entry["after"]["nll"] == entry["before"]["nll"]
    assert "temperature 1.000" in calibrate_run(run)


def test_a_training_changes_no_answer_by_a_bias(run):
    logits, answers = drawn_four(3000, PLANTED)
    predictions = Predictions([f"v{i}" for i in range(3000)], logits, answers, {"run": str(run)})
    write_predictions(run / "validation.parquet", predictions)
    calibrate_new(run)
    assert read_calibration(run, {}).bias is None
    calibrate_run(run)
    assert read_calibration(run, {}).bias is not None


def test_a_training_with_too_few_rows_ends_without_a_temperature(run):
    predictions = read_predictions(run / "validation.parquet")
    rows = {name: getattr(predictions, name)[:19] for name in ("ids", "choice_logits", "answers", "blanked")}
    write_predictions(run / "validation.parquet", replace(predictions, **rows))
    assert calibrate_new(run).startswith("Not calibrated: ") and not (run / CALIBRATION).exists()


def test_rows_that_a_fold_was_trained_on_say_nothing_of_all_folds(run):
    predictions = read_predictions(run / "validation.parquet")
    write_predictions(run / "out_of_fold.parquet", replace(predictions, ids=[f"o{i}" for i in range(300)]))
    (run / "fold0").mkdir()
    (run / "fold0" / "rows.csv").write_text("part,id\ntrain,v3\nvalidation,v4\n")
    for metadata, part in (({"run": str(run / "fold0")}, "was trained on row v3"), ({"run": str(run)}, None)):
        write_predictions(run.parent / "p.parquet", replace(predictions, metadata=metadata))
        if part is None:  # every row by the fold that has not seen it
            calibrate_run(run, run.parent / "p.parquet")
            continue
        with pytest.raises(InputError, match=part):
            calibrate_run(run, run.parent / "p.parquet")


@pytest.mark.parametrize("after", ["3", "null", '{"nll": "a", "nll_95": [1, 2]}', '{"nll": 0.1}'])
def test_an_entry_that_was_written_by_hand_is_left_out_of_the_comparison(run, after):
    entry = '{"temperature": 2.0, "after": %s}' % after  # noqa: UP031
    (run / CALIBRATION).write_text(f'{{"orders all": {entry}}}')
    assert "best first" not in calibrate_run(run)
    assert read_calibration(run, {"orders": "all"}) == Calibration(2.0)


def test_the_calibration_of_all_folds_goes_before_that_of_a_folds_training(run):
    """As where folds were trained one by one; `vqa-sft calibrate` on a fold goes before both."""
    predictions = read_predictions(run / "validation.parquet")
    (run / "fold0").mkdir()
    (run / "fold0" / "run.json").write_text("{}")
    write_predictions(run / "fold0" / "validation.parquet", predictions)
    calibrate_new(run / "fold0")
    of_fold = read_calibration(run / "fold0", {})
    assert of_fold is not None
    logits, answers = drawn(400, 5.0)
    write_predictions(run / "out_of_fold.parquet", Predictions([f"o{i}" for i in range(400)], logits, answers, {}))
    calibrate_new(run)
    assert read_calibration(run / "fold0", {}) == read_calibration(run, {}) != of_fold
    calibrate_run(run / "fold0")
    assert read_calibration(run / "fold0", {}).temperature == of_fold.temperature


def test_a_folder_that_was_moved_knows_its_predictions(run):
    predictions = read_predictions(run / "validation.parquet")
    write_predictions(run.parent / "p.parquet", predictions)
    run.rename(run.parent / "moved")
    assert "Wrote" in calibrate_run(run.parent / "moved", run.parent / "p.parquet")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"answers": [None] * 2 + [0] * 298}, "no answer to learn from in rows v0, v1"),
        ({"metadata": {"run": "elsewhere/run"}}, "holds predictions of elsewhere/run, not of"),
        ({"metadata": {"run": None, "base_model": "some/base"}}, "the base model some/base as it is"),
        ({"metadata": {"ensemble": {}}}, "is an ensemble"),
        ({"ids": [f"t{i}" for i in range(300)]}, "was trained on rows t3, t4"),
        ({"first": 19}, "has 19 rows; a temperature needs at least 20"),
    ],
)
def test_rows_that_say_nothing_of_the_run_are_refused(run, change, part):
    (run / "rows.csv").write_text("part,id\ntrain,t3\ntrain,t4\nvalidation,v0\ntrain,v0\n")
    predictions = read_predictions(run / "validation.parquet")
    first = change.pop("first", 300)
    predictions = replace(predictions, **change)
    rows = {name: getattr(predictions, name)[:first] for name in ("ids", "choice_logits", "answers", "blanked")}
    write_predictions(run.parent / "p.parquet", replace(predictions, **rows))
    with pytest.raises(InputError) as error:
        calibrate_run(run, run.parent / "p.parquet")
    assert part in str(error.value) and not (run / CALIBRATION).exists()


def test_rows_of_other_data_with_the_numbers_of_training_rows_were_not_trained_on(run):
    lines = "".join(f"train,{i},t{i}\n" for i in range(300))
    (run / "rows.csv").write_text("part,id,digest\n" + lines)
    numbered = replace(read_predictions(run / "validation.parquet"), ids=[str(i) for i in range(300)])
    for digests, is_refused in (([f"o{i}" for i in range(300)], False), (["t0"] + ["o"] * 299, True), ([], True)):
        write_predictions(run.parent / "other.parquet", replace(numbered, digests=digests))
        if not is_refused:
            assert "temperature" in calibrate_run(run, run.parent / "other.parquet")
            continue
        with pytest.raises(InputError, match="was trained on row"):
            calibrate_run(run, run.parent / "other.parquet")


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"a,b,c\n1,2,3\n", b"part,id\ntrain\n"])
def test_damaged_rows_are_an_error(run, content):
    (run / "rows.csv").write_bytes(content)
    predictions = read_predictions(run / "validation.parquet")
    write_predictions(run.parent / "p.parquet", predictions)
    with pytest.raises(InputError, match="rows.csv, which says what the run was trained on, is damaged"):
        calibrate_run(run, run.parent / "p.parquet")


def test_damaged_and_missing_folders_are_errors(run):
    for text in (
        "{",
        "[]",
        '{"orders identity": {"temperature": -1}}',
        '{"orders identity": {"temperature": 1e-320}}',
        "3",
    ):
        (run / CALIBRATION).write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            read_calibration(run, {})
        with pytest.raises(InputError, match="is damaged"):
            calibrate_run(run)
        assert (run / CALIBRATION).read_text() == text
    with pytest.raises(InputError, match="no such run folder"):
        calibrate_run(run / "nowhere")
    with pytest.raises(InputError, match="holds no finished run"):
        calibrate_run(run.parent)
    (run / "validation.parquet").unlink()
    with pytest.raises(InputError, match="Give --predictions"):
        calibrate_run(run)
