"""Fusion of a prior and a model's choices, against a loop over rows and classes."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import check_grad

from vqa_sft.data.class_probs import NONE_OF_THESE, keep_likely, read_class_probs, write_class_probs
from vqa_sft.errors import InputError
from vqa_sft.predictions import fit_fusion
from vqa_sft.predictions.class_metrics import losses_of
from vqa_sft.predictions.file import Predictions, write_predictions
from vqa_sft.predictions.fit_fusion import fit_ways, select
from vqa_sft.predictions.fuse import fuse_files
from vqa_sft.predictions.fusion import FUSED, MODEL, PRIOR, TERMS, Fusion, Rows, fuse, make_rows, temper
from vqa_sft.predictions.votes import NO_CLASS, Votes, votes_of

NAMES = tuple(f"class {number}" for number in range(12))
TRUE = Fusion(FUSED, 1.0, 0.8, 0.4, 1.2, 0.6, -0.5, 0.0, 0.01)


def softmax(logits):
    probs = np.exp(logits)
    return probs / probs.sum(axis=1, keepdims=True)


def drawn(num_rows, seed=0, num_kept=12, num_candidates=4, names=NAMES):
    """A prior and votes whose candidates are the prior's likeliest classes. No labels."""
    rng = np.random.default_rng(seed)
    ids = [f"r{seed}_{row}" for row in range(num_rows)]
    prior = keep_likely(ids, names, softmax(rng.normal(size=(num_rows, len(names))) * 2), num_kept=num_kept)
    candidates = np.sort(prior.indices[:, :num_candidates], axis=1).astype(int)
    probs = softmax(rng.normal(size=candidates.shape) * 2)
    return prior, Votes(ids, {}, candidates, probs, None, np.full(num_rows, -1))


def labelled(rows: Rows, truth: Fusion, seed=0) -> Rows:
    dense = fuse(rows, truth).dense()
    rng = np.random.default_rng(seed)
    return replace(rows, labels=np.array([rng.choice(len(row), p=row) for row in dense]))


def slow_table(prior, votes, found):
    """As the formula says it, row by row and class by class."""
    table = []
    for row, q in enumerate(prior.dense()):
        q = np.exp([found.exponent * np.log(each) for each in q])
        q = q / q.sum()
        inside = [int(c) for c in votes.candidates[row] if c != NO_CLASS]
        m = {c: votes.probs[row][place] / votes.probs[row].sum() for place, c in enumerate(inside)}
        share = {c: m[c] ** found.model * q[c] ** found.prior for c in inside}
        of_prior = sum(q[c] for c in inside)
        best = max(m.values())
        odds = found.mass * np.log(of_prior / (1 - of_prior)) + found.sure * np.log(best / (1 - best)) + found.shift
        if votes.none is not None:
            odds -= found.none * np.log(votes.none[row] / (1 - votes.none[row]))
        mass = 1 / (1 + np.exp(-odds))
        p = [
            mass * share[c] / sum(share.values()) if c in inside else (1 - mass) * q[c] / (1 - of_prior)
            for c in range(len(q))
        ]
        table.append([(1 - found.smoothing) * each + found.smoothing / len(q) for each in p])
    return np.array(table)


@pytest.mark.parametrize("num_kept", [12, 7, 5])
def test_a_fused_table_is_that_of_the_formula(num_kept):
    prior, votes = drawn(30, num_kept=num_kept)
    votes.candidates[3, 2:], votes.probs[3, 2:] = NO_CLASS, 0  # a row with fewer
    votes.candidates[4] = np.sort(prior.dense()[4].argsort()[:4])  # classes that the prior hardly has
    votes.candidates[5, 3] = next(c for c in range(12) if c not in prior.indices[5, :4]) if num_kept > 5 else 11
    votes.candidates[5] = np.sort(prior.indices[5, :4])
    votes.none = np.linspace(0.01, 0.9, 30)
    votes.probs *= (1 - votes.none)[:, None] / votes.probs.sum(axis=1, keepdims=True)
    for found in (replace(TRUE, none=0.7, exponent=0.6), Fusion(MODEL, 0.0, 0.9, 0, 0, 0.7, 1.5, 0.3, 1e-4)):
        fused = fuse(make_rows(prior, votes), found)
        np.testing.assert_allclose(fused.dense(), slow_table(prior, votes, found), rtol=2e-5, atol=1e-9)
        np.testing.assert_allclose(np.exp(fused.log_probs).sum(axis=1) + np.exp(fused.tail), 1, atol=1e-5)


def test_the_prior_alone_is_the_tempered_prior():
    prior, votes = drawn(20)
    alone = fuse(make_rows(prior, votes), Fusion(PRIOR, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1e-7))
    np.testing.assert_allclose(alone.dense(), prior.dense(), rtol=1e-4, atol=1e-7)  # of which smoothing takes a tenth


def test_candidates_that_are_all_classes_have_all_of_the_mass():
    prior, votes = drawn(20, num_candidates=12)
    rows = labelled(make_rows(prior, votes), TRUE)
    assert np.isneginf(temper(rows, 1.0).log_outside).all()
    for found in fit_ways(rows).values():
        np.testing.assert_allclose(fuse(rows, found).dense().sum(axis=1), 1, rtol=1e-6)


def test_the_slopes_of_the_fit_are_those_of_differences():
    prior, votes = drawn(40, num_kept=6)
    votes.none = np.linspace(0.01, 0.9, 40)
    rows = labelled(make_rows(prior, votes), replace(TRUE, none=0.5))
    cores = [
        (fit_fusion._core_of_prior(rows), [0.3]),
        (fit_fusion._core_of_terms(rows, temper(rows, 0.7), list(TERMS)), [0.6, 0.3, 1.1, 0.5, 0.2, 0.4]),
    ]
    for core, at in cores:
        error = check_grad(lambda x: core(x)[0].sum(), lambda x: core(x)[1].sum(axis=0), np.array(at))  # noqa: B023
        assert error < 1e-4


def test_known_parameters_are_found_again():
    prior, votes = drawn(12_000)
    rows = make_rows(prior, votes)
    found = fit_ways(labelled(rows, TRUE))[FUSED]
    for name, tolerance in (
        ("exponent", 0.15),
        ("model", 0.06),
        ("prior", 0.08),
        ("mass", 0.2),
        ("sure", 0.1),
        ("shift", 0.25),
    ):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), abs=tolerance), name
    true, near = fuse(rows, TRUE).dense(), fuse(rows, found).dense()
    assert (true * np.log(true / near)).sum(axis=1).mean() < 1e-3  # nats


def test_a_choice_none_of_these_tells_of_the_mass():
    prior, votes = drawn(6_000)
    votes.none = np.random.default_rng(1).uniform(0.02, 0.9, 6_000)
    rows = labelled(make_rows(prior, votes), replace(TRUE, none=0.9))
    chosen = select(rows)
    assert chosen.fusion.none == pytest.approx(0.9, abs=0.25)
    blind = select(replace(rows, none=None))
    assert losses_of(chosen.tables[FUSED]).mean() < losses_of(blind.tables[FUSED]).mean() - 0.005


def with_model(rows: Rows, probs) -> Rows:
    return replace(rows, model=np.log(probs / probs.sum(axis=1, keepdims=True)))


def test_a_model_that_knows_the_label_beats_the_prior_and_noise_is_left_out():
    prior, votes = drawn(800)
    labels = np.array([np.random.default_rng(7 + row).choice(12, p=p) for row, p in enumerate(prior.dense())])
    rows = replace(make_rows(prior, votes), labels=labels)
    knows = with_model(rows, np.where(votes.candidates == labels[:, None], 0.9, 0.1 / 3))
    found = select(knows)
    right = [labels[row] in votes.candidates[row] for row in range(800)]
    assert found.fusion.way == FUSED
    assert (found.tables[FUSED].indices[right, 0] == labels[right]).mean() > 0.95
    assert losses_of(found.tables[FUSED]).mean() < losses_of(found.tables[PRIOR]).mean() - 0.3
    noise = select(rows)
    assert noise.fusion.way == PRIOR and noise.ways[FUSED].model < 0.15


def test_a_model_that_is_unsure_where_the_label_is_no_candidate_moves_the_mass():
    prior, votes = drawn(1_500)
    labels = np.array([np.random.default_rng(7 + row).choice(12, p=p) for row, p in enumerate(prior.dense())])
    rows = replace(make_rows(prior, votes), labels=labels)
    is_it = votes.candidates == labels[:, None]
    noise = np.random.default_rng(1).dirichlet([20] * 4, len(labels))
    found = select(with_model(rows, np.where(is_it.any(axis=1)[:, None], 0.2 * noise + 0.8 * is_it, noise)))
    fused, is_inside = found.tables[FUSED], is_it.any(axis=1)
    mass = [sum(np.exp(fused.log_prob_of(votes.candidates[:, place]))) / len(labels) for place in range(4)]
    assert found.fusion.sure > 0.5 and sum(mass) == pytest.approx(is_inside.mean(), abs=0.02)
    assert losses_of(fused)[is_inside].mean() < 0.1


def test_a_prior_of_noise_leaves_the_model_alone():
    prior, votes = drawn(800, num_candidates=6)
    rows = labelled(make_rows(prior, votes), Fusion(MODEL, 0.0, 1.0, 0.0, 0.0, 0.5, 2.0, 0.0, 1e-3))
    assert select(rows).fusion.way == MODEL


def test_cross_fitted_rows_keep_their_order_and_groups_stay_together(monkeypatch):
    prior, votes = drawn(200)
    rows = labelled(make_rows(prior, votes), TRUE)
    rows = replace(rows, groups=np.arange(200) // 2)
    seen = []
    monkeypatch.setattr(fit_fusion, "fit_ways", lambda some: seen.append({*some.groups}) or fit_ways(some))
    found = select(rows)
    assert found.tables[FUSED].ids == rows.ids and (found.tables[FUSED].labels == rows.labels).all()
    left_out = [{*range(100)} - groups for groups in seen[:5]]
    assert sorted(group for groups in left_out for group in groups) == [*range(100)]


# --- vqa-sft fuse -----------------------------------------------------------------------------------------------------


def predictions_of(votes, names=NAMES, none=False, **metadata):
    """Votes as a prediction file holds them: the candidates in an order of their own."""
    rng = np.random.default_rng(0)
    logits, candidates, labels = [], [], []
    for row in range(len(votes.ids)):
        order = rng.permutation(votes.candidates.shape[1])
        candidates.append(votes.candidates[row][order].tolist() + ([NONE_OF_THESE] if none else []))
        logits.append(np.log(np.append(votes.probs[row][order], [0.2] if none else [])).tolist())
        labels.append(int(votes.labels[row]) if votes.labels[row] >= 0 else None)
    answers = [row.index(label) if label in row else None for row, label in zip(candidates, labels, strict=True)]
    digests = [f"digest of {row_id}" for row_id in votes.ids]
    metadata = {"classes": [*names]} | metadata
    return Predictions(votes.ids, logits, answers, metadata, digests=digests, candidates=candidates, labels=labels)


@pytest.fixture
def files(tmp_path):
    """test.parquet, oof.parquet, and the priors of both, whose classes stand in another order."""
    given = {}
    for name, seed, num_rows in (("test", 1, 60), ("fit", 2, 400)):
        prior, votes = drawn(num_rows, seed, num_kept=8)
        votes.labels = labelled(make_rows(prior, votes), TRUE, seed).labels
        if name == "test":
            votes.labels[:] = -1
        prior.digests = [f"digest of {row_id}" for row_id in votes.ids]
        prior.metadata["out_of_fold"] = True
        write_class_probs(tmp_path / f"{name}_prior.parquet", prior)
        write_predictions(tmp_path / f"{name}.parquet", predictions_of(votes))
        given[name] = (prior, votes)
    return tmp_path, given


def run_fuse(folder, **changed):
    given = {"files": ["test.parquet"], "prior": "test_prior.parquet", "fit": ["fit.parquet"]}
    given |= {"fit_prior": "fit_prior.parquet", "output": "fused.parquet"} | changed
    whole = {
        name: [str(folder / one) for one in value] if isinstance(value, list) else str(folder / value)
        for name, value in given.items()
    }
    return fuse_files(whole.pop("files"), **whole)


def test_fuse_writes_the_table_of_the_parameters_that_it_found(files):
    folder, given = files
    said = run_fuse(folder)
    fused = read_class_probs(folder / "fused.parquet")
    known = fused.metadata["fusion"]
    expected = fuse(make_rows(*given["test"]), Fusion(**known))
    assert known["way"] == FUSED and fused.ids == given["test"][1].ids
    np.testing.assert_allclose(fused.dense(), expected.dense(), rtol=1e-4)
    assert fused.digests[0] == "digest of r1_0" and (fused.labels == -1).all()
    for part in ("log loss", "accuracy", "top-5", PRIOR, MODEL, "Wrote 60 rows"):
        assert part in said


def test_what_is_not_named_is_what_the_predictions_and_their_run_know(files, run):
    folder, given = files
    run_fuse(folder)
    named = read_class_probs(folder / "fused.parquet")
    of_run = folder / "run"
    of_run.mkdir()
    priors = {name: str(folder / f"{name}_prior.parquet") for name in ("test", "fit")}
    test = predictions_of(given["test"][1], run=str(of_run), candidates_file=priors["test"])
    write_predictions(of_run / "test.parquet", test)
    command = ["fuse", of_run / "test.parquet", "--output", folder / "found.parquet"]
    code, _, error = run(*command)
    assert code == 2 and "run holds no out_of_fold.parquet and no validation.parquet. Give --fit FILE" in error
    held_out = predictions_of(given["fit"][1], run=str(of_run), candidates_file=priors["fit"])
    write_predictions(of_run / "validation.parquet", held_out)
    for fit in ([], ["--fit", of_run]):
        code, printed, error = run(*command, *fit)
        assert code == 0, error
        assert f"by {of_run / 'validation.parquet'} and {priors['fit']}" in printed
        assert f"vqa-sft submit {folder / 'found.parquet'} --template" in printed
        np.testing.assert_allclose(read_class_probs(folder / "found.parquet").log_probs, named.log_probs)


def test_a_calibration_of_the_run_changes_nothing(files):
    folder, given = files
    run_fuse(folder)
    plain = read_class_probs(folder / "fused.parquet")
    for name in ("test", "fit"):
        predictions = predictions_of(given[name][1])
        predictions.metadata["calibration"] = {"temperature": 3.0, "views": "identity", "rows": 100}
        write_predictions(folder / f"{name}.parquet", predictions)
    run_fuse(folder)
    np.testing.assert_array_equal(read_class_probs(folder / "fused.parquet").log_probs, plain.log_probs)


def test_what_nothing_knows_must_be_named(files):
    folder, given = files
    with pytest.raises(InputError, match="--fit is missing, and no run made .*test.parquet"):
        run_fuse(folder, fit=[])
    with pytest.raises(InputError, match="--fit-prior is missing, and .*fit.parquet does not say"):
        fuse_files([str(folder / "test.parquet")], fit=[str(folder / "fit.parquet")], prior="p", output="o.parquet")
    gone = predictions_of(given["test"][1], run="runs/mine", candidates_file="gone.parquet")
    write_predictions(folder / "test.parquet", gone)
    with pytest.raises(InputError, match="--prior is missing, and .*test.parquet names gone.parquet, which is gone"):
        fuse_files([str(folder / "test.parquet")], fit=[str(folder / "fit.parquet")], output="o.parquet")


def test_classes_in_another_order_give_the_same_table(files):
    folder, given = files
    run_fuse(folder)
    one = read_class_probs(folder / "fused.parquet").dense()
    order = np.random.default_rng(5).permutation(12)  # new class i is the old order[i]
    names, place = [NAMES[old] for old in order], np.argsort(order)
    for name in ("test", "fit"):
        votes = given[name][1]
        labels = np.where(votes.labels < 0, -1, place[votes.labels])
        moved = replace(votes, candidates=place[votes.candidates], labels=labels)
        write_predictions(folder / f"{name}.parquet", predictions_of(moved, names))
    run_fuse(folder)
    np.testing.assert_allclose(read_class_probs(folder / "fused.parquet").dense(), one, rtol=1e-5)


def test_several_files_are_averaged_by_class_and_by_id(files):
    folder, given = files
    votes = given["test"][1]
    other = softmax(np.random.default_rng(9).normal(size=votes.probs.shape))
    back = np.arange(60)[::-1]
    write_predictions(folder / "other.parquet", predictions_of(replace(votes, probs=other).take(back)))
    run_fuse(folder, files=["test.parquet", "other.parquet"])
    found = read_class_probs(folder / "fused.parquet")
    mean = replace(votes, probs=(votes.probs + other) / 2)
    expected = fuse(make_rows(given["test"][0], mean), Fusion(**found.metadata["fusion"]))
    np.testing.assert_allclose(found.dense(), expected.dense(), rtol=1e-4)


def test_a_file_is_not_averaged_with_itself(files):
    folder, _ = files
    for option, name in (("files", "test.parquet"), ("fit", "fit.parquet")):
        with pytest.raises(InputError, match=f"a file is given twice: .*{name}"):
            run_fuse(folder, **{option: [name, f"../{folder.name}/{name}"]})


def test_folds_of_the_rows_to_fit_on_are_put_together(files):
    folder, given = files
    run_fuse(folder)
    whole = read_class_probs(folder / "fused.parquet")
    for name, rows in (("a", np.arange(150)), ("b", np.arange(150, 400))):
        write_predictions(folder / f"{name}.parquet", predictions_of(given["fit"][1].take(rows)))
    run_fuse(folder, fit=["a.parquet", "b.parquet"])
    np.testing.assert_allclose(read_class_probs(folder / "fused.parquet").log_probs, whole.log_probs, rtol=1e-5)
    with pytest.raises(InputError, match="share some of their rows"):
        run_fuse(folder, fit=["a.parquet", "fit.parquet"])


def test_labels_of_test_rows_change_nothing(files):
    folder, given = files
    run_fuse(folder)
    one = read_class_probs(folder / "fused.parquet")
    votes = given["test"][1]
    write_predictions(folder / "test.parquet", predictions_of(replace(votes, labels=np.arange(60) % 12)))
    run_fuse(folder)
    other = read_class_probs(folder / "fused.parquet")
    assert (other.labels == np.arange(60) % 12).all() and (other.log_probs == one.log_probs).all()


def test_noise_falls_back_to_the_prior_with_a_line(files):
    folder, given = files
    prior, votes = given["fit"]
    labels = np.array([np.random.default_rng(70 + row).choice(12, p=p) for row, p in enumerate(prior.dense())])
    write_predictions(folder / "fit.parquet", predictions_of(replace(votes, labels=labels)))
    said = run_fuse(folder)
    assert "Fusing is not better" in said and "the table is that of the prior alone" in said
    found = Fusion(**read_class_probs(folder / "fused.parquet").metadata["fusion"])
    assert found.way == PRIOR and found.model == 0


def test_what_may_not_stand_for_the_test_rows_is_said(files):
    folder, given = files
    assert "Beware" not in run_fuse(folder)
    change_prior(folder, "fit_prior.parquet", metadata={"out_of_fold": False})  # of rows beside the training rows
    assert "Beware" not in run_fuse(folder)
    change_prior(folder, "fit_prior.parquet", metadata={})
    other = {"run": "runs/other", "orders": "rotations"}
    write_predictions(folder / "fit.parquet", predictions_of(given["fit"][1], **other))
    write_predictions(folder / "test.parquet", predictions_of(given["test"][1], run="runs/mine"))
    said = run_fuse(folder)
    for part in ("out of fold", "scored by runs/other, the test rows by runs/mine", "orders rotations", "Beware"):
        assert part in said


@pytest.mark.parametrize("name", ["test", "fit"])
def test_a_prior_that_would_give_other_candidates_is_said(files, name):
    folder, given = files
    assert "likeliest classes" not in run_fuse(folder)
    prior = given[name][0]
    change_prior(folder, f"{name}_prior.parquet", indices=np.roll(prior.indices, 1, axis=1))  # made again, say
    assert f"In 100.0% of the rows of {folder}/{name}.parquet the candidates are not" in run_fuse(folder)


def test_none_of_these_must_be_a_choice_of_all_rows_and_files(files):
    folder, given = files
    write_predictions(folder / "test.parquet", predictions_of(given["test"][1], none=True))
    with pytest.raises(InputError, match="'none of these' is a choice in .*test.parquet alone"):
        run_fuse(folder)
    write_predictions(folder / "fit.parquet", predictions_of(given["fit"][1], none=True))
    run_fuse(folder)
    some = predictions_of(given["test"][1], none=True)
    some.candidates[2], some.choice_logits[2] = some.candidates[2][:-1], some.choice_logits[2][:-1]
    with pytest.raises(InputError, match="missing in row r1_2"):
        votes_of(some, NAMES, ["a", "b"])


def change_prior(folder, name, **changed):
    write_class_probs(folder / name, replace(read_class_probs(folder / name), **changed))


def other_rows(folder, given):
    change_prior(folder, "test_prior.parquet", digests=["another"] * 60)


def other_classes(folder, given):
    change_prior(folder, "fit_prior.parquet", names=(*NAMES[:-1], "van"))


def missing_rows(folder, given):
    write_class_probs(folder / "test_prior.parquet", read_class_probs(folder / "test_prior.parquet").take([*range(50)]))


def not_a_number(folder, given):
    prior = read_class_probs(folder / "test_prior.parquet")
    write_class_probs(
        folder / "test_prior.parquet", replace(prior, log_probs=np.where(np.arange(8) == 7, np.nan, prior.log_probs))
    )


def same_rows(folder, given):
    write_predictions(folder / "fit.parquet", predictions_of(given["test"][1]))


def no_labels(folder, given):
    votes = given["fit"][1]
    write_predictions(folder / "fit.parquet", predictions_of(replace(votes, labels=np.full(400, -1))))


def other_labels(folder, given):
    change_prior(folder, "fit_prior.parquet", labels=((given["fit"][1].labels + 1) % 12).astype(np.int32))


def put_in(folder, given):
    votes = given["fit"][1]
    candidates = votes.candidates.copy()
    for row, label in enumerate(votes.labels):
        if label not in candidates[row]:
            candidates[row, -1] = label
    write_predictions(folder / "fit.parquet", predictions_of(replace(votes, candidates=candidates)))


def no_candidates(folder, given):
    write_predictions(folder / "test.parquet", replace(predictions_of(given["test"][1]), candidates=[], labels=[]))


def class_probabilities(folder, given):
    write_class_probs(folder / "test.parquet", given["test"][0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (class_probabilities, "test.parquet holds class probabilities. Give predictions of candidates"),
        (other_rows, "same ids and other questions, choices or images"),
        (other_classes, "lacks 'class 11'; .* lacks 'van'"),
        (missing_rows, r"test_prior.parquet lacks rows r1_50, .*\(10 of 60\)"),
        (not_a_number, "damaged|not finite"),
        (same_rows, "share rows r1_0"),
        (no_labels, "at least 20 rows with a label; got 0 of 400"),
        (other_labels, "other labels in rows r2_0"),
        (put_in, "the label was put among the candidates in"),
        (no_candidates, "holds no candidates"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(files, change, said):
    folder, given = files
    change(folder, given)
    with pytest.raises(InputError, match=said):
        run_fuse(folder)
    assert not (folder / "fused.parquet").exists()


def test_the_command_takes_its_options_in_both_spellings(files, run):
    folder, _ = files
    names = [folder / name for name in ("test.parquet", "test_prior.parquet", "fit.parquet", "fit_prior.parquet")]
    given = [part for pair in zip(["--prior", "--fit", "--fit_prior"], names[1:], strict=True) for part in pair]
    code, printed, _ = run("fuse", names[0], *given, "--output", folder / "o.parquet")
    assert code == 0 and "Wrote 60 rows" in printed
    code, _, error = run("fuse", names[0], *given, "--output", folder / "other.parquet")
    assert code == 0
    write_class_probs(folder / "other.parquet", read_class_probs(names[1]))
    code, _, error = run("fuse", names[0], *given, "--output", folder / "other.parquet")
    assert code == 2 and "is no table of vqa-sft fuse" in error
    code, _, error = run("fuse", names[0], *given, "--output", names[1])
    assert code == 2 and "one of the files that are read" in error
